//! Growing an image.

use std::sync::atomic::Ordering;

use super::Qcow2;
use super::cache::Dirty;
use super::header::Header;
use super::open::into_image;
use crate::error::{ImageError, IoError};

impl Qcow2 {
    pub(crate) fn resize(&self, bytes: u64) -> Result<(), ImageError> {
        let refuse = |reason| {
            Err(ImageError::Resize {
                path: self.path.clone(),
                bytes,
                reason,
            })
        };
        let _one = self.flushing.lock().expect("no thread panics with it");
        let now = self.bytes.load(Ordering::Acquire);
        if bytes == now {
            return Ok(());
        }
        if self.options.read_only {
            return refuse("it is attached read-only");
        }
        if bytes < now {
            return refuse(
                "qcow2 images cannot shrink; copy it with qemu-img convert after qemu-img resize --shrink",
            );
        }
        if !bytes.is_multiple_of(u64::from(self.options.sector_bytes)) {
            return refuse("the size has to be a multiple of the sector");
        }
        if bytes > i64::MAX as u64 {
            return refuse("a disk has less than 8 EiB");
        }
        if self
            .backing
            .as_ref()
            .is_some_and(|below| below.bytes() > now)
        {
            return refuse("its backing file is larger than it, and would show in the new part");
        }
        let Some(entries) = Header::l1_entries_for(self.cluster_bits, bytes) else {
            return refuse("its clusters are too small for that");
        };
        let grown = self
            .grow_l1(entries, bytes)
            .and_then(|()| self.flush_alone());
        if let Err(error) = grown {
            // The size comes back; a larger table does no harm.
            self.meta().header.bytes = now;
            return Err(into_image(&self.path, error));
        }
        self.bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    fn grow_l1(&self, entries: u32, bytes: u64) -> Result<(), IoError> {
        let mut meta = self.meta();
        if meta.header.snapshots > 0 && meta.header.version == 2 {
            return Err(super::refcounts::damaged(
                "snapshots of version 2 do not record their size, so it cannot grow",
            ));
        }
        let old = meta.header.l1_entries;
        if entries > old {
            let clusters = |entries: u32| (u64::from(entries) * 8).div_ceil(self.cluster_bytes());
            let place = meta.refcounts.alloc_exact(clusters(entries))?;
            let start = meta.header.l1_offset >> self.cluster_bits;
            meta.refcounts.retire(start..start + clusters(old));
            meta.refcounts
                .protected
                .extend(place..place + clusters(entries));
            meta.l1.resize(entries as usize, 0);
            meta.header.l1_offset = place << self.cluster_bits;
            meta.header.l1_entries = entries;
            meta.l1_dirty = Dirty::default();
            meta.l1_moved = true;
        }
        meta.header.bytes = bytes;
        Ok(())
    }
}
