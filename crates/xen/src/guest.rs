//! The calling convention: numbers and arguments out of registers, structures out of the caller's memory.

use hospes_engine::{CpuState, Vcpu, reg};
use hospes_units::Gva;
use hospes_xen_abi::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Outcome;

/// VMCALL and VMMCALL have the same length.
const TRAP_BYTES: u64 = 3;

/// A hypercall as the registers give it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub number: u64,
    pub args: [u64; 5],
    /// The caller runs 64-bit code.
    pub wide: bool,
}

/// How a hypercall that did not fail goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The result.
    Value(u64),
    /// Result 0, and something for the vCPU's thread to do.
    Then(Outcome),
    /// Issue the call again with this first argument: the part done so far is in it.
    Continue(u64),
}

impl Reply {
    pub const OK: Reply = Reply::Value(0);
}

impl Call {
    pub fn of(state: &CpuState) -> Call {
        let r = |i: usize| state.gpr[i];
        if state.code_bits() == 64 {
            Call {
                number: r(reg::RAX),
                args: [reg::RDI, reg::RSI, reg::RDX, reg::R10, reg::R8].map(r),
                wide: true,
            }
        } else {
            let low = |i: usize| r(i) & 0xffff_ffff;
            Call {
                number: low(reg::RAX),
                args: [reg::RBX, reg::RCX, reg::RDX, reg::RSI, reg::RDI].map(low),
                wide: false,
            }
        }
    }

    /// Puts the vCPU back in front of the instruction, so that a long operation lets it be paused in between.
    pub fn rewind(&self, vcpu: &mut dyn Vcpu, first_argument: u64) {
        let state = vcpu.state();
        let first = if self.wide { reg::RDI } else { reg::RBX };
        state.gpr[first] = first_argument;
        state.rip = state.rip.wrapping_sub(TRAP_BYTES);
        vcpu.state_changed();
    }
}

/// Copies a structure from the caller's memory.
pub(crate) fn read<T: FromBytes + IntoBytes>(vcpu: &mut dyn Vcpu, at: u64) -> Result<T, Errno> {
    let mut value = T::new_zeroed();
    vcpu.read_virt(Gva(at), value.as_mut_bytes())
        .map_err(|_| Errno::Fault)?;
    Ok(value)
}

/// Copies a structure into the caller's memory.
pub(crate) fn write<T: IntoBytes + Immutable + ?Sized>(
    vcpu: &mut dyn Vcpu,
    at: u64,
    value: &T,
) -> Result<(), Errno> {
    vcpu.write_virt(Gva(at), value.as_bytes())
        .map_err(|_| Errno::Fault)
}
