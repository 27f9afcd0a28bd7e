//! Building a domain: from files to memory and the state of the first virtual CPU.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use hospes_engine::CpuState;
use hospes_memory::{GuestMemory, Range};
use hospes_units::{Gpa, PAGE_SIZE};

use crate::BuildError;
use crate::acpi::{self, MAX_VCPUS, SLEEP_CONTROL_PORT};
use crate::cpu::bsp_cpu_state;
use crate::layout::{ACPI_BASE, Layout};
use crate::load::{self, Kernel};
use crate::place::first_fit;
use crate::start_info::BootInfo;

/// Most characters of a kernel command line: Linux has room for 2048 with the NUL.
pub const CMDLINE_LENGTH_MAX: usize = 2047;

/// The kernel reads start information, memory map and module list through a page table of 1 GiB.
const BOOT_INFO_END: u64 = 1 << 30;
/// Where the start information goes if nothing is in the way: low memory, where no 64-bit kernel lies, and away from the
/// first pages, which kernels use for themselves early.
const BOOT_INFO_START: u64 = 0x8_0000;
/// The first megabyte is left to the code that starts further processors.
const LOW_MEMORY_END: u64 = 1 << 20;
const PIECE_BYTES: usize = 1 << 20;

/// What to build.
#[derive(Clone, Copy)]
pub struct BuildSpec<'a> {
    /// bzImage or ELF image.
    pub kernel: &'a Path,
    /// Initial ramdisk, passed on unchanged.
    pub ramdisk: Option<&'a Path>,
    /// At most [`CMDLINE_LENGTH_MAX`] bytes.
    pub cmdline: &'a str,
    /// Number of virtual CPUs that the ACPI tables list, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// From [`crate::memory_layout`]; the memory given to [`build`] was created with its `backed` ranges.
    pub layout: &'a Layout,
    /// Opens the kernel and the ramdisk for reading.
    pub open: Open<'a>,
}

/// See [`BuildSpec::open`].
pub type Open<'a> = &'a dyn Fn(&Path) -> std::io::Result<File>;

/// A domain that is ready to run.
#[derive(Clone, Debug)]
pub struct Boot {
    /// State of vCPU 0. The others start with [`crate::ap_cpu_state`].
    pub cpu_state: CpuState,
    /// The start information, also in EBX.
    pub start_info: Gpa,
    /// 32-bit entry point, also in EIP.
    pub entry: u32,
    /// Memory that the kernel takes, with its zeroed part.
    pub kernel: Range,
    /// Where the ramdisk lies: address and size in bytes.
    pub ramdisk: Option<(Gpa, u64)>,
    /// Byte-wide port where the guest asks for power-off, see [`crate::POWER_OFF_REQUEST`].
    pub sleep_control_port: u16,
    /// The kernel accepts that a suspend was cancelled (hypercall result 1).
    pub suspend_cancel: bool,
}

/// Fills `memory` for the first instruction of the guest.
pub fn build(memory: &GuestMemory, spec: &BuildSpec) -> Result<Boot, BuildError> {
    check(spec)?;
    let mut file = Vec::new();
    (spec.open)(spec.kernel)
        .and_then(|mut kernel| kernel.read_to_end(&mut file))
        .map_err(|source| BuildError::Read {
            what: "kernel",
            path: spec.kernel.to_owned(),
            source,
        })?;
    let kernel = load::load(&file, memory, spec.layout).map_err(|reason| BuildError::Kernel {
        path: spec.kernel.to_owned(),
        reason,
    })?;
    drop(file);
    let mut used = vec![Range {
        start: kernel.start,
        end: kernel.end,
    }];
    let ramdisk = match spec.ramdisk {
        Some(path) => {
            let (at, bytes) = load_ramdisk(path, spec.open, memory, spec.layout, &kernel)?;
            used.push(Range {
                start: at,
                end: at + bytes,
            });
            Some((at, bytes))
        }
        None => None,
    };
    let start_info = place_boot_info(memory, spec, &used, ramdisk)?;
    memory.write(Gpa(ACPI_BASE), &acpi::tables(spec.vcpus))?;
    Ok(Boot {
        cpu_state: bsp_cpu_state(kernel.entry, start_info),
        start_info,
        entry: kernel.entry,
        kernel: used[0],
        ramdisk: ramdisk.map(|(at, bytes)| (Gpa(at), bytes)),
        sleep_control_port: SLEEP_CONTROL_PORT,
        suspend_cancel: kernel.suspend_cancel,
    })
}

fn check(spec: &BuildSpec) -> Result<(), BuildError> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(BuildError::Vcpus {
            vcpus: spec.vcpus,
            limit: MAX_VCPUS,
        });
    }
    if spec.cmdline.len() > CMDLINE_LENGTH_MAX {
        return Err(BuildError::CommandLineTooLong {
            length: spec.cmdline.len(),
            limit: CMDLINE_LENGTH_MAX,
        });
    }
    if spec.cmdline.contains('\0') {
        return Err(BuildError::CommandLineNul);
    }
    Ok(())
}

fn place_boot_info(
    memory: &GuestMemory,
    spec: &BuildSpec,
    used: &[Range],
    ramdisk: Option<(u64, u64)>,
) -> Result<Gpa, BuildError> {
    let memmap = spec.layout.memmap();
    let info = BootInfo {
        cmdline: spec.cmdline,
        rsdp: ACPI_BASE,
        memmap: &memmap,
        ramdisk,
    };
    let end = spec.layout.low_ram_end().min(BOOT_INFO_END);
    let size = info.size() as u64;
    let at = [BOOT_INFO_START, PAGE_SIZE]
        .iter()
        .find_map(|&from| first_fit(used, from, end, size, PAGE_SIZE))
        .ok_or_else(|| too_little(spec.layout, used, size))?;
    memory.write(Gpa(at), &info.encode(at))?;
    Ok(Gpa(at))
}

fn too_little(layout: &Layout, used: &[Range], more: u64) -> BuildError {
    let highest = used.iter().map(|r| r.end).max().unwrap_or(0);
    BuildError::TooLittleMemory {
        needed_mib: (highest.next_multiple_of(PAGE_SIZE) + more).div_ceil(1 << 20),
        have_mib: layout.ram_bytes() >> 20,
    }
}

/// Copies the ramdisk behind the kernel, or below it where there is no room behind; its address and size.
fn load_ramdisk(
    path: &Path,
    open: Open<'_>,
    memory: &GuestMemory,
    layout: &Layout,
    kernel: &Kernel,
) -> Result<(u64, u64), BuildError> {
    let failed = |source| BuildError::Read {
        what: "ramdisk",
        path: path.to_owned(),
        source,
    };
    let mut file = open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let bytes = metadata.len();
    if !metadata.is_file() || bytes == 0 {
        return Err(BuildError::RamdiskEmpty {
            path: path.to_owned(),
        });
    }
    let used = [Range {
        start: kernel.start,
        end: kernel.end,
    }];
    let end = layout.low_ram_end();
    let start = [kernel.end, LOW_MEMORY_END]
        .iter()
        .find_map(|&from| first_fit(&used, from, end, bytes, PAGE_SIZE))
        .ok_or_else(|| too_little(layout, &used, bytes))?;
    let mut piece = vec![0; PIECE_BYTES.min(bytes as usize)];
    let mut done = 0;
    while done < bytes {
        let want = piece.len().min((bytes - done) as usize);
        match file.read(&mut piece[..want]) {
            Ok(0) => {
                return Err(BuildError::RamdiskShrank {
                    path: path.to_owned(),
                });
            }
            Ok(n) => {
                memory.write(Gpa(start + done), &piece[..n])?;
                done += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok((start, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::memory_layout;
    use crate::testing::{ElfSpec, TempFile, bzimage};
    use crate::unpack::Codec;

    const MIB: u64 = 1 << 20;

    fn domain(mib: u64) -> (GuestMemory, Layout) {
        let layout = memory_layout(mib * MIB).unwrap();
        (GuestMemory::new(&layout.backed).unwrap(), layout)
    }

    fn u64_at(m: &GuestMemory, gpa: u64) -> u64 {
        m.read_obj(Gpa(gpa)).unwrap()
    }

    fn u32_at(m: &GuestMemory, gpa: u64) -> u32 {
        m.read_obj(Gpa(gpa)).unwrap()
    }

    #[test]
    fn build_gives_a_guest_everything_it_looks_for() {
        let kernel = TempFile::new(&bzimage(Codec::Zstd, &ElfSpec::default().build()));
        let disk: Vec<u8> = (0..3_000_001u32).map(|i| (i * 31) as u8).collect();
        let ramdisk = TempFile::new(&disk);
        for mib in [64, 1024, 5000] {
            let (memory, layout) = domain(mib);
            let cmdline = "console=hvc0 root=/dev/xvda";
            let boot = build(
                &memory,
                &BuildSpec {
                    kernel: kernel.path(),
                    ramdisk: Some(ramdisk.path()),
                    cmdline,
                    vcpus: 3,
                    layout: &layout,
                    open: &|path| File::open(path),
                },
            )
            .unwrap();
            let info = boot.start_info.0;
            assert_eq!(boot.cpu_state.gpr[hospes_engine::reg::RBX], info);
            assert_eq!(boot.cpu_state.rip, 0x100_0850);
            assert_eq!(u32_at(&memory, info), 0x336e_c578);
            // Modules: the ramdisk, unchanged and clear of the kernel.
            assert_eq!(u32_at(&memory, info + 12), 1);
            let module = u64_at(&memory, info + 16);
            let (at, size) = (u64_at(&memory, module), u64_at(&memory, module + 8));
            assert_eq!(size, disk.len() as u64);
            assert!(at >= boot.kernel.end && at + size < 1 << 32);
            let mut copy = vec![0; disk.len()];
            memory.read(Gpa(at), &mut copy).unwrap();
            assert!(copy == disk);
            // Command line.
            let mut line = vec![0; cmdline.len() + 1];
            memory
                .read(Gpa(u64_at(&memory, info + 24)), &mut line)
                .unwrap();
            assert_eq!(line.strip_suffix(b"\0"), Some(cmdline.as_bytes()));
            // ACPI, memory map.
            let mut rsdp = [0; 8];
            memory
                .read(Gpa(u64_at(&memory, info + 32)), &mut rsdp)
                .unwrap();
            assert_eq!(&rsdp, b"RSD PTR ");
            let map = u64_at(&memory, info + 40);
            let entries = u64::from(u32_at(&memory, info + 48));
            let ram: u64 = (0..entries)
                .filter(|i| u32_at(&memory, map + 24 * i + 16) == 1)
                .map(|i| u64_at(&memory, map + 24 * i + 8))
                .sum();
            assert_eq!(ram, mib * MIB);
            for low in [info, module, map] {
                assert!(low < 1 << 30);
            }
            let end = u64_at(&memory, info + 24) + cmdline.len() as u64 + 1;
            assert!(end <= boot.kernel.start || boot.kernel.end <= info);
        }
    }

    fn spec<'a>(kernel: &'a TempFile, layout: &'a Layout) -> BuildSpec<'a> {
        BuildSpec {
            kernel: kernel.path(),
            ramdisk: None,
            cmdline: "",
            vcpus: 1,
            layout,
            open: &|path| File::open(path),
        }
    }

    #[test]
    fn build_puts_the_ramdisk_below_a_kernel_that_fills_memory() {
        let kernel = TempFile::new(&ElfSpec::default().build());
        let (_, end) = ElfSpec::default().extent();
        let (memory, layout) = domain(end.div_ceil(MIB));
        let ramdisk = TempFile::new(&vec![7; 4 << 20]);
        let boot = build(
            &memory,
            &BuildSpec {
                ramdisk: Some(ramdisk.path()),
                ..spec(&kernel, &layout)
            },
        )
        .unwrap();
        assert_eq!(boot.ramdisk, Some((Gpa(MIB), 4 << 20)));
    }

    #[test]
    fn build_with_too_little_memory_says_how_much_is_needed() {
        let kernel = TempFile::new(&ElfSpec::default().build());
        let (_, end) = ElfSpec::default().extent();
        let (memory, layout) = domain(32);
        let ramdisk = TempFile::new(&vec![7; 16 << 20]);
        let e = build(
            &memory,
            &BuildSpec {
                ramdisk: Some(ramdisk.path()),
                ..spec(&kernel, &layout)
            },
        )
        .unwrap_err();
        let BuildError::TooLittleMemory {
            needed_mib,
            have_mib,
        } = e
        else {
            panic!("{e}");
        };
        assert_eq!(
            (needed_mib, have_mib),
            ((end + (16 << 20)).div_ceil(MIB), 32)
        );
        let (memory, layout) = domain(needed_mib);
        build(
            &memory,
            &BuildSpec {
                ramdisk: Some(ramdisk.path()),
                ..spec(&kernel, &layout)
            },
        )
        .unwrap();
    }

    #[test]
    fn build_checks_its_arguments() {
        let kernel = TempFile::new(&ElfSpec::default().build());
        let (memory, layout) = domain(64);
        let good = spec(&kernel, &layout);
        let line = "x".repeat(2047);
        build(
            &memory,
            &BuildSpec {
                cmdline: &line,
                vcpus: MAX_VCPUS,
                ..good
            },
        )
        .unwrap();
        let fails = |s: BuildSpec| build(&memory, &s).unwrap_err().to_string();
        let line = "x".repeat(2048);
        assert!(
            fails(BuildSpec {
                cmdline: &line,
                ..good
            })
            .contains("2048 characters")
        );
        assert!(
            fails(BuildSpec {
                cmdline: "a\0b",
                ..good
            })
            .contains("NUL")
        );
        assert!(fails(BuildSpec { vcpus: 0, ..good }).contains("1 to 512"));
        assert!(fails(BuildSpec { vcpus: 513, ..good }).contains("513"));
        let missing = Path::new("/nonexistent/vmlinuz");
        assert!(
            fails(BuildSpec {
                kernel: missing,
                ..good
            })
            .contains("cannot read kernel /nonexistent/vmlinuz: No such file")
        );
        assert!(
            fails(BuildSpec {
                ramdisk: Some(missing),
                ..good
            })
            .contains("cannot read ramdisk /nonexistent/vmlinuz: No such file")
        );
        let empty = TempFile::new(b"");
        assert!(
            fails(BuildSpec {
                ramdisk: Some(empty.path()),
                ..good
            })
            .contains("not a regular file with something in it")
        );
        let text = TempFile::new(b"#!/bin/sh\n");
        assert!(fails(spec(&text, &layout)).ends_with(
            "is neither a bzImage nor an ELF image: give the kernel's vmlinuz or vmlinux file"
        ));
    }
}
