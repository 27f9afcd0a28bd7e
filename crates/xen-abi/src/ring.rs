//! The console page and the xenstore page (`public/io/console.h`, `public/io/xs_wire.h`): where their words lie.
//!
//! Both sides write these pages at once, so nobody copies them as a whole: offsets are all there is. Indices are free-running u32.

/// Console page: bytes to the guest.
pub const CONSOLE_IN: usize = 0;
pub const CONSOLE_IN_BYTES: usize = 1024;
/// Console page: bytes from the guest.
pub const CONSOLE_OUT: usize = 1024;
pub const CONSOLE_OUT_BYTES: usize = 2048;
pub const CONSOLE_IN_CONS: usize = 3072;
pub const CONSOLE_IN_PROD: usize = 3076;
pub const CONSOLE_OUT_CONS: usize = 3080;
pub const CONSOLE_OUT_PROD: usize = 3084;

/// Xenstore page: requests of the guest.
pub const XS_REQ: usize = 0;
/// Xenstore page: responses and watch events.
pub const XS_RSP: usize = 1024;
/// Bytes in each direction.
pub const XS_RING_BYTES: usize = 1024;
pub const XS_REQ_CONS: usize = 2048;
pub const XS_REQ_PROD: usize = 2052;
pub const XS_RSP_CONS: usize = 2056;
pub const XS_RSP_PROD: usize = 2060;
pub const XS_SERVER_FEATURES: usize = 2064;
pub const XS_CONNECTION: usize = 2068;
pub const XS_ERROR: usize = 2072;

/// The guest may ask for a fresh connection by [`XS_CONNECTION`].
pub const XS_FEATURE_RECONNECTION: u32 = 1 << 0;
/// Why the server stopped is told in [`XS_ERROR`].
pub const XS_FEATURE_ERROR: u32 = 1 << 1;

pub const XS_CONNECTED: u32 = 0;
pub const XS_RECONNECT: u32 = 1;

pub const XS_ERROR_NONE: u32 = 0;
/// Ring indices that cannot be.
pub const XS_ERROR_RINGIDX: u32 = 2;
/// A message that breaks the wire format.
pub const XS_ERROR_PROTO: u32 = 3;
