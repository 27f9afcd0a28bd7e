//! The header before each frame on a tap: `struct virtio_net_hdr` of the virtio specification, 5.1.6, in its form of 10 bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The checksum at `csum_start + csum_offset` is to be filled in.
pub const NEEDS_CSUM: u8 = 1;
/// The checksums are known to be good.
pub const DATA_VALID: u8 = 2;
pub const GSO_NONE: u8 = 0;
pub const GSO_TCPV4: u8 = 1;
pub const GSO_TCPV6: u8 = 4;
/// A bit beside the type: the segments carry congestion marks.
pub const GSO_ECN: u8 = 0x80;

/// Numbers are little-endian, as this machine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct VnetHeader {
    pub flags: u8,
    pub gso_type: u8,
    /// Bytes of all headers.
    pub hdr_len: u16,
    /// Bytes of payload of each segment.
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
}

/// Bytes of the header.
pub const BYTES: usize = size_of::<VnetHeader>();
