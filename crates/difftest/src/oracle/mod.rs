//! The host CPU as an oracle: a child process in which cases run natively.
//!
//! Cases go over in batches through shared memory. A case ends with a signal; its frame holds every register, the exception's number, its error code and
//! CR2, which `ptrace` would not show.

mod child;
mod shared;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use crate::forms::Level;
use crate::layout::{IMAGE_BYTES, backing};
use crate::program::{Case, window};
use crate::state::{Ending, Fpu, Outcome, Regs, image_bytes};
use shared::{FAILED, PATCH_BYTES, PATCHES, READY, RawCase, RawRegs, RawResult, Shared};

pub use shared::BATCH;

/// Seconds that a batch may take.
const BATCH_SECONDS: i64 = 30;

/// A case that takes longer natively is no case: the engine, an instruction at a time, would need a hundred times as long.
const TICKS_MAX: u64 = 5_000_000;

#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    #[error("cannot start the oracle process: {0}")]
    Start(io::Error),
    #[error("the oracle process cannot map the test memory or install its handlers: {0}")]
    SetUp(io::Error),
    #[error(
        "the oracle process ended or hangs in case {case} of its batch (wait status {status:#x})"
    )]
    Died { case: usize, status: i32 },
    #[error("a case has a patch outside of the test memory or too many bytes of patches")]
    Patch,
}

/// The oracle process.
#[derive(Debug)]
pub struct Oracle {
    shared: NonNull<Shared>,
    pid: i32,
    batch: u32,
    count: usize,
}

impl Oracle {
    /// Starts the process. `base` is the memory that every case begins with.
    pub fn new(base: &[u8], level: Level) -> Result<Oracle, OracleError> {
        assert_eq!(base.len(), IMAGE_BYTES);
        let fd = rustix::fs::memfd_create("hospes-difftest", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| OracleError::Start(e.into()))?;
        rustix::fs::ftruncate(&fd, IMAGE_BYTES as u64).map_err(|e| OracleError::Start(e.into()))?;
        // SAFETY: a new anonymous mapping at an address the kernel chooses.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(OracleError::Start(io::Error::last_os_error()));
        }
        let shared = NonNull::new(memory.cast::<Shared>()).expect("a mapping is not at zero");
        // SAFETY: zero bytes are valid for `Shared`; nobody else has it yet.
        unsafe {
            (*shared.as_ptr()).base.copy_from_slice(base);
            (*shared.as_ptr()).image_bytes = image_bytes(level) as u32;
        }
        let mut oracle = Oracle {
            shared,
            pid: 0,
            batch: 0,
            count: 0,
        };
        oracle.fork(&fd)?;
        oracle.wait(READY)?;
        Ok(oracle)
    }

    fn fork(&mut self, fd: &OwnedFd) -> Result<(), OracleError> {
        // SAFETY: the child calls only `live`, which neither allocates nor takes locks.
        match unsafe { libc::fork() } {
            -1 => Err(OracleError::Start(io::Error::last_os_error())),
            0 => child::live(self.shared.as_ptr(), fd.as_raw_fd()),
            pid => {
                self.pid = pid;
                Ok(())
            }
        }
    }

    fn wait(&mut self, value: u32) -> Result<(), OracleError> {
        // SAFETY: the word is valid as long as `self`.
        let word = unsafe { &(*self.shared.as_ptr()).completed };
        for _ in 0..BATCH_SECONDS * 10 {
            let now = word.load(Ordering::Acquire);
            if now == value {
                return Ok(());
            }
            if now & FAILED != 0 {
                let error = io::Error::from_raw_os_error((now & !FAILED) as i32);
                return Err(OracleError::SetUp(error));
            }
            let tenth = libc::timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            let mut status = 0;
            // SAFETY: a futex wait on a valid word, and a look at our own child.
            let gone = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    word.as_ptr(),
                    libc::FUTEX_WAIT,
                    now,
                    &tenth,
                );
                word.load(Ordering::Acquire) == now
                    && libc::waitpid(self.pid, &mut status, libc::WNOHANG) == self.pid
            };
            if gone {
                self.pid = 0;
                return Err(OracleError::Died {
                    case: self.finished(),
                    status,
                });
            }
        }
        Err(OracleError::Died {
            case: self.finished(),
            status: 0,
        })
    }

    /// Cases of the batch that have a result.
    fn finished(&self) -> usize {
        let shared = self.shared.as_ptr();
        (0..self.count)
            // SAFETY: the memory is mapped; a torn value would only make the message less exact.
            .position(|n| unsafe { (*shared).results[n].signal } == 0)
            .unwrap_or(self.count)
    }

    /// Starts up to [`BATCH`] cases; they run while the caller does something else.
    pub fn submit(&mut self, cases: &[&Case]) -> Result<(), OracleError> {
        assert!(cases.len() <= BATCH && !cases.is_empty());
        let shared = self.shared.as_ptr();
        for (n, case) in cases.iter().enumerate() {
            // SAFETY: between two batches the child does not look at the cases.
            unsafe {
                fill(&mut (*shared).cases[n], case)?;
                (*shared).results[n].signal = 0;
            }
        }
        self.batch += 1;
        self.count = cases.len();
        // SAFETY: as above; the store publishes the cases. The futex call has valid arguments.
        unsafe {
            (*shared).count = cases.len() as u32;
            (*shared).submitted.store(self.batch, Ordering::Release);
            libc::syscall(
                libc::SYS_futex,
                (*shared).submitted.as_ptr(),
                libc::FUTEX_WAKE,
                1,
            );
        }
        Ok(())
    }

    /// Waits for the cases submitted and gives their outcomes in order.
    pub fn collect(&mut self) -> Result<Vec<Outcome>, OracleError> {
        self.wait(self.batch)?;
        let shared = self.shared.as_ptr();
        Ok((0..self.count)
            // SAFETY: the child has finished the batch and waits.
            .map(|n| outcome(unsafe { &(*shared).results[n] }))
            .collect())
    }
}

fn fill(raw: &mut RawCase, case: &Case) -> Result<(), OracleError> {
    let r = &case.regs;
    raw.regs = RawRegs {
        gpr: r.gpr,
        rip: r.rip,
        rflags: r.rflags,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        cs: u64::from(r.cs),
        xsave: r.fpu.to_image(),
    };
    if case.patches.len() > PATCHES {
        return Err(OracleError::Patch);
    }
    for p in &mut raw.patches {
        p.len = 0;
    }
    for (p, (address, bytes)) in raw.patches.iter_mut().zip(&case.patches) {
        let (at, room) = backing(address - window(*address)).ok_or(OracleError::Patch)?;
        if bytes.len() > PATCH_BYTES || bytes.len() > room {
            return Err(OracleError::Patch);
        }
        p.at = at as u32;
        p.len = bytes.len() as u32;
        p.bytes[..bytes.len()].copy_from_slice(bytes);
    }
    Ok(())
}

fn outcome(raw: &RawResult) -> Outcome {
    let r = &raw.regs;
    let ending = if raw.signal == libc::SIGPROF as u64 || raw.ticks > TICKS_MAX {
        Ending::TimedOut
    } else {
        Ending::Exception {
            vector: raw.trap as u8,
            error: raw.error,
            cr2: if raw.trap == 14 { raw.cr2 } else { 0 },
        }
    };
    Outcome {
        ending,
        regs: Regs {
            gpr: r.gpr,
            rip: r.rip,
            rflags: r.rflags,
            fs_base: r.fs_base,
            gs_base: r.gs_base,
            cs: r.cs as u16,
            fpu: Fpu::from_image(&r.xsave),
        },
        memory: raw.memory.to_vec(),
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: the process is our child and not yet waited for; the mapping is ours.
        unsafe {
            if self.pid > 0 {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            }
            libc::munmap(self.shared.as_ptr().cast(), size_of::<Shared>());
        }
    }
}
