//! The local APIC as functions on [`LapicState`].
//!
//! Source: Intel SDM volume 3, chapter 11. Registers are named by their xAPIC offset divided by 16, which is also the x2APIC MSR number
//! less 0x800; both modes use the same functions. The timer and LINT inputs are latches: PVH guests never start the timer. Interrupts
//! are edge-triggered.

use hospes_engine::LapicState;

use super::host::{Delivery, Ipi, Shorthand};

/// Register numbers: xAPIC offset / 16.
pub mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT: u32 = 0x32;
    pub const LVT_END: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Six LVT entries, version 0x14.
const VERSION: u32 = 0x0005_0014;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
/// Writable bits of each LVT entry: timer, thermal, performance, LINT0, LINT1, error.
const LVT_BITS: [u32; 6] = [0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff];
/// ESR: an illegal vector was sent.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;

/// A register access that raises #GP in x2APIC mode and is ignored (reads as 0) in xAPIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRegister;

/// What a register write sets off outside the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Ipi(Ipi),
    /// SVR bit 8 has been cleared, or went from 0 to 1.
    Enabled(bool),
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    let word = bits.iter().rposition(|&w| w != 0)?;
    Some((word * 32) as u8 + 31 - bits[word].leading_zeros() as u8)
}

fn set(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector >> 5)] |= 1 << (vector & 31);
}

fn clear(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector >> 5)] &= !(1 << (vector & 31));
}

/// Processor priority: the higher of the task priority and the class of the interrupt in service.
pub fn processor_priority(l: &LapicState) -> u32 {
    let in_service = highest(&l.isr).map_or(0, |v| u32::from(v) & 0xf0);
    if l.tpr & 0xf0 >= in_service {
        l.tpr & 0xff
    } else {
        in_service
    }
}

/// Whether software has enabled the APIC.
pub fn enabled(l: &LapicState) -> bool {
    l.svr & SVR_ENABLED != 0
}

/// Sets a fixed edge-triggered interrupt in the IRR; false where the APIC is disabled by software and the interrupt is lost.
pub fn raise(l: &mut LapicState, vector: u8) -> bool {
    if !enabled(l) {
        return false;
    }
    clear(&mut l.tmr, vector);
    set(&mut l.irr, vector);
    true
}

/// The interrupt that would be taken now, were interrupts enabled.
#[inline]
pub fn pending_vector(l: &LapicState) -> Option<u8> {
    let v = highest(&l.irr)?;
    (u32::from(v >> 4) > processor_priority(l) >> 4).then_some(v)
}

/// Moves an interrupt from requested to in service: it is being delivered.
pub fn accept(l: &mut LapicState, vector: u8) {
    clear(&mut l.irr, vector);
    set(&mut l.isr, vector);
}

/// End of the highest interrupt in service.
pub fn eoi(l: &mut LapicState) {
    if let Some(v) = highest(&l.isr) {
        clear(&mut l.isr, v);
    }
}

/// Logical destination in x2APIC mode: cluster and bit, both from the id.
pub fn x2apic_logical_id(id: u32) -> u32 {
    ((id >> 4) << 16) | (1 << (id & 15))
}

/// Reads a register.
pub fn read(l: &LapicState, r: u32, x2apic: bool) -> Result<u64, BadRegister> {
    let low = match r {
        reg::ID if x2apic => l.id,
        reg::ID => l.id << 24,
        reg::VERSION => VERSION,
        reg::TPR => l.tpr,
        reg::PPR => processor_priority(l),
        reg::LDR if x2apic => x2apic_logical_id(l.id),
        reg::LDR => l.ldr,
        reg::DFR if !x2apic => l.dfr,
        reg::SVR => l.svr,
        reg::ISR..reg::TMR => l.isr[(r - reg::ISR) as usize],
        reg::TMR..reg::IRR => l.tmr[(r - reg::TMR) as usize],
        reg::IRR..reg::ESR => l.irr[(r - reg::IRR) as usize],
        reg::ESR => l.esr,
        reg::ICR if x2apic => return Ok(l.icr),
        reg::ICR => l.icr as u32,
        reg::ICR_HIGH if !x2apic => (l.icr >> 32) as u32,
        reg::LVT..=reg::LVT_END => l.lvt[(r - reg::LVT) as usize],
        reg::TIMER_INITIAL => l.timer_initial,
        reg::TIMER_CURRENT => 0,
        reg::TIMER_DIVIDE => l.timer_divide,
        _ => return Err(BadRegister),
    };
    Ok(u64::from(low))
}

/// Writes a register. In xAPIC mode the upper half of `value` is ignored.
pub fn write(l: &mut LapicState, r: u32, value: u64, x2apic: bool) -> Result<Effect, BadRegister> {
    let low = value as u32;
    if x2apic && r != reg::ICR && value >> 32 != 0 {
        return Err(BadRegister);
    }
    let only = |bits: u32| {
        if x2apic && low & !bits != 0 {
            Err(BadRegister)
        } else {
            Ok(low & bits)
        }
    };
    match r {
        reg::TPR => l.tpr = only(0xff)?,
        reg::EOI => {
            only(0)?;
            eoi(l);
        }
        reg::ID if !x2apic => l.id = low >> 24,
        reg::LDR if !x2apic => l.ldr = low & 0xff00_0000,
        reg::DFR if !x2apic => l.dfr = low | 0x0fff_ffff,
        reg::SVR => {
            let new = only(0x3ff)?;
            let was = std::mem::replace(&mut l.svr, new) & SVR_ENABLED;
            if new & SVR_ENABLED == 0 {
                l.lvt.iter_mut().for_each(|e| *e |= LVT_MASKED);
                return Ok(Effect::Enabled(false));
            }
            if was == 0 {
                return Ok(Effect::Enabled(true));
            }
        }
        reg::ESR => l.esr = only(0)?,
        reg::ICR => {
            if x2apic {
                // Bit 12, delivery status, always reads idle.
                if low & 0xfff3_2000 != 0 {
                    return Err(BadRegister);
                }
                l.icr = value & !(1 << 12);
            } else {
                l.icr = (l.icr & !0xffff_ffff) | u64::from(low & 0x000c_cfff);
            }
            return Ok(send(l, x2apic));
        }
        reg::ICR_HIGH if !x2apic => {
            l.icr = (l.icr & 0xffff_ffff) | (u64::from(low & 0xff00_0000) << 32);
        }
        reg::LVT..=reg::LVT_END => {
            let i = (r - reg::LVT) as usize;
            // Delivery status and remote IRR (bits 12 and 14) are read-only, not reserved.
            let masked = if enabled(l) { 0 } else { LVT_MASKED };
            l.lvt[i] = only(LVT_BITS[i] | 0x5000)? & LVT_BITS[i] | masked;
        }
        reg::TIMER_INITIAL => l.timer_initial = low,
        reg::TIMER_DIVIDE => l.timer_divide = only(0xb)?,
        reg::SELF_IPI if x2apic => deliver_to_self(l, only(0xff)? as u8),
        _ => return Err(BadRegister),
    }
    Ok(Effect::None)
}

fn deliver_to_self(l: &mut LapicState, vector: u8) {
    if vector < 16 {
        l.esr |= ESR_SEND_ILLEGAL;
    } else {
        raise(l, vector);
    }
}

/// Carries out a write of the ICR. The part of a fixed interrupt that concerns the sender alone is done here.
fn send(l: &mut LapicState, x2apic: bool) -> Effect {
    let icr = l.icr as u32;
    let vector = icr as u8;
    let level_deassert = icr & (1 << 14) == 0 && icr & (1 << 15) != 0;
    let delivery = match icr >> 8 & 7 {
        0 => Delivery::Fixed,
        1 => Delivery::LowestPriority,
        2 => Delivery::Smi,
        4 => Delivery::Nmi,
        // INIT de-assert only concerned processors without ids in the APIC bus.
        5 if level_deassert => return Effect::None,
        5 => Delivery::Init,
        6 => Delivery::Startup,
        _ => return Effect::None,
    };
    let fixed = matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
    if fixed && vector < 16 {
        l.esr |= ESR_SEND_ILLEGAL;
        return Effect::None;
    }
    let dest = if x2apic {
        (l.icr >> 32) as u32
    } else {
        match (l.icr >> 56) as u32 {
            0xff => 0xffff_ffff,
            id => id,
        }
    };
    let logical = icr & (1 << 11) != 0;
    let mut shorthand = match icr >> 18 & 3 {
        0 => Shorthand::None,
        1 => Shorthand::Oneself,
        2 => Shorthand::All,
        _ => Shorthand::Others,
    };
    if fixed {
        if shorthand == Shorthand::Oneself
            || (shorthand == Shorthand::None && !logical && dest == l.id)
        {
            deliver_to_self(l, vector);
            return Effect::None;
        }
        if shorthand == Shorthand::All {
            deliver_to_self(l, vector);
            shorthand = Shorthand::Others;
        }
    }
    Effect::Ipi(Ipi {
        dest,
        logical,
        delivery,
        vector,
        shorthand,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on() -> LapicState {
        LapicState {
            id: 2,
            svr: 0x1ff,
            ..LapicState::default()
        }
    }

    #[test]
    fn raise_while_software_disabled_is_lost() {
        let mut l = LapicState::default();
        assert!(!raise(&mut l, 0xf3));
        assert_eq!(pending_vector(&l), None);
        assert_eq!(
            write(&mut l, reg::SVR, 0x1ff, true),
            Ok(Effect::Enabled(true))
        );
        assert!(raise(&mut l, 0xf3));
        assert_eq!(pending_vector(&l), Some(0xf3));
        assert_eq!(
            write(&mut l, reg::SVR, 0xff, true),
            Ok(Effect::Enabled(false))
        );
    }

    #[test]
    fn pending_vector_follows_priority_classes() {
        let mut l = on();
        raise(&mut l, 0x31);
        raise(&mut l, 0xf3);
        assert_eq!(pending_vector(&l), Some(0xf3));
        accept(&mut l, 0xf3);
        assert_eq!(pending_vector(&l), None);
        assert_eq!(processor_priority(&l), 0xf0);
        eoi(&mut l);
        assert_eq!(pending_vector(&l), Some(0x31));
        l.tpr = 0x30;
        assert_eq!(pending_vector(&l), None);
        l.tpr = 0x2f;
        assert_eq!(pending_vector(&l), Some(0x31));
    }

    #[test]
    fn icr_init_startup_and_deassert_decode() {
        let mut l = on();
        let ipi = |delivery, vector| {
            Ok(Effect::Ipi(Ipi {
                dest: 4,
                logical: false,
                delivery,
                vector,
                shorthand: Shorthand::None,
            }))
        };
        let to = 4u64 << 32;
        assert_eq!(
            write(&mut l, reg::ICR, to | 0xc500, true),
            ipi(Delivery::Init, 0)
        );
        assert_eq!(write(&mut l, reg::ICR, to | 0x8500, true), Ok(Effect::None));
        assert_eq!(
            write(&mut l, reg::ICR, to | 0x69a, true),
            ipi(Delivery::Startup, 0x9a)
        );
    }

    #[test]
    fn fixed_interrupts_to_oneself_stay_local() {
        let mut l = on();
        assert_eq!(write(&mut l, reg::SELF_IPI, 0xf6, true), Ok(Effect::None));
        assert_eq!(pending_vector(&l), Some(0xf6));
        let mut l = on();
        assert!(matches!(
            write(&mut l, reg::ICR, 0x800f8, true),
            Ok(Effect::Ipi(Ipi {
                shorthand: Shorthand::Others,
                ..
            }))
        ));
        assert_eq!(pending_vector(&l), Some(0xf8));
    }

    #[test]
    fn x2apic_reserved_bits_are_refused() {
        let mut l = on();
        for (r, v) in [
            (reg::TPR, 0x100),
            (reg::EOI, 1),
            (reg::SVR, 1 << 12),
            (reg::LVT, 1 << 20),
            (reg::ID, 0),
            (reg::DFR, 0),
            (reg::TPR, 1 << 32),
        ] {
            assert_eq!(write(&mut l, r, v, true), Err(BadRegister), "{r:#x}");
        }
        assert_eq!(read(&l, reg::EOI, true), Err(BadRegister));
        assert_eq!(read(&l, reg::LDR, true), Ok(0x4));
    }

    #[test]
    fn disabling_masks_the_local_vectors() {
        let mut l = on();
        write(&mut l, reg::LVT + 3, 0x700, true).unwrap();
        assert_eq!(l.lvt[3], 0x700);
        write(&mut l, reg::SVR, 0xff, true).unwrap();
        assert_eq!(l.lvt[3], 0x10700);
        write(&mut l, reg::LVT + 3, 0x700, true).unwrap();
        assert_eq!(l.lvt[3], 0x10700);
    }
}
