//! Moves the guest's x87 and vector state between where it lives while the guest runs and the XSAVE image.
//!
//! While a vCPU is attached to its thread, its x87 state is in the processor, MXCSR, vector and mask registers are in the frame; the image is then stale. The
//! image is in standard format; a component whose XSTATE_BV bit is clear is in its initial state.

use hospes_engine::XSAVE_BYTES;

use crate::frame::Frame;

/// Where the AVX-512 components lie in the XSAVE image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wide {
    /// K0-7, 8 bytes each.
    masks: usize,
    /// Upper halves of ZMM0-15, 32 bytes each.
    upper: usize,
    /// ZMM16-31, 64 bytes each.
    more: usize,
}

/// Bytes of the components that every domain has.
const NARROW_BYTES: usize = 832;

impl Wide {
    /// XCR0's bits of the components.
    pub const XCR0: u64 = 0xe0;

    /// What CPUID's leaf 0xD says of them; `None` where it does not offer them. An error is a layout that the image has no room for.
    pub fn new(leaf: impl Fn(u32) -> [u32; 4]) -> Result<Option<Wide>, &'static str> {
        if u64::from(leaf(0)[0]) & Wide::XCR0 != Wide::XCR0 {
            return Ok(None);
        }
        let place = |n, size: usize| {
            let [bytes, at, ..] = leaf(n).map(|v| v as usize);
            let fits = bytes == size && at >= NARROW_BYTES && at + size <= XSAVE_BYTES;
            fits.then_some(at)
        };
        match (place(5, 64), place(6, 512), place(7, 1024)) {
            (Some(masks), Some(upper), Some(more)) => Ok(Some(Wide { masks, upper, more })),
            _ => Err("the processor keeps its state in an unknown place of the XSAVE image"),
        }
    }
}

/// Bytes of the XSAVE image that a vCPU uses, and the components in it as bits of XCR0.
pub fn extent(wide: Option<Wide>) -> (usize, u64) {
    match wide {
        None => (NARROW_BYTES, 7),
        Some(w) => {
            let end = (w.masks + 64).max(w.upper + 512).max(w.more + 1024);
            (end, 7 | Wide::XCR0)
        }
    }
}

const XMM: usize = 160;
const HEADER: usize = 512;
const YMM_HIGH: usize = 576;

#[repr(C, align(16))]
struct Legacy([u8; 512]);

/// Whether a register, or several, have other bits than zeros; whole ones, of 16 bytes at least.
fn any(registers: &[u8]) -> bool {
    let (words, rest) = registers.as_chunks::<16>();
    debug_assert!(rest.is_empty());
    words.iter().fold(0, |all, w| all | u128::from_ne_bytes(*w)) != 0
}

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
    for (n, vector) in frame.vectors.0[..16].iter().enumerate() {
        let (low, high) = vector[..32].split_at(16);
        image[XMM + 16 * n..XMM + 16 * n + 16].copy_from_slice(low);
        image[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16].copy_from_slice(high);
        sse |= any(low);
        avx |= any(high);
    }
    let initial_x87 = image[0..5] == [0x7f, 3, 0, 0, 0] && !any(&image[32..160]);
    let mut present = u64::from(!initial_x87) | u64::from(sse) << 1 | u64::from(avx) << 2;
    if let Some(wide) = frame.wide {
        present |= store_wide(frame, wide);
    }
    let image = &mut frame.cpu.xsave.0;
    let mut header = u64::from_le_bytes(image[HEADER..HEADER + 8].try_into().expect("8 bytes"));
    header = header & !extent(frame.wide).1 | present;
    image[HEADER..HEADER + 8].copy_from_slice(&header.to_le_bytes());
}

/// The AVX-512 part of [`store`]; gives the components that are not in their initial state.
fn store_wide(frame: &mut Frame, wide: Wide) -> u64 {
    let image = &mut frame.cpu.xsave.0;
    let (mut masks, mut upper, mut more) = (false, false, false);
    for (n, k) in frame.masks.iter().enumerate() {
        image[wide.masks + 8 * n..][..8].copy_from_slice(&k.to_le_bytes());
        masks |= *k != 0;
    }
    for (n, vector) in frame.vectors.0.iter().enumerate() {
        if n < 16 {
            image[wide.upper + 32 * n..][..32].copy_from_slice(&vector[32..]);
            upper |= any(&vector[32..]);
        } else {
            image[wide.more + 64 * (n - 16)..][..64].copy_from_slice(vector);
            more |= any(vector);
        }
    }
    u64::from(masks) << 5 | u64::from(upper) << 6 | u64::from(more) << 7
}

/// Makes the image the state that the guest goes on with.
pub fn load(frame: &mut Frame) {
    let image = &frame.cpu.xsave.0;
    let present = u64::from_le_bytes(image[HEADER..HEADER + 8].try_into().expect("8 bytes"));
    frame.guest_mxcsr = u32::from_le_bytes(image[24..28].try_into().expect("4 bytes"));
    for (n, vector) in frame.vectors.0[..16].iter_mut().enumerate() {
        let (low, high) = vector[..32].split_at_mut(16);
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
    if let Some(wide) = frame.wide {
        load_wide(frame, wide, present);
    }
    let image = &frame.cpu.xsave.0;
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

/// The AVX-512 part of [`load`].
fn load_wide(frame: &mut Frame, wide: Wide, present: u64) {
    let image = &frame.cpu.xsave.0;
    let take = |component: u32, at: usize, to: &mut [u8]| {
        if present >> component & 1 != 0 {
            to.copy_from_slice(&image[at..at + to.len()]);
        } else {
            to.fill(0);
        }
    };
    for (n, k) in frame.masks.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        take(5, wide.masks + 8 * n, &mut bytes);
        *k = u64::from_le_bytes(bytes);
    }
    for (n, vector) in frame.vectors.0.iter_mut().enumerate() {
        if n < 16 {
            take(6, wide.upper + 32 * n, &mut vector[32..]);
        } else {
            take(7, wide.more + 64 * (n - 16), vector);
        }
    }
}
