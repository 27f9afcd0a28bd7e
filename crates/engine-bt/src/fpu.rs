//! Moves the guest's x87 and vector state between where it lives while the guest runs and the XSAVE image.
//!
//! While a vCPU is attached to its thread, its x87 state is in the processor, MXCSR and YMM0-15 are in the frame; the image is then stale. The image is in
//! standard format; a component whose XSTATE_BV bit is clear is in its initial state.

use crate::frame::Frame;

const XMM: usize = 160;
const HEADER: usize = 512;
const YMM_HIGH: usize = 576;

#[repr(C, align(16))]
struct Legacy([u8; 512]);

/// Brings the image up to date. The x87 instruction and data pointers in it are zero.
pub fn store(frame: &mut Frame) {
    let mut legacy = Legacy([0; 512]);
    // SAFETY: the buffer is 512 bytes and 16-byte aligned; FXSAVE changes no register.
    unsafe {
        std::arch::asm!("fxsave64 [{}]", in(reg) &mut legacy.0, options(nostack, preserves_flags));
    }
    let image = &mut frame.cpu.xsave.0;
    image[..160].copy_from_slice(&legacy.0[..160]);
    image[6..24].fill(0);
    image[24..28].copy_from_slice(&frame.guest_mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    let (mut sse, mut avx) = (false, false);
    for (n, ymm) in frame.ymm.iter().enumerate() {
        let (low, high) = ymm.split_at(16);
        image[XMM + 16 * n..XMM + 16 * n + 16].copy_from_slice(low);
        image[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16].copy_from_slice(high);
        sse |= low.iter().any(|&b| b != 0);
        avx |= high.iter().any(|&b| b != 0);
    }
    let initial_x87 = image[0..5] == [0x7f, 3, 0, 0, 0] && image[32..160].iter().all(|&b| b == 0);
    let present = u64::from(!initial_x87) | u64::from(sse) << 1 | u64::from(avx) << 2;
    let mut header = u64::from_le_bytes(image[HEADER..HEADER + 8].try_into().expect("8 bytes"));
    header = header & !7 | present;
    image[HEADER..HEADER + 8].copy_from_slice(&header.to_le_bytes());
}

/// Makes the image the state that the guest goes on with.
pub fn load(frame: &mut Frame) {
    let image = &frame.cpu.xsave.0;
    let present = u64::from_le_bytes(image[HEADER..HEADER + 8].try_into().expect("8 bytes"));
    frame.guest_mxcsr = u32::from_le_bytes(image[24..28].try_into().expect("4 bytes"));
    for (n, ymm) in frame.ymm.iter_mut().enumerate() {
        let (low, high) = ymm.split_at_mut(16);
        if present & 2 != 0 {
            low.copy_from_slice(&image[XMM + 16 * n..XMM + 16 * n + 16]);
        } else {
            low.fill(0);
        }
        if present & 4 != 0 {
            high.copy_from_slice(&image[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16]);
        } else {
            high.fill(0);
        }
    }
    let mut legacy = Legacy([0; 512]);
    if present & 1 != 0 {
        legacy.0[..160].copy_from_slice(&image[..160]);
        legacy.0[6..24].fill(0);
    } else {
        legacy.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
    legacy.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    // SAFETY: a valid 512-byte image; it loads the vector registers with zeros, which are declared clobbered.
    unsafe {
        std::arch::asm!(
            "fxrstor64 [{}]", in(reg) &legacy.0,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags),
        );
    }
}
