//! A disk whose image is let go of while its guest is suspended, and had again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use hospes_image::{Geometry, Image, ImageError, Op, Queue, Status};
use hospes_xen_abi::blkif;

use super::disk::MemoryImage;
use super::{ID, Machine, request, segment};
use crate::block::Block;
use crate::frame::{DeviceError, DeviceNodes};
use crate::lock;
use crate::testing::wait;

const MIB: usize = 1 << 20;

/// An image as it is opened: closed when nobody has it any more, whoever else has what is behind it.
struct Opened {
    image: Arc<MemoryImage>,
    /// Counts those that are closed.
    closed: Arc<AtomicU32>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Tables are written now.
        thread::sleep(Duration::from_millis(20));
        self.closed.fetch_add(1, SeqCst);
    }
}

impl Image for Opened {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn queue(&self) -> Result<Box<dyn Queue>, ImageError> {
        self.image.queue()
    }

    fn resize(&self, bytes: u64) -> Result<(), ImageError> {
        self.image.resize(bytes)
    }

    fn status(&self) -> Status {
        self.image.status()
    }
}

/// A machine, whether its image can be opened, and what was opened last.
struct Bench {
    m: Machine,
    locked: Arc<AtomicBool>,
    opened: Arc<Mutex<Weak<Opened>>>,
    closed: Arc<AtomicU32>,
}

impl Bench {
    fn new() -> Bench {
        let m = Machine::connected(MemoryImage::new(MIB));
        m.bus.remove(ID).unwrap();
        m.guest.close(m.queues[0].port);
        let locked = Arc::new(AtomicBool::new(false));
        let opened = Arc::new(Mutex::new(Weak::new()));
        let closed = Arc::new(AtomicU32::new(0));
        let open = {
            let (image, locked, opened) = (m.image.clone(), locked.clone(), opened.clone());
            let closed = closed.clone();
            move || {
                if locked.load(SeqCst) {
                    return Err("somebody has it".to_owned());
                }
                let image = Arc::new(Opened {
                    image: image.clone(),
                    closed: closed.clone(),
                });
                *lock(&opened) = Arc::downgrade(&image);
                Ok(image as Arc<dyn Image>)
            }
        };
        let block = Block::new(open().unwrap(), false, 2, Arc::new(|_| {}));
        let block = block.with_reopen(Box::new(open));
        let nodes = DeviceNodes::default();
        m.bus.attach(ID, &nodes, Box::new(block)).unwrap();
        let mut bench = Bench {
            m,
            locked,
            opened,
            closed,
        };
        bench.m.connect(1, 0);
        bench
    }

    fn is_open(&self) -> bool {
        lock(&self.opened).strong_count() > 0
    }
}

#[test]
fn let_go_leaves_all_durable_and_take_again_goes_on_in_the_same_rings() {
    let mut bench = Bench::new();
    let (_, gref) = bench.m.page(3);
    let write = |sector| request(blkif::OP_WRITE, sector, &[segment(gref, 0, 7)]);
    bench.m.send(0, &[write(8), write(16)]);
    bench.m.bus.let_go().unwrap();
    let operations: Vec<Op> = bench.m.image.done().iter().map(|(op, _)| *op).collect();
    assert_eq!(operations, [Op::Write, Op::Write, Op::Flush, Op::Flush]);
    assert!(!bench.is_open());
    bench.m.bus.let_go().unwrap();
    // What the guest had still sent waits in its ring.
    bench.m.send(0, &[write(24)]);
    bench.locked.store(true, SeqCst);
    let refused = bench.m.bus.take_again();
    assert!(
        matches!(&refused, Err(DeviceError::NotAgain(ID, why)) if why == "somebody has it"),
        "{refused:?}"
    );
    assert_eq!(bench.m.image.done(), []);
    bench.locked.store(false, SeqCst);
    bench.m.bus.take_again().unwrap();
    for _ in 0..3 {
        assert_eq!(bench.m.receive(0).status, blkif::STATUS_OKAY);
    }
    assert_eq!(bench.m.image.done(), [(Op::Write, 24 * 512)]);
    assert_eq!(bench.m.ask(write(32)).status, blkif::STATUS_OKAY);
    bench.m.guest.wait_state(ID, "4");
    bench.m.bus.take_again().unwrap();
    assert_eq!(bench.m.ask(write(40)).status, blkif::STATUS_OKAY);
}

#[test]
fn flush_leaves_all_durable_or_says_why_not() {
    let mut bench = Bench::new();
    let (_, gref) = bench.m.page(3);
    let write = request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)]);
    bench.m.send(0, &[write]);
    bench.m.bus.flush().unwrap();
    let operations: Vec<Op> = bench.m.image.done().iter().map(|(op, _)| *op).collect();
    assert_eq!(operations, [Op::Write, Op::Flush, Op::Flush]);
    assert_eq!(bench.m.receive(0).status, blkif::STATUS_OKAY);
    // It goes on in the same rings all the time.
    assert_eq!(bench.m.ask(write).status, blkif::STATUS_OKAY);
    for _ in 0..2 {
        bench.m.image.fail(true);
        assert!(matches!(
            bench.m.bus.flush(),
            Err(DeviceError::Flush(ID, _))
        ));
        bench.m.image.fail(false);
    }
    assert_eq!(bench.m.ask(write).status, blkif::STATUS_OKAY);
    bench.m.bus.let_go().unwrap();
    bench.m.bus.flush().unwrap();
    assert!(!bench.is_open());
}

#[test]
fn disk_that_has_not_changed_is_flushed_once() {
    let mut bench = Bench::new();
    let (_, gref) = bench.m.page(3);
    let ask = |bench: &mut Bench, operation| {
        let request = request(operation, 8, &[segment(gref, 0, 7)]);
        assert_eq!(bench.m.ask(request).status, blkif::STATUS_OKAY);
    };
    let flushes = |bench: &Bench| {
        let done = bench.m.image.done();
        done.iter().filter(|(op, _)| *op == Op::Flush).count()
    };
    ask(&mut bench, blkif::OP_WRITE);
    bench.m.bus.flush().unwrap();
    assert_eq!(flushes(&bench), 2);
    ask(&mut bench, blkif::OP_READ);
    bench.m.bus.flush().unwrap();
    assert_eq!(flushes(&bench), 0);
    ask(&mut bench, blkif::OP_WRITE);
    bench.m.bus.flush().unwrap();
    bench.m.bus.let_go().unwrap();
    assert_eq!(flushes(&bench), 2);
    assert!(!bench.is_open());
    // An image that was opened again may have changed.
    bench.m.bus.take_again().unwrap();
    bench.m.bus.flush().unwrap();
    assert_eq!(flushes(&bench), 2);
}

#[test]
fn let_go_with_requests_that_wait_for_the_host_changes_nothing() {
    let mut bench = Bench::new();
    let (_, gref) = bench.m.page(3);
    bench.m.image.hold(true);
    bench
        .m
        .send(0, &[request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)])]);
    wait("the trouble", || bench.m.bus.list()[0].trouble.is_some());
    assert!(matches!(
        bench.m.bus.let_go(),
        Err(DeviceError::Busy(ID, _))
    ));
    assert!(bench.is_open());
    bench.m.image.hold(false);
    bench.m.bus.take_again().unwrap();
    assert_eq!(bench.m.receive(0).status, blkif::STATUS_OKAY);
}

#[test]
fn image_that_is_not_durable_is_not_closed() {
    let mut bench = Bench::new();
    let first = lock(&bench.opened).clone();
    bench.m.image.fail(true);
    assert!(bench.m.bus.let_go().is_err());
    assert!(bench.is_open());
    bench.m.image.fail(false);
    bench.m.bus.take_again().unwrap();
    assert!(first.ptr_eq(&lock(&bench.opened)) && bench.is_open());
    let (_, gref) = bench.m.page(3);
    let write = request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)]);
    assert_eq!(bench.m.ask(write).status, blkif::STATUS_OKAY);
}

#[test]
fn let_go_ends_when_the_image_is_closed_whoever_looked_at_it() {
    let bench = Bench::new();
    let looking = lock(&bench.opened).upgrade();
    thread::scope(|scope| {
        let let_go = scope.spawn(|| bench.m.bus.let_go().map(|()| bench.closed.load(SeqCst)));
        // Long enough for the device to let go where it does not wait for this.
        for _ in 0..20 {
            if lock(&bench.opened).strong_count() > 1 {
                thread::sleep(Duration::from_millis(10));
            }
        }
        drop(looking);
        assert_eq!(let_go.join().unwrap().unwrap(), 1);
    });
}

#[test]
fn disk_that_is_let_go_can_be_taken_away() {
    let bench = Bench::new();
    bench.m.bus.let_go().unwrap();
    bench.m.bus.close();
    assert!(matches!(bench.m.bus.take_again(), Err(DeviceError::Closed)));
    assert!(!bench.is_open());
}
