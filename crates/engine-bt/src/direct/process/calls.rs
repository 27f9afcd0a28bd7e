//! Calls that the process makes for us: of its area, of its filter, and those that change what is mapped.

use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::ptr;

use super::spawn::{ptrace, random, wait};
use super::{AREA_BYTES, BATCH_CALLS, KICK, PAGE, Process, Registers, Stop, USER_END};
use crate::direct::stub::{self, Call, SCRATCH, Start, TABLE, TABLE_PAGES};

impl Process {
    /// Maps the area at a new random address, by a system-call instruction at `via`.
    pub(super) fn map_area(&mut self, via: u64) -> Result<()> {
        for _ in 0..16 {
            // Between 64 and 80 TiB: above what programs and sanitizers choose for themselves, below where Linux puts programs and all that has no place of its own.
            let base = (random()? & 0x0fff_ffff_f000) | 0x4000_0000_0000;
            let map = |offset: usize, bytes: usize, prot: i32, flags: i32| {
                [
                    libc::SYS_mmap as u64,
                    base + offset as u64,
                    bytes as u64,
                    prot as u64,
                    (libc::MAP_SHARED | flags) as u64,
                    self.area_fd.as_raw_fd() as u64,
                    offset as u64,
                ]
            };
            // The whole of it, where nothing else is; then what is not code with other rights, by that code.
            let code = libc::PROT_READ | libc::PROT_EXEC;
            let whole = map(0, AREA_BYTES, code, libc::MAP_FIXED_NOREPLACE);
            if self.call(via, whole)? as u64 != base {
                continue;
            }
            let one = base + stub::ONE;
            let data = libc::PROT_READ | libc::PROT_WRITE;
            let rest = map(TABLE, AREA_BYTES - TABLE, data, libc::MAP_FIXED);
            self.call_checked(one, rest)?;
            self.base = base;
            return Ok(());
        }
        Err(Error::other("no free address in an empty address space"))
    }

    /// From here on the process can make mapping calls with the key and no others: they stop it.
    pub(super) fn install_filter(&mut self) -> Result<()> {
        const LOAD: u64 = 0x20;
        const JUMP_EQUAL: u64 = 0x15;
        const RETURN: u64 = 0x06;
        const X86_64: u64 = 0xc000_003e;
        const ALLOW: u64 = 0x7fff_0000;
        // Outranks what other filters answer that the process has from us, so that it stops for each call.
        const TRAP: u64 = 0x0003_0000;
        // Of struct seccomp_data: the number, the architecture, the upper halves of the third and fifth arguments.
        let [number, architecture, third_argument, fifth_argument] = [0, 4, 36, 52];
        let op = |code: u64, yes: u64, no: u64, k: u64| code | yes << 16 | no << 24 | k << 32;
        let random = random()?;
        let [third, fifth] = [random >> 32, random & 0xffff_ffff];
        let filter = [
            op(LOAD, 0, 0, architecture),
            op(JUMP_EQUAL, 0, 7, X86_64),
            op(LOAD, 0, 0, number),
            op(JUMP_EQUAL, 1, 0, libc::SYS_mmap as u64),
            op(JUMP_EQUAL, 0, 4, libc::SYS_munmap as u64),
            op(LOAD, 0, 0, third_argument),
            op(JUMP_EQUAL, 0, 2, third),
            op(LOAD, 0, 0, fifth_argument),
            op(JUMP_EQUAL, 1, 0, fifth),
            op(RETURN, 0, 0, TRAP),
            op(RETURN, 0, 0, ALLOW),
        ];
        let table = self.base + TABLE as u64;
        self.put(0, &[filter.len() as u64, table + 16]);
        self.put(2, &filter);
        let one = self.base + stub::ONE;
        let no_new = libc::PR_SET_NO_NEW_PRIVS as u64;
        self.call_checked(one, [libc::SYS_prctl as u64, no_new, 1, 0, 0, 0, 0])?;
        let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        self.call_checked(one, [libc::SYS_seccomp as u64, mode, 0, table, 0, 0, 0])?;
        self.put(0, &[0; 2]);
        self.put(2, &[0; 11]);
        self.key = [third << 32, fifth << 32];
        Ok(())
    }

    /// A mapping call with the key.
    fn keyed(&self, mut call: Call) -> Call {
        call[3] |= self.key[0];
        call[5] |= self.key[1];
        call
    }

    /// Writes words into the table of calls.
    pub(super) fn put(&self, at: usize, words: &[u64]) {
        assert!((at + words.len()) * 8 <= TABLE_PAGES * PAGE);
        // SAFETY: the range lies in the mapped table, which is aligned; the process that shares it is stopped.
        unsafe {
            let table = self.area.add(TABLE).cast::<u64>();
            ptr::copy_nonoverlapping(words.as_ptr(), table.add(at), words.len());
        }
    }

    /// Moves the area because the guest uses its address.
    pub fn move_area(&mut self) -> Result<()> {
        let old = self.base;
        self.map_area(old + stub::ONE)?;
        let bytes = AREA_BYTES as u64;
        self.call_checked(
            self.base + stub::ONE,
            [libc::SYS_munmap as u64, old, bytes, 0, 0, 0, 0],
        )
    }

    /// A call that maps `bytes` at `offset` of the memory file to `address`, in place of what is there.
    pub fn map_call(&self, address: u64, bytes: u64, prot: i32, offset: u64) -> Call {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        [
            libc::SYS_mmap as u64,
            address,
            bytes,
            prot as u64,
            flags as u64,
            self.memory_fd as u64,
            offset,
        ]
    }

    pub fn unmap_call(address: u64, bytes: u64) -> Call {
        [libc::SYS_munmap as u64, address, bytes, 0, 0, 0, 0]
    }

    /// Has calls made, in order, before guest code runs again.
    pub fn queue(&mut self, calls: impl IntoIterator<Item = Call>) {
        self.queue.extend(calls);
    }

    /// Unmaps everything but the area.
    pub fn unmap_all(&mut self) -> Result<()> {
        self.queue.clear();
        let end = self.base + AREA_BYTES as u64;
        let start = PAGE as u64;
        self.batch(&[
            Self::unmap_call(start, self.base - start),
            Self::unmap_call(end, USER_END - end),
        ])
    }

    pub(super) fn call_checked(&self, via: u64, call: Call) -> Result<()> {
        let result = self.call(via, call)?;
        if result < 0 {
            return Err(Error::from_raw_os_error(-result as i32));
        }
        Ok(())
    }

    /// Makes one system call through the instruction at `via`.
    pub(super) fn call(&self, via: u64, call: Call) -> Result<i64> {
        let mut regs = self.template;
        regs.rip = via;
        [
            regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9,
        ] = self.keyed(call);
        Ok(self.run_stub(&mut regs)?.rax as i64)
    }

    /// Makes all these calls in the process at once, in order; fails with the first that does.
    pub fn batch(&self, calls: &[Call]) -> Result<()> {
        for part in calls.chunks(BATCH_CALLS) {
            let mut regs = self.template;
            regs.rip = self.base + stub::STOP;
            regs.orig_rax = u64::MAX;
            if self.go(&mut regs, part)? == Stop::Dead {
                return Err(died());
            }
        }
        Ok(())
    }

    fn put_calls(&self, calls: &[Call]) {
        for (n, call) in calls.iter().enumerate() {
            self.put(n * call.len(), &self.keyed(*call));
        }
    }

    /// What the table says, of guest memory and the key, is none of the guest program's business.
    fn clear_calls(&self, calls: usize) {
        let none: Call = [0; 7];
        for n in 0..calls {
            self.put(n * none.len(), &none);
        }
    }

    pub(super) fn run_stub(&self, regs: &mut Registers) -> Result<Registers> {
        regs.orig_rax = u64::MAX;
        self.set_registers(regs)?;
        loop {
            ptrace(libc::PTRACE_CONT, self.pid, 0, ptr::null_mut())?;
            let status = wait(self.pid)?;
            if !libc::WIFSTOPPED(status) {
                return Err(died());
            }
            match libc::WSTOPSIG(status) {
                libc::SIGTRAP => return self.registers(),
                KICK => {}
                signal => {
                    return Err(Error::other(format!(
                        "an address-space process stopped with signal {signal} while it was prepared"
                    )));
                }
            }
        }
    }

    /// Makes calls, and guest code goes on behind them without a stop in between.
    pub(super) fn go(&self, regs: &mut Registers, calls: &[Call]) -> Result<Stop> {
        let start = Start {
            general: [
                regs.r15, regs.r14, regs.r13, regs.r12, regs.r11, regs.r10, regs.r9, regs.r8,
                regs.rbp, regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.rbx, regs.rax,
            ],
            rip: regs.rip,
            cs: regs.cs,
            rflags: regs.eflags,
            rsp: regs.rsp,
            ss: regs.ss,
            calls: calls.len() as u64,
            words: calls.as_flattened().len() as u64,
            made: 0,
        };
        self.put_start(&start);
        self.put_calls(calls);
        let mut through = *regs;
        through.rip = self.base + stub::GO;
        through.eflags = self.template.eflags;
        self.set_registers(&through)?;
        let mut kicked = false;
        loop {
            ptrace(libc::PTRACE_CONT, self.pid, 0, ptr::null_mut())?;
            let status = wait(self.pid)?;
            if !libc::WIFSTOPPED(status) {
                return Ok(Stop::Dead);
            }
            let now = self.registers()?;
            let inside = (self.base..self.base + PAGE as u64).contains(&now.rip.wrapping_sub(1));
            match libc::WSTOPSIG(status) {
                // The calls are made first, for what is mapped is known by them; then it is as if the kick had come before.
                KICK if inside => {
                    kicked = true;
                    let rip = self.base + stub::STOP;
                    self.put_start(&Start { rip, ..start });
                }
                libc::SIGTRAP if kicked && now.rip == self.base + stub::STOP + 1 => {
                    return Ok(Stop::Kick);
                }
                // Not cleared: a call has failed. Else it is guest code that has come here by itself.
                libc::SIGTRAP if inside && self.first_call() != 0 => {
                    self.clear_calls(calls.len());
                    return Err(Error::from_raw_os_error(now.rax.wrapping_neg() as i32));
                }
                _ => {
                    *regs = now;
                    return self.stop(status, regs);
                }
            }
        }
    }

    /// When the process had made the last calls, by the time-stamp counter.
    pub(super) fn made(&self) -> u64 {
        // SAFETY: the page lies in the mapped area and is aligned; where the process runs still, no sense is made of what is read.
        unsafe { ptr::read_volatile(&raw const (*self.area.add(SCRATCH).cast::<Start>()).made) }
    }

    /// The number of the first call in the table.
    pub(super) fn first_call(&self) -> u64 {
        // SAFETY: the word lies in the mapped area and is aligned; the process that shares it is stopped.
        unsafe { ptr::read_volatile(self.area.add(TABLE).cast()) }
    }

    fn put_start(&self, start: &Start) {
        // SAFETY: the page lies in the mapped area and is aligned; the process that shares it is stopped.
        unsafe { ptr::write_volatile(self.area.add(SCRATCH).cast(), *start) };
    }
}

fn died() -> Error {
    Error::other("an address-space process has died")
}
