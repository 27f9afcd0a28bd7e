//! States of a device's two halves, decimal numbers in their `state` nodes (`public/io/xenbus.h`).

/// What one half of a device is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum XenbusState {
    /// The node is missing or not a state.
    #[default]
    Unknown = 0,
    Initialising = 1,
    /// Has said what it can do and waits for the other half.
    InitWait = 2,
    /// Has set up its side and waits for the connection.
    Initialised = 3,
    Connected = 4,
    Closing = 5,
    Closed = 6,
    Reconfiguring = 7,
    Reconfigured = 8,
}

impl XenbusState {
    /// The state in a node's value.
    pub fn parse(value: &str) -> XenbusState {
        match value.trim() {
            "1" => XenbusState::Initialising,
            "2" => XenbusState::InitWait,
            "3" => XenbusState::Initialised,
            "4" => XenbusState::Connected,
            "5" => XenbusState::Closing,
            "6" => XenbusState::Closed,
            "7" => XenbusState::Reconfiguring,
            "8" => XenbusState::Reconfigured,
            _ => XenbusState::Unknown,
        }
    }

    /// The number for a node's value.
    pub const fn number(self) -> u8 {
        self as u8
    }
}
