//! Instructions decoded before: what is left to the semantics are the same few instructions of a kernel again and again.

use iced_x86::Instruction;

use super::MAX_INSTRUCTION;

/// A power of two.
const ENTRIES: usize = 64;

/// All that an instruction in 64-bit code follows from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Source {
    pub rip: u64,
    pub bytes: [u8; MAX_INSTRUCTION],
}

/// The latest instructions, each in the place that its address selects.
pub struct Decoded(Box<[Option<(Source, Instruction)>; ENTRIES]>);

impl Default for Decoded {
    fn default() -> Decoded {
        Decoded(Box::new([None; ENTRIES]))
    }
}

fn place(rip: u64) -> usize {
    (rip ^ rip >> 6 ^ rip >> 12) as usize % ENTRIES
}

impl Decoded {
    pub(super) fn get(&self, source: &Source) -> Option<Instruction> {
        let known = self.0[place(source.rip)].as_ref();
        known.filter(|(s, _)| s == source).map(|(_, i)| *i)
    }

    pub(super) fn add(&mut self, source: Source, i: Instruction) {
        self.0[place(source.rip)] = Some((source, i));
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Code;

    use super::*;

    fn source(rip: u64, first: u8) -> Source {
        let mut bytes = [0x90; MAX_INSTRUCTION];
        bytes[0] = first;
        Source { rip, bytes }
    }

    #[test]
    fn get_finds_the_same_bytes_at_the_same_address_only() {
        let mut decoded = Decoded::default();
        let i = Instruction::with(Code::Nopd);
        decoded.add(source(0x1000, 0x90), i);
        assert_eq!(decoded.get(&source(0x1000, 0x90)), Some(i));
        assert_eq!(decoded.get(&source(0x1000, 0xf4)), None);
        // One that has the same place.
        let other = (0x1001..).find(|&rip| place(rip) == place(0x1000)).unwrap();
        assert_eq!(decoded.get(&source(other, 0x90)), None);
    }
}
