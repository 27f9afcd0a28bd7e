//! Queues of back ends that the threads of vCPUs serve while they have nothing else to do.
//!
//! A vCPU that waits for its own disk would else be woken by the queue's thread, which is woken by the disk: two threads that go to sleep and wake
//! up for each request. In place of that the vCPU looks for the answer itself.

use std::sync::{Arc, Mutex, Weak};

use crate::{Xen, lock};

/// A queue that threads of vCPUs may serve beside its own thread. None of its methods waits for the host or for the guest.
pub trait Attended: Send + Sync {
    /// Does what there is to do, from the thread of a vCPU that waits. Says whether more comes so soon that it pays to stay awake for it; until
    /// [`Attended::leave`] the queue's own thread need not be told of that.
    fn attend(&self) -> bool;

    /// No vCPU looks any more: the queue's own thread is told again. `in_vain` where the vCPU stayed awake for nothing.
    fn leave(&self, in_vain: bool);
}

/// All of a domain's.
#[derive(Default)]
pub(crate) struct AttendedQueues(Mutex<Arc<[Weak<dyn Attended>]>>);

impl AttendedQueues {
    /// Taken out of the lock, under which nobody is called back.
    fn all(&self) -> Arc<[Weak<dyn Attended>]> {
        Arc::clone(&lock(&self.0))
    }

    fn add(&self, queue: Weak<dyn Attended>) {
        let mut queues = lock(&self.0);
        let alive = queues.iter().filter(|other| other.strong_count() > 0);
        *queues = alive.cloned().chain([queue]).collect();
    }
}

impl Xen {
    /// Has vCPUs that wait look after a queue, for as long as it exists.
    pub fn add_attended(&self, queue: Weak<dyn Attended>) {
        self.attended.add(queue);
    }

    /// Looks after all queues, from the thread of a vCPU that waits; says whether it pays to stay awake. [`Xen::leave_attended`] has to follow.
    pub fn attend(&self) -> bool {
        let mut soon = false;
        for queue in self.attended.all().iter().filter_map(Weak::upgrade) {
            soon |= queue.attend();
        }
        soon
    }

    /// The vCPU looks no more.
    pub fn leave_attended(&self, in_vain: bool) {
        let queues = self.attended.all();
        for queue in queues.iter().filter_map(Weak::upgrade) {
            queue.leave(in_vain);
        }
    }
}
