//! A disk that is served by the threads of vCPUs; the test's own thread plays one.

use hospes_units::VcpuId;
use hospes_xen_abi::blkif;

use super::super::queue::WORKS;
use super::*;

const MIB: usize = 1 << 20;

/// One write of a page.
fn write(m: &Machine) -> blkif::Request {
    let (_, gref) = m.page(3);
    request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)])
}

/// A guest that waits for each of its requests, with a disk that answers promptly.
fn machine() -> Machine {
    let m = Machine::connected(MemoryImage::new(MIB).promptly());
    m.guest.xen.set_idle(VcpuId(0), true);
    m
}

/// Until the disk has shown itself to be prompt, and this thread has served a request.
fn becomes_prompt(m: &mut Machine, write: blkif::Request) {
    wait("a request that its sender serves", || {
        assert_eq!(m.ask(write).status, blkif::STATUS_OKAY);
        m.image.is_served_here()
    });
}

#[test]
fn request_alone_is_served_by_the_thread_that_sends_it() {
    let mut m = machine();
    let write = write(&m);
    becomes_prompt(&mut m, write);
}

#[test]
fn image_without_a_look_is_left_to_its_own_thread() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    m.guest.xen.set_idle(VcpuId(0), true);
    let write = write(&m);
    for _ in 0..1000 {
        assert_eq!(m.ask(write).status, blkif::STATUS_OKAY);
        assert!(!m.image.is_served_here() && !m.guest.xen.attend());
    }
}

#[test]
fn guest_that_works_meanwhile_leaves_its_requests_to_the_queues_thread() {
    let mut m = machine();
    let write = write(&m);
    becomes_prompt(&mut m, write);
    m.guest.xen.set_idle(VcpuId(0), false);
    for _ in 0..WORKS {
        m.ask(write);
    }
    for _ in 0..1000 {
        m.ask(write);
        assert!(!m.image.is_served_here() && !m.guest.xen.attend());
    }
}

#[test]
fn answer_before_the_guest_waits_for_it_leaves_its_requests_to_who_sends_them() {
    let mut m = machine();
    let write = write(&m);
    // The queue's own thread may be at work, with what the event of the one before woke it for.
    wait(
        "a request served by its sender after such an answer",
        || {
            m.guest.xen.set_idle(VcpuId(0), true);
            becomes_prompt(&mut m, write);
            m.guest.xen.set_idle(VcpuId(0), false);
            m.ask(write);
            m.ask(write);
            m.image.is_served_here()
        },
    );
}

#[test]
fn answer_is_seen_by_the_vcpu_that_waits_for_it() {
    let mut m = machine();
    let write = write(&m);
    // The queue's own thread may be faster, with other work on this machine.
    wait("an answer that the waiting thread saw", || {
        becomes_prompt(&mut m, write);
        m.image.hold(true);
        m.send(0, &[write]);
        let expected = m.guest.xen.attend() && m.image.is_silent();
        m.image.hold(false);
        m.guest.xen.attend();
        let seen = m.image.is_served_here() && m.queues[0].ring.take().is_some();
        m.guest.xen.leave_attended(false);
        wait("events of the image", || !m.image.is_silent());
        if !seen {
            m.receive(0);
        }
        expected && seen
    });
}

#[test]
fn answer_after_the_vcpu_went_to_sleep_comes_from_the_queues_thread() {
    let mut m = machine();
    let write = write(&m);
    becomes_prompt(&mut m, write);
    m.image.hold(true);
    m.send(0, &[write]);
    wait("a queue to wait for", || m.guest.xen.attend());
    m.guest.xen.leave_attended(true);
    // Nobody stays awake for a disk that was waited for in vain.
    wait("an end of waiting", || !m.guest.xen.attend());
    m.image.hold(false);
    assert_eq!(m.receive(0).id, write.id);
}

/// A request that takes longer than anybody stays awake for.
fn slow(m: &mut Machine, write: blkif::Request) {
    m.image.hold(true);
    m.send(0, &[write]);
    std::thread::sleep(std::time::Duration::from_millis(2));
    m.image.hold(false);
    m.receive(0);
}

#[test]
fn slow_answer_now_and_then_leaves_requests_to_who_sends_them() {
    let mut m = machine();
    let write = write(&m);
    // Other work on this machine may make the next one slow as well.
    wait("a request served by its sender behind a slow one", || {
        becomes_prompt(&mut m, write);
        slow(&mut m, write);
        m.ask(write);
        m.image.is_served_here()
    });
    becomes_prompt(&mut m, write);
    slow(&mut m, write);
    slow(&mut m, write);
    m.ask(write);
    assert!(!m.image.is_served_here());
}

#[test]
fn answer_is_not_lost_when_it_comes_while_the_vcpu_leaves() {
    let mut m = machine();
    let write = write(&m);
    for _ in 0..200 {
        becomes_prompt(&mut m, write);
        m.image.hold(true);
        m.send(0, &[write]);
        let image = Arc::clone(&m.image);
        let disk = std::thread::spawn(move || image.hold(false));
        m.guest.xen.attend();
        m.guest.xen.leave_attended(false);
        disk.join().unwrap();
        assert_eq!(m.receive(0).id, write.id);
    }
}

#[test]
fn completion_unseen_at_the_end_of_a_silence_is_seen_by_the_queues_thread() {
    let mut m = machine();
    let write = write(&m);
    for looks in 1..3 {
        becomes_prompt(&mut m, write);
        m.image.hold(true);
        m.send(0, &[write]);
        wait("a silence", || m.guest.xen.attend() && m.image.is_silent());
        // The vCPU's last look misses it, the first ones of the queue's thread may, and no event tells of it.
        m.image.complete_unseen(looks);
        m.guest.xen.leave_attended(false);
        assert_eq!(m.receive(0).id, write.id);
        assert!(!m.image.is_served_here());
    }
}

#[test]
fn vcpu_does_not_stay_awake_while_another_thread_serves_the_queue() {
    let mut m = machine();
    let write = write(&m);
    m.guest.xen.set_idle(VcpuId(0), false);
    m.ask(write);
    let image = Arc::clone(&m.image);
    let gate = image.close_gate();
    let entries = image.entries();
    m.send(0, &[write]);
    wait("the queue's thread", || image.entries() > entries);
    assert!(!m.guest.xen.attend());
    drop(gate);
    assert_eq!(m.receive(0).id, write.id);
}

#[test]
fn ring_broken_for_a_vcpus_thread_closes_the_device() {
    let mut m = machine();
    let write = write(&m);
    becomes_prompt(&mut m, write);
    let gref = m.queues[0].grefs[0];
    let page = m.guest.xen.grant_page(gref, hospes_xen::Access::Write);
    let memory = m.guest.xen.memory();
    memory.write_obj(page.unwrap(), &1000u32).unwrap();
    m.guest.send(m.queues[0].port);
    m.guest.wait_state(ID, "5");
    m.bus.detach(ID, true).unwrap();
    assert_eq!(Arc::strong_count(&m.image), 1);
    assert!(!m.guest.xen.attend());
}
