//! How much memory guests have, as seen from outside of their processes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

/// How /proc names the file of a guest's memory among a process's descriptors.
const GUEST_MEMORY: &[u8] = b"/memfd:hospes-guest";

/// What the host has given a domain's process for its guest's memory, in bytes. The process may have the same memory mapped twice, so what it has mapped says nothing.
pub(crate) fn guest_memory_bytes(pid: u32) -> Option<u64> {
    let mut files = BTreeMap::new();
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let path = descriptor.path();
        // One that is closed meanwhile was none of these.
        let name = fs::read_link(&path).unwrap_or_default();
        if name.as_os_str().as_bytes().starts_with(GUEST_MEMORY)
            && let Ok(file) = fs::metadata(&path)
        {
            // Blocks are 512 bytes by definition (stat(2)).
            files.insert(file.ino(), file.blocks() * 512);
        }
    }
    Some(files.values().sum())
}
