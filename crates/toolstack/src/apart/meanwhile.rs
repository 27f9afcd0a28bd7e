//! What a machine process says before its answer to a call.

use std::io;

use hospes_migration::LiveRound;

use super::broken;
use super::call::Back;
use super::told::Room;
use super::wire::Wire;
use crate::machine::{MachineError, Piece, SaveStream};

/// Most bytes that follow one message.
const BYTES_MAX: u32 = 16 << 20;

/// What is done with what comes before the answer to a call.
pub(super) struct Meanwhile<'a, 'b> {
    pub(super) room: Room,
    pub(super) promised: Option<&'a dyn Fn() -> u64>,
    pub(super) given_up: Option<&'a dyn Fn() -> bool>,
    pub(super) progress: Option<&'a mut dyn FnMut(LiveRound)>,
    pub(super) to: Option<&'a mut SaveStream<'b>>,
    pub(super) piece: Option<Piece<'a>>,
}

/// What to say of a connection that has ended too soon.
type Lost<'a> = &'a dyn Fn(io::Error) -> MachineError;

impl Meanwhile<'_, '_> {
    /// Nothing.
    pub(super) fn none() -> Self {
        Meanwhile {
            room: Room::for_rounds(),
            promised: None,
            given_up: None,
            progress: None,
            to: None,
            piece: None,
        }
    }

    /// Does what a message says, with the bytes that follow it.
    pub(super) fn obey(
        &mut self,
        back: Back,
        wire: &Wire,
        buffer: &mut Vec<u8>,
        lost: Lost<'_>,
    ) -> Result<(), MachineError> {
        match (back, self) {
            (
                Back::Promised,
                Meanwhile {
                    promised: Some(f), ..
                },
            ) => wire.send(&f(), &[])?,
            (
                Back::GivenUp,
                Meanwhile {
                    given_up: Some(f), ..
                },
            ) => wire.send(&f(), &[])?,
            (
                Back::Round {
                    number,
                    pages,
                    bytes_per_s,
                    left,
                },
                Meanwhile {
                    progress: Some(f),
                    room,
                    ..
                },
            ) => {
                room.take_round()?;
                f(LiveRound {
                    number,
                    pages,
                    bytes_per_s,
                    left,
                });
            }
            (
                Back::Bytes(bytes),
                Meanwhile {
                    to: Some(to), room, ..
                },
            ) => {
                room.take(bytes)?;
                read(wire, bytes, buffer, lost)?;
                to.pass(buffer)?;
            }
            (
                Back::Piece { offset, bytes },
                Meanwhile {
                    piece: Some(f),
                    room,
                    ..
                },
            ) => {
                room.check_end(offset.checked_add(bytes.into()))?;
                read(wire, bytes, buffer, lost)?;
                let written = f(offset, buffer);
                let fault = written.as_ref().err().map(ToString::to_string);
                wire.send(&fault, &[])?;
            }
            (other, _) => return Err(broken(other)),
        }
        Ok(())
    }
}

/// Reads the bytes that follow a message.
fn read(wire: &Wire, bytes: u32, buffer: &mut Vec<u8>, lost: Lost<'_>) -> Result<(), MachineError> {
    if bytes > BYTES_MAX {
        return Err(broken(bytes));
    }
    buffer.resize(bytes as usize, 0);
    wire.read_exact(buffer).map_err(lost)
}
