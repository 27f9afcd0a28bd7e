//! What the store process and its clients say to each other beyond Xen's protocol. The messages have its form.
//!
//! A guest's session begins with HELLO on a new connection. From then on that connection carries the guest's requests, one at a time, with
//! numbers of their own in place of the guest's; answers carry the same number. Events carry a number, too, and SEEN acknowledges all up
//! to one. RESET forgets the guest's watches, transactions and events. REMOVE, on a connection of domain 0, takes a domain out.
//!
//! RESTRICT, as the first message on a connection, takes from it for good what does not belong to one domain: a HELLO may follow for that domain
//! only, which is entered with the UUID and name of the RESTRICT, or requests for the domain's nodes. On a connection of domain 0 that is not restricted, IDENTIFY changes the UUID of a domain, and SHUT_DOWN
//! tells that one has shut down, as the hypervisor tells xenstored; RESUME of Xen's protocol takes that back.
//!
//! A process and its clients are of one [`VERSION`]. LEAVE, as the first message on a connection, ends a process that no domain needs, for one of another version to take its place.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use hospes_store::{Error, Request, wire};
use hospes_units::DomId;

/// Version of what is said here, and of the journal: one more with each change that those before would misunderstand.
pub const VERSION: u32 = 1;

/// Opens a guest's session or takes it up again: [`Hello`].
pub const HELLO: u32 = 0x4853_0001;
/// Its number is that of the last event that was delivered; there is no answer.
pub const SEEN: u32 = 0x4853_0002;
pub const RESET: u32 = 0x4853_0003;
/// Domain number and session, as text: ends the session and removes the domain.
pub const REMOVE: u32 = 0x4853_0004;

/// Domain number, UUID and name, as text, of the domain that the connection is for.
pub const RESTRICT: u32 = 0x4853_0005;
/// Domain number and new UUID, as text.
pub const IDENTIFY: u32 = 0x4853_0006;
/// Domain number, as text.
pub const SHUT_DOWN: u32 = 0x4853_0007;

/// Nothing, or EBUSY where there are domains.
pub const LEAVE: u32 = 0x4853_0008;

pub const OK: &[u8] = b"OK\0";

/// Guests' requests above this kind are not passed on.
pub const GUEST_KIND_MAX: u32 = 0xffff;

/// Whose session it is and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub session: u64,
    pub domid: DomId,
    /// UUID and name with which the domain is entered, where the session is new.
    pub uuid: String,
    pub name: String,
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
            self.name.clone(),
            self.seen.map(|n| n.to_string()).unwrap_or_default(),
        ];
        strings.extend(self.transactions.iter().map(u32::to_string));
        wire::encode(HELLO, 0, 0, &wire::join(strings))
    }

    pub fn decode(payload: &[u8]) -> Option<Hello> {
        let strings = wire::strings(payload)?;
        let [session, domid, uuid, name, seen, transactions @ ..] = &strings[..] else {
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
            name: (*name).to_owned(),
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

/// The payload of a RESTRICT.
pub fn restriction(domid: DomId, uuid: &str, name: &str) -> Vec<u8> {
    wire::join([&domid.to_string(), uuid, name])
}

pub fn parse_restriction(payload: &[u8]) -> Option<(DomId, &str, &str)> {
    match wire::strings(payload)?[..] {
        [domid, uuid, name] => Some((DomId(domid.parse().ok()?), uuid, name)),
        _ => None,
    }
}

/// The payload of an IDENTIFY.
pub fn identity(domid: DomId, uuid: &str) -> Vec<u8> {
    wire::join([&domid.to_string(), uuid])
}

/// The payload of a SHUT_DOWN.
pub fn parse_domid(payload: &[u8]) -> Option<DomId> {
    match wire::strings(payload)?[..] {
        [domid] => Some(DomId(domid.parse().ok()?)),
        _ => None,
    }
}

pub fn parse_identity(payload: &[u8]) -> Option<(DomId, &str)> {
    match wire::strings(payload)?[..] {
        [domid, uuid] => Some((DomId(domid.parse().ok()?), uuid)),
        _ => None,
    }
}

/// Which of a guest's open transactions a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Nothing,
    Transaction(u32),
    /// All of them.
    Transactions,
}

/// What a request has ended that was answered like this.
pub fn ended(request: &Request, failed: bool, answer: &[u8]) -> Ended {
    match request.kind {
        // A refused commit ends it as well, unless the request itself was malformed.
        wire::kind::TRANSACTION_END if !failed || answer != b"EINVAL\0" => {
            Ended::Transaction(request.transaction)
        }
        wire::kind::RESET_WATCHES if !failed => Ended::Transactions,
        _ => Ended::Nothing,
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

/// Waits for one message and leaves what follows it in the connection.
pub fn read_answer(mut stream: &UnixStream) -> io::Result<Request> {
    let mut input = Vec::new();
    let mut buf = [0; 1];
    loop {
        stream.read_exact(&mut buf)?;
        input.extend(buf);
        if let Some(answer) = wire::decode(&mut input).map_err(io::Error::other)? {
            return Ok(answer);
        }
    }
}

/// What an answer that is none says.
pub fn error_of(answer: &Request) -> Error {
    let name = wire::strings(&answer.payload).and_then(|n| n.first().copied());
    Error::from_name(name.unwrap_or_default())
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
                name: "n".into(),
                seen,
                transactions,
            };
            let mut bytes = hello.encode();
            let request = wire::decode(&mut bytes).unwrap().unwrap();
            assert_eq!(request.kind, HELLO);
            assert_eq!(Hello::decode(&request.payload), Some(hello));
        }
        assert_eq!(parse_removal(&removal(DomId(3), 4)), Some((DomId(3), 4)));
        assert_eq!(
            parse_identity(&identity(DomId(3), "u")),
            Some((DomId(3), "u"))
        );
        assert_eq!(parse_identity(b"3\0u\0v\0"), None);
        assert_eq!(
            parse_restriction(&restriction(DomId(3), "u", "n")),
            Some((DomId(3), "u", "n"))
        );
        assert_eq!(parse_restriction(b"3\0u\0"), None);
        for bad in [
            &b"1\x002\0u\0n\0"[..],
            b"1\0x\0u\0n\0\0",
            b"",
            b"1\x001\0u\0n\0x\0",
        ] {
            assert_eq!(Hello::decode(bad), None);
            assert_eq!(parse_removal(bad), None);
        }
    }
}
