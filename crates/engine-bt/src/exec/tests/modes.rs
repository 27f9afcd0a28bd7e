//! Mode switches as kernels do them.

use hospes_engine::cr;
use iced_x86::code_asm::*;

use super::*;

/// The way a PVH kernel goes: 32-bit entry, own GDT, PAE, LME, paging, far jump to 64-bit code.
#[test]
fn pvh_entry_reaches_long_mode() {
    let mut m = Machine::protected();
    m.host.native = native_or;
    for va in (0..0x40_0000u64).step_by(4096) {
        m.map(va, va, P | RW);
    }
    let pointer = 0x6000;
    m.poke(pointer, u64::from(GDT_LIMIT) | GDT << 16);
    m.cpu.gdtr = DescTable::default();
    let len = m.code(|a| {
        a.cld().unwrap();
        a.lgdt(fword_ptr(pointer)).unwrap();
        a.mov(eax, u32::from(KERNEL_DS)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, cr4).unwrap();
        a.or(eax, cr::CR4_PAE as u32).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, cr::EFER_LME as u32).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, PML4 as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(eax, 0x8000_0001u32).unwrap();
        a.mov(cr0, eax).unwrap();
    });
    // ljmp $0x08, $0x11000
    let at = CODE + len;
    m.host
        .memory
        .write(Gpa(at), &[0xea, 0, 0x10, 1, 0, 8, 0])
        .unwrap();
    m.run(17);
    assert_eq!(m.cpu.rip, at);
    assert_ne!(m.cpu.msr.efer & cr::EFER_LMA, 0);
    assert_eq!(m.cpu.code_bits(), 32);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.code_bits()), (0x1_1000, 64));
    assert!(m.host.flushes.contains(&TlbFlush::All));
    m.code(|a| a.mov(rax, 0x1234_5678_9abc_def0u64).unwrap());
    m.run(1);
    assert_eq!(m.cpu.gpr[reg::RAX], 0x1234_5678_9abc_def0);
}

/// The way of a further vCPU: real mode at the start-up vector, protected mode, long mode.
#[test]
fn start_up_code_goes_from_16_to_64_bits() {
    let mut m = Machine::long();
    let tables = Machine::bare().cpu;
    m.cpu = tables;
    m.host.native = native_or;
    m.cpu.seg[seg::CS].selector = 0x1000;
    m.cpu.seg[seg::CS].base = 0x1_0000;
    m.cpu.rip = 0;
    // The pointer for LGDT lies in the code segment, at offset 0x200.
    m.poke(0x1_0200, u64::from(GDT_LIMIT) | GDT << 16);
    let code: &[u8] = &[
        0xfa, // cli
        0x8c, 0xc8, // mov ax, cs
        0x8e, 0xd8, // mov ds, ax
        0x66, 0x0f, 0x01, 0x16, 0x00, 0x02, // lgdtl [0x200]
        0xb8, 0x01, 0x00, // mov ax, 1
        0x0f, 0x01, 0xf0, // lmsw ax
        0x66, 0xea, 0x00, 0x10, 0x01, 0x00, 0x30, 0x00, // ljmpl 0x30:0x11000
    ];
    m.raw(code);
    m.run(7);
    assert_eq!((m.cpu.rip, m.cpu.code_bits()), (0x1_1000, 32));
    assert_eq!(m.cpu.gdtr.base, GDT);
    m.code(|a| {
        a.mov(eax, u32::from(KERNEL_DS)).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, (cr::CR4_PAE | cr::CR4_PGE) as u32).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PML4 as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.mov(eax, (cr::EFER_LME | cr::EFER_NXE | cr::EFER_SCE) as u32)
            .unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x8001_0011u32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.push(u32::from(KERNEL_CS)).unwrap();
        a.push(0x1_2000).unwrap();
        a.retf().unwrap();
    });
    m.cpu.gpr[reg::RSP] = KERNEL_STACK;
    m.run(15);
    assert_eq!(m.cpu.rip, 0x1_2000);
    assert_eq!(m.cpu.code_bits(), 64);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK);
}

#[test]
fn leaving_protected_mode_keeps_the_hidden_parts() {
    let mut m = Machine::protected();
    m.cpu.seg[seg::CS] = Segment {
        attr: 0x009b,
        limit: 0xffff,
        base: CODE,
        ..flat(0x30, 0)
    };
    m.cpu.rip = 0;
    m.cpu.gpr[reg::RAX] = cr::CR0_ET;
    m.code(|a| a.mov(cr0, eax).unwrap());
    m.run(1);
    assert_eq!(m.cpu.code_bits(), 16);
    assert_eq!(m.cpu.seg[seg::DS].limit, 0xffff_ffff);
}

#[test]
fn far_call_and_return_between_64_and_32_bit_code() {
    let mut m = Machine::long();
    // lcall *(0x5000): m16:32 to the 32-bit kernel segment.
    m.poke(0x5000, 0x1_1000 | u64::from(KERNEL_CS32) << 32);
    m.raw(&[0xff, 0x1c, 0x25, 0x00, 0x50, 0x00, 0x00]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.code_bits()), (0x1_1000, 32));
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 8);
    m.code(|a| a.retf().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.code_bits()), (CODE + 7, 64));
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK);
}

#[test]
fn cr0_combinations_that_fault() {
    for v in [
        cr::CR0_PG | cr::CR0_ET,
        cr::CR0_PE | cr::CR0_NW,
        1 << 32 | cr::CR0_PE,
        // Paging off in 64-bit mode.
        cr::CR0_PE,
    ] {
        let mut m = Machine::long();
        let before = m.cpu.cr0;
        m.cpu.gpr[reg::RAX] = v;
        m.code(|a| a.mov(cr0, rax).unwrap());
        assert_eq!(m.fault(), vector::GP, "{v:#x}");
        assert_eq!(m.cpu.cr0, before);
    }
}
