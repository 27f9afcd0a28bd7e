//! Network devices: requests and responses (`public/io/netif.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

/// Transmit flags: the checksum is to be filled in; the data is known to be good; the packet goes on in the next slot; an [`ExtraInfo`] follows.
pub const TX_CSUM_BLANK: u16 = 1;
pub const TX_DATA_VALIDATED: u16 = 2;
pub const TX_MORE_DATA: u16 = 4;
pub const TX_EXTRA_INFO: u16 = 8;

/// Receive flags, as above.
pub const RX_DATA_VALIDATED: u16 = 1;
pub const RX_CSUM_BLANK: u16 = 2;
pub const RX_MORE_DATA: u16 = 4;
pub const RX_EXTRA_INFO: u16 = 8;

pub const STATUS_OKAY: i16 = 0;
pub const STATUS_ERROR: i16 = -1;
pub const STATUS_DROPPED: i16 = -2;
/// The response in a slot that held an [`ExtraInfo`].
pub const STATUS_NULL: i16 = 1;

pub const EXTRA_TYPE_GSO: u8 = 1;
/// Another extra follows.
pub const EXTRA_FLAG_MORE: u8 = 1;
pub const GSO_TYPE_NONE: u8 = 0;
pub const GSO_TYPE_TCPV4: u8 = 1;
pub const GSO_TYPE_TCPV6: u8 = 2;

/// Slots that a back end must take for one packet.
pub const MAX_TX_SLOTS: usize = 18;

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TxRequest {
    pub gref: u32,
    /// Of the data in its page, bytes.
    pub offset: u16,
    pub flags: u16,
    pub id: u16,
    /// Bytes of the whole packet in its first slot, of the fragment in the others.
    pub size: u16,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TxResponse {
    pub id: u16,
    pub status: i16,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RxRequest {
    pub id: u16,
    pub pad: u16,
    pub gref: u32,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RxResponse {
    pub id: u16,
    pub offset: u16,
    pub flags: u16,
    /// Bytes of the packet in this slot; negative for an error.
    pub status: i16,
}

/// A slot that describes the packet of the slots around it; this shape is for [`EXTRA_TYPE_GSO`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ExtraInfo {
    pub kind: u8,
    pub flags: u8,
    /// Bytes of payload of each piece.
    pub gso_size: u16,
    pub gso_type: u8,
    pub pad: u8,
    pub gso_features: u16,
}

assert_size!(TxRequest: 12, TxResponse: 4, RxRequest: 8, RxResponse: 8, ExtraInfo: 8);
