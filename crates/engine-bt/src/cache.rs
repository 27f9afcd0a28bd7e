//! The memory of translated code: one file, mapped once writable and once executable, never both through one mapping.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use hospes_memory::{HUGE_PAGE, shared_memory_file, small_memory_file};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes kept at the start for the stubs.
pub const STUB_BYTES: usize = 8192;
/// Bytes at the end of the cache for each vCPU's native snippets.
pub const SNIPPET_BYTES: usize = 64 * 1024;

/// The two mappings of the code cache. Positions are bytes from its start.
#[derive(Debug)]
pub struct CodeMemory {
    write: *mut u8,
    exec: *mut u8,
    len: usize,
}

// SAFETY: the mappings live as long as the value. Writers hold the block table's lock or write single aligned words atomically.
unsafe impl Send for CodeMemory {}
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    pub fn new(len: usize) -> Result<CodeMemory, rustix::io::Errno> {
        const NAME: &str = "hospes-code";
        // A host may forbid to execute what is in a file system.
        shared_memory_file(NAME)
            .and_then(|fd| CodeMemory::map(&fd, len))
            .or_else(|_| CodeMemory::map(&small_memory_file(NAME)?, len))
    }

    fn map(fd: &OwnedFd, len: usize) -> Result<CodeMemory, rustix::io::Errno> {
        // The file is a whole number of huge pages, as the last one would not be huge otherwise.
        let bytes = len.next_multiple_of(HUGE_PAGE as usize);
        rustix::fs::ftruncate(fd, bytes as u64)?;
        let map = |prot| {
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            // SAFETY: a new mapping at an address the kernel chooses, which begins a huge page where it has some, overlaps nothing.
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, 0) }
        };
        Ok(CodeMemory {
            write: map(ProtFlags::READ | ProtFlags::WRITE)?.cast(),
            exec: map(ProtFlags::READ | ProtFlags::EXEC)?.cast(),
            len,
        })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Executable address of a position.
    pub fn address(&self, pos: usize) -> usize {
        debug_assert!(pos < self.len);
        self.exec as usize + pos
    }

    /// Position of an executable address, if it is inside.
    pub fn position(&self, address: usize) -> Option<usize> {
        address
            .checked_sub(self.exec as usize)
            .filter(|&p| p < self.len)
    }

    /// Puts code where nothing executes yet.
    pub fn put(&self, pos: usize, code: &[u8]) {
        assert!(pos + code.len() <= self.len, "code outside the cache");
        // SAFETY: inside the mapping; the range is not yet reachable by any vCPU.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(pos), code.len()) };
    }

    /// Copies code to where nothing executes yet, changed as `change` says.
    pub fn copy(&self, from: usize, to: usize, len: usize, change: impl FnOnce(&mut [u8])) {
        assert!(
            from + len <= to && to + len <= self.len,
            "code outside the cache"
        );
        // SAFETY: both ranges are inside the mapping and do not overlap. The second is not yet reachable by any vCPU, nor by other writers, who would
        // hold the lock that the caller holds; the first changes under that lock only.
        let code = unsafe {
            std::ptr::copy_nonoverlapping(self.write.add(from), self.write.add(to), len);
            std::slice::from_raw_parts_mut(self.write.add(to), len)
        };
        change(code);
    }

    /// Where the jump with the 4-byte aligned displacement at `pos` goes.
    pub fn jump_target(&self, pos: usize) -> usize {
        assert!(
            pos.is_multiple_of(4) && pos + 4 <= self.len,
            "misplaced jump"
        );
        // SAFETY: aligned and inside the mapping, which other threads change atomically here.
        let word = unsafe { &*self.write.add(pos).cast::<std::sync::atomic::AtomicI32>() };
        (pos + 4).wrapping_add_signed(word.load(Ordering::Acquire) as isize)
    }

    /// Replaces the 4-byte aligned jump displacement at `pos` so that the jump goes to `target`. Other vCPUs may be executing it.
    pub fn patch_jump(&self, pos: usize, target: usize) {
        assert!(
            pos.is_multiple_of(4) && pos + 4 <= self.len,
            "misplaced jump"
        );
        let rel = (target as i64 - (pos as i64 + 4)) as i32;
        // SAFETY: aligned and inside the mapping; a single aligned store, which instruction fetch sees whole.
        unsafe {
            (*self.write.add(pos).cast::<std::sync::atomic::AtomicI32>())
                .store(rel, Ordering::Release)
        };
    }

    /// Replaces the 5-byte no-operation at the 8-byte aligned `pos` by a jump to `target`. Other vCPUs may be executing it.
    pub fn divert(&self, pos: usize, target: usize) {
        assert!(
            pos.is_multiple_of(8) && pos + 8 <= self.len,
            "misplaced entry"
        );
        let rel = (target as i64 - (pos as i64 + 5)) as i32;
        // SAFETY: aligned and inside the mapping. The three bytes behind keep their value: only the lock's holder writes here.
        unsafe {
            let word = &*self.write.add(pos).cast::<AtomicU64>();
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            bytes[0] = 0xe9;
            bytes[1..5].copy_from_slice(&rel.to_le_bytes());
            word.store(u64::from_le_bytes(bytes), Ordering::Release);
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        let mapped = self.len.next_multiple_of(HUGE_PAGE as usize);
        // SAFETY: both mappings were made in `map`; no vCPU is left that could execute them.
        unsafe {
            let _ = rustix::mm::munmap(self.write.cast(), mapped);
            let _ = rustix::mm::munmap(self.exec.cast(), mapped);
        }
    }
}
