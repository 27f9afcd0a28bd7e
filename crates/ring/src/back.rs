//! The side that takes requests and writes responses.

use std::marker::PhantomData;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::SharedMemory;
use crate::{Broken, HEADER_BYTES, at, crosses, slots};

/// The back end's side of a ring whose slots hold a `Req` and later a `Rsp`.
#[derive(Debug)]
pub struct BackRing<M, Req, Rsp> {
    memory: M,
    slots: u32,
    /// Requests taken so far.
    consumed: u32,
    /// Responses written so far, and those of them that the peer may see.
    answered: u32,
    published: u32,
    types: PhantomData<fn() -> (Req, Rsp)>,
}

impl<M, Req, Rsp> BackRing<M, Req, Rsp>
where
    M: SharedMemory,
    Req: FromBytes + IntoBytes + Immutable,
    Rsp: IntoBytes + Immutable,
{
    const SLOT_BYTES: usize = if size_of::<Req>() > size_of::<Rsp>() {
        size_of::<Req>()
    } else {
        size_of::<Rsp>()
    };

    /// Takes over a ring where its last user left it: all that is answered is done, all else is still to do. `None` where the memory holds no slot.
    pub fn attach(memory: M) -> Option<Self> {
        let slots = slots(memory.bytes(), Self::SLOT_BYTES);
        if slots == 0 {
            return None;
        }
        let answered = memory.word(at::RSP_PROD).load(Acquire);
        Some(BackRing {
            memory,
            slots,
            consumed: answered,
            answered,
            published: answered,
            types: PhantomData,
        })
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Requests taken and not answered yet.
    pub fn open(&self) -> u32 {
        self.consumed.wrapping_sub(self.answered)
    }

    /// Responses that the peer does not see yet.
    pub fn unpublished(&self) -> u32 {
        self.answered.wrapping_sub(self.published)
    }

    /// Requests that wait to be taken.
    pub fn waiting(&self) -> Result<u32, Broken> {
        let produced = self.memory.word(at::REQ_PROD).load(Acquire);
        let waiting = produced.wrapping_sub(self.consumed);
        if waiting > self.slots - self.open() {
            return Err(Broken {
                produced,
                consumed: self.consumed,
                answered: self.answered,
                slots: self.slots,
            });
        }
        Ok(waiting)
    }

    /// Takes the next request.
    pub fn take(&mut self) -> Result<Option<Req>, Broken> {
        if self.waiting()? == 0 {
            return Ok(None);
        }
        let mut request = Req::new_zeroed();
        self.memory
            .read(self.slot(self.consumed), request.as_mut_bytes());
        self.consumed = self.consumed.wrapping_add(1);
        Ok(Some(request))
    }

    /// Writes the next response; the peer sees it after [`BackRing::publish`]. Each request taken is answered once.
    pub fn answer(&mut self, response: &Rsp) {
        debug_assert!(self.open() > 0, "more answers than requests");
        self.memory
            .write(self.slot(self.answered), response.as_bytes());
        self.answered = self.answered.wrapping_add(1);
    }

    /// Shows all responses to the peer; true where it has to be notified.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.answered == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.answered);
        self.memory.word(at::RSP_PROD).store(self.answered, Release);
        // The peer sets its event before it looks at the index a last time: one of the two sees the other.
        fence(SeqCst);
        let event = self.memory.word(at::RSP_EVENT).load(Relaxed);
        crosses(old, self.answered, event)
    }

    /// Asks the peer to notify when `count` requests wait (at least 1), and says whether they do already: who gets false may sleep.
    pub fn wait_for(&mut self, count: u32) -> Result<bool, Broken> {
        let count = count.max(1);
        self.memory
            .word(at::REQ_EVENT)
            .store(self.consumed.wrapping_add(count), Release);
        fence(SeqCst);
        Ok(self.waiting()? >= count)
    }

    fn slot(&self, index: u32) -> usize {
        HEADER_BYTES + (index & (self.slots - 1)) as usize * Self::SLOT_BYTES
    }
}
