//! A model front end against the back end's side, and an adversary.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;

use hospes_xen_abi::blkif;
use hospes_xen_abi::netif::{RxRequest, RxResponse, TxRequest, TxResponse};
use proptest::prelude::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::*;

type Block = BackRing<LocalMemory, blkif::Request, blkif::Response>;

#[test]
fn slots_of_the_known_devices() {
    assert_eq!(slots(4096, 112), 32);
    assert_eq!(slots(4 * 4096, 112), 128);
    assert_eq!(slots(16 * 4096, 112), 512);
    assert_eq!(slots(4096, size_of::<TxRequest>()), 256);
    assert_eq!(slots(4096, size_of::<RxResponse>()), 256);
    assert_eq!(slots(64, 8), 0);
    assert_eq!(slots(0, 8), 0);
    assert_eq!(slots(4096, 0), 0);
}

#[test]
fn crosses_only_where_the_event_lies_in_between() {
    assert!(crosses(0, 1, 1));
    assert!(crosses(5, 9, 7));
    assert!(!crosses(5, 9, 5));
    assert!(!crosses(5, 9, 10));
    assert!(crosses(u32::MAX, 1, 0));
    assert!(!crosses(3, 3, 3));
}

#[test]
fn take_with_index_that_went_back_is_broken() {
    let memory = LocalMemory::new(4096);
    let mut back = Block::attach(memory.clone()).unwrap();
    memory.word(at::REQ_PROD).store(2, SeqCst);
    back.take().unwrap().unwrap();
    back.take().unwrap().unwrap();
    memory.word(at::REQ_PROD).store(1, SeqCst);
    assert!(back.take().is_err());
    assert!(back.wait_for(1).is_err());
}

#[test]
fn attach_goes_on_behind_the_last_answer() {
    let memory = LocalMemory::new(4096);
    memory.word(at::REQ_PROD).store(u32::MAX, SeqCst);
    memory.word(at::RSP_PROD).store(u32::MAX - 3, SeqCst);
    let back = Block::attach(memory).unwrap();
    assert_eq!(back.waiting(), Ok(3));
}

#[test]
fn open_requests_and_waiting_ones_share_the_slots() {
    let memory = LocalMemory::new(4096);
    let mut back = Block::attach(memory.clone()).unwrap();
    memory.word(at::REQ_PROD).store(32, SeqCst);
    for _ in 0..32 {
        back.take().unwrap().unwrap();
    }
    assert_eq!(back.take(), Ok(None));
    memory.word(at::REQ_PROD).store(33, SeqCst);
    let broken = back.take().unwrap_err();
    assert_eq!((broken.produced, broken.slots), (33, 32));
    back.answer(&blkif::Response::default());
    assert!(back.take().unwrap().is_some());
}

/// What happens next in the model.
#[derive(Clone, Debug)]
enum Step {
    /// The front end queues so many and shows them.
    Request(u8),
    /// The back end takes so many.
    Take(u8),
    /// The back end answers so many of those taken, by choice of the oldest or the newest, and shows them.
    Answer(u8, bool),
    /// The front end takes all responses.
    Reap,
    BackSleeps,
    FrontSleeps,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u8..40).prop_map(Step::Request),
        (1u8..40).prop_map(Step::Take),
        ((1u8..40), any::<bool>()).prop_map(|(n, newest)| Step::Answer(n, newest)),
        Just(Step::Reap),
        Just(Step::BackSleeps),
        Just(Step::FrontSleeps),
    ]
}

/// Both sides with typed slots. Whoever sleeps must be notified exactly when there is something for it.
fn model<Req, Rsp>(
    bytes: usize,
    steps: Vec<Step>,
    request: impl Fn(u16) -> Req,
    id_of: impl Fn(&Req) -> u16,
    response: impl Fn(u16) -> Rsp,
    id_in: impl Fn(&Rsp) -> u16,
) where
    Req: FromBytes + IntoBytes + Immutable,
    Rsp: FromBytes + IntoBytes + Immutable,
{
    let memory = LocalMemory::new(bytes);
    let mut front = FrontRing::<_, Req, Rsp>::new(memory.clone()).unwrap();
    let mut back = BackRing::<_, Req, Rsp>::attach(memory).unwrap();
    let mut next_id = 0u16;
    let (mut queued, mut taken, mut answered) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
    // A new ring asks for an event at the first request and the first response.
    let (mut back_sleeps, mut front_sleeps) = (true, true);
    for step in steps {
        match step {
            Step::Request(count) => {
                let mut any = false;
                for _ in 0..count {
                    if !front.put(&request(next_id)) {
                        break;
                    }
                    queued.push_back(next_id);
                    next_id = next_id.wrapping_add(1);
                    any = true;
                }
                let notify = front.publish();
                assert_eq!(notify, any && back_sleeps);
                back_sleeps &= !notify;
            }
            Step::Take(count) => {
                for _ in 0..count {
                    let id = back.take().unwrap().map(|r| id_of(&r));
                    assert_eq!(id, queued.pop_front());
                    taken.extend(id);
                }
                assert_eq!(back.waiting().unwrap() as usize, queued.len());
            }
            Step::Answer(count, newest) => {
                let mut any = false;
                for _ in 0..count {
                    let id = if newest {
                        taken.pop_back()
                    } else {
                        taken.pop_front()
                    };
                    let Some(id) = id else { break };
                    back.answer(&response(id));
                    answered.push_back(id);
                    any = true;
                }
                let notify = back.publish();
                assert_eq!(notify, any && front_sleeps);
                front_sleeps &= !notify;
            }
            Step::Reap => {
                while let Some(r) = front.take() {
                    assert_eq!(Some(id_in(&r)), answered.pop_front());
                }
                assert!(answered.is_empty());
            }
            Step::BackSleeps => back_sleeps = !back.wait_for(1).unwrap(),
            Step::FrontSleeps => front_sleeps = !front.wait_for_one(),
        }
        assert_eq!(back.open() as usize, taken.len());
    }
}

fn block_request(id: u16) -> blkif::Request {
    let mut request = blkif::Request::new_zeroed();
    request.id = u64::from(id);
    request.segments[10].gref = u32::from(id) * 3;
    request
}

proptest! {
    #[test]
    fn model_of_a_block_ring(pages in 1usize..=16, steps in proptest::collection::vec(step(), 1..200)) {
        model(pages * 4096, steps, block_request,
            |r| {
                assert_eq!(u64::from(r.segments[10].gref), r.id * 3);
                r.id as u16
            },
            |id| blkif::Response { id: u64::from(id), ..Default::default() },
            |r| r.id as u16);
    }

    #[test]
    fn model_of_the_network_rings(steps in proptest::collection::vec(step(), 1..200)) {
        model(4096, steps.clone(),
            |id| TxRequest { id, gref: 7, ..Default::default() }, |r| r.id,
            |id| TxResponse { id, status: 0 }, |r| r.id);
        model(4096, steps,
            |id| RxRequest { id, gref: 7, pad: 0 }, |r| r.id,
            |id| RxResponse { id, ..Default::default() }, |r| r.id);
    }

    /// Whatever the guest writes into the header at any time, no more requests are taken than there are slots without an answer.
    #[test]
    fn adversary_cannot_overflow_the_ring(
        start in any::<u32>(),
        writes in proptest::collection::vec((0usize..4, any::<u32>(), -40i32..40, 0u8..40, 0u8..40), 1..100),
    ) {
        let memory = LocalMemory::new(4096);
        memory.word(at::RSP_PROD).store(start, SeqCst);
        let mut back = Block::attach(memory.clone()).unwrap();
        for (word, wild, near, take, answer) in writes {
            let value = if take % 2 == 0 { wild } else { start.wrapping_add_signed(near) };
            memory.word(word * 4).store(value, SeqCst);
            for _ in 0..take {
                if !matches!(back.take(), Ok(Some(_))) {
                    break;
                }
            }
            prop_assert!(back.open() <= back.slots());
            for _ in 0..answer.min(back.open() as u8) {
                back.answer(&blkif::Response::default());
            }
            let _ = back.publish();
            if let Ok(true) = back.wait_for(1) {
                prop_assert!(back.waiting().unwrap() >= 1);
            }
        }
    }
}
