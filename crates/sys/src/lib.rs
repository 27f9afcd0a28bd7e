//! What no library wraps safely: the processor's own instructions (the time-stamp counter, CPUID, XGETBV), handlers of the signals that
//! ask a process to end, and what these handlers do to a terminal. And what the kernel says of a process in /proc, which has no call.
//!
//! Refuses: all other system calls, which are rustix's.

mod action;
mod process;
pub mod terminal;
mod termination;

pub use action::ignore_termination;
pub use process::process_stat;
pub use termination::Termination;

/// Reads the time-stamp counter, not before earlier loads have completed. Ticks.
pub fn rdtsc() -> u64 {
    // SAFETY: LFENCE and RDTSC exist on every x86-64 processor, touch no memory and are not forbidden to user space on Linux unless
    // the process asked for that.
    #[allow(unused_unsafe)]
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// What CPUID answers: EAX, EBX, ECX, EDX. A leaf that the processor does not have gives what it gives natively.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // Older compilers do not know it as safe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID, and it changes nothing but its four result registers.
    let r = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What the kernel enabled of the extended state (XCR0); 0 where it enabled XGETBV for nobody.
pub fn xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if cpuid(1, 0)[2] & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: CPUID has just said that the kernel enabled XGETBV; register 0 exists wherever the instruction does.
    unsafe { core::arch::x86_64::_xgetbv(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_counter_twice_goes_forward() {
        let first = rdtsc();
        assert!(rdtsc() > first);
    }

    #[test]
    fn ask_first_leaf_names_a_vendor() {
        let [highest, b, c, d] = cpuid(0, 0);
        assert!(highest >= 1);
        let name: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert!(name.iter().all(u8::is_ascii_graphic), "{name:?}");
    }
}
