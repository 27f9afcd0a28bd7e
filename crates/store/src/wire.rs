//! The wire format, for both ends: a header of four little-endian words and up to 4096 bytes.

/// Bytes of the header: type, request number, transaction number, payload length.
pub const HEADER_BYTES: usize = 16;
/// Most bytes of payload.
pub const PAYLOAD_MAX: usize = 4096;

/// Message types.
pub mod kind {
    pub const CONTROL: u32 = 0;
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const GET_PERMS: u32 = 3;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const INTRODUCE: u32 = 8;
    pub const RELEASE: u32 = 9;
    pub const GET_DOMAIN_PATH: u32 = 10;
    pub const WRITE: u32 = 11;
    pub const MKDIR: u32 = 12;
    pub const RM: u32 = 13;
    pub const SET_PERMS: u32 = 14;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
    pub const IS_DOMAIN_INTRODUCED: u32 = 17;
    pub const RESUME: u32 = 18;
    pub const SET_TARGET: u32 = 19;
    pub const RESET_WATCHES: u32 = 21;
    pub const DIRECTORY_PART: u32 = 22;
}

/// Why a connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("a message claims {len} bytes of payload; {PAYLOAD_MAX} are allowed")]
    TooLong { len: u32 },
    #[error("the connection is closed")]
    Closed,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub kind: u32,
    pub id: u32,
    pub transaction: u32,
    pub payload: Vec<u8>,
}

/// Encodes a message.
pub fn encode(kind: u32, id: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for word in [kind, id, transaction, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Takes the first complete message off a buffer.
pub fn decode(buffer: &mut Vec<u8>) -> Result<Option<Request>, ProtocolError> {
    if buffer.len() < HEADER_BYTES {
        return Ok(None);
    }
    let word = |i: usize| {
        let b = &buffer[4 * i..4 * i + 4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    };
    let (kind, id, transaction, len) = (word(0), word(1), word(2), word(3));
    if len as usize > PAYLOAD_MAX {
        return Err(ProtocolError::TooLong { len });
    }
    let end = HEADER_BYTES + len as usize;
    if buffer.len() < end {
        return Ok(None);
    }
    let payload = buffer[HEADER_BYTES..end].to_vec();
    buffer.drain(..end);
    Ok(Some(Request {
        kind,
        id,
        transaction,
        payload,
    }))
}

/// Splits a payload of NUL-terminated strings; `None` where the last has no end or one is not text.
pub fn strings(payload: &[u8]) -> Option<Vec<&str>> {
    let body = payload.strip_suffix(b"\0")?;
    body.split(|b| *b == 0)
        .map(|s| std::str::from_utf8(s).ok())
        .collect()
}

/// Joins NUL-terminated strings.
pub fn join<T: AsRef<str>>(strings: impl IntoIterator<Item = T>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for s in strings {
        bytes.extend(s.as_ref().as_bytes());
        bytes.push(0);
    }
    bytes
}
