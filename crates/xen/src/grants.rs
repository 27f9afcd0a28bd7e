//! The grant table, version 1: the guest's list of pages that back ends may use.
//!
//! Back ends live in the monitor and reach all guest memory anyway; they must still ask here for each page, so that the guest decides what
//! a device touches. Nothing is written into the entries: a guest may end any grant at any time, and a back end that still uses the page then harms only that
//! guest.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use hospes_engine::Vcpu;
use hospes_memory::{GuestMemory, MemoryError, Page};
use hospes_units::{DomId, Gfn, Gpa, GrantRef};
use hospes_xen_abi::{Errno, grant};

use crate::guest::{Reply, read, write};
use crate::{Config, Xen, lock};

/// Most frames a grant table may have.
pub const MAX_FRAMES: u32 = 256;

/// What a back end wants to do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// Why the guest's grant does not let a back end use a page. A fault of the guest: the request it belongs to fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    #[error("grant {0} lies outside the guest's grant table")]
    BadReference(GrantRef),
    #[error("grant {0} does not permit access")]
    NotGranted(GrantRef),
    #[error("grant {gref} is for domain {granted_to}, not for the host")]
    WrongDomain { gref: GrantRef, granted_to: DomId },
    #[error("grant {0} is read-only")]
    ReadOnly(GrantRef),
    #[error("grant {gref} names frame {gfn}, which is not memory")]
    NotMemory { gref: GrantRef, gfn: Gfn },
}

/// The table's frames.
#[derive(Debug)]
pub(crate) struct Grants {
    frames: Vec<(Page, u64)>,
    max: u32,
}

impl Grants {
    pub fn new(memory: &Arc<GuestMemory>, config: &Config) -> Result<Grants, MemoryError> {
        let mut grants = Grants {
            frames: Vec::new(),
            max: config.grant_frames,
        };
        grants.frame(memory, 0)?;
        grants.reserve(grant::REF_CONSOLE, config.console_gfn);
        grants.reserve(grant::REF_XENSTORE, config.store_gfn);
        Ok(grants)
    }

    /// Grants a page of the tools' choice to the host.
    fn reserve(&self, gref: u32, gfn: Gfn) {
        let entry = u64::from(grant::TYPE_PERMIT_ACCESS)
            | u64::from(DomId::HOST.0) << 16
            | (gfn.0 & 0xffff_ffff) << 32;
        self.frames[0].0.u64(gref as usize * 8).store(entry, SeqCst);
    }

    /// The frame's place in the memory file; frames up to it are made as needed. The caller checked `idx` against `max`.
    pub fn frame(&mut self, memory: &Arc<GuestMemory>, idx: u32) -> Result<u64, MemoryError> {
        while self.frames.len() <= idx as usize {
            self.frames.push(Page::new_special(memory)?);
        }
        Ok(self.frames[idx as usize].1)
    }

    pub fn max(&self) -> u32 {
        self.max
    }

    /// One consistent copy of an entry.
    fn entry(&self, gref: GrantRef) -> Result<grant::EntryV1, GrantError> {
        let frame = self
            .frames
            .get((gref.0 / grant::ENTRIES_PER_FRAME) as usize)
            .ok_or(GrantError::BadReference(gref))?;
        let at = (gref.0 % grant::ENTRIES_PER_FRAME) as usize * 8;
        let word = frame.0.u64(at).load(SeqCst);
        Ok(grant::EntryV1 {
            flags: word as u16,
            domid: (word >> 16) as u16,
            frame: (word >> 32) as u32,
        })
    }
}

impl Xen {
    /// The page behind a grant, for a back end in the monitor. A back end that has written to it calls [`Xen::mark_written`].
    pub fn grant_page(&self, gref: GrantRef, access: Access) -> Result<Gpa, GrantError> {
        let entry = lock(&self.grants).entry(gref)?;
        if entry.flags & grant::TYPE_MASK != grant::TYPE_PERMIT_ACCESS {
            return Err(GrantError::NotGranted(gref));
        }
        if entry.domid != DomId::HOST.0 {
            return Err(GrantError::WrongDomain {
                gref,
                granted_to: DomId(entry.domid),
            });
        }
        if access == Access::Write && entry.flags & grant::FLAG_READONLY != 0 {
            return Err(GrantError::ReadOnly(gref));
        }
        let gfn = Gfn(u64::from(entry.frame));
        if !self.memory.is_backed(gfn) {
            return Err(GrantError::NotMemory { gref, gfn });
        }
        Ok(gfn.gpa())
    }

    pub(crate) fn grant_table_op(
        &self,
        vcpu: &mut dyn Vcpu,
        cmd: u64,
        array: u64,
        count: u64,
    ) -> Result<Reply, Errno> {
        match cmd {
            grant::QUERY_SIZE | grant::SET_VERSION | grant::GET_VERSION => {}
            _ => return Err(Errno::NoSys),
        }
        // Each of these calls takes one structure; as in Xen, a count of 0 asks for nothing.
        if count == 0 {
            return Ok(Reply::OK);
        }
        if count > 1 {
            return Err(Errno::Inval);
        }
        match cmd {
            grant::QUERY_SIZE => {
                let mut a: grant::QuerySize = read(vcpu, array)?;
                if self.check_self(a.dom).is_ok() {
                    let grants = lock(&self.grants);
                    a.nr_frames = grants.frames.len() as u32;
                    a.max_nr_frames = grants.max;
                    a.status = grant::STATUS_OKAY;
                } else {
                    a.status = grant::STATUS_BAD_DOMAIN;
                }
                write(vcpu, array, &a)?;
            }
            grant::SET_VERSION => {
                if read::<u32>(vcpu, array)? != 1 {
                    return Err(Errno::NoSys);
                }
            }
            _ => {
                let mut a: grant::GetVersion = read(vcpu, array)?;
                self.check_self(a.dom)?;
                a.version = 1;
                write(vcpu, array, &a)?;
            }
        }
        Ok(Reply::OK)
    }
}
