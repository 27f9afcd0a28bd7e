//! Making an image durable from outside of its queues.

use std::os::fd::AsFd;
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
        completion(&mut *queue, deadline)??;
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
    use super::*;
    use crate::testing::{Directory, spec};
    use crate::{Format, create_qcow2, open};
    use std::time::Duration;

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
