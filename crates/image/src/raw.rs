//! Images without a format: the bytes of the file or block device are the disk.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{ImageError, IoError};
use crate::hold::Hold;
use crate::storage::Storage;
use crate::threads::{Event, Threads, Work};
use crate::types::{Completion, Geometry, Image, Op, Queue, Request, Status};
use crate::uring::{self, End, Ring};

/// Why a file does not become so large.
const TOO_LARGE: &str = "it is more than the file system takes for one file";

/// An open raw image.
pub(crate) struct Raw {
    path: PathBuf,
    file: Arc<RawFile>,
    hold: Arc<Hold>,
    resizing: Mutex<()>,
}

/// What the threads work on.
pub(crate) struct RawFile {
    pub(crate) storage: Arc<dyn Storage>,
    bytes: AtomicU64,
    sector_bytes: u32,
    physical_sector_bytes: u32,
    read_only: bool,
    discard: Option<u32>,
}

impl RawFile {
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.bytes.load(Ordering::Acquire),
            sector_bytes: self.sector_bytes,
            physical_sector_bytes: self.physical_sector_bytes,
            read_only: self.read_only,
            discard: self.discard,
        }
    }
}

impl Work for RawFile {
    fn work(&self, request: &Request) -> Result<(), IoError> {
        request.check(&self.geometry())?;
        match request.op {
            Op::Read => self.storage.read_whole(&request.buffers, request.offset)?,
            Op::Write => {
                self.storage.check_end(request.offset + request.bytes)?;
                self.storage.write(&request.buffers, request.offset)?;
            }
            Op::Flush => self.storage.sync()?,
            Op::Discard => self.storage.discard(request.offset, request.bytes)?,
        }
        Ok(())
    }
}

/// A queue on a ring.
struct RawQueue {
    ring: Ring,
    /// For what a ring cannot do.
    side: Threads,
    /// Of both.
    event: Event,
    file: Arc<RawFile>,
    side_discards: bool,
    /// The event may be set: not so where the ring had completed nothing when a silence began.
    may_be_set: bool,
}

impl Queue for RawQueue {
    fn submit(&mut self, request: Request) {
        if let Err(error) = request.check(&self.file.geometry()) {
            self.ring.complete(request.id, Err(error));
        } else if request.op == Op::Discard && request.bytes == 0 {
            // The host's calls refuse what is empty; other back ends do not.
            self.ring.complete(request.id, Ok(()));
        } else if request.op == Op::Discard && self.side_discards
            || request.op == Op::Flush && self.ring.is_cached()
        {
            self.side.submit(request);
        } else {
            self.ring.submit(request);
        }
    }

    fn flush_submissions(&mut self) {
        self.ring.flush_submissions();
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        // If it is set although it seemed not to be, its sleeper wakes up, ends the silence and clears it.
        if self.may_be_set {
            self.event.clear();
        }
        self.side.collect(out);
        self.ring.collect(out);
    }

    fn peek(&mut self) -> Option<bool> {
        self.ring.peek()
    }

    fn silence(&mut self, silent: bool) {
        self.ring.silence(silent);
        self.may_be_set = !silent || self.peek() == Some(true);
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// How [`Raw::new`] shows the image.
pub(crate) struct RawOptions {
    pub(crate) sector_bytes: u32,
    pub(crate) physical_sector_bytes: u32,
    pub(crate) read_only: bool,
    pub(crate) discard: Option<u32>,
}

impl Raw {
    /// The disk in `storage`. What is left over after the last whole sector is not part of it.
    pub(crate) fn new(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: RawOptions,
    ) -> Result<Raw, ImageError> {
        let bytes = storage
            .len()
            .map_err(ImageError::host(path, "get its size"))?;
        let whole = whole_sectors(path, bytes, options.sector_bytes)?;
        Ok(Raw {
            path: path.to_owned(),
            file: Arc::new(RawFile {
                storage,
                bytes: AtomicU64::new(whole),
                sector_bytes: options.sector_bytes,
                physical_sector_bytes: options.physical_sector_bytes.max(options.sector_bytes),
                read_only: options.read_only,
                discard: options.discard.filter(|_| !options.read_only),
            }),
            hold: Arc::new(Hold::new(path.to_owned())),
            resizing: Mutex::new(()),
        })
    }

    #[cfg(test)]
    pub(crate) fn work(&self) -> Arc<dyn Work> {
        self.file.clone()
    }

    fn is_block(&self) -> bool {
        let file = self.file.storage.clone().host_file();
        file.is_some_and(|file| file.is_block())
    }
}

fn whole_sectors(path: &Path, bytes: u64, sector_bytes: u32) -> Result<u64, ImageError> {
    let whole = bytes - bytes % u64::from(sector_bytes);
    if whole == 0 {
        return Err(ImageError::TooSmall {
            path: path.to_owned(),
            bytes,
            sector_bytes,
        });
    }
    Ok(whole)
}

impl Image for Raw {
    fn geometry(&self) -> Geometry {
        self.file.geometry()
    }

    fn queue(&self) -> Result<Box<dyn Queue>, ImageError> {
        let event = Event::new().map_err(ImageError::host(&self.path, "make an event for it"))?;
        let side = Threads::new(self.file.clone(), self.hold.clone(), event.clone());
        let Some(ring) = uring::start(&self.file.storage, &self.hold, &event, End::Cut) else {
            return Ok(Box::new(side));
        };
        Ok(Box::new(RawQueue {
            ring,
            side,
            event,
            file: self.file.clone(),
            side_discards: self.is_block(),
            may_be_set: true,
        }))
    }

    fn resize(&self, bytes: u64) -> Result<(), ImageError> {
        let _one = self.resizing.lock().expect("no thread panics with it");
        let refuse = |reason| {
            Err(ImageError::Resize {
                path: self.path.clone(),
                bytes,
                reason,
            })
        };
        let geometry = self.geometry();
        let storage = &self.file.storage;
        if self.is_block() {
            let now = storage
                .len()
                .map_err(ImageError::host(&self.path, "get its size"))?;
            let now = whole_sectors(&self.path, now, self.file.sector_bytes)?;
            if bytes != now && bytes != geometry.bytes {
                return refuse(
                    "a block device has the size the host gives it; resize it there first",
                );
            }
            self.file.bytes.store(now, Ordering::Release);
            return Ok(());
        }
        if bytes == 0 || !bytes.is_multiple_of(u64::from(self.file.sector_bytes)) {
            return refuse("the size has to be a multiple of the sector, and not 0");
        }
        if bytes == geometry.bytes {
            return Ok(());
        }
        if geometry.read_only {
            return refuse("it is attached read-only");
        }
        if bytes > i64::MAX as u64 {
            return refuse(TOO_LARGE);
        }
        // A disk that shrinks does so for the guest first, so that nothing is written behind the new end.
        self.file
            .bytes
            .store(bytes.min(geometry.bytes), Ordering::Release);
        let set = storage.set_len(bytes);
        let now = if set.is_ok() { bytes } else { geometry.bytes };
        self.file.bytes.store(now, Ordering::Release);
        match set {
            Err(error) if error.kind() == ErrorKind::FileTooLarge => refuse(TOO_LARGE),
            set => set.map_err(ImageError::host(
                &self.path,
                "change its size, which stays as it was",
            )),
        }
    }

    fn status(&self) -> Status {
        self.hold.status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Access;
    use crate::host::HostFile;
    use crate::testing::{Directory, discard, flush, pattern, raw, read, spec, write};
    use crate::{Format, open};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::fd::AsRawFd;

    /// The work of an image of `bytes`, whatever the file has, without a lock.
    fn raw_file(path: &Path, bytes: u64) -> Arc<dyn Work> {
        let access = Access {
            read_only: false,
            direct: true,
            unit: Some(512),
        };
        Arc::new(RawFile {
            storage: Arc::new(HostFile::open(path, access, None).unwrap()),
            bytes: AtomicU64::new(bytes),
            sector_bytes: 512,
            physical_sector_bytes: 512,
            read_only: false,
            discard: None,
        })
    }

    #[test]
    fn read_of_what_was_written_returns_it() {
        let directory = Directory::new();
        let image = raw(&directory.file("a.img", 1 << 20));
        let mut queue = image.queue().unwrap();
        let data = pattern(7, 8192);
        write(&mut *queue, 512, &data).unwrap();
        flush(&mut *queue).unwrap();
        assert_eq!(read(&mut *queue, 512, 8192).unwrap(), data);
        assert_eq!(read(&mut *queue, 0, 512).unwrap(), [0; 512]);
    }

    #[test]
    fn submit_of_bad_requests_completes_with_errors() {
        let directory = Directory::new();
        let image = raw(&directory.file("a.img", 8192));
        let mut queue = image.queue().unwrap();
        let end = write(&mut *queue, 8192, &[1; 512]);
        assert!(matches!(end, Err(IoError::OutOfRange)), "{end:?}");
        let far = write(&mut *queue, u64::MAX - 511, &[1; 512]);
        assert!(matches!(far, Err(IoError::OutOfRange)), "{far:?}");
        let odd = write(&mut *queue, 100, &[1; 512]);
        assert!(matches!(odd, Err(IoError::Unaligned { .. })), "{odd:?}");
        let short = crate::testing::once(&mut *queue, Op::Read, 0, 512, Vec::new());
        assert!(matches!(short, Err(IoError::BufferLength)), "{short:?}");
    }

    #[test]
    fn event_is_cleared_after_a_silence_whenever_it_was_set() {
        let directory = Directory::new();
        let image = raw(&directory.file("a.img", 8192));
        let mut queue = image.queue().unwrap();
        if queue.peek().is_none() {
            return;
        }
        let event = queue.event_fd().try_clone_to_owned().unwrap();
        let is_set = || {
            let mut fds = [PollFd::new(&event, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
        };
        let submit = |queue: &mut dyn Queue, offset| {
            queue.submit(Request {
                id: 0,
                op: Op::Discard,
                offset,
                bytes: 4096,
                buffers: Vec::new(),
            });
            queue.flush_submissions();
        };
        let take = |queue: &mut dyn Queue| {
            let mut out = Vec::new();
            while out.is_empty() {
                if queue.peek() == Some(true) {
                    queue.completions(&mut out);
                }
            }
            assert_eq!(out.len(), 1);
        };
        // Completed before the silence, and in it.
        submit(&mut *queue, 0);
        while !is_set() {}
        queue.silence(true);
        take(&mut *queue);
        assert!(!is_set());
        submit(&mut *queue, 4096);
        take(&mut *queue);
        assert!(!is_set());
        // Refused in the silence, which sets the event: it is there for its sleeper, who clears it.
        submit(&mut *queue, 1);
        assert!(is_set());
        queue.silence(false);
        take(&mut *queue);
        assert!(!is_set());
    }

    #[test]
    fn write_to_a_read_only_image_is_refused() {
        let directory = Directory::new();
        let mut wanted = spec(&directory.file("a.img", 8192), Format::Raw);
        wanted.read_only = true;
        let image = open(&wanted).unwrap();
        assert!(image.geometry().read_only && image.geometry().discard.is_none());
        let mut queue = image.queue().unwrap();
        let result = write(&mut *queue, 0, &[1; 512]);
        assert!(matches!(result, Err(IoError::ReadOnly)), "{result:?}");
    }

    #[test]
    fn discard_punches_a_hole_that_reads_as_zeros() {
        use std::os::unix::fs::MetadataExt;
        let directory = Directory::new();
        let path = directory.file("a.img", 1 << 20);
        let image = raw(&path);
        let mut queue = image.queue().unwrap();
        write(&mut *queue, 0, &pattern(3, 1 << 20)).unwrap();
        flush(&mut *queue).unwrap();
        let full = std::fs::metadata(&path).unwrap().blocks();
        discard(&mut *queue, 65536, 1 << 19).unwrap();
        flush(&mut *queue).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() <= full - (1 << 19) / 512);
        assert_eq!(read(&mut *queue, 65536, 1 << 19).unwrap(), [0; 1 << 19]);
        let kept = read(&mut *queue, 0, 65536).unwrap();
        assert_eq!(kept, pattern(3, 1 << 20)[..65536]);
    }

    #[test]
    fn discard_of_nothing_is_done() {
        let directory = Directory::new();
        let (path, qcow2) = (directory.file("a.img", 8192), directory.join("a.qcow2"));
        crate::create_qcow2(&qcow2, 8192).unwrap();
        for image in [raw(&path), open(&spec(&qcow2, Format::Qcow2)).unwrap()] {
            let mut queue = image.queue().unwrap();
            write(&mut *queue, 0, &[7; 8192]).unwrap();
            for offset in [0, 4096, 8192] {
                discard(&mut *queue, offset, 0).unwrap();
            }
            let far = discard(&mut *queue, 8704, 0);
            assert!(matches!(far, Err(IoError::OutOfRange)), "{far:?}");
            assert_eq!(read(&mut *queue, 0, 8192).unwrap(), [7; 8192]);
        }
    }

    #[test]
    fn open_of_a_file_with_half_a_sector_more_leaves_it_out() {
        let directory = Directory::new();
        let image = raw(&directory.file("a.img", 8192 + 100));
        assert_eq!(image.geometry().bytes, 8192);
        let nothing = open(&spec(&directory.file("b.img", 100), Format::Raw));
        let sentence = nothing.err().unwrap().to_string();
        assert!(sentence.contains("less than a sector"), "{sentence}");
    }

    #[test]
    fn requests_past_the_end_of_a_file_that_was_cut_fail_and_the_file_stays_as_it_is() {
        let directory = Directory::new();
        let path = directory.file("a.img", 65536);
        let image = raw(&path);
        let mut queue = image.queue().unwrap();
        write(&mut *queue, 0, &[7; 65536]).unwrap();
        // In the middle of a sector, which is lost then.
        let cut = 8192 + 100;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(cut).unwrap();
        let threads = Threads::new(
            raw_file(&path, 65536),
            Arc::new(Hold::new(path.clone())),
            Event::new().unwrap(),
        );
        for mut queue in [queue, Box::new(threads)] {
            assert_eq!(read(&mut *queue, 0, 8192).unwrap(), [7; 8192]);
            write(&mut *queue, 4096, &[7; 4096]).unwrap();
            for offset in [4096, 8192, 32768] {
                let read = read(&mut *queue, offset, 8192);
                assert!(matches!(read, Err(IoError::Cut { .. })), "{read:?}");
                let write = write(&mut *queue, offset, &[8; 8192]);
                assert!(
                    matches!(write, Err(IoError::Cut { bytes }) if bytes == cut),
                    "{write:?}"
                );
            }
            flush(&mut *queue).unwrap();
            assert_eq!(file.metadata().unwrap().len(), cut);
            assert_eq!(std::fs::read(&path).unwrap()[..8192], [7; 8192]);
        }
        file.set_len(65536).unwrap();
        let mut queue = image.queue().unwrap();
        write(&mut *queue, 32768, &[9; 8192]).unwrap();
        assert_eq!(read(&mut *queue, 32768, 8192).unwrap(), [9; 8192]);
    }

    #[test]
    fn resize_changes_the_disk_and_the_file() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let image = raw(&path);
        image.resize(16384).unwrap();
        assert_eq!(image.geometry().bytes, 16384);
        let mut queue = image.queue().unwrap();
        write(&mut *queue, 15872, &[9; 512]).unwrap();
        image.resize(4096).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
        assert!(write(&mut *queue, 15872, &[9; 512]).is_err());
        assert!(image.resize(4097).is_err());
        assert!(image.resize(0).is_err());
        for more_than_any_file_has in [u64::MAX - 511, (i64::MAX - 511) as u64] {
            let error = image
                .resize(more_than_any_file_has)
                .unwrap_err()
                .to_string();
            assert!(error.contains("more than the file system takes"), "{error}");
            assert_eq!(image.geometry().bytes, 4096);
        }
    }

    #[test]
    fn resize_that_the_host_refuses_leaves_the_disk_as_it_was() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let file = memfd_create("disk", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 16384).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let image = raw(Path::new(&path));
        let mut queue = image.queue().unwrap();
        for bytes in [8192, 32768] {
            let refused = image.resize(bytes).unwrap_err().to_string();
            assert!(refused.contains("which stays as it was"), "{refused}");
            assert_eq!(image.geometry().bytes, 16384);
            write(&mut *queue, 12288, &[9; 4096]).unwrap();
        }
    }
}
