//! What other threads may ask of a vCPU.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering,
};
use std::time::Duration;

use hospes_engine::{VcpuControl, Waker};

use crate::direct::process;
use crate::signal;

/// Requests to a vCPU; it looks at them before it goes back to translated code.
pub mod request {
    /// `run` returns.
    pub const KICK: u32 = 1;
    /// Something in the interrupt fields changed.
    pub const INTERRUPT: u32 = 2;
    /// Forget which pages may be written.
    pub const WRITE_TAGS: u32 = 4;
    /// Forget all jump targets.
    pub const JUMPS: u32 = 8;
    /// Forget all cached translations.
    pub const TLB: u32 = 16;
    /// INIT was received.
    pub const INIT: u32 = 32;
    /// A start-up interrupt was received.
    pub const SIPI: u32 = 64;
    /// Code that may be executed natively was written.
    pub const CODE_WRITTEN: u32 = 128;

    /// What ends a halt even while interrupts are disabled.
    pub const WAKES_ALWAYS: u32 = KICK | INIT | SIPI;
    /// What a vCPU that sleeps has to be woken for; it does the rest when it runs again.
    pub const WAKES: u32 = WAKES_ALWAYS | INTERRUPT;
}

/// The shared side of a vCPU.
#[derive(Default)]
pub struct Control {
    requests: AtomicU32,
    /// Set while `run` is being executed, which looks at the requests after setting this and before it returns.
    running: AtomicBool,
    waker: OnceLock<Waker>,
    /// Set while the vCPU may execute translated code.
    in_code: AtomicBool,
    /// Set while a signal that makes it leave is on its way or not taken note of: another one would say nothing new, and all that are sent are taken, one after the other.
    kicked: AtomicBool,
    direct_ns: AtomicU64,
    direct_wait_ns: AtomicU64,
    place_changed: AtomicBool,
    /// 1 more than the descriptor that stops the address-space process which runs for this vCPU; 0 without one.
    direct: AtomicI32,
    tid: AtomicI32,
    /// The frame's `busy`: while it is set, a kick waits for the end of what the guest is doing, perhaps a copy in memory.
    busy: AtomicPtr<u8>,
    irr: [AtomicU64; 4],
    callback: AtomicU32,
    nmi: AtomicBool,
    /// 1 more than the generation of blocks whose positions the vCPU's thread may hold; 0 where it holds none.
    positions: AtomicU64,
    /// What the vCPU's top table maps kernel code by; 0 where it has none. See `links.rs`.
    kernel_entry: AtomicU64,
    /// Guest physical address of the vCPU's top table; 0 where it has none. See `kernel_window.rs`.
    root: AtomicU64,
    sipi_vector: AtomicU32,
    apic_disabled: AtomicBool,
}

impl Control {
    pub fn root(&self) -> u64 {
        self.root.load(Ordering::SeqCst)
    }

    pub fn set_root(&self, root: u64) {
        self.root.store(root, Ordering::SeqCst);
    }

    /// Names the vCPU's thread and its `busy`, which stays where it is for as long as the vCPU is in the machine's list.
    pub fn attach(&self, tid: i32, busy: *mut u8) {
        self.busy.store(busy, Ordering::SeqCst);
        self.tid.store(tid, Ordering::SeqCst);
    }

    fn is_busy(&self) -> bool {
        let busy = self.busy.load(Ordering::SeqCst);
        // SAFETY: null or the byte given to `attach`, which lives while callers hold the machine's list of vCPUs; it is read as the atomic that
        // other threads may change.
        !busy.is_null() && unsafe { AtomicU8::from_ptr(busy) }.load(Ordering::SeqCst) != 0
    }

    /// Declares of which generation of blocks the vCPU holds positions from now on: before `run` begins, and whenever it has learnt of another one.
    pub fn hold_positions(&self, generation: u64) {
        self.positions.store(generation + 1, Ordering::SeqCst);
    }

    /// The generation of blocks whose positions the vCPU may hold. Who asks has posted [`request::JUMPS`] before: a vCPU that declares itself later
    /// learns of the present generation first.
    pub fn positions_held(&self) -> Option<u64> {
        self.positions.load(Ordering::SeqCst).checked_sub(1)
    }

    pub fn kernel_entry(&self) -> u64 {
        self.kernel_entry.load(Ordering::SeqCst)
    }

    pub fn set_kernel_entry(&self, entry: u64) {
        self.kernel_entry.store(entry, Ordering::SeqCst);
    }

    /// Declares that `run` has begun. Who posts a request from now on sees that, or the request is seen by `run`.
    pub fn enter_run(&self) {
        self.running.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Declares that `run` ends. Whoever sleeps after that asks [`VcpuControl::has_wakeup`] first.
    pub fn leave_run(&self) {
        self.positions.store(0, Ordering::SeqCst);
        self.running.store(false, Ordering::SeqCst);
    }

    /// Posts a request that only concerns what translated code does, and makes sure of that for all of these vCPUs: when this returns, none of
    /// them executes another instruction of guest code before it has seen the request. They may still be inside translated code, without a host
    /// CPU for as long as the host likes. The caller holds the machine's list of vCPUs.
    pub fn post_to_all<'a>(controls: impl Iterator<Item = &'a Control> + Clone, bits: u32) {
        for control in controls.clone() {
            control.requests.fetch_or(bits, Ordering::SeqCst);
        }
        let running = controls.filter(|c| c.running.load(Ordering::SeqCst));
        if running.clone().next().is_none() {
            return;
        }
        membarrier();
        let inside = running.filter(|c| c.in_code.load(Ordering::SeqCst));
        let (mut kicked, mut all_threads) = (false, true);
        for control in inside.clone() {
            all_threads &= control.stop_code();
            kicked = true;
        }
        // A thread that does not run now takes the signal before anything else; one that runs passes through the host's kernel, and takes
        // it there, before this barrier is complete.
        let taken = kicked && membarrier() && all_threads;
        for control in inside {
            while (control.is_busy() || !taken) && control.has_not_seen(bits) {
                std::thread::yield_now();
            }
        }
    }

    /// Makes sure that none of these vCPUs goes on in an address-space process with what was executable there. The caller holds the machine's list of
    /// vCPUs.
    pub fn stop_direct<'a>(controls: impl Iterator<Item = &'a Control> + Clone) {
        for control in controls.clone() {
            control
                .requests
                .fetch_or(request::CODE_WRITTEN, Ordering::SeqCst);
        }
        membarrier();
        let is_inside = |c: &&Control| c.direct.load(Ordering::SeqCst) != 0;
        for control in controls.clone().filter(is_inside) {
            control.stop_code();
        }
        for control in controls {
            while is_inside(&control) && control.has_not_seen(request::CODE_WRITTEN) {
                std::thread::yield_now();
            }
        }
    }

    /// Posts requests and makes the vCPU look at them.
    pub fn post(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        if !self.running.load(Ordering::SeqCst) {
            // The signal costs more than waking a thread does, and most targets of interrupts sleep.
            if bits & request::WAKES != 0
                && let Some(wake) = self.waker.get()
            {
                wake();
            }
            return;
        }
        // A vCPU that is not seen inside, or has not yet forgotten that it was kicked, looks at its requests behind the barrier in `enter_code`, and so sees this one.
        if self.in_code.load(Ordering::SeqCst) && !self.kicked.swap(true, Ordering::SeqCst) {
            self.stop_code();
        }
    }

    /// Makes a vCPU that is inside leave; false where it runs in an address-space process, of which membarrier knows nothing.
    fn stop_code(&self) -> bool {
        let n = self.direct.load(Ordering::SeqCst);
        if n == 0 {
            signal::kick_thread(self.tid.load(Ordering::SeqCst));
        } else {
            process::kick(n - 1);
        }
        n == 0
    }

    fn has_not_seen(&self, bits: u32) -> bool {
        self.in_code.load(Ordering::SeqCst) && self.requests.load(Ordering::SeqCst) & bits != 0
    }

    /// Declares that the vCPU is about to run in the address-space process with this kick descriptor.
    pub fn enter_direct(&self, kick_fd: RawFd) {
        self.direct.store(kick_fd + 1, Ordering::SeqCst);
        self.enter_code();
    }

    /// Adds host CPU time of an address-space process, and the time that it waited for a host CPU.
    pub fn add_direct(&self, used: Duration, waited: Duration) {
        let add =
            |sum: &AtomicU64, d: Duration| sum.fetch_add(d.as_nanos() as u64, Ordering::Relaxed);
        add(&self.direct_ns, used);
        add(&self.direct_wait_ns, waited);
    }

    /// Whether the thread's place on the host has changed since the last call.
    pub fn take_place_changed(&self) -> bool {
        self.place_changed.load(Ordering::Relaxed)
            && self.place_changed.swap(false, Ordering::SeqCst)
    }

    pub fn leave_direct(&self) {
        self.leave_code();
        self.direct.store(0, Ordering::SeqCst);
    }

    /// Waits until the vCPU has seen what was posted, or is sure to see it before it executes translated code again.
    pub fn wait_seen(&self, bits: u32) {
        while self.has_not_seen(bits) {
            std::hint::spin_loop();
            std::thread::yield_now();
        }
    }

    /// Takes all requests. Called by the vCPU.
    pub fn take(&self) -> u32 {
        if self.requests.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.requests.swap(0, Ordering::SeqCst)
    }

    pub fn has_requests(&self) -> bool {
        self.requests.load(Ordering::Relaxed) != 0
    }

    /// Declares that the vCPU is about to execute guest code, and is a barrier: it has to look at the requests behind it.
    pub fn enter_code(&self) {
        self.kicked.store(false, Ordering::Relaxed);
        self.in_code.swap(true, Ordering::SeqCst);
    }

    /// The same for code after which it looks at the requests before any of the guest's, or where it has just looked at them.
    pub fn enter_more_code(&self) {
        self.in_code.store(true, Ordering::Relaxed);
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    pub fn leave_code(&self) {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        self.in_code.store(false, Ordering::Relaxed);
    }

    /// Moves posted interrupts into the given IRR.
    pub fn take_interrupts(&self, irr: &mut [u32; 8]) {
        for (n, word) in self.irr.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::SeqCst);
                irr[2 * n] |= bits as u32;
                irr[2 * n + 1] |= (bits >> 32) as u32;
            }
        }
    }

    pub fn take_nmi(&self) -> bool {
        self.nmi.load(Ordering::Relaxed) && self.nmi.swap(false, Ordering::SeqCst)
    }

    /// The vector to inject without the local APIC, if asserted.
    pub fn callback(&self) -> Option<u8> {
        match self.callback.load(Ordering::SeqCst) {
            0 => None,
            v => Some(v as u8),
        }
    }

    pub fn set_apic_enabled(&self, on: bool) {
        self.apic_disabled.store(!on, Ordering::SeqCst);
    }

    pub fn post_startup(&self, vector: u8) {
        self.sipi_vector.store(u32::from(vector), Ordering::SeqCst);
        self.post(request::SIPI);
    }

    pub fn startup_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst) as u8
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("requests", &self.requests)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl VcpuControl for Control {
    fn set_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    fn kick(&self) {
        self.post(request::KICK);
    }

    fn raise_interrupt(&self, vector: u8) -> bool {
        if self.apic_disabled.load(Ordering::SeqCst) {
            return false;
        }
        self.irr[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::SeqCst);
        self.post(request::INTERRUPT);
        true
    }

    fn set_callback_line(&self, vector: Option<u8>) {
        self.callback
            .store(vector.map_or(0, u32::from), Ordering::SeqCst);
        if vector.is_some() {
            self.post(request::INTERRUPT);
        }
    }

    fn raise_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.post(request::INTERRUPT);
    }

    fn time_elsewhere_ns(&self) -> u64 {
        self.direct_ns.load(Ordering::Relaxed)
    }

    fn wait_elsewhere_ns(&self) -> u64 {
        self.direct_wait_ns.load(Ordering::Relaxed)
    }

    fn place_changed(&self) {
        self.place_changed.store(true, Ordering::SeqCst);
    }

    fn has_wakeup(&self, interrupts_enabled: bool) -> bool {
        self.requests.load(Ordering::SeqCst) & request::WAKES_ALWAYS != 0
            || self.nmi.load(Ordering::SeqCst)
            || interrupts_enabled
                && (self.callback.load(Ordering::SeqCst) != 0
                    || self.irr.iter().any(|w| w.load(Ordering::SeqCst) != 0))
    }
}

/// A full memory barrier on every running thread of the process, so that the vCPU's own side needs none. False where the host's kernel has no
/// such thing.
fn membarrier() -> bool {
    const PRIVATE_EXPEDITED: i32 = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;
    static REGISTERED: std::sync::Once = std::sync::Once::new();
    // SAFETY: membarrier has no memory operands.
    unsafe {
        REGISTERED.call_once(|| {
            libc::syscall(libc::SYS_membarrier, REGISTER_PRIVATE_EXPEDITED, 0, 0);
        });
        let done = libc::syscall(libc::SYS_membarrier, PRIVATE_EXPEDITED, 0, 0) == 0;
        std::sync::atomic::fence(Ordering::SeqCst);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU of the calling thread, which holds kicks back and counts them.
    struct Held(Control);

    impl Held {
        fn new() -> Held {
            let control = Control::default();
            signal::name_process();
            // SAFETY: plain system calls; a set of this function alone.
            unsafe {
                let set = Held::signals();
                libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
                control.attach(libc::gettid(), std::ptr::null_mut());
            }
            Held(control)
        }

        fn signals() -> libc::sigset_t {
            // SAFETY: an all-zero set is an empty one.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigaddset(&mut set, signal::kick_signal());
                set
            }
        }

        /// Kicks since the last call.
        fn kicks(&self) -> u32 {
            let set = Held::signals();
            let none = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the set and the time live for the call, and nothing is written.
            let take = || unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &none) };
            std::iter::from_fn(|| (take() > 0).then_some(())).count() as u32
        }
    }

    #[test]
    fn post_kicks_a_vcpu_in_code_once_until_it_has_seen_that() {
        let held = Held::new();
        let control = &held.0;
        control.enter_run();
        control.post(request::INTERRUPT);
        assert_eq!(held.kicks(), 0, "it is not in code");
        control.take();
        for round in 0..2 {
            control.enter_code();
            for _ in 0..3 {
                control.post(request::INTERRUPT);
            }
            assert_eq!(held.kicks(), 1, "round {round}");
            control.leave_code();
            assert_eq!(control.take(), request::INTERRUPT);
        }
        control.leave_run();
    }
}
