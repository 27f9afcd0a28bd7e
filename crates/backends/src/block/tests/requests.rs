//! What each request does.

use hospes_image::Op;
use hospes_units::Gpa;
use hospes_xen_abi::blkif;
use zerocopy::{FromZeros, IntoBytes, transmute};

use super::*;

const MIB: usize = 1 << 20;

fn indirect(op: u8, sector_number: u64, count: usize, grefs: &[GrantRef]) -> blkif::Request {
    let mut request = blkif::Indirect::new_zeroed();
    request.operation = blkif::OP_INDIRECT;
    request.indirect_op = op;
    request.nr_segments = count as u16;
    request.sector_number = sector_number;
    request.id = 77;
    for (place, gref) in request.grefs.iter_mut().zip(grefs) {
        *place = gref.0;
    }
    transmute!(request)
}

fn discard(sector_number: u64, nr_sectors: u64, flag: u8) -> blkif::Request {
    let mut request = blkif::Discard::new_zeroed();
    request.operation = blkif::OP_DISCARD;
    request.flag = flag;
    request.sector_number = sector_number;
    request.nr_sectors = nr_sectors;
    transmute!(request)
}

#[test]
fn connect_tells_the_guest_what_the_disk_is() {
    let machine =
        Machine::connected(MemoryImage::new(MIB).with(|g| g.physical_sector_bytes = 4096));
    for (node, value) in [
        ("sectors", "2048"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("feature-flush-cache", "1"),
        ("feature-discard", "1"),
        ("discard-granularity", "4096"),
        ("feature-persistent", "0"),
        ("feature-max-indirect-segments", "256"),
        ("multi-queue-max-queues", "2"),
        ("max-ring-page-order", "4"),
        ("frontend-id", "5"),
        ("online", "1"),
    ] {
        assert_eq!(
            machine.guest.read(ID, node).as_deref(),
            Some(value),
            "{node}"
        );
    }
}

#[test]
fn read_fills_the_segments_and_tells_the_engine_first() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    m.image.fill(512, &[7; 4096]);
    lock(&m.guest.vm.written).clear();
    let ((one, one_ref), (two, two_ref)) = (m.page(1), m.page(2));
    let segments = [segment(one_ref, 6, 7), segment(two_ref, 0, 2)];
    let response = m.ask(request(blkif::OP_READ, 1, &segments));
    assert_eq!(response.status, blkif::STATUS_OKAY);
    assert_eq!(response.operation, blkif::OP_READ);
    assert_eq!(m.content(one)[..3072], [1; 3072]);
    assert_eq!(m.content(one)[3072..], [7; 1024]);
    assert_eq!(m.content(two)[..1536], [7; 1536]);
    assert_eq!(m.content(two)[1536..], [2; 2560]);
    // The two pages lie side by side: they are one range.
    let start = Gpa(one.gpa().0 + 3072);
    assert_eq!(*lock(&m.guest.vm.written), [(start, 1024 + 1536)]);
}

#[test]
fn write_and_indirect_read_carry_the_data() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(9);
    let response = m.ask(request(blkif::OP_WRITE, 8, &[segment(gref, 0, 7)]));
    assert_eq!(response.status, blkif::STATUS_OKAY);
    assert_eq!(m.image.bytes(4096, 4096), [9; 4096]);

    m.image
        .fill(0, &(0..=255).cycle().take(40 * 4096).collect::<Vec<u8>>());
    let pages: Vec<_> = (0..40).map(|_| m.page(0)).collect();
    let list: Vec<_> = pages.iter().map(|(_, gref)| segment(*gref, 0, 7)).collect();
    let (table, table_ref) = m.page(0);
    let memory = m.guest.xen.memory().clone();
    memory.write(table.gpa(), list.as_bytes()).unwrap();
    let response = m.ask(indirect(blkif::OP_READ, 0, 40, &[table_ref]));
    assert_eq!(response.status, blkif::STATUS_OKAY);
    // Linux takes the disk out of service where this is 6.
    assert_eq!(response.operation, blkif::OP_READ);
    for (i, (gfn, _)) in pages.iter().enumerate() {
        assert_eq!(m.content(*gfn), m.image.bytes(i * 4096, 4096));
    }
}

#[test]
fn indirect_page_that_the_request_overwrites_is_harmless() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    m.image.fill(0, &[0xff; 8192]);
    let (table, table_ref) = m.page(0);
    let list = [segment(table_ref, 0, 7), segment(table_ref, 0, 7)];
    let memory = m.guest.xen.memory().clone();
    memory.write(table.gpa(), list.as_bytes()).unwrap();
    let response = m.ask(indirect(blkif::OP_READ, 0, 2, &[table_ref]));
    assert_eq!(response.status, blkif::STATUS_OKAY);
    assert_eq!(m.content(table), [0xff; 4096]);
}

#[test]
fn flush_with_data_flushes_first_and_barrier_on_both_sides() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(1);
    m.ask(request(blkif::OP_FLUSH_DISKCACHE, 0, &[]));
    assert_eq!(m.image.done(), [(Op::Flush, 0)]);
    m.ask(request(
        blkif::OP_FLUSH_DISKCACHE,
        8,
        &[segment(gref, 0, 7)],
    ));
    assert_eq!(m.image.done(), [(Op::Flush, 0), (Op::Write, 4096)]);
    m.ask(request(blkif::OP_WRITE_BARRIER, 0, &[]));
    assert_eq!(m.image.done(), [(Op::Flush, 0)]);

    // A barrier waits for what is before it and holds back what is behind it.
    m.image.hold(true);
    let write = |sector| request(blkif::OP_WRITE, sector, &[segment(gref, 0, 0)]);
    let barrier = request(blkif::OP_WRITE_BARRIER, 20, &[segment(gref, 0, 0)]);
    m.send(0, &[write(1), write(2), barrier, write(3), write(4)]);
    m.image.hold(false);
    for _ in 0..5 {
        assert_eq!(m.receive(0).status, blkif::STATUS_OKAY);
    }
    let done: Vec<_> = m
        .image
        .done()
        .iter()
        .map(|(op, at)| (*op, at / 512))
        .collect();
    let at = done.iter().position(|d| *d == (Op::Write, 20)).unwrap();
    assert_eq!(
        done[at - 1..=at + 1],
        [(Op::Flush, 0), (Op::Write, 20), (Op::Flush, 0)]
    );
    assert!(
        done[..at - 1]
            .iter()
            .all(|(_, sector)| [1, 2].contains(sector)),
        "{done:?}"
    );
    assert!(
        done[at + 2..]
            .iter()
            .all(|(_, sector)| [3, 4].contains(sector)),
        "{done:?}"
    );
}

#[test]
fn discard_gives_space_back_but_not_securely() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    m.image.fill(0, &[5; 16384]);
    assert_eq!(m.ask(discard(8, 16, 0)).status, blkif::STATUS_OKAY);
    assert_eq!(m.image.bytes(4096, 8192), [0; 8192]);
    assert_eq!(m.image.bytes(12288, 4096), [5; 4096]);
    let response = m.ask(discard(8, 16, blkif::DISCARD_SECURE));
    assert_eq!(response.status, blkif::STATUS_NOT_SUPPORTED);
    assert_eq!(m.ask(discard(2040, 9, 0)).status, blkif::STATUS_ERROR);
    assert_eq!(m.ask(discard(u64::MAX, 2, 0)).status, blkif::STATUS_ERROR);
}

#[test]
fn wrong_requests_get_errors_and_the_disk_goes_on() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (gfn, gref) = m.page(3);
    let readonly = m.guest.grant(gfn, hospes_xen_abi::grant::FLAG_READONLY);
    let foreign = m.guest.grant_to(gfn, 0, 3);
    let no_memory = m.guest.grant(Gfn(0xfffff), 0);
    let revoked = m.guest.grant(gfn, 0);
    m.guest.revoke(revoked);
    let (read, write) = (blkif::OP_READ, blkif::OP_WRITE);
    let (error, unsupported) = (blkif::STATUS_ERROR, blkif::STATUS_NOT_SUPPORTED);
    let full = segment(gref, 0, 7);
    let mut twelve = request(read, 0, &[full; 11]);
    twelve.nr_segments = 12;
    let table = [
        ("unknown operation", request(9, 0, &[full]), unsupported),
        ("reserved operation", request(4, 0, &[full]), unsupported),
        ("no segments", request(read, 0, &[]), error),
        ("too many segments", twelve, error),
        (
            "first behind last",
            request(write, 0, &[segment(gref, 5, 4)]),
            error,
        ),
        (
            "past the page",
            request(read, 0, &[segment(gref, 0, 8)]),
            error,
        ),
        (
            "far past the page",
            request(read, 0, &[segment(gref, 255, 255)]),
            error,
        ),
        ("past the end", request(read, 2041, &[full]), error),
        (
            "sector overflow",
            request(write, u64::MAX - 3, &[full]),
            error,
        ),
        ("byte overflow", request(write, 1 << 55, &[full]), error),
        (
            "free grant",
            request(read, 0, &[segment(GrantRef(500), 0, 0)]),
            error,
        ),
        (
            "grant of no frame",
            request(read, 0, &[segment(GrantRef(u32::MAX), 0, 0)]),
            error,
        ),
        (
            "ended grant",
            request(read, 0, &[segment(revoked, 0, 0)]),
            error,
        ),
        (
            "read into a read-only page",
            request(read, 0, &[segment(readonly, 0, 0)]),
            error,
        ),
        (
            "grant for another domain",
            request(read, 0, &[segment(foreign, 0, 0)]),
            error,
        ),
        (
            "grant of no memory",
            request(read, 0, &[segment(no_memory, 0, 0)]),
            error,
        ),
        (
            "second segment wrong",
            request(write, 0, &[full, segment(GrantRef(9999), 0, 0)]),
            error,
        ),
        (
            "indirect flush",
            indirect(blkif::OP_FLUSH_DISKCACHE, 0, 1, &[gref]),
            error,
        ),
        (
            "indirect of indirect",
            indirect(blkif::OP_INDIRECT, 0, 1, &[gref]),
            error,
        ),
        (
            "indirect without segments",
            indirect(read, 0, 0, &[gref]),
            error,
        ),
        (
            "indirect with too many",
            indirect(read, 0, 257, &[gref]),
            error,
        ),
        (
            "indirect with far too many",
            indirect(write, 0, 65535, &[gref]),
            error,
        ),
        (
            "indirect page not granted",
            indirect(read, 0, 5, &[GrantRef(9999)]),
            error,
        ),
        (
            "indirect page full of nonsense",
            indirect(read, 0, 5, &[gref]),
            error,
        ),
        (
            "indirect page read-only nonsense",
            indirect(write, 0, 256, &[readonly]),
            error,
        ),
    ];
    for (what, request, status) in table {
        let response = m.ask(request);
        assert_eq!(response.status, status, "{what}");
    }
    assert!(m.image.done().is_empty());
    assert_eq!(m.content(gfn), [3; 4096]);
    // A page granted for reading is enough for a write.
    let good = request(write, 2040, &[segment(readonly, 0, 7)]);
    assert_eq!(m.ask(good).status, blkif::STATUS_OKAY);
    let counters = m.bus.list()[0].counters.clone();
    assert!(counters.contains(&("errors", 25)), "{counters:?}");
    assert!(counters.contains(&("written_bytes", 4096)), "{counters:?}");
    assert!(
        m.guest
            .lines()
            .iter()
            .any(|l| l.contains("operation 9 is not known"))
    );
}

#[test]
fn read_only_disk_refuses_writes_and_discards() {
    let mut m = Machine::connected(MemoryImage::new(MIB).with(|g| g.read_only = true));
    assert_eq!(m.guest.read(ID, "info").as_deref(), Some("4"));
    assert_eq!(m.guest.read(ID, "feature-discard"), None);
    let (_, gref) = m.page(3);
    let full = [segment(gref, 0, 7)];
    assert_eq!(
        m.ask(request(blkif::OP_WRITE, 0, &full)).status,
        blkif::STATUS_ERROR
    );
    assert_eq!(m.ask(discard(0, 8, 0)).status, blkif::STATUS_ERROR);
    assert_eq!(
        m.ask(request(blkif::OP_FLUSH_DISKCACHE, 0, &full)).status,
        blkif::STATUS_ERROR
    );
    assert_eq!(
        m.ask(request(blkif::OP_READ, 0, &full)).status,
        blkif::STATUS_OKAY
    );
    assert_eq!(m.image.done(), [(Op::Read, 0)]);
}

#[test]
fn disk_with_large_sectors_takes_whole_ones_only() {
    let mut m = Machine::connected(MemoryImage::new(MIB).with(|g| g.sector_bytes = 4096));
    assert_eq!(m.guest.read(ID, "sector-size").as_deref(), Some("4096"));
    assert_eq!(m.guest.read(ID, "sectors").as_deref(), Some("2048"));
    let (_, gref) = m.page(3);
    for (sector, last, status) in [
        (8, 7, blkif::STATUS_OKAY),
        (8, 6, blkif::STATUS_ERROR),
        (1, 7, blkif::STATUS_ERROR),
    ] {
        let request = request(blkif::OP_WRITE, sector, &[segment(gref, 0, last)]);
        assert_eq!(m.ask(request).status, status);
    }
}

#[test]
fn storage_errors_of_the_host_go_to_the_guest() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    m.image.fail(true);
    let full = [segment(gref, 0, 7)];
    assert_eq!(
        m.ask(request(blkif::OP_WRITE, 0, &full)).status,
        blkif::STATUS_ERROR
    );
    assert_eq!(
        m.ask(request(blkif::OP_FLUSH_DISKCACHE, 0, &[])).status,
        blkif::STATUS_ERROR
    );
    m.image.fail(false);
    assert_eq!(
        m.ask(request(blkif::OP_WRITE, 0, &full)).status,
        blkif::STATUS_OKAY
    );
}

#[test]
fn image_that_was_cut_is_in_the_log_however_many_errors_there_were() {
    let mut m = Machine::connected(MemoryImage::new(MIB));
    let (_, gref) = m.page(3);
    let full = [segment(gref, 0, 7)];
    let fails = |m: &mut Machine, sector| {
        let status = m.ask(request(blkif::OP_READ, sector, &full)).status;
        assert_eq!(status, blkif::STATUS_ERROR);
    };
    let told = |m: &Machine| {
        let log = lock(&m.guest.log);
        let told = log.iter().filter(|line| line.contains("has cut it off"));
        told.count()
    };
    for _ in 0..2 {
        fails(&mut m, 2048);
    }
    m.image.cut(MIB / 2);
    fails(&mut m, 1024);
    assert_eq!(told(&m), 1);
    for _ in 0..4 {
        fails(&mut m, 1024);
    }
    assert_eq!(told(&m), 2);
    assert_eq!(
        m.ask(request(blkif::OP_WRITE, 0, &full)).status,
        blkif::STATUS_OKAY
    );
}
