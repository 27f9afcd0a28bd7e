//! Core files of guests that run, wait, are paused and have crashed.

use super::*;

const MEMORY: u64 = 64 << 20;
const MARK: u64 = 0x300_0000;
const ABOUT: u64 = 0x310_0000;

/// A core file, read as the System V ABI has it.
struct Core(Vec<u8>);

impl Core {
    fn of(d: &Domain) -> Core {
        let mut file = Vec::new();
        let size = d
            .dump_core(&mut |at, bytes| {
                assert!(at >= file.len() as u64, "a piece behind another");
                file.resize(at as usize, 0);
                file.extend_from_slice(bytes);
                Ok(())
            })
            .unwrap();
        file.resize(size as usize, 0);
        Core(file)
    }

    fn word<const N: usize>(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        word[..N].copy_from_slice(&self.0[at..at + N]);
        u64::from_le_bytes(word)
    }

    /// Kind, offset, physical address and bytes.
    fn segments(&self) -> Vec<[usize; 4]> {
        assert_eq!(self.0[..8], [0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
        assert_eq!((self.word::<2>(16), self.word::<2>(18)), (4, 62));
        let (at, count) = (self.word::<8>(32) as usize, self.word::<2>(56) as usize);
        let header = |n: usize| {
            let at = at + 56 * n;
            assert_eq!(self.word::<8>(at + 32), self.word::<8>(at + 40));
            [
                self.word::<4>(at) as usize,
                self.word::<8>(at + 8) as usize,
                self.word::<8>(at + 24) as usize,
                self.word::<8>(at + 32) as usize,
            ]
        };
        (0..count).map(header).collect()
    }

    /// Names, types and descriptions.
    fn notes(&self) -> Vec<(&[u8], u64, &[u8])> {
        let [_, mut at, _, bytes] = self.segments()[0];
        let end = at + bytes;
        let mut notes = Vec::new();
        while at < end {
            let [name, description] = [0, 4].map(|o| self.word::<4>(at + o) as usize);
            let from = at + 12 + name.next_multiple_of(4);
            notes.push((
                &self.0[at + 12..at + 12 + name],
                self.word::<4>(at + 8),
                &self.0[from..from + description],
            ));
            at = from + description.next_multiple_of(4);
        }
        notes
    }

    fn memory(&self, gpa: u64, bytes: usize) -> &[u8] {
        let gpa = gpa as usize;
        let segments = self.segments();
        let [_, offset, start, _] = *segments[1..]
            .iter()
            .find(|[kind, _, start, bytes]| *kind == 1 && (*start..start + bytes).contains(&gpa))
            .expect("RAM");
        &self.0[offset + gpa - start..][..bytes]
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|w| u64::from_le_bytes(*w)).collect()
}

/// A guest of two vCPUs, of which the second is down: it waits for an NMI, and powers off.
fn waiting() -> Domain {
    let d = try_domain(2, MEMORY, Sink::default(), |c| {
        if c.step > 0 {
            return Ok(c.shutdown(sched::SHUTDOWN_POWEROFF));
        }
        // What is no such note, and then one.
        for (page, name) in [(0, *b"VMCOREINFO!\0"), (1, *b"VMCOREINFO\0\0")] {
            let mut note = vec![11, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
            note.extend(name);
            note.extend(b"OSRELEASE");
            c.memory.write(Gpa(ABOUT + 4096 * page), &note).unwrap();
        }
        c.state.gpr = std::array::from_fn(|n| 0x1000 + n as u64);
        c.state.rip = 0x1234_5678;
        c.state.cr3 = 0x9000;
        c.state.idtr.base = 0xffff_fe00_0000_0000;
        c.state.rflags = rflags::FIXED | rflags::IF;
        c.state.seg[4].base = 0x7777;
        c.state.msr.kernel_gs_base = 0x8888;
        c.memory.write(Gpa(MARK), b"a mark").unwrap();
        Ok(Exit::Halt {
            interrupts_enabled: true,
        })
    });
    let d = d.unwrap();
    d.unpause();
    let marked = || d.xen().memory().read_obj::<u8>(Gpa(MARK)).unwrap() != 0;
    while !(marked() && d.info().state.blocked) {
        std::thread::yield_now();
    }
    d
}

#[test]
fn core_of_a_guest_that_waits_has_its_memory_and_registers() {
    let d = waiting();
    let core = Core::of(&d);
    let ram: usize = core.segments()[1..].iter().map(|s| s[3]).sum();
    // With the tables that the guest starts with.
    assert!(
        (MEMORY..MEMORY + (1 << 20)).contains(&(ram as u64)),
        "{ram}"
    );
    assert!(core.segments()[1..].iter().all(|s| s[1] % 4096 == 0));
    assert_eq!(core.memory(MARK, 7), b"a mark\0");
    let notes = core.notes();
    let names: Vec<_> = notes.iter().map(|(name, kind, _)| (*name, *kind)).collect();
    let (status, system) = ((&b"CORE\0"[..], 1), (&b"QEMU\0"[..], 0));
    let about = (&b"VMCOREINFO\0"[..], 0);
    assert_eq!(names, [status, status, system, system, about]);
    let general = words(&notes[0].2[112..]);
    assert_eq!((notes[0].2.len(), notes[1].2[32]), (336, 2));
    // R15 first, RDI last.
    assert_eq!((general[0], general[14]), (0x100f, 0x1007));
    assert_eq!((general[16], general[19]), (0x1234_5678, 0x1004));
    assert_eq!(general[21], 0x7777);
    let system = words(notes[2].2);
    assert_eq!((system[0], system.len()), (1 | 440 << 32, 55));
    assert_eq!((system[1], system[17]), (0x1000, 0x1234_5678));
    let idt = &system[19 + 9 * 3..];
    assert_eq!(idt[2], 0xffff_fe00_0000_0000);
    assert_eq!((idt[6], idt[8]), (0x9000, 0x8888));
    assert_eq!(notes[4].2, b"OSRELEASE");
    // Twice the same, and the guest waits on.
    assert!(Core::of(&d).0 == core.0);
    assert!(d.info().state.blocked);
    d.raise_nmi(VcpuId(0));
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn core_of_a_paused_guest_leaves_it_paused() {
    let d = waiting();
    d.pause();
    let core = Core::of(&d);
    assert_eq!(words(&core.notes()[0].2[112..])[16], 0x1234_5678);
    assert!(d.info().state.paused);
    d.destroy();
}

#[test]
fn core_of_a_busy_guest_has_it_at_one_moment() {
    let steps = Arc::new(AtomicU32::new(0));
    let count = steps.clone();
    let d = domain(move |c| {
        c.state.gpr = [c.step.into(); 16];
        count.store(c.step, SeqCst);
        Exit::Yield
    });
    d.unpause();
    while steps.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let seen: Vec<u64> = (0..3)
        .map(|_| {
            let core = Core::of(&d);
            let general = words(&core.notes()[0].2[112..]);
            assert!(general[..15].iter().all(|g| *g == general[0]));
            general[0]
        })
        .collect();
    assert!(seen.is_sorted());
    d.destroy();
}

#[test]
fn core_of_a_crashed_guest_has_what_it_ended_with() {
    let d = domain(|c| {
        c.memory.write(Gpa(MARK), b"crashed").unwrap();
        c.state.gpr[reg::R12] = 0xdead;
        c.shutdown(sched::SHUTDOWN_CRASH)
    });
    d.unpause();
    assert!(matches!(d.wait(), EndReason::Crash(_)));
    let core = Core::of(&d);
    assert_eq!(words(&core.notes()[0].2[112..])[3], 0xdead);
    assert_eq!(core.memory(MARK, 7), b"crashed");
}

#[test]
fn core_that_cannot_be_written_says_why_and_the_guest_goes_on() {
    let d = waiting();
    let full = |_: u64, _: &[u8]| Err(std::io::Error::from_raw_os_error(28));
    let fault = d.dump_core(&mut { full }).unwrap_err();
    assert!(fault.to_string().contains("No space left"), "{fault}");
    d.raise_nmi(VcpuId(0));
    assert_eq!(d.wait(), EndReason::PowerOff);
}
