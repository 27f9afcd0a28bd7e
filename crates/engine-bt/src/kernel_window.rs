//! The kernel window: kernel memory of the guest, shown in the monitor's address space where one instruction leads to from a guest address, without a look into any table.
//!
//! Most of what a kernel accesses lies in a linear mapping of all memory, in its own image and in the array that describes its frames: large, global mappings that hardly ever
//! change. They are mapped here from the guest's memory file, so the host's processor translates and checks instead of emitted code. Whatever is not shown faults
//! there, and the instruction that did so is translated with a check from then on.
//!
//! Invariants
//! * An *extent* shows consecutive addresses by consecutive frames of RAM, in global pages of the kernel's alone. What flushes global pages, one or all, has the extents walked again before
//!   the guest goes on; those that have changed go.
//! * It can be written where the guest's tables allow that with the dirty bit set, but for frames with code: such a frame is made read-only before its bytes are read for translation. While
//!   written frames are logged nothing is shown.
//! * Pages of stacks are extents of one page each, which come and go ([`stacks`]).
//! * Special frames are not shown; what else lies in the memory file at their place never is.
//! * All vCPUs use the same window, so the top tables of all have the same entries for what it shows, or none. Four addresses 2^43 and 2^46 apart share a place: nothing is shown whose place
//!   other tables lead to. Both are looked at whenever a vCPU loads a root or flushes.
//! * Nothing but extents lies in what [`hospes_translate::layout::WINDOW`] says emitted code can reach; a process has one such window, and the first machine that needs it has it.

mod extent;
mod stacks;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use hospes_engine::cr;
use hospes_memory::GuestMemory;
use hospes_translate::layout::{WINDOW, WINDOW_REACH, window_address};
use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

pub(crate) use extent::{Asker, root};
use extent::{Extent, Roof, UPPER, guest_addresses};
use stacks::Stacks;

/// Most extents.
const EXTENTS: usize = 64;
/// How many times the guest's memory they show at most: its host keeps page tables for each.
const TIMES_SHOWN: u64 = 4;
/// Most mappings that they may come apart into. A process has 65,530 by default (proc_sys_vm(5)), for everything.
const PIECES: usize = 50_000;
/// As many of these may still come when something is shown; where that alone leaves no room for them the window is given up.
const PIECES_TO_COME: usize = 8_000;
/// Stores of one instruction to frames with code, after which it is one that writes code.
const CODE_WRITES: u32 = 4;
/// The same for stores to stacks.
const STACK_WRITES: u32 = 64;
/// Instructions that are remembered for that.
const WRITERS: usize = 4096;
/// Strikes after which nothing is tried there any more.
const STRIKES: u32 = 16;
/// log2 of the bytes that they are counted for, and of how many such regions that is remembered.
const REGION_BITS: u32 = 21;
const REGIONS: usize = 4096;
/// How often vCPUs may load tables that disagree before it is given up.
const HOPELESS: u32 = 64;

/// The address space that emitted code can reach belongs to a machine of this process.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// What becomes of an instruction that faulted in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page is there now.
    Again,
    /// It is the instruction semantics' this time.
    Step,
    /// It accesses other memory, and is to be translated with a check.
    Elsewhere,
    /// Nothing is shown at present: it is to be translated anew.
    Closed,
}

#[derive(Debug, Default)]
struct State {
    /// `None` until it is first needed.
    reserved: Option<bool>,
    extents: Vec<Extent>,
    stacks: Stacks,
    /// What they rely on.
    roofs: Vec<Roof>,
    /// Written frames are being logged.
    shut: bool,
    /// Something was shown then.
    shut_something: bool,
    given_up: bool,
    disagreements: u32,
    /// The same for pages of stacks that were not shown for that.
    stack_disagreements: u32,
    /// How often something could not be shown or not for long, by address in units of 2 MiB.
    strikes: HashMap<u64, u32>,
    /// How often instructions have stored to frames with code, by address.
    writers: HashMap<u64, u32>,
}

/// What the machine's window shows. Lock order: after the translations.
#[derive(Debug, Default)]
pub(crate) struct KernelWindow {
    state: RwLock<State>,
    /// How many extents and pages of stacks there are, for those who would find nothing to do.
    extents: AtomicUsize,
    open: AtomicBool,
    /// How many special frames are hidden, the first that were placed.
    specials: AtomicUsize,
}

/// Whether the host's processor has a PEXT that is worth a window: AMD's before Zen 3, and those made after them, take some 250 cycles for this one, which is more than any check does.
pub fn can_have_kernel_window() -> bool {
    let [_, b, c, d] = hospes_sys::cpuid(0, 0);
    let [version, ..] = hospes_sys::cpuid(1, 0);
    let name = [b, d, c].map(u32::to_le_bytes).concat();
    let family = (version >> 8 & 15) + (version >> 20 & 255);
    family >= 0x19 || !matches!(name.as_slice(), b"AuthenticAMD" | b"HygonGenuine")
}

/// Has nothing be accessible in a range of the address space.
///
/// # Safety
/// As mmap(2) with these flags: with `FIXED` whatever lies there goes.
unsafe fn map_nothing(range: &Range<u64>, fixed: MapFlags) -> Result<*mut c_void, Errno> {
    let (at, bytes) = (range.start as *mut _, (range.end - range.start) as usize);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
    // SAFETY: as the caller says.
    unsafe { rustix::mm::mmap_anonymous(at, bytes, ProtFlags::empty(), flags) }
}

fn reserve() -> bool {
    if !can_have_kernel_window() || TAKEN.swap(true, Ordering::SeqCst) {
        return false;
    }
    // SAFETY: the kernel refuses where anything is mapped already; nobody else maps at addresses of their choice.
    let made = unsafe { map_nothing(&WINDOW_REACH, MapFlags::FIXED_NOREPLACE) };
    match made {
        Ok(at) if at as u64 == WINDOW_REACH.start => true,
        other => {
            if let Ok(elsewhere) = other {
                // SAFETY: a kernel that does not know the flag has put it elsewhere, where nobody uses it.
                let _ = unsafe {
                    rustix::mm::munmap(elsewhere, (WINDOW_REACH.end - WINDOW_REACH.start) as usize)
                };
            }
            TAKEN.store(false, Ordering::SeqCst);
            false
        }
    }
}

/// Has nothing be accessible in an extent's place.
fn hide(e: &Extent, fixed: MapFlags) -> Result<(), Errno> {
    // SAFETY: the range lies in the reservation, and nothing but emitted code, which expects faults there, accesses it.
    unsafe { map_nothing(&(e.host()..e.host() + e.len), fixed) }?;
    Ok(())
}

/// Ends what an extent shows.
fn take_out(e: &Extent) {
    let removed = hide(e, MapFlags::FIXED).or_else(|_| {
        // A process that has as many mappings as it may has to give some back first.
        // SAFETY: the range lies in the reservation, and nothing but emitted code, which expects faults there, accesses it.
        unsafe { rustix::mm::munmap(e.host() as *mut _, e.len as usize) }?;
        hide(e, MapFlags::FIXED_NOREPLACE)
    });
    removed.expect("memory of the guest can be taken out of its window");
}

impl State {
    /// Takes an extent away.
    fn remove(&mut self, n: usize) {
        take_out(&self.extents.swap_remove(n));
    }

    /// Shows nothing any more, and gives the host back what it needed for that.
    fn close(&mut self) {
        if self.extents.is_empty() && self.stacks.is_untouched() {
            return;
        }
        // SAFETY: the range is the reservation, which only emitted code accesses, and that expects faults there.
        if unsafe { map_nothing(&WINDOW_REACH, MapFlags::FIXED) }.is_err() {
            let all = self.extents.iter().chain(self.stacks.iter());
            all.for_each(take_out);
        }
        self.extents.clear();
        self.stacks = Stacks::default();
    }

    fn strike(&mut self, gva: u64) {
        if self.strikes.len() >= REGIONS {
            self.strikes.clear();
        }
        *self.strikes.entry(gva >> REGION_BITS).or_default() += 1;
    }

    /// What becomes of an instruction that stores to a frame with code.
    fn stored(&mut self, rip: u64, most: u32) -> Verdict {
        if self.writers.len() >= WRITERS {
            self.writers.clear();
        }
        let times = self.writers.entry(rip).or_default();
        *times += 1;
        if *times > most {
            Verdict::Elsewhere
        } else {
            Verdict::Step
        }
    }

    fn is_hopeless(&self, gva: u64) -> bool {
        let strikes = self.strikes.get(&(gva >> REGION_BITS));
        strikes.is_some_and(|&n| n >= STRIKES)
    }

    fn pieces(&self) -> usize {
        let extents: usize = self.extents.iter().map(|e| e.pieces).sum();
        extents + 2 * self.stacks.len()
    }

    /// Changes what may be done with places of extents. False where nothing is shown any more: the window is given up where the host has no room for that, and closed where it has come
    /// apart too much, as what is shown again is in as few pieces as can be.
    fn protect(&mut self, places: &[(u64, u64)], flags: MprotectFlags) -> bool {
        let fits = self.pieces() <= PIECES;
        let protected = fits
            && places.iter().all(|&(at, len)| {
                // SAFETY: the range lies in an extent, which only emitted code accesses, and that expects faults there.
                unsafe { rustix::mm::mprotect(at as *mut _, len as usize, flags) }.is_ok()
            });
        if !protected {
            self.given_up |= fits;
            self.close();
        }
        protected
    }

    /// Changes what may be done with frames where `concerned` extents show them.
    fn protect_frames(
        &mut self,
        frames: &[Gfn],
        flags: MprotectFlags,
        concerned: impl Fn(&Extent) -> bool,
    ) {
        let mut places = Vec::new();
        for e in self.extents.iter_mut().filter(|e| concerned(e)) {
            let before = places.len();
            let shown = frames.iter().filter_map(|&gfn| e.place(gfn));
            places.extend(shown.map(|at| (at, PAGE_SIZE)));
            e.pieces += 2 * (places.len() - before);
        }
        self.protect(&places, flags);
    }

    fn shows(&self, gva: u64) -> bool {
        let shows = |e: &Extent| gva.checked_sub(e.gva).is_some_and(|into| into < e.len);
        let stack = self.stacks.at(window_address(gva));
        self.extents.iter().chain(stack).any(shows)
    }

    /// Puts an extent in its place. False where the host has no room for it; then the place is as it was, or as inaccessible.
    fn map(&self, e: &Extent, memory: &GuestMemory, offset: u64, rights: ProtFlags) -> bool {
        let (at, bytes) = (e.host() as *mut c_void, e.len as usize);
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range lies in the reservation, and no extent is there; only emitted code accesses it.
        if unsafe { rustix::mm::mmap(at, bytes, rights, flags, memory.fd(), offset) }.is_err() {
            let _ = hide(e, MapFlags::FIXED);
            return false;
        }
        // SAFETY: as above. The dump of a process that failed has this memory once already.
        let left_out = unsafe { rustix::mm::madvise(at, bytes, Advice::LinuxDontDump) }.is_ok();
        if !left_out {
            take_out(e);
        }
        left_out
    }
}

impl KernelWindow {
    fn lock(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("kernel window")
    }

    /// To be called when the extents have changed.
    fn note(&self, state: &mut State) {
        state.roofs.clear();
        let own = state.extents.iter().map(Roof::of);
        for other in own.chain(state.stacks.roofs().iter().copied()) {
            if !state.roofs.iter_mut().any(|roof| roof.cover(&other)) {
                state.roofs.push(other);
            }
        }
        self.open.store(!state.extents.is_empty(), Ordering::SeqCst);
        let shown = state.extents.len() + state.stacks.len();
        self.extents.store(shown, Ordering::SeqCst);
    }

    /// Whether more than stacks is shown.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    pub fn is_empty(&self) -> bool {
        self.extents.load(Ordering::SeqCst) == 0
    }

    /// Bytes of guest addresses that are shown.
    pub fn shown_bytes(&self) -> u64 {
        let state = self.lock();
        let all = state.extents.iter().chain(state.stacks.iter());
        all.map(|e| e.len).sum()
    }

    /// Whether an address is shown, or can be and is from now on.
    pub fn show(&self, asker: &Asker<'_>, gva: u64) -> bool {
        if gva < UPPER {
            return false;
        }
        let mut state = self.lock();
        let state = &mut *state;
        state.shows(gva) || self.extend(state, asker, gva)
    }

    /// Whether all vCPUs' tables say what is about to be shown. One that loads another root, or flushes, from here on looks at the extents behind that: what another has changed before is seen now.
    fn agreed(&self, asker: &Asker<'_>, e: &Extent) -> bool {
        fence(Ordering::SeqCst);
        let mut agreed = asker.confirms(e);
        let roof = Roof::of(e);
        (asker.roots)(&mut |root| agreed &= roof.agrees(asker.memory, root));
        agreed && e.top != 0
    }

    /// Shows what lies around an address, if it can be shown.
    fn extend(&self, state: &mut State, asker: &Asker<'_>, gva: u64) -> bool {
        if state.shut || state.given_up || root(asker.cpu) == 0 || asker.cpu.cr4 & cr::CR4_PGE == 0
        {
            return false;
        }
        if self.show_stack(state, asker, gva) {
            return true;
        }
        if state.is_hopeless(gva) {
            return false;
        }
        let free = |at: u64, len: u64| {
            let stack = len == PAGE_SIZE && state.stacks.at(at).is_some();
            !stack && !state.extents.iter().any(|e| e.overlaps(at, len))
        };
        let Some(e) = asker.extent(gva, free) else {
            // Other addresses of the region may have more around them.
            return false;
        };
        let shown = self.try_to_extend(state, asker, e);
        if !shown {
            state.strike(gva);
        }
        shown
    }

    fn try_to_extend(&self, state: &mut State, asker: &Asker<'_>, e: Extent) -> bool {
        if state.extents.len() >= EXTENTS {
            return false;
        }
        // Kernels have allocations among small pages, which come and go.
        let beside = |o: &Extent| o.large && o.slot() == e.slot();
        if !e.large && !state.extents.iter().any(beside) {
            return false;
        }
        let Some(offset) = asker.memory.ram_offset(Gpa(e.gpa).gfn(), e.len / PAGE_SIZE) else {
            return false;
        };
        if state.stacks.iter().any(|o| o.overlaps(e.host(), e.len))
            || !*state.reserved.get_or_insert_with(reserve)
        {
            return false;
        }
        let ram = asker.memory.ram().iter().map(|r| r.end - r.start);
        let shown = state.extents.iter().map(|o| o.len);
        if shown.sum::<u64>() + e.len > TIMES_SHOWN * ram.sum::<u64>() {
            return false;
        }
        state.extents.push(e);
        self.note(state);
        let n = state.extents.len() - 1;
        let shown = self.agreed(asker, &e) && self.fill(state, n, asker, offset);
        if !shown {
            state.extents.truncate(n);
        }
        self.note(state);
        shown
    }

    /// Shows what the last extent, number `n`, is to show. False where that cannot be.
    fn fill(&self, state: &mut State, n: usize, asker: &Asker<'_>, offset: u64) -> bool {
        let e = state.extents[n];
        // Those that are placed from here on are hidden by who has placed them.
        let specials = self.hide_specials(state, asker.memory);
        if state.extents.len() <= n {
            return false;
        }
        let mut hidden: Vec<Gfn> = specials
            .into_iter()
            .filter(|&gfn| e.place(gfn).is_some())
            .collect();
        hidden.sort_unstable();
        let is_ram = |gfn| hidden.binary_search(&gfn).is_err();
        let readable = e.runs(is_ram);
        let writable = match e.writable {
            true => e.runs(|gfn| !asker.pages.contains(gfn) && is_ram(gfn)),
            false => Vec::new(),
        };
        let pieces = 2 * (readable.len() + writable.len());
        if state.pieces() + pieces > PIECES - PIECES_TO_COME {
            state.given_up |= pieces > PIECES - PIECES_TO_COME;
            state.close();
            return false;
        }
        if !state.map(&e, asker.memory, offset, ProtFlags::empty()) {
            return false;
        }
        state.extents[n].pieces = pieces;
        state.protect(&readable, MprotectFlags::READ)
            && state.protect(&writable, MprotectFlags::READ | MprotectFlags::WRITE)
    }

    /// Hides the special frames that have been placed since the last time; gives all there are.
    fn hide_specials(&self, state: &mut State, memory: &GuestMemory) -> Vec<Gfn> {
        let all = memory.special_frames();
        let known = self.specials.load(Ordering::SeqCst);
        state.protect_frames(&all[known..], MprotectFlags::empty(), |_| true);
        for &gfn in &all[known..] {
            state.remove_stack_frame(gfn);
        }
        self.specials.store(all.len(), Ordering::SeqCst);
        all
    }

    /// An access of emitted code of the kernel, the instruction at `rip`, has faulted at a host address.
    pub fn faulted(&self, asker: &Asker<'_>, host: u64) -> Verdict {
        if !WINDOW.contains(&host) {
            return Verdict::Elsewhere;
        }
        let mut state = self.lock();
        let state = &mut *state;
        let inside = |e: &&Extent| host.checked_sub(e.host()).is_some_and(|into| into < e.len);
        let Some(e) = state.extents.iter().find(inside).copied() else {
            if state.stacks.at(host).is_some()
                || guest_addresses(host).any(|gva| self.extend(state, asker, gva))
            {
                return Verdict::Again;
            }
            return if state.shut {
                Verdict::Closed
            } else if guest_addresses(host).any(|gva| asker.is_on_new_stack(gva)) {
                // What it still has of what it was before goes when it is stored to.
                state.stored(asker.cpu.rip, STACK_WRITES)
            } else {
                Verdict::Elsewhere
            };
        };
        let gfn = Gpa(e.gpa + (host - e.host())).gfn();
        if asker.memory.is_special(gfn) {
            return Verdict::Elsewhere;
        }
        if e.writable && !asker.pages.contains(gfn) {
            // It had code once.
            let flags = MprotectFlags::READ | MprotectFlags::WRITE;
            state.protect_frames(&[gfn], flags, |e| e.writable);
            self.note(state);
            return Verdict::Again;
        }
        state.stored(asker.cpu.rip, CODE_WRITES)
    }

    /// A frame has become one with code: when this returns nobody writes it through the window.
    pub fn protect(&self, memory: &GuestMemory, gfn: Gfn) {
        if self.is_empty() {
            return;
        }
        let mut state = self.lock();
        if memory.is_special(gfn) {
            return;
        }
        state.protect_frames(&[gfn], MprotectFlags::READ, |e| e.writable);
        state.remove_stack_frame(gfn);
        self.note(&mut state);
    }

    /// The vCPU that asks has loaded a root.
    pub fn follow_root(&self, asker: &Asker<'_>) {
        if self.is_empty() {
            return;
        }
        let root = root(asker.cpu);
        let agreed = {
            let state = self.state.read().expect("kernel window");
            let mut roofs = state.roofs.iter();
            roofs.all(|roof| roof.agrees(asker.memory, root))
        };
        if !agreed {
            let mut state = self.lock();
            state.disagreements += 1;
            state.given_up |= state.disagreements >= HOPELESS;
            state.close();
            self.note(&mut state);
        }
    }

    /// Global pages of these addresses may have changed; of the small ones only that of `address`, if there is one.
    pub fn check(&self, asker: &Asker<'_>, range: RangeInclusive<u64>, address: Option<u64>) {
        // The guest has changed its tables with plain stores.
        fence(Ordering::SeqCst);
        // A vCPU without paging accesses nothing here, and comes by again when it turns it on.
        if *range.end() < UPPER || self.is_empty() || root(asker.cpu) == 0 {
            return;
        }
        // Nor may what it has flushed be in the place of what is shown.
        self.follow_root(asker);
        let mut state = self.lock();
        for n in (0..state.extents.len()).rev() {
            let e = state.extents[n];
            let concerned = e.gva <= *range.end() && *range.start() <= e.gva + (e.len - 1);
            if concerned && !asker.confirms(&e) {
                state.strike(e.gva);
                state.remove(n);
            }
        }
        state.check_stacks(asker, address);
        self.note(&mut state);
    }

    /// Special frames may have been placed.
    pub fn follow_specials(&self, memory: &GuestMemory) {
        if self.is_empty() || self.specials.load(Ordering::SeqCst) == memory.special_count() {
            return;
        }
        let mut state = self.lock();
        self.hide_specials(&mut state, memory);
        self.note(&mut state);
    }

    /// Shows nothing, from when this returns until it is opened again. True if anything was shown.
    pub fn shut(&self) -> bool {
        let mut state = self.lock();
        state.shut = true;
        let any = !self.is_empty();
        state.shut_something |= any;
        state.close();
        self.note(&mut state);
        any
    }

    /// Ends that. True if it was shut and something had been shown.
    pub fn open(&self) -> bool {
        let mut state = self.lock();
        state.shut = false;
        std::mem::take(&mut state.shut_something)
    }
}

impl Drop for KernelWindow {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.reserved == Some(true) {
            let bytes = (WINDOW_REACH.end - WINDOW_REACH.start) as usize;
            // SAFETY: the reservation is this value's, and no translated code of its machine is left.
            let _ = unsafe { rustix::mm::munmap(WINDOW_REACH.start as *mut _, bytes) };
            TAKEN.store(false, Ordering::SeqCst);
        }
    }
}

/// Instructions of kernel code that access memory which is not shown, by frame: a bit for each byte.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere(HashMap<u64, Box<[u64; 64]>>);

impl Elsewhere {
    /// Frames that are remembered.
    const FRAMES: usize = 8192;

    pub fn add(&mut self, at: Gpa) {
        if self.0.len() >= Self::FRAMES {
            self.0.clear();
        }
        let bits = self
            .0
            .entry(at.gfn().0)
            .or_insert_with(|| Box::new([0; 64]));
        let at = at.page_offset() as usize;
        bits[at / 64] |= 1 << (at % 64);
    }

    pub fn of(&self, gfn: Gfn) -> Option<&[u64; 64]> {
        self.0.get(&gfn.0).map(|bits| &**bits)
    }
}
