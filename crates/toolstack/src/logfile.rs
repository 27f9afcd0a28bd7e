//! A log file that cannot fill the disk: what the guest prints is the guest's choice.

use std::fs::{File, OpenOptions, rename};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Size at which a log is moved to `<file>.1`, in bytes; both together take at most twice as much.
pub(crate) const LOG_MAX_BYTES: u64 = 16 << 20;

/// Opens a log for appending, readable by the user alone.
pub(crate) fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// `<file>.1`, where a log is moved to.
fn earlier(path: &Path) -> PathBuf {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    old.into()
}

/// Gives a log that may be open another name. What an earlier domain of that name left is moved out of the way, as a log that is full is.
pub(crate) fn move_log(from: &Path, to: &Path) -> io::Result<()> {
    let (from_earlier, to_earlier) = (earlier(from), earlier(to));
    if to.exists() {
        rename(to, &to_earlier)?;
    }
    rename(from, to)?;
    // What was moved there last stays.
    if from_earlier.exists() && !to_earlier.exists() {
        rename(&from_earlier, &to_earlier)?;
    }
    Ok(())
}

pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    max: u64,
}

impl LogFile {
    pub(crate) fn open(path: &Path, max: u64) -> io::Result<LogFile> {
        let file = open_append(path)?;
        let size = file.metadata()?.len();
        Ok(LogFile {
            path: path.to_path_buf(),
            file,
            size,
            max,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// [`move_log`] of this one.
    pub(crate) fn move_to(&mut self, path: &Path) -> io::Result<()> {
        move_log(&self.path, path)?;
        self.path = path.to_path_buf();
        Ok(())
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size.saturating_add(bytes.len() as u64) > self.max {
            rename(&self.path, earlier(&self.path))?;
            self.file = open_append(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}
