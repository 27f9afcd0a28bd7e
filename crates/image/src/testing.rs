//! For tests: directories, and requests made one at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::Aligned;
use crate::{Buffer, Completion, Format, Image, IoError, Op, OpenSpec, Queue, Request, open};

/// A directory of its own, removed at the end.
pub(crate) struct Directory(PathBuf);

impl Directory {
    /// On the file system of the temporary directory.
    pub(crate) fn new() -> Directory {
        Directory::below(&std::env::temp_dir())
    }

    pub(crate) fn below(parent: &Path) -> Directory {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("hospes-image-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for tests can be made");
        Directory(path)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of `bytes` zeros.
    pub(crate) fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        let file = std::fs::File::create(&path).expect("a file can be made");
        file.set_len(bytes).expect("sparse files can be made");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn spec(path: &Path, format: Format) -> OpenSpec {
    OpenSpec {
        path: path.to_owned(),
        format,
        direct: true,
        discard: true,
        lock_owner: "the test".to_owned(),
        ..OpenSpec::default()
    }
}

pub(crate) fn raw(path: &Path) -> Arc<dyn Image> {
    open(&spec(path, Format::Raw)).expect("the image opens")
}

/// Waits until something completes.
pub(crate) fn wait(queue: &mut dyn Queue, out: &mut Vec<Completion>) {
    let before = out.len();
    while out.len() == before {
        let fd = queue.event_fd();
        let mut poll = [rustix::event::PollFd::new(
            &fd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut poll, None).expect("poll works");
        queue.completions(out);
    }
}

/// One request from its submission to its completion.
pub(crate) fn once(
    queue: &mut dyn Queue,
    op: Op,
    offset: u64,
    bytes: u64,
    buffers: Vec<Buffer>,
) -> Result<(), IoError> {
    queue.submit(Request {
        id: offset,
        op,
        offset,
        bytes,
        buffers,
    });
    queue.flush_submissions();
    let mut out = Vec::new();
    wait(queue, &mut out);
    assert_eq!(out.len(), 1);
    let completion = out.remove(0);
    assert_eq!(completion.id, offset);
    completion.result
}

pub(crate) fn write(queue: &mut dyn Queue, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    let mut copy = Aligned::new(bytes.len());
    copy.copy_from_slice(bytes);
    let buffer = Buffer::of(&mut copy);
    once(queue, Op::Write, offset, bytes.len() as u64, vec![buffer])
}

pub(crate) fn read(queue: &mut dyn Queue, offset: u64, bytes: usize) -> Result<Vec<u8>, IoError> {
    let mut copy = Aligned::new(bytes);
    copy.fill(0xee);
    let buffer = Buffer::of(&mut copy);
    once(queue, Op::Read, offset, bytes as u64, vec![buffer])?;
    Ok(copy.to_vec())
}

pub(crate) fn flush(queue: &mut dyn Queue) -> Result<(), IoError> {
    once(queue, Op::Flush, 0, 0, Vec::new())
}

pub(crate) fn discard(queue: &mut dyn Queue, offset: u64, bytes: u64) -> Result<(), IoError> {
    once(queue, Op::Discard, offset, bytes, Vec::new())
}

/// Bytes that tell their place and `seed`.
pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|at| ((at / 8 + 1).wrapping_mul(seed | 1) >> (at % 8 * 8)) as u8)
        .collect()
}

/// Runs `body` of the test `name` in a directory with 1 MiB of room: in a process of its own, with mounts of its own.
pub(crate) fn full_host(name: &str, body: impl FnOnce(&Path)) {
    const INSIDE: &str = "HOSPES_IMAGE_SMALL_DIRECTORY";
    if let Some(directory) = std::env::var_os(INSIDE) {
        return body(Path::new(&directory));
    }
    let directory = Directory::new();
    let script = "mount -t tmpfs -o size=1M none \"$HOSPES_IMAGE_SMALL_DIRECTORY\" && exec \"$@\"";
    let output = std::process::Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().expect("the test has a program"))
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, &directory.0)
        .output()
        .expect("unshare of util-linux runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
