//! What fuzzers and property tests check about any request.

use hospes_image::{Geometry, Op};
use hospes_units::{Gpa, GrantRef, PAGE_SIZE};
use hospes_xen::{Access, GrantError};
use hospes_xen_abi::blkif;
use zerocopy::{FromZeros, IntoBytes};

use super::parse::{Pages, Refusal, parse};

/// Pages 0 to 15 are memory, all with the same content; grants 0 to 15 give them, those above 11 for reading only.
struct FewPages<'a> {
    content: &'a [u8],
}

const PAGES: u64 = 16;
const BASE: usize = 1 << 40;

impl Pages for FewPages<'_> {
    fn page(&self, gref: GrantRef, access: Access) -> Result<Gpa, Refusal> {
        match gref.0 {
            12..16 if access == Access::Write => Err(GrantError::ReadOnly(gref).into()),
            0..16 => Ok(Gpa(u64::from(gref.0) * PAGE_SIZE)),
            _ => Err(GrantError::BadReference(gref).into()),
        }
    }

    fn host(&self, gpa: Gpa, len: u64) -> Result<*mut u8, Refusal> {
        assert!(len <= PAGE_SIZE && gpa.0 + len <= PAGES * PAGE_SIZE);
        Ok(std::ptr::without_provenance_mut(BASE + gpa.0 as usize))
    }

    fn read(&self, _: Gpa, buf: &mut [u8]) -> Result<(), Refusal> {
        assert!(buf.len() as u64 <= PAGE_SIZE);
        for (byte, source) in buf.iter_mut().zip(self.content.iter().cycle()) {
            *byte = *source;
        }
        Ok(())
    }
}

/// Takes any bytes as a request, with the rest as the content of indirect pages, and asserts that what it becomes stays on the disk, in granted
/// memory and within the limits.
pub fn fuzz_request(data: &[u8]) {
    let mut request = blkif::Request::new_zeroed();
    let count = data.len().min(size_of::<blkif::Request>());
    request.as_mut_bytes()[..count].copy_from_slice(&data[..count]);
    let pages = FewPages {
        content: &data[count..],
    };
    for (sector_bytes, read_only) in [(512, false), (512, true), (4096, false)] {
        let geometry = Geometry {
            bytes: 1 << 20,
            sector_bytes,
            physical_sector_bytes: 4096,
            read_only,
            discard: Some(4096),
        };
        let Ok(work) = parse(&request, &geometry, &pages) else {
            continue;
        };
        assert!(!work.steps.is_empty() && work.steps.len() <= 3);
        for step in &work.steps {
            assert!(step.offset + step.bytes <= geometry.bytes);
            assert!(step.offset % u64::from(sector_bytes) == 0);
            assert!(step.bytes % u64::from(sector_bytes) == 0);
            assert!(!read_only || matches!(step.op, Op::Read | Op::Flush));
            assert!(step.buffers.len() <= super::MAX_INDIRECT_SEGMENTS);
            let mut sum = 0;
            for buffer in &step.buffers {
                let start = buffer.host.addr() - BASE;
                assert!((start + buffer.len) as u64 <= PAGES * PAGE_SIZE && buffer.len > 0);
                sum += buffer.len as u64;
            }
            let has_data = matches!(step.op, Op::Read | Op::Write);
            assert_eq!(sum, if has_data { step.bytes } else { 0 });
            if step.op == Op::Read {
                assert_eq!(work.written.iter().map(|w| w.1).sum::<u64>(), sum);
            }
        }
    }
}
