//! What the journal holds, and how it is written: a tag, then the fields; numbers little-endian, bytes behind their length (u32).

use hospes_store::{Perm, Perms, Record, Stage};
use hospes_units::DomId;

/// One change of what has to survive the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Store(Record),
    /// A guest's session exists; its next event has this number.
    Session {
        session: u64,
        domid: DomId,
        next_event: u32,
    },
    NoSession {
        session: u64,
    },
    /// Path and token as the guest gave them.
    Watch {
        session: u64,
        path: String,
        token: String,
    },
    NoWatch {
        session: u64,
        path: String,
        token: String,
    },
    NoWatches {
        session: u64,
    },
    /// An event waits to be delivered.
    Event {
        session: u64,
        number: u32,
        payload: Vec<u8>,
    },
    /// Undelivered events are forgotten.
    NoEvents {
        session: u64,
    },
    /// The session's last request that changed something, and its answer as on the wire.
    Done {
        session: u64,
        request: u32,
        reply: Vec<u8>,
    },
}

mod tag {
    pub const NODE: u8 = 1;
    pub const NO_NODE: u8 = 2;
    pub const DOMAIN: u8 = 3;
    pub const NO_DOMAIN: u8 = 4;
    pub const TARGET: u8 = 5;
    pub const SESSION: u8 = 6;
    pub const NO_SESSION: u8 = 7;
    pub const WATCH: u8 = 8;
    pub const NO_WATCH: u8 = 9;
    pub const NO_WATCHES: u8 = 10;
    pub const EVENT: u8 = 11;
    pub const NO_EVENTS: u8 = 12;
    pub const DONE: u8 = 13;
    pub const DOMAIN_ENTERED: u8 = 14;
    pub const DOMAIN_SHUT_DOWN: u8 = 15;
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

fn put_domid(out: &mut Vec<u8>, domid: DomId) {
    out.extend(domid.0.to_le_bytes());
}

fn put_tagged(out: &mut Vec<u8>, tag: u8, session: u64) {
    out.push(tag);
    out.extend(session.to_le_bytes());
}

/// Appends an entry.
pub fn encode(entry: &Entry, out: &mut Vec<u8>) {
    match entry {
        Entry::Store(record) => encode_record(record, out),
        Entry::Session {
            session,
            domid,
            next_event,
        } => {
            put_tagged(out, tag::SESSION, *session);
            put_domid(out, *domid);
            out.extend(next_event.to_le_bytes());
        }
        Entry::NoSession { session } => put_tagged(out, tag::NO_SESSION, *session),
        Entry::Watch {
            session,
            path,
            token,
        } => {
            put_tagged(out, tag::WATCH, *session);
            put_bytes(out, path.as_bytes());
            put_bytes(out, token.as_bytes());
        }
        Entry::NoWatch {
            session,
            path,
            token,
        } => {
            put_tagged(out, tag::NO_WATCH, *session);
            put_bytes(out, path.as_bytes());
            put_bytes(out, token.as_bytes());
        }
        Entry::NoWatches { session } => put_tagged(out, tag::NO_WATCHES, *session),
        Entry::Event {
            session,
            number,
            payload,
        } => {
            put_tagged(out, tag::EVENT, *session);
            out.extend(number.to_le_bytes());
            put_bytes(out, payload);
        }
        Entry::NoEvents { session } => put_tagged(out, tag::NO_EVENTS, *session),
        Entry::Done {
            session,
            request,
            reply,
        } => {
            put_tagged(out, tag::DONE, *session);
            out.extend(request.to_le_bytes());
            put_bytes(out, reply);
        }
    }
}

fn encode_record(record: &Record, out: &mut Vec<u8>) {
    match record {
        Record::Node { path, value, perms } => {
            out.push(tag::NODE);
            put_bytes(out, path.as_bytes());
            put_bytes(out, value);
            let entries: Vec<String> = perms.entries().map(|p| p.to_string()).collect();
            put_bytes(out, entries.join(" ").as_bytes());
        }
        Record::NoNode { path } => {
            out.push(tag::NO_NODE);
            put_bytes(out, path.as_bytes());
        }
        Record::Domain { domid, uuid, stage } => {
            out.push(match stage {
                Stage::Entered => tag::DOMAIN_ENTERED,
                Stage::Introduced => tag::DOMAIN,
                Stage::ShutDown => tag::DOMAIN_SHUT_DOWN,
            });
            put_domid(out, *domid);
            // A UUID is never empty.
            put_bytes(out, uuid.as_deref().unwrap_or_default().as_bytes());
        }
        Record::NoDomain { domid } => {
            out.push(tag::NO_DOMAIN);
            put_domid(out, *domid);
        }
        Record::Target { domid, target } => {
            out.push(tag::TARGET);
            put_domid(out, *domid);
            put_domid(out, *target);
        }
    }
}

/// Reads from the front of a slice; `None` where it ends too soon or something is no value of its kind.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn domid(&mut self) -> Option<DomId> {
        self.array().map(u16::from_le_bytes).map(DomId)
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let count = self.u32()? as usize;
        let (first, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(first.to_vec())
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }

    fn perms(&mut self) -> Option<Perms> {
        let text = self.text()?;
        let entries: Option<Vec<Perm>> = text.split(' ').map(Perm::parse).collect();
        Perms::from_entries(&entries?)
    }

    fn domain(&mut self, stage: Stage) -> Option<Entry> {
        Some(Entry::Store(Record::Domain {
            domid: self.domid()?,
            uuid: Some(self.text()?).filter(|uuid| !uuid.is_empty()),
            stage,
        }))
    }

    fn entry(&mut self) -> Option<Entry> {
        let [tag] = self.array()?;
        Some(match tag {
            tag::NODE => Entry::Store(Record::Node {
                path: self.text()?,
                value: self.bytes()?,
                perms: self.perms()?,
            }),
            tag::NO_NODE => Entry::Store(Record::NoNode { path: self.text()? }),
            tag::DOMAIN => self.domain(Stage::Introduced)?,
            tag::DOMAIN_ENTERED => self.domain(Stage::Entered)?,
            tag::DOMAIN_SHUT_DOWN => self.domain(Stage::ShutDown)?,
            tag::NO_DOMAIN => Entry::Store(Record::NoDomain {
                domid: self.domid()?,
            }),
            tag::TARGET => Entry::Store(Record::Target {
                domid: self.domid()?,
                target: self.domid()?,
            }),
            tag::SESSION => Entry::Session {
                session: self.u64()?,
                domid: self.domid()?,
                next_event: self.u32()?,
            },
            tag::NO_SESSION => Entry::NoSession {
                session: self.u64()?,
            },
            tag::WATCH => Entry::Watch {
                session: self.u64()?,
                path: self.text()?,
                token: self.text()?,
            },
            tag::NO_WATCH => Entry::NoWatch {
                session: self.u64()?,
                path: self.text()?,
                token: self.text()?,
            },
            tag::NO_WATCHES => Entry::NoWatches {
                session: self.u64()?,
            },
            tag::EVENT => Entry::Event {
                session: self.u64()?,
                number: self.u32()?,
                payload: self.bytes()?,
            },
            tag::NO_EVENTS => Entry::NoEvents {
                session: self.u64()?,
            },
            tag::DONE => Entry::Done {
                session: self.u64()?,
                request: self.u32()?,
                reply: self.bytes()?,
            },
            _ => return None,
        })
    }
}

/// Reads entries to the end; `None` where something is none.
pub fn decode(bytes: &[u8]) -> Option<Vec<Entry>> {
    let mut reader = Reader(bytes);
    let mut entries = Vec::new();
    while !reader.0.is_empty() {
        entries.push(reader.entry()?);
    }
    Some(entries)
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    fn perms() -> impl Strategy<Value = Perms> {
        prop::collection::vec(("[nrwb]", any::<u16>()), 1..5).prop_map(|entries| {
            let entries: Vec<Perm> = entries
                .iter()
                .map(|(letter, domid)| Perm::parse(&format!("{letter}{domid}")).unwrap())
                .collect();
            Perms::from_entries(&entries).unwrap()
        })
    }

    fn stage() -> impl Strategy<Value = Stage> {
        prop_oneof![
            Just(Stage::Entered),
            Just(Stage::Introduced),
            Just(Stage::ShutDown)
        ]
    }

    pub fn entry() -> impl Strategy<Value = Entry> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..20);
        let text = || "[a-z/]{0,12}";
        let domid = || any::<u16>().prop_map(DomId);
        prop_oneof![
            (text(), bytes(), perms())
                .prop_map(|(path, value, perms)| Entry::Store(Record::Node { path, value, perms })),
            text().prop_map(|path| Entry::Store(Record::NoNode { path })),
            (domid(), prop::option::of("[a-f0-9-]{1,36}"), stage()).prop_map(
                |(domid, uuid, stage)| Entry::Store(Record::Domain { domid, uuid, stage })
            ),
            domid().prop_map(|domid| Entry::Store(Record::NoDomain { domid })),
            (domid(), domid())
                .prop_map(|(domid, target)| Entry::Store(Record::Target { domid, target })),
            (any::<u64>(), domid(), any::<u32>()).prop_map(|(session, domid, next_event)| {
                Entry::Session {
                    session,
                    domid,
                    next_event,
                }
            }),
            any::<u64>().prop_map(|session| Entry::NoSession { session }),
            (any::<u64>(), text(), text()).prop_map(|(session, path, token)| Entry::Watch {
                session,
                path,
                token
            }),
            (any::<u64>(), text(), text()).prop_map(|(session, path, token)| Entry::NoWatch {
                session,
                path,
                token
            }),
            any::<u64>().prop_map(|session| Entry::NoWatches { session }),
            (any::<u64>(), any::<u32>(), bytes()).prop_map(|(session, number, payload)| {
                Entry::Event {
                    session,
                    number,
                    payload,
                }
            }),
            any::<u64>().prop_map(|session| Entry::NoEvents { session }),
            (any::<u64>(), any::<u32>(), bytes()).prop_map(|(session, request, reply)| {
                Entry::Done {
                    session,
                    request,
                    reply,
                }
            }),
        ]
    }

    proptest! {
        #[test]
        fn decode_gives_back_what_was_encoded(entries in prop::collection::vec(entry(), 0..10)) {
            let mut bytes = Vec::new();
            for e in &entries {
                encode(e, &mut bytes);
            }
            prop_assert_eq!(decode(&bytes), Some(entries));
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }
}
