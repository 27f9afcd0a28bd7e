//! Leaf 0xD: where XSAVE puts the components that the guest may enable.
//!
//! Sizes and places in the standard format are the host's, since natively executed code and the engine's own image share them. Sources: Intel SDM volume 1,
//! sections 13.2, 13.4.2 and 13.4.3.

use crate::host::HostCpu;

/// Bytes of the legacy area and the header, in front of the extended components.
const LEGACY_BYTES: u32 = 512 + 64;
/// Upper halves of YMM0-15, at the same place on every processor.
const AVX: Component = Component {
    number: 2,
    bytes: 256,
    at: LEGACY_BYTES,
    aligned: false,
};
/// The AVX-512 components.
const WIDE: std::ops::RangeInclusive<u32> = 5..=7;

/// An extended component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Component {
    /// Bit of XCR0.
    number: u32,
    bytes: u32,
    /// Offset in the standard format.
    at: u32,
    /// It begins at a multiple of 64 in the compacted format.
    aligned: bool,
}

/// The leaf for one domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Xsave {
    /// XCR0's valid bits.
    xcr0: u64,
    /// Subleaf 1, EAX.
    features: u32,
    /// Ascending.
    components: Vec<Component>,
}

impl Xsave {
    /// For the components in `xcr0`; all zeros where that is 0.
    pub fn new(host: &HostCpu, xcr0: u64, features: u32) -> Xsave {
        let wide = WIDE.map(|number| {
            let [bytes, at, flags, _] = host.leaf(0xd, number);
            Component {
                number,
                bytes,
                at,
                aligned: flags & 2 != 0,
            }
        });
        let all = std::iter::once(AVX).chain(wide);
        Xsave {
            xcr0,
            features,
            components: all.filter(|c| xcr0 >> c.number & 1 != 0).collect(),
        }
    }

    /// EAX, EBX, ECX, EDX for the present XCR0.
    pub fn lookup(&self, subleaf: u32, xcr0: u64) -> [u32; 4] {
        if self.xcr0 == 0 {
            return [0; 4];
        }
        match subleaf {
            0 => [
                self.xcr0 as u32,
                self.standard(xcr0),
                self.standard(self.xcr0),
                0,
            ],
            1 => [self.features, self.compacted(xcr0), 0, 0],
            _ => self
                .components
                .iter()
                .find(|c| c.number == subleaf)
                .map_or([0; 4], |c| [c.bytes, c.at, u32::from(c.aligned) << 1, 0]),
        }
    }

    fn enabled(&self, xcr0: u64) -> impl Iterator<Item = &Component> {
        let chosen = move |c: &&Component| xcr0 >> c.number & 1 != 0;
        self.components.iter().filter(chosen)
    }

    /// Bytes of an image in standard format.
    fn standard(&self, xcr0: u64) -> u32 {
        let ends = self.enabled(xcr0).map(|c| c.at.saturating_add(c.bytes));
        ends.fold(LEGACY_BYTES, u32::max)
    }

    /// Bytes of an image in compacted format.
    fn compacted(&self, xcr0: u64) -> u32 {
        self.enabled(xcr0).fold(LEGACY_BYTES, |end, c| {
            let start = if c.aligned {
                end.next_multiple_of(64)
            } else {
                end
            };
            start.saturating_add(c.bytes)
        })
    }
}
