//! Guest memory: one file of shared memory, mapped so that host address = base + guest physical address, for ever.
//!
//! Everything read from here is under the guest's control and may change between two reads: copy once, validate, use.
//! The guest reaches only ranges that [`GuestMemory`] knows as RAM or as special pages; what lies between them in the
//! reservation is `PROT_NONE`.
//!
//! Invariants: the reservation is never unmapped while a `GuestMemory` lives; a frame, once backed, stays backed by
//! readable and writable memory; special pages replace what lay there in place (`MAP_FIXED`).
//! Base and offsets in the file agree with guest physical addresses modulo [`HUGE_PAGE`], so that the host can use huge pages.
//! Limits: the reservation ends [`RESERVE_ABOVE_RAM`] bytes above the highest RAM address.

mod file;
mod page;
mod written;

use std::os::fd::OwnedFd;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use file::{HUGE_PAGE, shared_memory_file, small_memory_file};
pub use page::{Area, Page};
pub use written::{FrameSet, WriteLog};

/// Address space kept free above the last byte of RAM; guests place grant frames there.
pub const RESERVE_ABOVE_RAM: u64 = 16 << 30;

/// Why an access to guest memory, or its creation, failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest physical range {gpa}+{len:#x} is not memory")]
    NotMemory { gpa: Gpa, len: u64 },
    #[error("cannot {what} {bytes} bytes of guest memory: {source}")]
    Host {
        what: &'static str,
        bytes: u64,
        source: rustix::io::Errno,
    },
    #[error("guest memory range {start:#x}-{end:#x} is empty, unaligned or overlaps another")]
    BadRange { start: u64, end: u64 },
}

/// A range of guest physical addresses backed by memory: `start..end`, bytes, page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// The memory of one domain.
#[derive(Debug)]
pub struct GuestMemory {
    base: *mut u8,
    reserved: u64,
    fd: OwnedFd,
    fd_len: AtomicU64,
    ram: Vec<Range>,
    /// Where each range of `ram` begins in the file.
    offsets: Vec<u64>,
    /// Frames that show special pages, in RAM and outside (grant frames).
    extra: RwLock<Vec<Gfn>>,
    /// How many there are.
    specials: AtomicUsize,
    log: WriteLog,
}

// SAFETY: `base` points to a reservation that lives as long as the value; all accesses through it are raw copies or
// atomics, never references to guest bytes, so sharing between threads races only as hardware would.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

fn host(what: &'static str, bytes: u64) -> impl Fn(rustix::io::Errno) -> MemoryError {
    move |source| MemoryError::Host {
        what,
        bytes,
        source,
    }
}

/// Where in the file each range lies, as near one behind the other as huge pages allow; and the size of the file. Bytes.
fn file_offsets(ram: &[Range]) -> (Vec<u64>, u64) {
    let mut end = 0;
    let place = |r: &Range| {
        let offset = end + r.start.wrapping_sub(end) % HUGE_PAGE;
        end = offset + (r.end - r.start);
        offset
    };
    (ram.iter().map(place).collect(), end)
}

/// Reserves address space, inaccessible as yet, at a multiple of [`HUGE_PAGE`].
pub fn reserve(bytes: u64) -> rustix::io::Result<*mut u8> {
    // SAFETY: an anonymous reservation at an address the kernel chooses overlaps nothing.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            (bytes + HUGE_PAGE) as usize,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }? as *mut u8;
    let before = start.align_offset(HUGE_PAGE as usize);
    let after = HUGE_PAGE as usize - before;
    // SAFETY: both ends lie in the reservation that was just made and that nobody uses yet.
    unsafe {
        let base = start.add(before);
        if before > 0 {
            rustix::mm::munmap(start.cast(), before)?;
        }
        if after > 0 {
            rustix::mm::munmap(base.add(bytes as usize).cast(), after)?;
        }
        Ok(base)
    }
}

impl GuestMemory {
    /// Reserves and maps the given RAM ranges (ascending, page aligned, not overlapping), zero filled.
    pub fn new(ram: &[Range]) -> Result<GuestMemory, MemoryError> {
        let mut last = 0;
        for r in ram {
            if r.start >= r.end || r.start < last || (r.start | r.end) % PAGE_SIZE != 0 {
                return Err(MemoryError::BadRange {
                    start: r.start,
                    end: r.end,
                });
            }
            last = r.end;
        }
        let reserved = last.max(1 << 32) + RESERVE_ABOVE_RAM;
        let total: u64 = ram.iter().map(|r| r.end - r.start).sum();
        let (offsets, size) = file_offsets(ram);
        let fd = shared_memory_file("hospes-guest").map_err(host("create", total))?;
        rustix::fs::ftruncate(&fd, size).map_err(host("size", total))?;
        let base = reserve(reserved).map_err(host("reserve", reserved))?;
        let memory = GuestMemory {
            base,
            reserved,
            fd,
            fd_len: AtomicU64::new(size),
            ram: ram.to_vec(),
            offsets,
            extra: RwLock::new(Vec::new()),
            specials: AtomicUsize::new(0),
            log: WriteLog::new(ram),
        };
        for (r, &offset) in ram.iter().zip(&memory.offsets) {
            memory.map_fixed(r.start, r.end - r.start, offset)?;
        }
        Ok(memory)
    }

    fn map_fixed(&self, gpa: u64, len: u64, fd_offset: u64) -> Result<(), MemoryError> {
        debug_assert!(gpa + len <= self.reserved);
        // SAFETY: the target lies inside our own reservation, so MAP_FIXED replaces only mappings of ours, and nobody
        // holds references (only raw pointers that stay valid) to them.
        unsafe {
            rustix::mm::mmap(
                self.base.add(gpa as usize).cast(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                &self.fd,
                fd_offset,
            )
        }
        .map_err(host("map", len))?;
        Ok(())
    }

    /// Host address of guest physical address 0.
    pub fn host_base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes of address space reserved from [`Self::host_base`].
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved
    }

    /// The RAM ranges given at creation.
    pub fn ram(&self) -> &[Range] {
        &self.ram
    }

    /// The memory file; special pages lie behind the RAM.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Which frames are written. What is written by this type's own methods is noted there.
    pub fn log(&self) -> &WriteLog {
        &self.log
    }

    /// Whether the frame is backed by memory.
    pub fn is_backed(&self, gfn: Gfn) -> bool {
        let a = gfn.gpa().0;
        self.ram.iter().any(|r| r.start <= a && a < r.end)
            || self.extra.read().expect("extra lock").contains(&gfn)
    }

    /// Host address of a backed frame.
    pub fn page(&self, gfn: Gfn) -> Option<*mut u8> {
        // SAFETY: a backed frame lies inside the reservation.
        self.is_backed(gfn)
            .then(|| unsafe { self.base.add(gfn.gpa().0 as usize) })
    }

    /// Creates a zeroed page of the memory file that no guest frame shows yet; returns its offset in the file.
    pub fn new_special_page(&self) -> Result<u64, MemoryError> {
        let offset = self.fd_len.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        rustix::fs::ftruncate(&self.fd, offset + PAGE_SIZE).map_err(host("size", PAGE_SIZE))?;
        Ok(offset)
    }

    /// Maps a special page for the monitor's own use, at an address that never changes.
    pub fn map_special_for_monitor(&self, offset: u64) -> Result<*mut u8, MemoryError> {
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing.
        let p = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &self.fd,
                offset,
            )
        }
        .map_err(host("map", PAGE_SIZE))?;
        Ok(p.cast())
    }

    /// Shows the special page at `offset` in guest frame `gfn`, in place of what was there. Idempotent.
    ///
    /// The caller must have the engine forget cached translations of the frame.
    pub fn place_special(&self, gfn: Gfn, offset: u64) -> Result<(), MemoryError> {
        let gpa = gfn.gpa();
        if gfn.0 > (self.reserved >> 12) || gpa.0 + PAGE_SIZE > self.reserved {
            return Err(MemoryError::NotMemory {
                gpa,
                len: PAGE_SIZE,
            });
        }
        self.map_fixed(gpa.0, PAGE_SIZE, offset)?;
        let mut extra = self.extra.write().expect("extra lock");
        if !extra.contains(&gfn) {
            extra.push(gfn);
            self.specials.store(extra.len(), Ordering::SeqCst);
        }
        Ok(())
    }

    /// Frames that show special pages.
    pub fn special_frames(&self) -> Vec<Gfn> {
        self.extra.read().expect("extra lock").clone()
    }

    /// How many frames show special pages; grows as they are placed.
    pub fn special_count(&self) -> usize {
        self.specials.load(Ordering::SeqCst)
    }

    /// Whether a frame shows a special page.
    pub fn is_special(&self, gfn: Gfn) -> bool {
        self.extra.read().expect("extra lock").contains(&gfn)
    }

    /// Gives the memory of frames that lie in one range of RAM back to the host; they read as zeros afterwards and take memory again when written.
    pub fn discard(&self, first: Gfn, pages: u64) -> Result<(), MemoryError> {
        let len = pages.saturating_mul(PAGE_SIZE);
        let offset = self
            .ram_offset(first, pages)
            .ok_or(MemoryError::NotMemory {
                gpa: Gpa(first.0.saturating_mul(PAGE_SIZE)),
                len,
            })?;
        rustix::fs::fallocate(
            &self.fd,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
        .map_err(host("discard", len))?;
        self.log.note_written(first.gpa(), len);
        Ok(())
    }

    /// Memory of the host that all frames together take now, in bytes: what was never touched and what was discarded takes none.
    pub fn used_bytes(&self) -> u64 {
        // The file is open, so its state can be had; blocks are 512 bytes by definition (stat(2)).
        rustix::fs::fstat(&self.fd).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }

    /// Whether frames lie in one range of RAM, whatever they show.
    pub fn is_ram(&self, first: Gfn, pages: u64) -> bool {
        self.ram_offset(first, pages).is_some()
    }

    /// The first run of RAM at or above `from` that takes memory of the host; all other RAM is zero. What special pages hide counts as RAM.
    pub fn occupied(&self, from: Gpa) -> Result<Option<Range>, MemoryError> {
        let seek = |to| match rustix::fs::seek(&self.fd, to) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(source) => Err(host("look through", PAGE_SIZE)(source)),
        };
        for (r, &offset) in self.ram.iter().zip(&self.offsets) {
            if r.end <= from.0 {
                continue;
            }
            let begin = offset + from.0.saturating_sub(r.start);
            let end = offset + (r.end - r.start);
            let Some(data) = seek(SeekFrom::Data(begin))?.filter(|data| *data < end) else {
                continue;
            };
            let hole = seek(SeekFrom::Hole(data))?.unwrap_or(end).min(end);
            return Ok(Some(Range {
                start: r.start + (data - offset),
                end: r.start + (hole - offset),
            }));
        }
        Ok(None)
    }

    /// Copies bytes of one range of RAM, whatever its frames show, and takes no memory for what is zero.
    pub fn read_ram(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = buf.len() as u64;
        let mut ranges = self.ram.iter().zip(&self.offsets);
        let inside = |r: &Range| r.start <= gpa.0 && len <= r.end.saturating_sub(gpa.0);
        let (r, offset) = ranges
            .find(|(r, _)| inside(r))
            .ok_or(MemoryError::NotMemory { gpa, len })?;
        let mut at = offset + (gpa.0 - r.start);
        let mut rest = buf;
        while !rest.is_empty() {
            match rustix::io::pread(&self.fd, &mut *rest, at) {
                // The file ends behind the RAM.
                Ok(0) => return Err(MemoryError::NotMemory { gpa, len }),
                Ok(read) => {
                    at += read as u64;
                    rest = &mut rest[read..];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => return Err(host("read", len)(source)),
            }
        }
        Ok(())
    }

    /// Where what a frame shows lies in the memory file, in bytes; `None` for special pages.
    pub fn fd_offset(&self, gfn: Gfn) -> Option<u64> {
        if self.is_special(gfn) {
            return None;
        }
        self.ram_offset(gfn, 1)
    }

    /// Where frames of one range of RAM lie in the memory file, in bytes, whatever they show.
    pub fn ram_offset(&self, first: Gfn, pages: u64) -> Option<u64> {
        let start = first.0.checked_mul(PAGE_SIZE)?;
        let end = first.0.checked_add(pages)?.checked_mul(PAGE_SIZE)?;
        let mut ranges = self.ram.iter().zip(&self.offsets);
        ranges
            .find(|(r, _)| r.start <= start && start < end && end <= r.end)
            .map(|(r, offset)| offset + (start - r.start))
    }

    /// Host pointer to `len` bytes at `gpa`; an error unless every page of them is backed.
    pub fn slice(&self, gpa: Gpa, len: u64) -> Result<*mut u8, MemoryError> {
        let bad = MemoryError::NotMemory { gpa, len };
        let Some(end) = gpa.0.checked_add(len) else {
            return Err(bad);
        };
        let inside = self.ram.iter().any(|r| r.start <= gpa.0 && end <= r.end)
            || (gpa.gfn().0..=(end.max(gpa.0 + 1) - 1) >> 12).all(|f| self.is_backed(Gfn(f)));
        if !inside {
            return Err(bad);
        }
        // SAFETY: the range was just checked to lie in backed pages of the reservation.
        Ok(unsafe { self.base.add(gpa.0 as usize) })
    }

    /// Copies guest bytes out.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let p = self.slice(gpa, buf.len() as u64)?;
        // SAFETY: `slice` checked the source; `buf` is ours, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Copies bytes into the guest.
    pub fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let p = self.slice(gpa, buf.len() as u64)?;
        // SAFETY: `slice` checked the target; `buf` is ours, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), p, buf.len()) };
        self.log.note_written(gpa, buf.len() as u64);
        Ok(())
    }

    /// Fills a range with zeros.
    pub fn zero(&self, gpa: Gpa, len: u64) -> Result<(), MemoryError> {
        let p = self.slice(gpa, len)?;
        // SAFETY: `slice` checked the target.
        unsafe { std::ptr::write_bytes(p, 0, len as usize) };
        self.log.note_written(gpa, len);
        Ok(())
    }

    /// Reads one plain value.
    pub fn read_obj<T: FromBytes + IntoBytes + Immutable>(
        &self,
        gpa: Gpa,
    ) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes one plain value.
    pub fn write_obj<T: IntoBytes + Immutable>(
        &self,
        gpa: Gpa,
        value: &T,
    ) -> Result<(), MemoryError> {
        self.write(gpa, value.as_bytes())
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours and, with the last owner gone, nothing points into it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.reserved as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[
            Range {
                start: 0,
                end: 0x10_0000,
            },
            Range {
                start: 1 << 32,
                end: (1 << 32) + 0x2000,
            },
        ])
        .unwrap()
    }

    #[test]
    fn read_across_the_end_of_a_range_fails() {
        let m = memory();
        let mut buf = [0; 8];
        m.read(Gpa(0xf_fff8), &mut buf).unwrap();
        assert!(m.read(Gpa(0xf_fff9), &mut buf).is_err());
        assert!(m.read(Gpa(u64::MAX - 3), &mut buf).is_err());
    }

    #[test]
    fn place_special_replaces_the_page_and_keeps_neighbours() {
        let m = memory();
        m.write(Gpa(0x1000), &[1; 4096]).unwrap();
        m.write(Gpa(0x2000), &[2; 4096]).unwrap();
        let off = m.new_special_page().unwrap();
        let own = m.map_special_for_monitor(off).unwrap();
        m.place_special(Gfn(1), off).unwrap();
        // SAFETY: `own` is a mapped page.
        unsafe { own.write_volatile(7) };
        let mut b = [0; 1];
        m.read(Gpa(0x1000), &mut b).unwrap();
        assert_eq!(b, [7]);
        m.read(Gpa(0x2000), &mut b).unwrap();
        assert_eq!(b, [2]);
    }

    #[test]
    fn place_special_outside_ram_backs_the_frame() {
        let m = memory();
        let gfn = Gfn(0x17fff);
        assert!(!m.is_backed(gfn));
        let off = m.new_special_page().unwrap();
        m.place_special(gfn, off).unwrap();
        m.place_special(gfn, off).unwrap();
        assert!(m.is_backed(gfn));
        assert!(m.place_special(Gfn(u64::MAX >> 12), off).is_err());
    }

    #[test]
    fn files_and_addresses_agree_modulo_a_huge_page() {
        let range = |start, end| Range { start, end };
        let ram = [
            range(0, 0x10_1000),
            range(0xfc00_0000, 0xfc01_1000),
            range(1 << 32, 5 << 30),
        ];
        let (offsets, size) = file_offsets(&ram);
        assert_eq!(offsets, [0, 0x20_0000, 0x40_0000]);
        assert_eq!(size, 0x40_0000 + (1 << 30));
        let m = memory();
        assert_eq!(m.host_base() as u64 % HUGE_PAGE, 0);
        assert_eq!(m.fd_offset(Gfn((1 << 20) + 1)), Some(0x20_1000));
    }

    #[test]
    fn occupied_finds_what_was_written_and_read_ram_takes_nothing() {
        let m = memory();
        assert_eq!(m.occupied(Gpa(0)).unwrap(), None);
        let mut b = [9; 2 * PAGE_SIZE as usize];
        m.read_ram(Gpa(0x8000), &mut b).unwrap();
        assert!(b.iter().all(|byte| *byte == 0));
        assert_eq!(m.occupied(Gpa(0)).unwrap(), None);
        m.write(Gpa((1 << 32) + 0x1000), &[5; 16]).unwrap();
        let found = m.occupied(Gpa(0x3000)).unwrap().unwrap();
        assert!(found.start <= (1 << 32) + 0x1000 && found.end >= (1 << 32) + 0x2000);
        assert_eq!(m.occupied(Gpa(found.end)).unwrap(), None);
        m.read_ram(Gpa((1 << 32) + 0x1000), &mut b[..16]).unwrap();
        assert_eq!(b[..16], [5; 16]);
        assert!(m.read_ram(Gpa((1 << 32) + 0x1000), &mut b).is_err());
        assert!(m.read_ram(Gpa(u64::MAX), &mut b).is_err());
        // A page of its own in place of the RAM hides it and is no RAM.
        let off = m.new_special_page().unwrap();
        m.place_special(Gfn((1 << 20) + 1), off).unwrap();
        m.read_ram(Gpa((1 << 32) + 0x1000), &mut b[..16]).unwrap();
        assert_eq!(b[..16], [5; 16]);
    }

    #[test]
    fn discard_gives_zeros_and_the_memory_back() {
        let m = memory();
        m.write(Gpa(0x8000), &[9; 0x3000]).unwrap();
        let used = m.used_bytes();
        assert!(used >= 0x3000);
        m.discard(Gfn(8), 2).unwrap();
        let mut b = [1; 16];
        m.read(Gpa(0x9000), &mut b).unwrap();
        assert_eq!(b, [0; 16]);
        m.read(Gpa(0xa000), &mut b).unwrap();
        assert_eq!(b, [9; 16]);
        m.discard(Gfn(0), 0x100).unwrap();
        // Reading takes memory, too.
        assert!(m.used_bytes() <= used);
        assert_eq!(m.used_bytes(), 0);
    }

    #[test]
    fn discard_beyond_a_range_is_refused() {
        let m = memory();
        for (first, pages) in [
            (0xff, 2),
            (0x100, 1),
            (u64::MAX, 1),
            (u64::MAX >> 12, 2),
            (0, 0),
        ] {
            assert!(m.discard(Gfn(first), pages).is_err(), "{first:#x} {pages}");
            assert!(!m.is_ram(Gfn(first), pages));
        }
    }
}
