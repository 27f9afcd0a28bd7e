//! A guest on a thread of its own: a thread that has run one vCPU keeps its registers for good.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use hospes_engine_bt::Execution;

use crate::forms::Level;
use crate::guest::{Guest, GuestError};
use crate::program::Case;
use crate::state::{Ending, Outcome};

type Answer = Result<Outcome, GuestError>;

/// A guest that runs cases while the caller does something else.
#[derive(Debug)]
pub struct Engine {
    cases: Option<Sender<(Arc<Case>, bool)>>,
    outcomes: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the thread; see [`Guest::new`].
    pub fn new(base: &[u8], execution: Execution, level: Level) -> Result<Engine, GuestError> {
        let (cases, todo) = channel::<(Arc<Case>, bool)>();
        let (done, outcomes) = channel();
        let mut guest = Guest::new(base, execution, level)?;
        let base = base.to_vec();
        let thread = std::thread::spawn(move || {
            for (case, cold) in todo {
                let run = AssertUnwindSafe(|| guest.run(&case, cold));
                let (answer, usable) = match catch_unwind(run) {
                    Ok(answer) => (answer, true),
                    Err(panic) => (Ok(panicked(&case, &base, &*panic)), false),
                };
                if done.send(answer).is_err() || !usable {
                    break;
                }
            }
        });
        Ok(Engine {
            cases: Some(cases),
            outcomes,
            thread: Some(thread),
        })
    }

    /// Hands a case over; `cold` forgets the TLB before it.
    pub fn submit(&self, case: Arc<Case>, cold: bool) {
        if let Some(cases) = &self.cases {
            // A thread that has ended shows in `collect`.
            let _ = cases.send((case, cold));
        }
    }

    /// The next outcome; `None` where a panic in an earlier case has ended the engine.
    pub fn collect(&self) -> Option<Answer> {
        self.outcomes.recv().ok()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.cases = None;
        if let Some(t) = self.thread.take() {
            // Panics of the thread are caught and have been reported.
            let _ = t.join();
        }
    }
}

fn panicked(case: &Case, base: &[u8], panic: &(dyn Any + Send)) -> Outcome {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Outcome {
        ending: Ending::Failed(format!("panic: {text}")),
        regs: case.regs.clone(),
        memory: base.to_vec(),
    }
}
