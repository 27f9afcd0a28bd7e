//! A file that appears under its name when it is complete, readable by its owner alone; a device or pipe as it is.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Result, at};
use crate::launch;

/// Where something is written.
pub(crate) struct Target {
    pub(crate) file: File,
    path: PathBuf,
    /// Whether it has still to appear there.
    pub(crate) is_new: bool,
    /// Its name until then, where the file system knows no files without one.
    draft: Option<PathBuf>,
}

impl Target {
    pub(crate) fn open(path: &Path) -> Result<Target> {
        let fault = |source| at("cannot write", path)(source);
        if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(fault(ErrorKind::IsADirectory.into()));
        }
        let is_special = |data: fs::Metadata| !data.is_file();
        let beneath = |root| path.starts_with(root);
        if fs::metadata(path).is_ok_and(is_special) || beneath("/dev") || beneath("/proc") {
            let file = OpenOptions::new().write(true).open(path).map_err(fault)?;
            return Ok(Target {
                file,
                path: path.to_path_buf(),
                is_new: false,
                draft: None,
            });
        }
        // A link stays one.
        let place = fs::canonicalize(path).or_else(|_| std::path::absolute(path));
        let place = place.map_err(fault)?;
        let directory = place.parent().unwrap_or(Path::new("/"));
        let nameless = rustix::fs::openat(
            rustix::fs::CWD,
            directory,
            OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC,
            // What is written has a guest's memory, and with it its secrets.
            Mode::RUSR | Mode::WUSR,
        );
        let (file, draft) = match nameless {
            Ok(file) => (File::from(file), None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let draft = draft_of(&place)?;
                let mut options = OpenOptions::new();
                options.write(true).create_new(true).mode(0o600);
                (options.open(&draft).map_err(fault)?, Some(draft))
            }
            Err(errno) => return Err(fault(errno.into())),
        };
        Ok(Target {
            file,
            path: place,
            is_new: true,
            draft,
        })
    }

    /// Makes sure that what was written outlives a failure of the host, and gives it its name.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let fault = at("cannot write", &self.path);
        match self.file.sync_all() {
            // Pipes and terminals keep nothing.
            Err(why) if !self.is_new && why.kind() == ErrorKind::InvalidInput => {}
            synced => synced.map_err(&fault)?,
        }
        if !self.is_new {
            return Ok(());
        }
        if self.draft.is_none() {
            let draft = draft_of(&self.path)?;
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let here = rustix::fs::CWD;
            rustix::fs::linkat(here, own, here, &draft, AtFlags::SYMLINK_FOLLOW)
                .map_err(|errno| fault(errno.into()))?;
            self.draft = Some(draft);
        }
        if let Some(draft) = &self.draft {
            fs::rename(draft, &self.path).map_err(&fault)?;
            self.draft = None;
        }
        Ok(())
    }

    /// Behind [`Target::finish`]: makes sure that the name does so, too.
    pub(crate) fn settle(&self) -> Result<()> {
        if !self.is_new {
            return Ok(());
        }
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(at("cannot write", &self.path))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(draft) = &self.draft {
            let _ = fs::remove_file(draft);
        }
    }
}

/// A name beside a file's that nobody else has.
fn draft_of(place: &Path) -> Result<PathBuf> {
    let mut name = OsString::from(".");
    name.push(place.file_name().unwrap_or_default());
    name.push(format!(".{}", launch::random_uuid()?));
    Ok(place.with_file_name(name))
}
