//! What can go wrong while a domain's memory is filled.

use std::path::PathBuf;

use hospes_memory::MemoryError;

/// Why a kernel image was refused; reads on from `Kernel FILE `.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("is neither a bzImage nor an ELF image: give the kernel's vmlinuz or vmlinux file")]
    UnknownFormat,
    #[error(
        "is a bzImage of boot protocol {major}.{minor:02}, which does not say where its payload is: 2.08 or newer is needed (Linux 2.6.26)"
    )]
    OldProtocol { major: u8, minor: u8 },
    #[error("is truncated or damaged: {what}")]
    Damaged { what: String },
    #[error("is packed in a way that this program does not know (its payload starts with {start})")]
    UnknownCompression { start: String },
    #[error(
        "unpacks to more than {limit_mib} MiB, the most that this domain can take: raise the domain's memory, or check the file"
    )]
    TooLarge { limit_mib: u64 },
    #[error("is not for x86: its ELF machine type is {machine}, 62 (x86-64) or 3 (i386) is needed")]
    WrongMachine { machine: u16 },
    #[error("has no PVH entry note (CONFIG_PVH=y is needed)")]
    NoPvhNote,
    #[error(
        "has its PVH entry at {entry:#x}, outside of what it loads: the file is damaged or not a kernel"
    )]
    EntryOutside { entry: u64 },
    #[error(
        "must be loaded at {start:#x}-{end:#x} and cannot be moved: the domain's memory does not reach there, it needs at least {needed_mib} MiB and has {have_mib} MiB"
    )]
    DoesNotFit {
        start: u64,
        end: u64,
        needed_mib: u64,
        have_mib: u64,
    },
    #[error("could not be copied into the domain's memory: {0}")]
    Memory(String),
}

impl ImageError {
    pub(crate) fn damaged(what: impl Into<String>) -> ImageError {
        ImageError::Damaged { what: what.into() }
    }
}

impl From<MemoryError> for ImageError {
    fn from(e: MemoryError) -> Self {
        ImageError::Memory(e.to_string())
    }
}

/// Why a domain could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("Kernel {} {reason}", path.display())]
    Kernel { path: PathBuf, reason: ImageError },
    #[error("Ramdisk {} is not a regular file with something in it: give an initramfs image, or none", path.display())]
    RamdiskEmpty { path: PathBuf },
    #[error("Ramdisk {} became shorter while it was read: try again when nothing writes to it", path.display())]
    RamdiskShrank { path: PathBuf },
    #[error(
        "kernel and ramdisk need at least {needed_mib} MiB of memory and the domain has {have_mib} MiB: raise `memory`"
    )]
    TooLittleMemory { needed_mib: u64, have_mib: u64 },
    #[error(
        "the kernel command line is {length} characters long and the limit is {limit}: shorten `cmdline`, `extra` or `root`"
    )]
    CommandLineTooLong { length: usize, limit: usize },
    #[error("the kernel command line contains a NUL character: remove it")]
    CommandLineNul,
    #[error("a domain cannot have {vcpus} virtual CPUs: choose 1 to {limit}")]
    Vcpus { vcpus: u32, limit: u32 },
    #[error(
        "a domain cannot have {bytes} bytes of memory: choose a multiple of 4096 from {min_mib} MiB to {max_mib} MiB"
    )]
    MemorySize {
        bytes: u64,
        min_mib: u64,
        max_mib: u64,
    },
    #[error("cannot fill the domain's memory: {0}")]
    Memory(#[from] MemoryError),
}
