//! The journal: a file to which each step of the store is appended before anybody hears of it.
//!
//! Eight bytes that name the format, then records: the length of what follows the checksum (u32), a checksum (u64), entries. A record is
//! one step: it counts as a whole or, where it was torn off, not at all. The file lies on a tmpfs and outlives the process, not the host;
//! it needs no fsync.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::entry::{self, Entry};

const MAGIC: &[u8; 8] = b"HospesX1";
const RECORD_HEADER: usize = 12;
/// A journal is not written anew before it has this size, in bytes.
const COMPACT_MIN_BYTES: u64 = 1 << 20;
/// Nor before it is so many times what it was when it was written anew.
const COMPACT_GROWTH: u64 = 4;

/// FNV-1a with 64 bits: enough to tell a torn record.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Appends one step.
fn encode(entries: &[Entry], out: &mut Vec<u8>) {
    let at = out.len();
    out.extend([0; RECORD_HEADER]);
    for e in entries {
        entry::encode(e, out);
    }
    let body = &out[at + RECORD_HEADER..];
    let (length, sum) = (body.len() as u32, checksum(body));
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
    out[at + 4..at + RECORD_HEADER].copy_from_slice(&sum.to_le_bytes());
}

/// The steps of a journal, and whether it ends with a whole one. What follows a torn or broken record is not read.
pub fn records(bytes: &[u8]) -> (Vec<Vec<Entry>>, bool) {
    let mut steps = Vec::new();
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        return (steps, bytes.is_empty());
    };
    while let Some((header, body)) = rest.split_first_chunk::<RECORD_HEADER>() {
        let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
        let length = u32::from_le_bytes(word(0)) as usize;
        let sum =
            u64::from(u32::from_le_bytes(word(4))) | u64::from(u32::from_le_bytes(word(8))) << 32;
        let Some((body, tail)) = body.split_at_checked(length) else {
            return (steps, false);
        };
        let Some(entries) = (checksum(body) == sum)
            .then(|| entry::decode(body))
            .flatten()
        else {
            return (steps, false);
        };
        steps.push(entries);
        rest = tail;
    }
    (steps, rest.is_empty())
}

/// The open file. What was appended is in the file when [`Journal::flush`] has returned.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Not in the file yet.
    waiting: Vec<u8>,
    bytes: u64,
    /// Size when it was last written anew.
    fresh_bytes: u64,
}

impl Journal {
    /// The steps of the file at `path`, if there is one.
    pub fn load(path: &Path) -> io::Result<(Vec<Vec<Entry>>, bool)> {
        match fs::read(path) {
            Ok(bytes) => Ok(records(&bytes)),
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => Ok((Vec::new(), true)),
            Err(fault) => Err(fault),
        }
    }

    /// Puts a new journal with one step in the place of what is there.
    pub fn create(path: &Path, entries: &[Entry]) -> io::Result<Journal> {
        let mut bytes = MAGIC.to_vec();
        encode(entries, &mut bytes);
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&name)?;
        let put = file
            .write_all(&bytes)
            .and_then(|()| fs::rename(&name, path));
        if let Err(fault) = put {
            // On a full host the other one needs the room that this has taken.
            let _ = fs::remove_file(&name);
            return Err(fault);
        }
        let size = bytes.len() as u64;
        Ok(Journal {
            path: path.to_path_buf(),
            file,
            waiting: Vec::new(),
            bytes: size,
            fresh_bytes: size,
        })
    }

    pub fn append(&mut self, entries: &[Entry]) {
        if !entries.is_empty() {
            encode(entries, &mut self.waiting);
        }
    }

    /// Writes what was appended. After an error the same bytes are tried again the next time.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            // A part that fits is a part of the step: the rest follows it.
            let count = match self.file.write(&self.waiting) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(fault) if fault.kind() == io::ErrorKind::Interrupted => continue,
                Err(fault) => return Err(fault),
            };
            self.waiting.drain(..count);
            self.bytes += count as u64;
        }
        Ok(())
    }

    pub fn wants_compaction(&self) -> bool {
        self.bytes >= COMPACT_MIN_BYTES && self.bytes >= COMPACT_GROWTH * self.fresh_bytes
    }

    /// Writes the journal anew, as these entries. After an error it goes on as it was, and grows before that is tried again.
    pub fn compact(&mut self, entries: &[Entry]) -> io::Result<()> {
        self.fresh_bytes = self.bytes;
        *self = Journal::create(&self.path, entries)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::entry::tests::entry;

    fn steps() -> impl Strategy<Value = Vec<Vec<Entry>>> {
        prop::collection::vec(prop::collection::vec(entry(), 1..4), 0..6)
    }

    fn written(steps: &[Vec<Entry>]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = MAGIC.to_vec();
        let mut ends = vec![bytes.len()];
        for step in steps {
            encode(step, &mut bytes);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    proptest! {
        /// Cut at every byte, a journal gives the steps that are whole, and says whether there was more.
        #[test]
        fn records_of_a_cut_journal_are_the_whole_steps(steps in steps()) {
            let (bytes, ends) = written(&steps);
            for cut in MAGIC.len()..=bytes.len() {
                let (found, whole) = records(&bytes[..cut]);
                let count = ends.iter().filter(|end| **end <= cut).count() - 1;
                prop_assert_eq!(&found, &steps[..count]);
                prop_assert_eq!(whole, ends.contains(&cut));
            }
        }

        #[test]
        fn records_stop_at_a_changed_byte(steps in steps(), at: prop::sample::Index, flip in 1u8..) {
            let (mut bytes, ends) = written(&steps);
            prop_assume!(bytes.len() > MAGIC.len());
            let at = MAGIC.len() + at.index(bytes.len() - MAGIC.len());
            bytes[at] ^= flip;
            let before = ends.iter().filter(|end| **end <= at).count() - 1;
            let (found, whole) = records(&bytes);
            prop_assert_eq!(found, &steps[..before]);
            prop_assert!(!whole);
        }

        #[test]
        fn records_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut journal = MAGIC.to_vec();
            journal.extend(bytes);
            let _ = records(&journal);
        }
    }

    #[test]
    fn journal_that_cannot_be_written_anew_takes_no_room() {
        let dir = std::env::temp_dir().join(format!("hospes-anew-{}", std::process::id()));
        let path = dir.join("journal");
        // Nothing can be put in its place.
        fs::create_dir_all(path.join("in the way")).unwrap();
        Journal::create(&path, &[Entry::NoSession { session: 1 }]).unwrap_err();
        assert!(path.exists() && !dir.join("journal.new").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn journal_keeps_what_was_flushed_and_compacts() {
        let dir = std::env::temp_dir().join(format!("hospes-journal-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("journal");
        assert_eq!(Journal::load(&path).unwrap(), (Vec::new(), true));
        let step = |session| vec![Entry::NoSession { session }];
        let mut journal = Journal::create(&path, &step(1)).unwrap();
        journal.append(&step(2));
        journal.append(&[]);
        assert_eq!(Journal::load(&path).unwrap(), (vec![step(1)], true));
        journal.flush().unwrap();
        assert_eq!(
            Journal::load(&path).unwrap(),
            (vec![step(1), step(2)], true)
        );
        let long = vec![Entry::Event {
            session: 1,
            number: 1,
            payload: vec![0; 2 << 20],
        }];
        journal.append(&long);
        assert!(!journal.wants_compaction());
        journal.flush().unwrap();
        assert!(journal.wants_compaction());
        journal.compact(&step(3)).unwrap();
        journal.append(&step(4));
        journal.flush().unwrap();
        assert_eq!(
            Journal::load(&path).unwrap(),
            (vec![step(3), step(4)], true)
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
