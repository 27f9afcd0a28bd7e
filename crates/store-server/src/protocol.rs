//! What the store process and its clients say to each other beyond Xen's protocol. The messages have its form.
//!
//! A guest's session begins with HELLO on a new connection. From then on that connection carries the guest's requests, one at a time, with
//! numbers of their own in place of the guest's; answers carry the same number. Events carry a number, too, and SEEN acknowledges all up
//! to one. RESET forgets the guest's watches, transactions and events. REMOVE, on a connection of domain 0, takes a domain out.

use hospes_store::{Error, Request, wire};
use hospes_units::DomId;

/// Opens a guest's session or takes it up again: [`Hello`].
pub const HELLO: u32 = 0x4853_0001;
/// Its number is that of the last event that was delivered; there is no answer.
pub const SEEN: u32 = 0x4853_0002;
pub const RESET: u32 = 0x4853_0003;
/// Domain number and session, as text: ends the session and removes the domain.
pub const REMOVE: u32 = 0x4853_0004;

pub const OK: &[u8] = b"OK\0";

/// Guests' requests above this kind are not passed on.
pub const GUEST_KIND_MAX: u32 = 0xffff;

/// Whose session it is and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub session: u64,
    pub domid: DomId,
    pub uuid: String,
    /// The last event that arrived, if one did.
    pub seen: Option<u32>,
    /// The guest's open transactions.
    pub transactions: Vec<u32>,
}

impl Hello {
    pub fn encode(&self) -> Vec<u8> {
        let mut strings = vec![
            self.session.to_string(),
            self.domid.to_string(),
            self.uuid.clone(),
            self.seen.map(|n| n.to_string()).unwrap_or_default(),
        ];
        strings.extend(self.transactions.iter().map(u32::to_string));
        wire::encode(HELLO, 0, 0, &wire::join(strings))
    }

    pub fn decode(payload: &[u8]) -> Option<Hello> {
        let strings = wire::strings(payload)?;
        let [session, domid, uuid, seen, transactions @ ..] = &strings[..] else {
            return None;
        };
        let seen = match *seen {
            "" => None,
            number => Some(number.parse().ok()?),
        };
        let transactions: Result<_, _> = transactions.iter().map(|t| t.parse()).collect();
        Some(Hello {
            session: session.parse().ok()?,
            domid: DomId(domid.parse().ok()?),
            uuid: (*uuid).to_owned(),
            seen,
            transactions: transactions.ok()?,
        })
    }
}

/// The payload of a REMOVE.
pub fn removal(domid: DomId, session: u64) -> Vec<u8> {
    wire::join([domid.to_string(), session.to_string()])
}

pub fn parse_removal(payload: &[u8]) -> Option<(DomId, u64)> {
    match wire::strings(payload)?[..] {
        [domid, session] => Some((DomId(domid.parse().ok()?), session.parse().ok()?)),
        _ => None,
    }
}

/// The answer to a request as bytes of the wire.
pub fn answer(request: &Request, result: Result<&[u8], Error>) -> Vec<u8> {
    let (kind, payload) = match result {
        Ok(payload) => (request.kind, payload.to_vec()),
        Err(error) => (wire::kind::ERROR, wire::join([error.name()])),
    };
    wire::encode(kind, request.id, request.transaction, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_and_removal_come_back() {
        for (seen, transactions) in [(None, vec![]), (Some(7), vec![1, 9])] {
            let hello = Hello {
                session: u64::MAX,
                domid: DomId(3),
                uuid: "u".into(),
                seen,
                transactions,
            };
            let mut bytes = hello.encode();
            let request = wire::decode(&mut bytes).unwrap().unwrap();
            assert_eq!(request.kind, HELLO);
            assert_eq!(Hello::decode(&request.payload), Some(hello));
        }
        assert_eq!(parse_removal(&removal(DomId(3), 4)), Some((DomId(3), 4)));
        for bad in [&b"1\x002\0u\0"[..], b"1\0x\0u\0\0", b"", b"1\x001\0u\0x\0"] {
            assert_eq!(Hello::decode(bad), None);
            assert_eq!(parse_removal(bad), None);
        }
    }
}
