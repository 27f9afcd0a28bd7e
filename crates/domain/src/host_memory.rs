//! Whether the host can give a new domain its memory.

use crate::CreateError;

/// Kept for the host, and for what a domain needs beside its guest's memory, in bytes.
const RESERVE_BYTES: u64 = 128 << 20;

/// Refuses a domain that the host's free memory, without what is promised to others, does not hold. A host that does not tell how much it has is trusted to have enough.
pub fn check(name: &str, memory_bytes: u64, promised: u64) -> Result<(), CreateError> {
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_bytes(&text));
    match available {
        Some(available) => check_against(name, memory_bytes, promised, available),
        None => Ok(()),
    }
}

fn check_against(
    name: &str,
    memory_bytes: u64,
    promised: u64,
    available: u64,
) -> Result<(), CreateError> {
    let spoken_for = promised.saturating_add(RESERVE_BYTES);
    if memory_bytes.saturating_add(spoken_for) <= available {
        return Ok(());
    }
    Err(CreateError::HostMemory {
        name: name.to_owned(),
        needed_mib: memory_bytes >> 20,
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
    fn check_beyond_the_host_names_the_numbers() {
        assert!(check_against("web", 512 << 20, 0, 640 << 20).is_ok());
        assert!(check_against("web", 412 << 20, 100 << 20, 640 << 20).is_ok());
        assert!(check_against("web", 413 << 20, 100 << 20, 640 << 20).is_err());
        let e = check_against("web", 513 << 20, 0, 640 << 20).unwrap_err();
        let text = e.to_string();
        assert!(
            text.contains("web") && text.contains("513 MiB") && text.contains("640 MiB"),
            "{text}"
        );
    }
}
