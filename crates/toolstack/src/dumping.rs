//! Core files of domains, for those who look for the fault of a guest's kernel: by a command, and by what a configuration says is to happen with a crash.
//!
//! The command writes the file. Behind [`Reply::Dumping`] come pieces over the control connection, each behind the ones before: the offset in the file and the number of
//! bytes, 8 bytes each and little-endian, and the bytes. One without bytes is the last: its offset is the file's size. What is left out is zero.

use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::client::{CONNECT_PATIENCE, Host, read_reply, send, unexpected};
use crate::each::check_goes_on;
use crate::error::{Error, Result, at};
use crate::instance::Instance;
use crate::log::log;
use crate::machine::{Machine, MachineError};
use crate::protocol::{self, Reply, Request};
use crate::saving::BUFFER;
use crate::target::Target;

/// Most bytes of a piece on its way.
const PIECE_MAX: u64 = 16 << 20;
/// Zeros that are written at a time where there are no holes.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// A core file that is being written.
struct Core {
    target: Target,
    /// How far it is written.
    end: u64,
    /// Bytes that were not left out.
    filled: u64,
}

impl Core {
    fn open(path: &Path) -> Result<Core> {
        Ok(Core {
            target: Target::open(path)?,
            end: 0,
            filled: 0,
        })
    }

    /// Leaves all zero up to a position.
    fn skip(&mut self, to: u64) -> io::Result<()> {
        let mut left = to.checked_sub(self.end).ok_or(ErrorKind::InvalidData)?;
        self.end = to;
        if self.target.is_new {
            self.target.file.seek(SeekFrom::Start(to))?;
            return Ok(());
        }
        // A pipe has no holes, and a device may have something there.
        while left > 0 {
            let bytes = left.min(ZEROS.len() as u64) as usize;
            self.target.file.write_all(&ZEROS[..bytes])?;
            left -= bytes as u64;
        }
        Ok(())
    }

    fn piece(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.skip(at)?;
        self.target.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        self.filled += bytes.len() as u64;
        Ok(())
    }

    /// The file has this size and is on the disk.
    fn finish(mut self, size: u64, path: &Path) -> Result<()> {
        let sized = self.skip(size).and_then(|()| match self.target.is_new {
            true => self.target.file.set_len(size),
            false => Ok(()),
        });
        sized.map_err(at("cannot write", path))?;
        self.target.finish()?;
        self.target.settle()
    }
}

impl Host {
    /// Writes a core file of a domain, which goes on as it was. It is complete and on the disk when this returns; after an error, a file of that name is as it was
    /// before. Calls `progress` with the bytes written.
    pub fn dump_core(&self, who: &str, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let mut core = Core::open(path)?;
        let entry = self.find(who)?;
        check_goes_on(&entry)?;
        let domid = entry.domid;
        let stream = send(&entry, &Request::DumpCore, CONNECT_PATIENCE)?;
        let mut from = BufReader::with_capacity(BUFFER, &stream);
        match read_reply(domid, &mut from)? {
            Reply::Dumping => {}
            reply => return Err(unexpected(&reply)),
        }
        let lost = |source: io::Error| match source.kind() {
            ErrorKind::UnexpectedEof => Error::Refused {
                domid,
                message: "it has not given all of itself: its log says why".into(),
            },
            _ => Error::Unreachable { domid, source },
        };
        let mut buffer = Vec::new();
        loop {
            let mut words = [[0; 8]; 2];
            from.read_exact(words.as_flattened_mut()).map_err(lost)?;
            let [offset, bytes] = words.map(u64::from_le_bytes);
            if offset < core.end || bytes > PIECE_MAX || offset.checked_add(bytes).is_none() {
                return Err(Error::Protocol(
                    "a piece of a core file has no place".into(),
                ));
            }
            if bytes == 0 {
                return core.finish(offset, path);
            }
            buffer.resize(bytes as usize, 0);
            from.read_exact(&mut buffer).map_err(lost)?;
            core.piece(offset, &buffer)
                .map_err(at("cannot write", path))?;
            progress(core.filled);
        }
    }
}

/// Answers [`Request::DumpCore`] on a connection: the domain's side. `None` where all has been said.
pub(crate) fn answer(stream: &UnixStream, instance: &Instance) -> Option<Reply> {
    if let Some(message) = instance.is_elsewhere() {
        return Some(Reply::Error { message });
    }
    log!("Dumping core for a command");
    match give(stream, instance.machine()) {
        Ok(()) => log!("The core is dumped"),
        Err(fault) => log!("The core is not dumped: {fault}"),
    }
    None
}

fn give(stream: &UnixStream, machine: &dyn Machine) -> std::result::Result<(), MachineError> {
    protocol::send(stream, &Reply::Dumping)??;
    let mut to = BufWriter::with_capacity(BUFFER, stream);
    let header = |to: &mut BufWriter<_>, offset: u64, bytes: u64| {
        to.write_all([offset, bytes].map(u64::to_le_bytes).as_flattened())
    };
    let size = machine.dump_core(&mut |offset, bytes| {
        header(&mut to, offset, bytes.len() as u64)?;
        to.write_all(bytes)
    })?;
    header(&mut to, size, 0)?;
    Ok(to.flush()?)
}

/// Writes a core file of this process's domain. `given_up` says whether the domain is to go all the same.
pub(crate) fn dump(
    machine: &dyn Machine,
    path: &Path,
    given_up: &dyn Fn() -> bool,
) -> std::result::Result<(), MachineError> {
    let mut core = Core::open(path)?;
    let size = machine.dump_core(&mut |offset, bytes| match given_up() {
        true => Err(io::Error::other("the domain was destroyed meanwhile")),
        false => core.piece(offset, bytes),
    })?;
    Ok(core.finish(size, path)?)
}
