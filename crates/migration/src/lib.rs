//! The stream in which a domain leaves one process and comes into another: a file that `save` writes.
//!
//! It begins with [`MAGIC`] and a version; records follow. All numbers are little-endian. The head of a record is 16 bytes: what it is, the length of what
//! follows it in bytes, the CRC-32 of these two words and of what follows, and zero.
//!
//! | record | holds |
//! |---|---|
//! | 1 configuration | text of whoever made the domain; the first record |
//! | 2 machine | text of the domain: processors, time, what the guest has given back; once, anywhere between the first record and the last |
//! | 3 pages | the number of a guest frame, eight bytes, and the content of it and of those behind it, at most [`PAGES_MAX`]; a frame that comes again is as it came last, one that does not come is zero |
//! | 16 failed | why nothing more comes, a sentence of at most [`REASON_MAX`] bytes; the last record where there is no end |
//! | 4 end | the number of frames in all records, eight bytes; nothing is complete without it |
//!
//! A stream is hostile input: no length in it takes more memory than [`PAYLOAD_MAX`] bytes, and whatever is wrong is an error. What the texts mean is not
//! known here, and nothing here knows what a domain is.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};

/// How a stream begins.
pub const MAGIC: [u8; 8] = *b"\x89HOSPES\n";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages in one record.
pub const PAGES_MAX: usize = 256;
/// Most bytes in one record behind its head.
pub const PAYLOAD_MAX: usize = 64 << 20;

/// Most bytes of the reason in the record of a failure.
pub const REASON_MAX: usize = 4096;

const HEAD_BYTES: usize = 16;

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("this is no saved domain")]
    Magic,
    #[error(
        "it was saved in version {0} of the format, and this program knows version {VERSION}: use the program that saved it"
    )]
    Version(u32),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it ends too soon: it was not written to its end")]
    Truncated,
    #[error("{0}")]
    Failed(String),
    #[error("it cannot be read: {0}")]
    Read(io::Error),
    #[error("it cannot be written: {0}")]
    Write(io::Error),
}

/// A round in which pages were sent while their guest ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveRound {
    /// From 1.
    pub number: u32,
    /// Pages that were sent in it.
    pub pages: u64,
    /// Bytes of pages in a second, in all rounds so far.
    pub bytes_per_s: u64,
    /// Pages that were written meanwhile, empty ones among them.
    pub left: u64,
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Config = 1,
    Machine = 2,
    Pages = 3,
    End = 4,
    Failed = 16,
}

impl Kind {
    fn from_u32(value: u32) -> Option<Kind> {
        [
            Kind::Config,
            Kind::Machine,
            Kind::Pages,
            Kind::End,
            Kind::Failed,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == value)
    }
}

/// A record as it was read; its bytes have their checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    Config(&'a [u8]),
    Machine(&'a [u8]),
    /// Whole pages, the first of which is that of frame `first`.
    Pages {
        first: u64,
        bytes: &'a [u8],
    },
    End,
}

/// Writes a stream.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    pages: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the beginning: who made the domain, and how.
    pub fn new(mut to: W, config: &[u8]) -> io::Result<Writer<W>> {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        to.write_all(&head)?;
        let mut writer = Writer { to, pages: 0 };
        writer.record(Kind::Config, &[config])?;
        Ok(writer)
    }

    /// Goes on where another writer has written the beginning, and counts the pages from here on.
    pub fn continued(to: W) -> Writer<W> {
        Writer { to, pages: 0 }
    }

    /// Writes records of another writer that goes on here, as they are. Their pages are still to be counted.
    pub fn pass(&mut self, records: &[u8]) -> io::Result<()> {
        self.to.write_all(records)
    }

    /// Counts pages of records that were passed.
    pub fn count(&mut self, pages: u64) {
        self.pages = self.pages.saturating_add(pages);
    }

    /// Writes what is no page.
    pub fn machine(&mut self, text: &[u8]) -> io::Result<()> {
        self.record(Kind::Machine, &[text])
    }

    /// Writes whole pages, at most [`PAGES_MAX`].
    pub fn pages(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        let count = bytes.len() / PAGE_BYTES;
        debug_assert!(bytes.len().is_multiple_of(PAGE_BYTES) && count <= PAGES_MAX);
        self.pages += count as u64;
        self.record(Kind::Pages, &[&first.to_le_bytes(), bytes])
    }

    /// Writes the end and gives back what was written to.
    pub fn end(mut self) -> io::Result<W> {
        let pages = self.pages.to_le_bytes();
        self.record(Kind::End, &[&pages])?;
        self.to.flush()?;
        Ok(self.to)
    }

    /// Has whoever reads the stream see what was written so far.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// Writes in place of the end why nothing more comes.
    pub fn fail(mut self, why: &str) -> io::Result<()> {
        // A character that is cut is shown as one that is missing.
        let why = &why.as_bytes()[..why.len().min(REASON_MAX)];
        self.record(Kind::Failed, &[why])?;
        self.to.flush()
    }

    /// Pages written so far.
    pub fn pages_written(&self) -> u64 {
        self.pages
    }

    fn record(&mut self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length > PAYLOAD_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a record of {length} bytes is too long"),
            ));
        }
        let mut head = [0; HEAD_BYTES];
        head[..4].copy_from_slice(&(kind as u32).to_le_bytes());
        head[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&head[..8]);
        for part in parts {
            sum.update(part);
        }
        head[8..12].copy_from_slice(&sum.finalize().to_le_bytes());
        self.to.write_all(&head)?;
        for part in parts {
            self.to.write_all(part)?;
        }
        Ok(())
    }
}

/// Reads a stream, record by record.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    head: [u8; HEAD_BYTES],
    payload: Vec<u8>,
    last: Option<Kind>,
    machines: u32,
    pages: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the beginning and the configuration.
    pub fn new(mut from: R) -> Result<(Reader<R>, Vec<u8>), StreamError> {
        let mut head = [0; HEAD_BYTES];
        read_exact(&mut from, &mut head).map_err(|fault| match fault {
            // A file that is too short for a beginning has none.
            StreamError::Truncated => StreamError::Magic,
            fault => fault,
        })?;
        if head[..8] != MAGIC {
            return Err(StreamError::Magic);
        }
        let version = word(&head, 8);
        if version != VERSION {
            return Err(StreamError::Version(version));
        }
        let mut reader = Reader::continued(from);
        reader.last = None;
        match reader.next()? {
            Record::Config(text) => {
                let text = text.to_vec();
                Ok((reader, text))
            }
            _ => Err(StreamError::Damaged(
                "it does not begin with a configuration",
            )),
        }
    }

    /// Goes on where another reader has read the beginning and the configuration and has passed on what follows.
    pub fn continued(from: R) -> Reader<R> {
        Reader {
            from,
            head: [0; HEAD_BYTES],
            payload: Vec::new(),
            last: Some(Kind::Config),
            machines: 0,
            pages: 0,
        }
    }

    /// Where it reads from.
    pub fn into_inner(self) -> R {
        self.from
    }

    /// The next record; after [`Record::End`] there is none to be asked for.
    #[expect(clippy::should_implement_trait, reason = "a record borrows the reader")]
    pub fn next(&mut self) -> Result<Record<'_>, StreamError> {
        let kind = self.fetch()?;
        let bytes = &self.payload[..];
        Ok(match kind {
            Kind::Config => Record::Config(bytes),
            Kind::Machine => Record::Machine(bytes),
            Kind::Pages => Record::Pages {
                first: long(bytes),
                bytes: &bytes[8..],
            },
            Kind::End => Record::End,
            Kind::Failed => return Err(self.failure()),
        })
    }

    /// Passes all that follows on as it is, to its end, and says after each record how many pages have passed. What is wrong with the stream is found as by
    /// reading it.
    pub fn pass_on(
        &mut self,
        mut to: impl Write,
        mut progress: impl FnMut(u64),
    ) -> Result<(), StreamError> {
        loop {
            let kind = self.fetch()?;
            to.write_all(&self.head)
                .and_then(|()| to.write_all(&self.payload))
                .map_err(StreamError::Write)?;
            progress(self.pages);
            if kind == Kind::Failed {
                // Who reads it next is told by the same words; where nobody does, this is the reason all the same.
                let _ = to.flush();
                return Err(self.failure());
            }
            if kind == Kind::End {
                return to.flush().map_err(StreamError::Write);
            }
        }
    }

    /// What the record of a failure says, without what a terminal would take for commands.
    fn failure(&self) -> StreamError {
        let text = String::from_utf8_lossy(&self.payload);
        StreamError::Failed(text.chars().filter(|c| !c.is_control()).collect())
    }

    /// Reads one record and checks all that can be told of it here.
    fn fetch(&mut self) -> Result<Kind, StreamError> {
        if matches!(self.last, Some(Kind::End | Kind::Failed)) {
            return Err(StreamError::Truncated);
        }
        read_exact(&mut self.from, &mut self.head)?;
        let kind = Kind::from_u32(word(&self.head, 0))
            .ok_or(StreamError::Damaged("it has a record of no known kind"))?;
        let length = word(&self.head, 4) as usize;
        if length > PAYLOAD_MAX {
            return Err(StreamError::Damaged("it has a record that is too long"));
        }
        self.payload.resize(length, 0);
        read_exact(&mut self.from, &mut self.payload)?;
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.head[..8]);
        sum.update(&self.payload);
        if sum.finalize() != word(&self.head, 8) || word(&self.head, 12) != 0 {
            return Err(StreamError::Damaged("the checksum of a record is wrong"));
        }
        self.check(kind, length)?;
        self.last = Some(kind);
        Ok(kind)
    }

    fn check(&mut self, kind: Kind, length: usize) -> Result<(), StreamError> {
        match kind {
            Kind::Config if self.last.is_some() => {
                Err(StreamError::Damaged("it has two configurations"))
            }
            _ if self.last.is_none() && kind != Kind::Config => Err(StreamError::Damaged(
                "it does not begin with a configuration",
            )),
            Kind::Config => Ok(()),
            Kind::Machine => {
                self.machines += 1;
                match self.machines {
                    1 => Ok(()),
                    _ => Err(StreamError::Damaged("it has two machines")),
                }
            }
            Kind::Pages => {
                let bytes = length.wrapping_sub(8);
                if !bytes.is_multiple_of(PAGE_BYTES)
                    || !(1..=PAGES_MAX).contains(&(bytes / PAGE_BYTES))
                {
                    return Err(StreamError::Damaged(
                        "it has a record of pages that are not whole",
                    ));
                }
                self.pages += (bytes / PAGE_BYTES) as u64;
                Ok(())
            }
            Kind::Failed if length > REASON_MAX => {
                Err(StreamError::Damaged("it has a reason that is too long"))
            }
            Kind::Failed => Ok(()),
            Kind::End if length != 8 || long(&self.payload) != self.pages => {
                Err(StreamError::Damaged("pages are missing"))
            }
            Kind::End if self.machines == 0 => Err(StreamError::Damaged("it has no machine")),
            Kind::End => Ok(()),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8]) -> u64 {
    u64::from(word(bytes, 0)) | u64::from(word(bytes, 4)) << 32
}

fn read_exact(from: &mut impl Read, buf: &mut [u8]) -> Result<(), StreamError> {
    from.read_exact(buf).map_err(|fault| match fault.kind() {
        io::ErrorKind::UnexpectedEof => StreamError::Truncated,
        _ => StreamError::Read(fault),
    })
}

#[cfg(test)]
mod tests;
