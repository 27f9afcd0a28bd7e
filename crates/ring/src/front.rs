//! The side that makes requests, as a guest's driver does: what tests of back ends stand on.

use std::marker::PhantomData;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::SharedMemory;
use crate::{HEADER_BYTES, at, crosses, slots};

/// The front end's side of a ring. It trusts the back end.
#[derive(Debug)]
pub struct FrontRing<M, Req, Rsp> {
    memory: M,
    slots: u32,
    produced: u32,
    published: u32,
    consumed: u32,
    types: PhantomData<fn() -> (Req, Rsp)>,
}

impl<M, Req, Rsp> FrontRing<M, Req, Rsp>
where
    M: SharedMemory,
    Req: IntoBytes + Immutable,
    Rsp: FromBytes + IntoBytes + Immutable,
{
    const SLOT_BYTES: usize = if size_of::<Req>() > size_of::<Rsp>() {
        size_of::<Req>()
    } else {
        size_of::<Rsp>()
    };

    /// Makes a fresh ring. `None` where the memory holds no slot.
    pub fn new(memory: M) -> Option<Self> {
        let slots = slots(memory.bytes(), Self::SLOT_BYTES);
        if slots == 0 {
            return None;
        }
        for (offset, value) in [
            (at::REQ_PROD, 0),
            (at::RSP_PROD, 0),
            (at::REQ_EVENT, 1),
            (at::RSP_EVENT, 1),
        ] {
            memory.word(offset).store(value, Release);
        }
        Some(FrontRing {
            memory,
            slots,
            produced: 0,
            published: 0,
            consumed: 0,
            types: PhantomData,
        })
    }

    /// Slots without an open request.
    pub fn free(&self) -> u32 {
        self.slots - self.produced.wrapping_sub(self.consumed)
    }

    /// Queues a request; false where all slots are in use.
    pub fn put(&mut self, request: &Req) -> bool {
        if self.free() == 0 {
            return false;
        }
        self.memory
            .write(self.slot(self.produced), request.as_bytes());
        self.produced = self.produced.wrapping_add(1);
        true
    }

    /// Shows the queued requests to the back end; true where it has to be notified.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.produced == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.produced);
        self.memory.word(at::REQ_PROD).store(self.produced, Release);
        fence(SeqCst);
        crosses(
            old,
            self.produced,
            self.memory.word(at::REQ_EVENT).load(Relaxed),
        )
    }

    /// Takes the next response.
    pub fn take(&mut self) -> Option<Rsp> {
        if self.memory.word(at::RSP_PROD).load(Acquire) == self.consumed {
            return None;
        }
        let mut response = Rsp::new_zeroed();
        self.memory
            .read(self.slot(self.consumed), response.as_mut_bytes());
        self.consumed = self.consumed.wrapping_add(1);
        Some(response)
    }

    /// Asks to be notified of the next response; true where it is there already.
    pub fn wait_for_one(&mut self) -> bool {
        self.memory
            .word(at::RSP_EVENT)
            .store(self.consumed.wrapping_add(1), Release);
        fence(SeqCst);
        self.memory.word(at::RSP_PROD).load(Acquire) != self.consumed
    }

    fn slot(&self, index: u32) -> usize {
        HEADER_BYTES + (index & (self.slots - 1)) as usize * Self::SLOT_BYTES
    }
}
