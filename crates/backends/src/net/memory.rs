//! Guest pages as the queues need them.

use hospes_units::{GrantRef, PAGE_SIZE};
use hospes_xen::{Access, GrantError, Xen};

use super::link::Span;

/// Bytes of a page.
pub const PAGE: usize = PAGE_SIZE as usize;

/// The pages that a guest grants. What a queue finds behind a grant stays memory for as long as this value lives.
pub trait GuestPages: Send {
    /// The whole page behind a grant.
    fn page(&self, gref: GrantRef, access: Access) -> Result<GuestPage, GrantError>;

    /// A page's first bytes were changed.
    fn written(&self, page: &GuestPage, len: usize);
}

/// A page of the guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestPage {
    /// Guest physical address.
    pub gpa: u64,
    pub span: Span,
}

/// The pages of a domain.
pub struct DomainPages(pub std::sync::Arc<Xen>);

impl GuestPages for DomainPages {
    fn page(&self, gref: GrantRef, access: Access) -> Result<GuestPage, GrantError> {
        let gpa = self.0.grant_page(gref, access)?;
        let gfn = gpa.gfn();
        let host = self
            .0
            .memory()
            .page(gfn)
            .ok_or(GrantError::NotMemory { gref, gfn })?;
        Ok(GuestPage {
            gpa: gpa.0,
            // SAFETY: a backed frame is readable and writable and stays mapped as long as the memory, which `self.0` keeps; all of the monitor reaches
            // guest memory by copies and atomics only.
            span: unsafe { Span::new(host, PAGE) },
        })
    }

    fn written(&self, page: &GuestPage, len: usize) {
        self.0.mark_written(hospes_units::Gpa(page.gpa), len as u64);
    }
}
