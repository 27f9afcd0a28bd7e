//! From a request of the guest to requests of the image. Everything in it is checked here.

use hospes_image::{Buffer, Geometry, Op, Request};
use hospes_units::{Gpa, GrantRef};
use hospes_xen::{Access, GrantError, Xen};
use hospes_xen_abi::blkif::{self, SECTOR_BYTES, Segment};
use zerocopy::{FromZeros, IntoBytes, transmute};

use super::MAX_INDIRECT_SEGMENTS;

/// Sectors of the protocol in a page.
const SECTORS_PER_PAGE: u8 = (hospes_units::PAGE_SIZE / SECTOR_BYTES) as u8;

/// What a guest asked for, checked.
#[derive(Debug, Default)]
pub struct Work {
    /// Carried out one after the other; at least one.
    pub steps: Vec<Request>,
    /// Guest memory that is written when all went well.
    pub written: Vec<(Gpa, u64)>,
    /// Nothing may be under way beside it.
    pub barrier: bool,
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("operation {0} is not known")]
    Operation(u8),
    #[error("an indirect request cannot have operation {0}")]
    IndirectOperation(u8),
    #[error("a request has {0} segments")]
    Segments(usize),
    #[error("a segment has sectors {first} to {last} of a page")]
    Segment { first: u8, last: u8 },
    #[error("sectors {sector} and {count} more are not on the disk")]
    Range { sector: u64, count: u64 },
    #[error("the request is not aligned to the disk's sectors of {0} bytes")]
    Alignment(u32),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("the disk does not discard in this way")]
    Discard,
    #[error(transparent)]
    Grant(#[from] GrantError),
    #[error("a page is not memory")]
    NotMemory,
}

impl Refusal {
    /// What the guest reads.
    pub fn status(self) -> i16 {
        match self {
            Refusal::Operation(_) | Refusal::Discard => blkif::STATUS_NOT_SUPPORTED,
            _ => blkif::STATUS_ERROR,
        }
    }
}

/// The guest's pages, as its grants give them.
pub trait Pages {
    /// Where the page of a grant is.
    fn page(&self, gref: GrantRef, access: Access) -> Result<Gpa, Refusal>;

    /// Host address of bytes inside one page.
    fn host(&self, gpa: Gpa, len: u64) -> Result<*mut u8, Refusal>;

    /// Copies the start of a page.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Refusal>;
}

impl Pages for Xen {
    fn page(&self, gref: GrantRef, access: Access) -> Result<Gpa, Refusal> {
        Ok(self.grant_page(gref, access)?)
    }

    fn host(&self, gpa: Gpa, len: u64) -> Result<*mut u8, Refusal> {
        self.memory()
            .slice(gpa, len)
            .map_err(|_| Refusal::NotMemory)
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Refusal> {
        self.memory().read(gpa, buf).map_err(|_| Refusal::NotMemory)
    }
}

/// The operation to be repeated in the response: Linux takes a disk out of service that answers with another.
pub fn answered_operation(request: &blkif::Request) -> u8 {
    match request.operation {
        blkif::OP_INDIRECT => {
            let indirect: blkif::Indirect = transmute!(*request);
            indirect.indirect_op
        }
        operation => operation,
    }
}

/// Checks a request against the disk and the guest's grants.
pub fn parse(
    request: &blkif::Request,
    geometry: &Geometry,
    pages: &impl Pages,
) -> Result<Work, Refusal> {
    match request.operation {
        blkif::OP_READ | blkif::OP_WRITE | blkif::OP_WRITE_BARRIER | blkif::OP_FLUSH_DISKCACHE => {
            let count = usize::from(request.nr_segments);
            let segments = request.segments.get(..count);
            let segments = segments.ok_or(Refusal::Segments(count))?;
            direct(request, segments, geometry, pages)
        }
        blkif::OP_INDIRECT => indirect(&transmute!(*request), geometry, pages),
        blkif::OP_DISCARD => discard(&transmute!(*request), geometry),
        operation => Err(Refusal::Operation(operation)),
    }
}

fn direct(
    request: &blkif::Request,
    segments: &[Segment],
    geometry: &Geometry,
    pages: &impl Pages,
) -> Result<Work, Refusal> {
    let sector = request.sector_number;
    let barrier = request.operation == blkif::OP_WRITE_BARRIER;
    if segments.is_empty() && (barrier || request.operation == blkif::OP_FLUSH_DISKCACHE) {
        return Ok(Work {
            steps: vec![flush()],
            barrier,
            ..Work::default()
        });
    }
    let op = match request.operation {
        blkif::OP_READ => Op::Read,
        _ => Op::Write,
    };
    let mut work = transfer(op, sector, segments, geometry, pages)?;
    work.barrier = barrier;
    if request.operation == blkif::OP_FLUSH_DISKCACHE || barrier {
        work.steps.insert(0, flush());
    }
    if barrier {
        work.steps.push(flush());
    }
    Ok(work)
}

fn flush() -> Request {
    Request {
        id: 0,
        op: Op::Flush,
        offset: 0,
        bytes: 0,
        buffers: Vec::new(),
    }
}

fn indirect(
    request: &blkif::Indirect,
    geometry: &Geometry,
    pages: &impl Pages,
) -> Result<Work, Refusal> {
    let op = match request.indirect_op {
        blkif::OP_READ => Op::Read,
        blkif::OP_WRITE => Op::Write,
        other => return Err(Refusal::IndirectOperation(other)),
    };
    let count = usize::from(request.nr_segments);
    if count > MAX_INDIRECT_SEGMENTS {
        return Err(Refusal::Segments(count));
    }
    let mut segments = vec![Segment::new_zeroed(); count];
    let grefs = request.grefs;
    for (part, gref) in segments.chunks_mut(blkif::SEGMENTS_PER_PAGE).zip(grefs) {
        // Copied before anything is transferred: the page may be one that the request itself overwrites.
        let gpa = pages.page(GrantRef(gref), Access::Read)?;
        pages.read(gpa, part.as_mut_bytes())?;
    }
    transfer(op, request.sector_number, &segments, geometry, pages)
}

fn transfer(
    op: Op,
    sector: u64,
    segments: &[Segment],
    geometry: &Geometry,
    pages: &impl Pages,
) -> Result<Work, Refusal> {
    if segments.is_empty() {
        return Err(Refusal::Segments(0));
    }
    if op == Op::Write && geometry.read_only {
        return Err(Refusal::ReadOnly);
    }
    let access = match op {
        Op::Read => Access::Write,
        _ => Access::Read,
    };
    let mut buffers: Vec<Buffer> = Vec::with_capacity(segments.len());
    let mut written: Vec<(Gpa, u64)> = Vec::new();
    let mut count = 0;
    for segment in segments {
        let (first, last) = (segment.first_sect, segment.last_sect);
        if first > last || last >= SECTORS_PER_PAGE {
            return Err(Refusal::Segment { first, last });
        }
        let sectors = u64::from(last - first) + 1;
        count += sectors;
        let len = sectors * SECTOR_BYTES;
        let page = pages.page(GrantRef(segment.gref), access)?;
        let gpa = Gpa(page.0 + u64::from(first) * SECTOR_BYTES);
        let host = pages.host(gpa, len)?;
        match buffers.last_mut() {
            Some(last) if last.host.wrapping_add(last.len) == host => last.len += len as usize,
            _ => buffers.push(Buffer {
                host,
                len: len as usize,
            }),
        }
        if op == Op::Read {
            match written.last_mut() {
                Some((start, bytes)) if start.0 + *bytes == gpa.0 => *bytes += len,
                _ => written.push((gpa, len)),
            }
        }
    }
    let (offset, bytes) = range(sector, count, geometry)?;
    Ok(Work {
        steps: vec![Request {
            id: 0,
            op,
            offset,
            bytes,
            buffers,
        }],
        written,
        barrier: false,
    })
}

fn discard(request: &blkif::Discard, geometry: &Geometry) -> Result<Work, Refusal> {
    if geometry.read_only {
        return Err(Refusal::ReadOnly);
    }
    if geometry.discard.is_none() || request.flag & blkif::DISCARD_SECURE != 0 {
        return Err(Refusal::Discard);
    }
    let (offset, bytes) = range(request.sector_number, request.nr_sectors, geometry)?;
    Ok(Work {
        steps: vec![Request {
            id: 0,
            op: Op::Discard,
            offset,
            bytes,
            buffers: Vec::new(),
        }],
        ..Work::default()
    })
}

/// Offset and length in bytes of sectors that lie on the disk.
fn range(sector: u64, count: u64, geometry: &Geometry) -> Result<(u64, u64), Refusal> {
    let bad = Refusal::Range { sector, count };
    let end = sector.checked_add(count).ok_or(bad)?;
    if end > geometry.bytes / SECTOR_BYTES {
        return Err(bad);
    }
    let (offset, bytes) = (sector * SECTOR_BYTES, count * SECTOR_BYTES);
    let unit = u64::from(geometry.sector_bytes);
    if !offset.is_multiple_of(unit) || !bytes.is_multiple_of(unit) {
        return Err(Refusal::Alignment(geometry.sector_bytes));
    }
    Ok((offset, bytes))
}
