//! Shared pages, grants and the balloon.

use super::*;

#[test]
fn place_grant_frames_and_read_grants_through_them() {
    let mut m = Machine::new(1);
    let mut q = grant::QuerySize {
        dom: 0x7ff0,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::GRANT_TABLE_OP, grant::QUERY_SIZE, &mut q),
        0
    );
    assert_eq!((q.max_nr_frames, q.nr_frames, q.status), (64, 1, 0));
    let mut place = |idx: u64, gpfn: u64| {
        let mut a = memory::AddToPhysmap {
            domid: 0x7ff0,
            space: memory::SPACE_GRANT_TABLE,
            idx,
            gpfn,
            ..Default::default()
        };
        m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a)
    };
    for idx in (0..64).rev() {
        assert_eq!(place(idx, 0x17f00 + idx), 0);
    }
    assert_eq!(place(0, 0x17f00), 0);
    assert_eq!(place(64, 0x17f00), err(Errno::Inval));
    assert_eq!(place(1 << 31, 0x17f00), err(Errno::Inval));
    assert_eq!(place(0, u64::MAX), err(Errno::Inval));
    let set = |gref: u64, entry: grant::EntryV1| {
        m.xen
            .memory()
            .write_obj(Gpa(0x17f0_0000 + gref * 8), &entry)
            .unwrap();
    };
    let entry = |flags, domid, frame| grant::EntryV1 {
        flags,
        domid,
        frame,
    };
    set(600, entry(1, 0, 0x33));
    set(601, entry(1 | grant::FLAG_READONLY, 0, 0x33));
    set(602, entry(1, 3, 0x33));
    set(603, entry(0, 0, 0x33));
    set(604, entry(1, 0, 0x9_9999));
    let page = |r, access| m.xen.grant_page(GrantRef(r), access);
    assert_eq!(page(600, Access::Write), Ok(Gpa(0x33000)));
    assert_eq!(page(601, Access::Read), Ok(Gpa(0x33000)));
    assert_eq!(
        page(601, Access::Write),
        Err(GrantError::ReadOnly(GrantRef(601)))
    );
    assert!(matches!(
        page(602, Access::Read),
        Err(GrantError::WrongDomain { .. })
    ));
    assert!(matches!(
        page(603, Access::Read),
        Err(GrantError::NotGranted(_))
    ));
    assert!(matches!(
        page(604, Access::Read),
        Err(GrantError::NotMemory { .. })
    ));
    assert!(matches!(
        page(u32::MAX, Access::Read),
        Err(GrantError::BadReference(_))
    ));
    assert_eq!(page(grant::REF_XENSTORE, Access::Write), Ok(Gpa(0xc000)));
}

#[test]
fn place_shared_pages_everywhere_is_bounded() {
    let mut m = Machine::new(1);
    let mut last = 0;
    for gpfn in 0x2_0000..0x2_0000 + 2000 {
        let mut a = memory::AddToPhysmap {
            domid: 0x7ff0,
            gpfn,
            ..Default::default()
        };
        last = m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a);
    }
    assert_eq!(last, err(Errno::NoMem));
}

#[test]
fn balloon_gives_pages_back_and_takes_them_zeroed() {
    let mut m = Machine::new(1);
    let memory = m.xen.memory().clone();
    memory.write(Gpa(0x40000), &[7; 4096]).unwrap();
    let list: Vec<u64> = vec![0x40, 0x41, 0x42];
    for (i, gfn) in list.iter().enumerate() {
        memory.write_obj(Gpa(0x9000 + 8 * i as u64), gfn).unwrap();
    }
    let mut r = memory::Reservation {
        extent_start: 0x9000,
        nr_extents: 3,
        domid: 0x7ff0,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        3
    );
    assert_eq!(m.xen.current_pages(), 253);
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::POPULATE_PHYSMAP, &mut r),
        3
    );
    assert_eq!(m.xen.current_pages(), 256);
    assert_eq!(memory.read_obj::<u64>(Gpa(0x40000)).unwrap(), 0);
    memory.write_obj(Gpa(0x9008), &0x9_9999u64).unwrap();
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        1
    );
    r.domid = 3;
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        err(Errno::Perm)
    );
}

#[test]
fn given_back_frames_are_known_in_a_restored_domain() {
    let m = Machine::new(1);
    let runs = [(0x3f, 2), (0x80, 1)];
    let restore = |runs: &[(u64, u64)], on_demand| {
        m.xen.restore_balloon(&crate::Balloon {
            given_back: runs.to_vec(),
            on_demand,
        });
    };
    restore(&runs, 0);
    assert_eq!(m.xen.balloon().given_back, runs);
    assert_eq!(m.xen.current_pages(), 253);
    // What the domain does not have it cannot have given back.
    restore(&[(0xfe, u64::MAX), (u64::MAX, 9), (1 << 40, 1)], u64::MAX);
    assert_eq!(
        m.xen.balloon().given_back,
        [(0x3f, 2), (0x80, 1), (0xfe, 2)]
    );
    assert_eq!(m.xen.current_pages(), 0);
    restore(&[], 100);
    assert_eq!(m.xen.current_pages(), 151);
}

#[test]
fn long_reservation_is_continued_from_the_instruction() {
    let mut m = Machine::new(1);
    let memory = m.xen.memory().clone();
    for i in 0..1500u64 {
        memory
            .write_obj(Gpa(0x2_0000 + 8 * i), &(0x80 + i % 64))
            .unwrap();
    }
    let r = memory::Reservation {
        extent_start: 0x2_0000,
        nr_extents: 1500,
        domid: 0x7ff0,
        ..Default::default()
    };
    memory.write_obj(Gpa(ARG), &r).unwrap();
    m.vcpus[0].state.rip = 0x1003;
    m.call(nr::MEMORY_OP, [memory::DECREASE_RESERVATION, ARG, 0]);
    assert_eq!(m.vcpus[0].state.rip, 0x1000);
    let cmd = m.vcpus[0].state.gpr[reg::RDI];
    assert_eq!(cmd, memory::DECREASE_RESERVATION | 1024 << 6);
    assert_eq!(m.call(nr::MEMORY_OP, [cmd, ARG, 0]), 1500);
    assert_eq!(m.vcpus[0].state.rip, 0x1000);
}

/// A balloon's hypercall on these frames.
fn reserve(m: &mut Machine, op: u64, order: u32, frames: &[u64]) -> i64 {
    let memory = m.xen.memory().clone();
    for (i, gfn) in frames.iter().enumerate() {
        memory.write_obj(Gpa(0x9000 + 8 * i as u64), gfn).unwrap();
    }
    let mut r = memory::Reservation {
        extent_start: 0x9000,
        nr_extents: frames.len() as u64,
        order,
        domid: 0x7ff0,
        ..Default::default()
    };
    m.call_with(nr::MEMORY_OP, op, &mut r)
}

const GIVE: u64 = memory::DECREASE_RESERVATION;
const TAKE: u64 = memory::POPULATE_PHYSMAP;

#[test]
fn guest_takes_no_more_than_it_may_have() {
    let mut m = Machine::new(1);
    let frames: Vec<u64> = (0x40..0x50).collect();
    assert_eq!(reserve(&mut m, GIVE, 0, &frames), 16);
    // What it has it keeps until it gives it back.
    m.xen.set_target_pages(200);
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (240, 240));
    assert_eq!(reserve(&mut m, TAKE, 0, &frames), 0);
    m.xen.set_target_pages(244);
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (240, 244));
    // Whatever it asks for again and again, and in which order.
    assert_eq!(reserve(&mut m, TAKE, 0, &[0x4f, 0x4f, 0x4f, 0x4e]), 4);
    assert_eq!(m.xen.current_pages(), 242);
    assert_eq!(reserve(&mut m, TAKE, 2, &[0x40, 0x44]), 0);
    assert_eq!(reserve(&mut m, TAKE, 1, &[0x40, 0x44]), 1);
    assert_eq!(
        reserve(&mut m, TAKE, 0, &frames),
        2,
        "those that are there cost nothing"
    );
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (244, 244));
    // The limit alone is no reason to have less, and one beyond the map gives nothing more.
    m.xen.set_limit_pages(u64::MAX);
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::MAXIMUM_RESERVATION, &mut 0x7ff0u16),
        -1
    );
    assert_eq!(m.xen.claimed_pages(), 256);
    assert_eq!(reserve(&mut m, TAKE, 0, &frames), 16);
    assert_eq!(reserve(&mut m, TAKE, 0, &[0xff, 0x100]), 1);
    assert_eq!(m.xen.current_pages(), 256);
}

#[test]
fn frames_that_cannot_be_given_back_end_the_call() {
    let mut m = Machine::new(1);
    for frames in [[0x40, u64::MAX], [0x40, 0x100], [0x40, u64::MAX >> 12]] {
        assert_eq!(reserve(&mut m, GIVE, 0, &frames), 1, "{frames:x?}");
    }
    assert_eq!(reserve(&mut m, GIVE, 9, &[0x0]), 0, "more than there is");
    assert_eq!(reserve(&mut m, GIVE, 10, &[0x0]), err(Errno::Inval));
    assert_eq!(m.xen.current_pages(), 255);
    // Downwards, overlapping, twice the same.
    assert_eq!(reserve(&mut m, GIVE, 1, &[0x42, 0x40, 0x41, 0x40]), 4);
    assert_eq!(m.xen.current_pages(), 252);
    assert_eq!(
        reserve(&mut m, TAKE, 0, &[0x42, 0x41, 0x40, 0x43, 0x100]),
        4
    );
    assert_eq!(m.xen.current_pages(), 256);
}

#[test]
fn guest_with_a_map_too_large_has_what_it_was_started_with() {
    let mut m = Machine::with_pages(1, 200);
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (200, 200));
    let frames: Vec<u64> = (0x40..0x60).collect();
    // The first pages that it gives back it never had.
    assert_eq!(reserve(&mut m, GIVE, 0, &frames), 32);
    assert_eq!(m.xen.current_pages(), 200);
    assert_eq!(reserve(&mut m, TAKE, 0, &frames), 0);
    // 24 are left that it has not given back and need not any more.
    m.xen.set_target_pages(210);
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (210, 210));
    assert_eq!(reserve(&mut m, TAKE, 0, &frames), 0);
    m.xen.set_target_pages(256);
    assert_eq!((m.xen.current_pages(), m.xen.claimed_pages()), (224, 256));
    assert_eq!(reserve(&mut m, TAKE, 0, &frames), 32);
    assert_eq!(m.xen.current_pages(), 256);
}

#[test]
fn what_is_written_into_frames_given_back_is_thrown_away() {
    let mut m = Machine::new(1);
    let memory = m.xen.memory().clone();
    memory.write(Gpa(0x4_0000), &[7; 0x4000]).unwrap();
    assert_eq!(reserve(&mut m, GIVE, 0, &[0x40, 0x42]), 2);
    let used = memory.used_bytes();
    memory.write(Gpa(0x4_0000), &[8; 0x4000]).unwrap();
    assert_eq!(memory.used_bytes(), used + 0x2000);
    m.xen.discard_ballooned();
    assert_eq!(memory.used_bytes(), used);
    assert_eq!(memory.read_obj::<u8>(Gpa(0x4_1000)).unwrap(), 8);
    assert_eq!(memory.read_obj::<u8>(Gpa(0x4_2000)).unwrap(), 0);
}

#[test]
fn memory_map_is_cut_to_the_buffer() {
    let mut m = Machine::new(1);
    let mut a = memory::MemoryMap {
        nr_entries: 128,
        pad: 0,
        buffer: 0x9000,
    };
    assert_eq!(m.call_with(nr::MEMORY_OP, memory::MEMORY_MAP, &mut a), 0);
    assert_eq!(a.nr_entries, 1);
    let e: crate::E820 = m.xen.memory().read_obj(Gpa(0x9000)).unwrap();
    assert_eq!({ e.size }, 0x10_0000);
    assert_eq!(m.call(nr::MEMORY_OP, [memory::MAXIMUM_RAM_PAGE, 0, 0]), 255);
    assert!(m.xen.memory().is_backed(Gfn(255)));
}
