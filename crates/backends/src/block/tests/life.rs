//! Coming, starting over and going.

use std::time::Duration;

use hospes_image::Op;
use hospes_store::{Error, StoreAccess};
use hospes_xen_abi::blkif;

use super::*;
use crate::frame::DeviceError;

const MIB: usize = 1 << 20;

fn gone(m: &Machine) -> bool {
    [
        Guest::front(ID),
        Guest::back(ID),
        "/libxl/5/device/vbd/51712".to_owned(),
    ]
    .iter()
    .all(|path| m.guest.store.read(path) == Err(Error::NoEntry))
}

fn works(m: &mut Machine, queue: usize) {
    let (_, gref) = m.page(3);
    m.send(
        queue,
        &[request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)])],
    );
    assert_eq!(m.receive(queue).status, blkif::STATUS_OKAY);
}

#[test]
fn queues_and_large_rings_work_at_once() {
    for (queues, order) in [(1, 0), (2, 0), (1, 4), (2, 2)] {
        let mut m = Machine::new(MemoryImage::new(MIB));
        m.connect(queues, order);
        let (_, gref) = m.page(3);
        let count = m.queues[0].ring.free() as usize;
        for queue in 0..queues {
            // A full ring, twice, so that the slots that lie in two pages are used.
            for _ in 0..2 {
                let requests: Vec<_> = (0..count)
                    .map(|i| request(blkif::OP_WRITE, i as u64, &[segment(gref, 0, 0)]))
                    .collect();
                m.send(queue, &requests);
                let mut ids: Vec<u64> = (0..count).map(|_| m.receive(queue).id).collect();
                ids.sort_unstable();
                assert_eq!(ids, requests.iter().map(|r| r.id).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn queue_with_nothing_to_do_sleeps() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    works(&mut m, 0);
    // The image's event came with the completion that the queue saw without it: it must not keep the queue awake.
    let came_to_rest = (0..200).any(|_| {
        let before = m.image.looks();
        std::thread::sleep(std::time::Duration::from_millis(20));
        m.image.looks() == before
    });
    assert!(came_to_rest, "it looked {} times", m.image.looks());
}

#[test]
fn wrong_nodes_close_the_device_until_the_guest_starts_over() {
    type Spoil = fn(&Machine);
    let cases: [(&str, Spoil); 9] = [
        ("protocol", |m| m.guest.write(ID, "protocol", "x86_32-abi")),
        ("channel 4095", |m| m.guest.write(ID, "event-channel", 4095)),
        ("event-channel", |m| m.guest.write(ID, "event-channel", "x")),
        ("ring-ref", |m| m.guest.write(ID, "ring-ref", "-1")),
        ("ring page", |m| m.guest.write(ID, "ring-ref", 1999)),
        ("ring page", |m| m.guest.revoke(m.queues[0].grefs[0])),
        ("ring-page-order", |m| {
            m.guest.write(ID, "ring-page-order", 5)
        }),
        ("multi-queue-num-queues", |m| {
            m.guest.write(ID, "multi-queue-num-queues", 3)
        }),
        ("not written", |m| {
            m.guest.write(ID, "multi-queue-num-queues", 2)
        }),
    ];
    for (word, spoil) in cases {
        let mut m = Machine::new(MemoryImage::new(MIB));
        m.offer_spoiled(spoil);
        m.guest.wait_state(ID, "5");
        let line = m.guest.lines().join("\n");
        assert!(line.contains(word), "{word}: {line}");
        let told = m
            .guest
            .store
            .read_text("/local/domain/0/error/backend/vbd/5/51712/error");
        assert!(told.unwrap().contains(word));
        for (node, value) in [("multi-queue-num-queues", "1"), ("ring-page-order", "0")] {
            m.guest.write(ID, node, value);
        }
        start_over(&mut m);
        works(&mut m, 0);
    }
}

impl Machine {
    /// As [`Machine::offer`], with something wrong.
    fn offer_spoiled(&mut self, spoil: fn(&Machine)) {
        // Closed, so that nothing is looked at before all is written.
        self.guest.write(ID, "state", 6);
        self.guest.wait_state(ID, "6");
        self.guest.write(ID, "state", 1);
        self.guest.wait_state(ID, "2");
        self.prepare();
        spoil(self);
        self.guest.write(ID, "state", 3);
    }

    /// The nodes of one queue without the state behind them.
    fn prepare(&mut self) {
        let guest = &self.guest;
        let (ring, grefs) = guest.ring(1);
        let port = guest.port();
        guest.write(ID, "protocol", "x86_64-abi");
        guest.write(ID, "ring-ref", grefs[0]);
        guest.write(ID, "event-channel", port);
        self.queues = vec![FrontQueue { ring, port, grefs }];
    }
}

/// As a kernel does that finds a device of its predecessor.
fn start_over(m: &mut Machine) {
    m.guest.write(ID, "state", 5);
    m.guest.wait_state(ID, "5");
    m.guest.write(ID, "state", 6);
    m.guest.wait_state(ID, "6");
    m.guest.write(ID, "state", 1);
    m.guest.wait_state(ID, "2");
    m.connect(1, 0);
}

#[test]
fn broken_ring_closes_the_device_with_one_line() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    works(&mut m, 0);
    let gpa = m
        .guest
        .xen
        .grant_page(m.queues[0].grefs[0], hospes_xen::Access::Write)
        .unwrap();
    m.guest.xen.memory().write_obj(gpa, &1000u32).unwrap();
    m.guest.send(m.queues[0].port);
    m.guest.wait_state(ID, "5");
    assert_eq!(m.guest.lines().len(), 1, "{:?}", m.guest.lines());
    assert!(m.guest.lines()[0].contains("1000"), "{:?}", m.guest.lines());
    start_over(&mut m);
    works(&mut m, 0);
}

#[test]
fn new_kernel_that_resets_the_device_connects_again() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    for _ in 0..3 {
        works(&mut m, 0);
        start_over(&mut m);
    }
    works(&mut m, 0);
    // One that just starts over.
    m.guest.write(ID, "state", 1);
    m.guest.wait_state(ID, "2");
    m.connect(2, 1);
    works(&mut m, 0);
    works(&mut m, 1);
}

#[test]
fn requests_under_way_are_finished_before_the_device_is_closed() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    let requests = [1, 2, 3].map(|sector| request(blkif::OP_WRITE, sector, &[segment(gref, 0, 0)]));
    m.send(0, &requests);
    let received = m.receive(0);
    assert_eq!(received.status, blkif::STATUS_OKAY);
    m.guest.write(ID, "state", 6);
    m.guest.wait_state(ID, "6");
    assert_eq!(m.image.done().len(), 3);
}

#[test]
fn detach_waits_for_the_guest_and_frees_the_image() {
    let m = Machine::connected(MemoryImage::new(MIB));
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| m.bus.detach(ID, false));
        m.guest.wait_state(ID, "5");
        assert_eq!(m.guest.read(ID, "online").as_deref(), Some("0"));
        m.guest.write(ID, "state", 6);
        detaching.join().unwrap().unwrap();
    });
    assert!(gone(&m));
    // The test has the last reference.
    assert_eq!(Arc::strong_count(&m.image), 1);
    assert!(matches!(
        m.bus.detach(ID, false),
        Err(DeviceError::Missing(_))
    ));
}

#[test]
fn detach_of_a_disk_that_the_guest_never_took_needs_no_guest() {
    let m = Machine::new(MemoryImage::new(MIB));
    m.bus.detach(ID, false).unwrap();
    assert!(gone(&m));
    m.attach();
    m.bus.detach(ID, true).unwrap();
    assert!(gone(&m));
}

#[test]
fn forced_detach_does_not_wait_for_a_guest_that_does_not_let_go() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    works(&mut m, 0);
    m.bus.detach(ID, true).unwrap();
    assert!(gone(&m));
    assert_eq!(Arc::strong_count(&m.image), 1);
    m.guest.close(m.queues[0].port);
    m.attach();
    m.connect(1, 0);
    works(&mut m, 0);
}

#[test]
fn disk_that_the_guest_does_not_let_go_of_stays_without_force() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let short = Duration::from_millis(20);
    assert!(matches!(
        m.bus.detach_within(ID, false, short),
        Err(DeviceError::Kept(ID))
    ));
    m.guest.wait_state(ID, "4");
    assert_eq!(m.guest.read(ID, "online").as_deref(), Some("1"));
    works(&mut m, 0);
    // It is about to let go when its time is over.
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| m.bus.detach_within(ID, false, 20 * short));
        m.guest.wait_state(ID, "5");
        m.guest.write(ID, "state", 5);
        assert!(matches!(
            detaching.join().unwrap(),
            Err(DeviceError::Kept(ID))
        ));
    });
    m.guest.write(ID, "state", 6);
    m.bus.detach(ID, false).unwrap();
    assert!(gone(&m));
}

#[test]
fn disk_whose_requests_wait_goes_by_force_only_and_answers_them() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    m.image.hold(true);
    let requests: Vec<_> = (0..3)
        .map(|i| request(blkif::OP_WRITE, 8 * i, &[segment(gref, 0, 7)]))
        .collect();
    m.send(0, &requests);
    wait("the trouble", || m.bus.list()[0].trouble.is_some());
    assert!(matches!(
        m.bus.detach(ID, false),
        Err(DeviceError::Waits(ID, _))
    ));
    assert_eq!(m.guest.read(ID, "state").as_deref(), Some("4"));
    m.bus.detach(ID, true).unwrap();
    assert!(gone(&m));
    let mut ids: Vec<u64> = (0..3)
        .map(|_| {
            let response = m.receive(0);
            assert_eq!(response.status, blkif::STATUS_ERROR);
            response.id
        })
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, requests.iter().map(|r| r.id).collect::<Vec<_>>());
    assert_eq!(m.image.done(), []);
}

#[test]
fn requests_that_wait_are_not_answered_where_the_guest_comes_back_for_them() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    m.image.hold(true);
    m.send(0, &[request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)])]);
    wait("the trouble", || m.bus.list()[0].trouble.is_some());
    m.bus.close();
    assert!(m.queues[0].ring.take().is_none());
}

#[test]
fn attach_waits_until_the_guest_has_seen_the_disk_before_it_go() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    m.bus.remove(ID).unwrap();
    std::thread::scope(|scope| {
        let attaching = scope.spawn(|| m.attach());
        std::thread::sleep(Duration::from_millis(100));
        assert!(gone(&m));
        m.guest.close(m.queues[0].port);
        attaching.join().unwrap();
    });
    m.connect(1, 0);
    works(&mut m, 0);
}

#[test]
fn attach_twice_is_refused_and_leaves_the_first_alone() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let image: Arc<dyn Image> = Arc::new(MemoryImage::new(MIB));
    let block = Block::new(image, false, 1, Arc::new(|_| {}));
    let second = m.bus.attach(ID, &DeviceNodes::default(), Box::new(block));
    assert!(matches!(second, Err(DeviceError::Exists(ID))));
    works(&mut m, 0);
    m.bus.close();
    assert!(gone(&m));
    assert!(matches!(m.bus.detach(ID, true), Err(DeviceError::Closed)));
}

#[test]
fn host_without_room_makes_requests_wait_and_is_told_once() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    m.image.hold(true);
    m.send(0, &[request(blkif::OP_WRITE, 1, &[segment(gref, 0, 0)])]);
    wait("the trouble", || m.bus.list()[0].trouble.is_some());
    wait("the line", || {
        m.guest.lines().iter().any(|l| l.contains("no room"))
    });
    m.image.hold(false);
    assert_eq!(m.receive(0).status, blkif::STATUS_OKAY);
    assert_eq!(m.bus.list()[0].trouble, None);
    wait("the line", || {
        m.guest.lines().iter().any(|l| l.contains("go on"))
    });
    // Taking the disk away does not wait for the host.
    m.image.hold(true);
    m.send(0, &[request(blkif::OP_WRITE, 1, &[segment(gref, 0, 0)])]);
    m.bus.detach(ID, true).unwrap();
    assert_eq!(m.image.done(), [(Op::Write, 512)]);
}

#[test]
fn resized_disk_is_shown_and_used() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    let beyond = |gref| request(blkif::OP_WRITE, 2048, &[segment(gref, 0, 0)]);
    assert_eq!(m.ask(beyond(gref)).status, blkif::STATUS_ERROR);
    m.image.resize(2 * MIB as u64).unwrap();
    m.bus.renew(ID).unwrap();
    wait("the size", || {
        m.guest.read(ID, "sectors").as_deref() == Some("4096")
    });
    assert_eq!(m.ask(beyond(gref)).status, blkif::STATUS_OKAY);
}
