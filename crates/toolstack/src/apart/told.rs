//! What a machine process says of itself, made fit for logs, terminals and replies to commands: a guest that has broken out may have said it.

use std::fmt::Debug;

use super::broken;
use crate::machine::{MachineError, MachineInfo};
use crate::protocol::{EndReason, Waiting};
use crate::scheduling::VcpuInfo;

/// Longest sentence, in characters.
const SENTENCE_MAX: usize = 512;
/// Most devices that wait: with as many sentences a reply is not too long.
const WAITING_MAX: usize = 16;
/// Longest text of many lines, in characters.
const LINES_MAX: usize = 64 << 10;
/// Most rounds of a live migration.
const ROUNDS_MAX: u32 = 1000;
/// What a saved domain or a core file has beside its memory, and more than that, in bytes.
const BESIDE_MEMORY: u64 = 1 << 30;

fn plain(text: &str, most: usize, keeps: impl Fn(char) -> bool) -> String {
    let plain = |c: char| match c {
        '\n' if !keeps(c) => ' ',
        c if c.is_control() && !keeps(c) => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().take(most).map(plain).collect()
}

/// One line, not long and without control characters.
pub(super) fn sentence(text: &str) -> String {
    plain(text, SENTENCE_MAX, |_| false)
}

/// The same of many lines.
pub(super) fn lines(text: &str) -> String {
    plain(text, LINES_MAX, |c| c == '\n')
}

pub(super) fn end(reason: EndReason) -> EndReason {
    match reason {
        EndReason::Crash(cause) => EndReason::Crash(sentence(&cause)),
        other => other,
    }
}

pub(super) fn waiting(mut devices: Vec<Waiting>) -> Vec<Waiting> {
    devices.truncate(WAITING_MAX);
    for device in &mut devices {
        device.why = sentence(&device.why);
    }
    devices
}

pub(super) fn vcpus(mut vcpus: Vec<VcpuInfo>) -> Vec<VcpuInfo> {
    for vcpu in &mut vcpus {
        for cpus in [&mut vcpu.hard, &mut vcpu.soft].into_iter().flatten() {
            *cpus = sentence(cpus);
        }
    }
    vcpus
}

/// Of a machine that has `most_kib` of memory at most: what it claims beyond that other domains would not get.
pub(super) fn info(info: MachineInfo, most_kib: u64) -> MachineInfo {
    MachineInfo {
        memory_kib: info.memory_kib.min(most_kib),
        promised_kib: info.promised_kib.min(most_kib),
        ..info
    }
}

/// How much may come of a stream or a file that is written to the host's disks.
#[derive(Debug)]
pub(super) struct Room {
    bytes: u64,
    rounds: u32,
}

impl Room {
    /// For a machine that has so much memory at most, each page of which comes once.
    pub(super) fn for_once(most_kib: u64) -> Room {
        Room {
            bytes: most_kib
                .saturating_mul(2 << 10)
                .saturating_add(BESIDE_MEMORY),
            rounds: ROUNDS_MAX,
        }
    }

    /// For what comes again and again and stays nowhere.
    pub(super) fn for_rounds() -> Room {
        Room {
            bytes: u64::MAX,
            rounds: ROUNDS_MAX,
        }
    }

    /// Takes what so many bytes more need.
    pub(super) fn take(&mut self, bytes: u32) -> Result<(), MachineError> {
        let left = self.bytes.checked_sub(bytes.into());
        self.bytes = left.ok_or_else(|| too_much("bytes"))?;
        Ok(())
    }

    pub(super) fn take_round(&mut self) -> Result<(), MachineError> {
        let left = self.rounds.checked_sub(1);
        self.rounds = left.ok_or_else(|| too_much("rounds"))?;
        Ok(())
    }

    /// Refuses a file that ends there.
    pub(super) fn check_end(&self, end: Option<u64>) -> Result<(), MachineError> {
        match end {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(too_much("bytes")),
        }
    }
}

fn too_much(what: impl Debug) -> MachineError {
    broken(format_args!("more {what:?} than it can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_short_and_print_themselves_alone() {
        assert_eq!(sentence("a\nb\u{1b}[2Jc\u{9b}"), "a b\u{fffd}[2Jc\u{fffd}");
        assert_eq!(sentence(&"é".repeat(1 << 20)).chars().count(), SENTENCE_MAX);
        assert_eq!(lines("a\nb\r"), "a\nb\u{fffd}");
        let EndReason::Crash(cause) = end(EndReason::Crash("x\n".repeat(1 << 20))) else {
            panic!("another end");
        };
        assert_eq!(cause.len(), SENTENCE_MAX);
    }

    #[test]
    fn nobody_claims_more_than_the_most() {
        let all = MachineInfo {
            memory_kib: u64::MAX,
            promised_kib: u64::MAX,
            ..MachineInfo::default()
        };
        let told = info(all, 1 << 20);
        assert_eq!((told.memory_kib, told.promised_kib), (1 << 20, 1 << 20));
    }

    #[test]
    fn room_ends() {
        let mut room = Room::for_once(1 << 20);
        room.check_end(Some(1 << 30)).unwrap();
        room.check_end(Some(u64::MAX)).unwrap_err();
        room.check_end(None).unwrap_err();
        for _ in 0..3 {
            room.take(1 << 30).unwrap();
        }
        room.take(1).unwrap_err();
        for _ in 0..ROUNDS_MAX {
            room.take_round().unwrap();
        }
        room.take_round().unwrap_err();
    }
}
