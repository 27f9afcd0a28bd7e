//! The guest's kernel: a VMCALL for each vector, and a tail that starts the next case.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::tables::{CONTEXT, KERNEL, STUB, USER_SS};

/// Offsets in the context page, behind the XSAVE image.
pub const FS_BASE: u64 = 0xc00;
pub const GS_BASE: u64 = 0xc08;
pub const RAX: u64 = 0xc10;
pub const RCX: u64 = 0xc18;
pub const RDX: u64 = 0xc20;
pub const FRAME: u64 = 0xc40;

/// Offset of the tail that starts the next case.
pub const RESUME: u64 = 32 * 16;

/// Its code, for address `KERNEL + STUB`, with the components that XRSTOR loads.
pub fn assemble(xcr0: u64) -> Vec<u8> {
    let build = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut resume = a.create_label();
        for vector in 0..32 {
            a.vmcall()?;
            a.jmp(resume)?;
            // Entries are 16 bytes: VMCALL 3, JMP 5 (2 where it is near), the rest padding.
            let used = if vector >= 24 { 5 } else { 8 };
            a.db(&vec![0x90; 16 - used])?;
        }
        a.set_label(&mut resume)?;
        let at = |offset: u64| qword_ptr(KERNEL + CONTEXT + offset);
        a.mov(ecx, u32::from(USER_SS))?;
        a.mov(ds, ecx)?;
        a.mov(es, ecx)?;
        a.mov(eax, xcr0 as u32)?;
        a.xor(edx, edx)?;
        a.xrstor64(at(0))?;
        a.mov(rax, at(FS_BASE))?;
        a.wrfsbase(rax)?;
        a.mov(rax, at(GS_BASE))?;
        a.wrgsbase(rax)?;
        a.mov(rax, at(RAX))?;
        a.mov(rcx, at(RCX))?;
        a.mov(rdx, at(RDX))?;
        a.iretq()?;
        a.assemble(KERNEL + STUB)
    };
    build().expect("the stub has an encoding")
}
