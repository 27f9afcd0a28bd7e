//! Making an image durable from outside of its queues.

use std::os::fd::AsFd;
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{FlushError, IoError};
use crate::types::{Image, Op, Queue, Request};

/// Makes durable what was written, and all that the format keeps besides, until `deadline`. To be called when no queue has anything in flight.
///
/// # Errors
/// The host fails or takes longer.
pub fn flush(image: &dyn Image, deadline: Instant) -> Result<(), FlushError> {
    if image.geometry().read_only {
        return Ok(());
    }
    let mut queue = image.queue()?;
    // The second writes what the first has made known as free.
    for _ in 0..2 {
        queue.submit(Request {
            id: 0,
            op: Op::Flush,
            offset: 0,
            bytes: 0,
            buffers: Vec::new(),
        });
        queue.flush_submissions();
        match completion(&mut *queue, deadline) {
            Err(FlushError::Late) => {
                // Its end waits for the host, which may take as long as it likes.
                let _ = thread::Builder::new().spawn(move || drop(queue));
                return Err(FlushError::Late);
            }
            completed => completed??,
        }
    }
    Ok(())
}

fn completion(queue: &mut dyn Queue, deadline: Instant) -> Result<Result<(), IoError>, FlushError> {
    let mut completions = Vec::new();
    loop {
        queue.completions(&mut completions);
        if let Some(completion) = completions.pop() {
            return Ok(completion.result);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(FlushError::Late);
        }
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let event = queue.event_fd();
        let mut descriptors = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
        match poll(&mut descriptors, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(FlushError::Poll(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::files::HostFiles;
    use crate::host::HostFile;
    use crate::open::open_on;
    use crate::storage::Storage;
    use crate::testing::{Directory, spec};
    use crate::types::Buffer;
    use crate::{Format, create_qcow2, open};

    /// A file whose syncs wait while somebody has the gate.
    struct Slow {
        below: Arc<dyn Storage>,
        gate: Arc<Mutex<()>>,
    }

    impl Storage for Slow {
        fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
            self.below.read(buffers, offset)
        }

        fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()> {
            self.below.write(buffers, offset)
        }

        fn sync(&self) -> io::Result<()> {
            drop(self.gate.lock().unwrap());
            self.below.sync()
        }

        fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
            self.below.discard(offset, bytes)
        }

        fn len(&self) -> io::Result<u64> {
            self.below.len()
        }

        fn set_len(&self, bytes: u64) -> io::Result<()> {
            self.below.set_len(bytes)
        }

        fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>> {
            None
        }
    }

    #[test]
    fn flush_of_a_host_that_hangs_is_late_and_not_waited_for() {
        let directory = Directory::new();
        let path = directory.file("a.img", 1 << 20);
        let gate = Arc::new(Mutex::new(()));
        let slow = |below| -> io::Result<Arc<dyn Storage>> {
            let gate = Arc::clone(&gate);
            Ok(Arc::new(Slow { below, gate }))
        };
        let (image, _) = open_on(&spec(&path, Format::Raw), &HostFiles, slow).unwrap();
        let closed = gate.lock().unwrap();
        // Long enough for the sync to begin.
        let late = flush(&*image, Instant::now() + Duration::from_millis(200));
        assert!(matches!(late, Err(FlushError::Late)), "{late:?}");
        drop(closed);
        flush(&*image, Instant::now() + Duration::from_secs(3600)).unwrap();
    }

    #[test]
    fn flush_ends_for_both_formats() {
        let directory = Directory::new();
        let raw = directory.file("a.img", 1 << 20);
        let qcow2 = directory.join("a.qcow2");
        create_qcow2(&qcow2, 1 << 20).unwrap();
        for (path, format) in [(&raw, Format::Raw), (&qcow2, Format::Qcow2)] {
            let image = open(&spec(path, format)).unwrap();
            flush(&*image, Instant::now() + Duration::from_secs(10)).unwrap();
        }
    }
}
