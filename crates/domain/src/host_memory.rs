//! Whether the host can give a domain memory.

/// Kept for the host, and for what a domain needs beside its guest's memory, in bytes.
const RESERVE_BYTES: u64 = 128 << 20;

/// What the host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{needed_mib} MiB of memory are needed; the host has {available_mib} MiB left, of which other domains may still claim {promised_mib} MiB and the host keeps {reserve_mib} MiB"
)]
pub struct Shortage {
    pub needed_mib: u64,
    pub available_mib: u64,
    pub promised_mib: u64,
    pub reserve_mib: u64,
}

/// Whether the host's free memory, without what is promised to others, holds so many bytes more. A host that does not tell how much it has is trusted to have enough.
pub fn room(bytes: u64, promised: u64) -> Result<(), Shortage> {
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_bytes(&text));
    match available {
        Some(available) => room_in(bytes, promised, available),
        None => Ok(()),
    }
}

fn room_in(bytes: u64, promised: u64, available: u64) -> Result<(), Shortage> {
    let spoken_for = promised.saturating_add(RESERVE_BYTES);
    if bytes.saturating_add(spoken_for) <= available {
        return Ok(());
    }
    Err(Shortage {
        needed_mib: bytes.div_ceil(1 << 20),
        available_mib: available >> 20,
        promised_mib: promised >> 20,
        reserve_mib: RESERVE_BYTES >> 20,
    })
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_bytes_of_meminfo() {
        let text = "MemTotal:       8000000 kB\nMemAvailable:    2048000 kB\nBuffers: 1 kB\n";
        assert_eq!(available_bytes(text), Some(2_048_000 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
        assert_eq!(available_bytes("MemAvailable: x kB\n"), None);
    }

    #[test]
    fn room_beyond_the_host_names_the_numbers() {
        assert!(room_in(512 << 20, 0, 640 << 20).is_ok());
        assert!(room_in(412 << 20, 100 << 20, 640 << 20).is_ok());
        assert!(room_in(413 << 20, 100 << 20, 640 << 20).is_err());
        let text = room_in(513 << 20, 0, 640 << 20).unwrap_err().to_string();
        assert!(
            text.contains("513 MiB") && text.contains("640 MiB"),
            "{text}"
        );
    }
}
