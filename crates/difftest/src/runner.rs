//! Runs programs on both sides and reports what differs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hospes_engine_bt::Execution;

use crate::compare::{Verdict, compare};
use crate::engine::Engine;
use crate::forms::Level;
use crate::guest::GuestError;
use crate::layout::base_image;
use crate::oracle::{BATCH, Oracle, OracleError};
use crate::program::{Case, Flavour, Program};
use crate::rng::Rng;
use crate::state::{Ending, Outcome};

/// Mismatches after which a run stops looking for more.
const REPORTS: usize = 10;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Oracle(#[from] OracleError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the processor lacks {0}, which the tests need")]
    Host(&'static str),
}

/// What a run has found.
#[derive(Debug, Default)]
pub struct Report {
    pub cases: u64,
    /// Cases that ended with something else than the final INT3.
    pub faults: u64,
    /// Cases in which flags differed at a fault, but were dead.
    pub dead_flags: u64,
    /// Cases that are not compared.
    pub skipped: u64,
    /// Cases in which #GP came behind a jump and not at it.
    pub late_faults: u64,
    /// Cases in which the sides named different ones of two exceptions.
    pub other_orders: u64,
    pub mismatches: Vec<String>,
}

impl Report {
    /// Panics with all mismatches if there are any.
    pub fn check(&self, what: &str) {
        println!(
            "{what}: {} cases, {} ended in a fault, {} with dead flags that differ, {} with a late fault, \
             {} with another of two faults, {} not compared",
            self.cases,
            self.faults,
            self.dead_flags,
            self.late_faults,
            self.other_orders,
            self.skipped
        );
        assert!(self.cases > 0, "{what}: no case was run");
        assert!(
            self.mismatches.is_empty(),
            "{what}: {} mismatches\n{}",
            self.mismatches.len(),
            self.mismatches.join("\n")
        );
    }
}

/// How long and from where to look.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub seed: u64,
    /// Programs to run where no time is given.
    pub programs: u64,
    pub time: Option<Duration>,
}

impl Budget {
    /// `programs` with the fixed seed, or what HOSPES_DIFF_SECONDS and HOSPES_DIFF_SEED say.
    pub fn from_environment(programs: u64) -> Budget {
        let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse().ok());
        Budget {
            seed: number("HOSPES_DIFF_SEED").unwrap_or(1),
            programs,
            time: number("HOSPES_DIFF_SECONDS").map(Duration::from_secs),
        }
    }
}

/// Both sides, ready to run programs.
pub struct Runner {
    base: Vec<u8>,
    level: Level,
    oracle: Oracle,
    translated: Engine,
    interpreted: Engine,
    direct: Engine,
}

/// Whether there is something to compare: a return to a stale address can lead in a circle, and POPF of something else than flags can turn on alignment
/// checks, of which processors have different ideas where vectors are concerned.
fn comparable(case: &Case, want: &Outcome) -> bool {
    const AC: u64 = 1 << 18;
    want.ending != Ending::TimedOut && (want.regs.rflags & AC == 0 || case.regs.rflags & AC != 0)
}

/// What differs, without the values: shrinking must not turn one difference into another.
fn signature(text: &str) -> Vec<&str> {
    let mut names: Vec<&str> = text
        .lines()
        .filter_map(|l| l.split(&[':', ' ']).find(|w| !w.is_empty()))
        .collect();
    names.dedup();
    names
}

/// Ways of running a case in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// With an empty TLB.
    Cold,
    /// Directly after a cold run.
    Warm,
    /// One instruction at a time.
    Interpreted,
    /// Natively, in a process of its own.
    Direct,
}

impl Way {
    const ALL: [Way; 4] = [Way::Cold, Way::Warm, Way::Interpreted, Way::Direct];

    /// Only 64-bit user code is ever run natively.
    fn of(flavour: Flavour) -> &'static [Way] {
        match flavour {
            Flavour::User64 => &Way::ALL,
            Flavour::User32 | Flavour::Kernel64 => &Way::ALL[..3],
        }
    }

    fn execution(self) -> Execution {
        match self {
            Way::Cold | Way::Warm => Execution::Translated,
            Way::Interpreted => Execution::Single,
            Way::Direct => Execution::Direct,
        }
    }
}

impl Runner {
    /// Starts both sides for guests of a level.
    pub fn new(level: Level) -> Result<Runner, RunError> {
        // SAFETY: a plain system call that reads a number.
        let features = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        if features & 2 == 0 {
            return Err(RunError::Host("FSGSBASE for user code"));
        }
        if !level.on_host() {
            return Err(RunError::Host(match level {
                Level::V3 => "AVX2",
                Level::V4 => "AVX-512",
            }));
        }
        let base = base_image();
        Ok(Runner {
            oracle: Oracle::new(&base, level)?,
            translated: Engine::new(&base, Execution::Translated, level)?,
            interpreted: Engine::new(&base, Execution::Single, level)?,
            direct: Engine::new(&base, Execution::Direct, level)?,
            base,
            level,
        })
    }

    /// Runs what `generate` makes of seeds, until the budget is used up or too much differs.
    pub fn run(
        &mut self,
        budget: Budget,
        generate: impl Fn(&mut Rng, u64) -> Option<Program>,
    ) -> Result<Report, RunError> {
        let mut report = Report::default();
        let start = Instant::now();
        let mut n = 0;
        loop {
            let done = match budget.time {
                Some(t) => start.elapsed() >= t,
                None => n >= budget.programs,
            };
            if done || report.mismatches.len() >= REPORTS {
                return Ok(report);
            }
            let mut batch = Vec::with_capacity(BATCH);
            while batch.len() < BATCH {
                let seed = budget.seed.wrapping_mul(0x1_0000_0001).wrapping_add(n);
                if let Some(p) = generate(&mut Rng::new(seed), n)
                    && let Some(case) = p.assemble()
                {
                    batch.push((seed, p, Arc::new(case)));
                }
                n += 1;
            }
            self.batch(&batch, &mut report)?;
        }
    }

    fn batch(
        &mut self,
        batch: &[(u64, Program, Arc<Case>)],
        report: &mut Report,
    ) -> Result<(), RunError> {
        let cases: Vec<&Case> = batch.iter().map(|b| &*b.2).collect();
        let trace = std::env::var_os("HOSPES_DIFF_TRACE").is_some();
        self.oracle.submit(&cases)?;
        let oracle = self.oracle.collect()?;
        for ((seed, program, case), want) in batch.iter().zip(&oracle) {
            report.cases += 1;
            if !comparable(case, want) {
                report.skipped += 1;
                continue;
            }
            if trace {
                eprintln!("seed {seed}\n{}", program.describe());
            }
            if !matches!(want.ending, Ending::Exception { vector: 3, .. }) {
                report.faults += 1;
            }
            let ways = Way::of(case.flavour);
            for &way in &ways[2..] {
                self.submit(case, way);
            }
            let mut outcomes = vec![self.one(case, Way::Cold)?, self.one(case, Way::Warm)?];
            for &way in &ways[2..] {
                outcomes.push(self.collect(case, way)?);
            }
            for (&way, got) in ways.iter().zip(outcomes) {
                match compare(case, want, &got) {
                    Verdict::Same => {}
                    Verdict::DeadFlags => report.dead_flags += 1,
                    Verdict::LateFault => report.late_faults += 1,
                    Verdict::OtherOrder => report.other_orders += 1,
                    Verdict::Different(first) => {
                        let text = self.explain(*seed, program, way, &first)?;
                        report.mismatches.push(text);
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn submit(&self, case: &Arc<Case>, way: Way) {
        let engine = match way {
            Way::Cold | Way::Warm => &self.translated,
            Way::Interpreted => &self.interpreted,
            Way::Direct => &self.direct,
        };
        engine.submit(case.clone(), way == Way::Cold);
    }

    fn collect(&mut self, case: &Arc<Case>, way: Way) -> Result<Outcome, RunError> {
        let engine = match way {
            Way::Cold | Way::Warm => &mut self.translated,
            Way::Interpreted => &mut self.interpreted,
            Way::Direct => &mut self.direct,
        };
        if let Some(answer) = engine.collect() {
            return Ok(answer?);
        }
        // A panic has ended it: try once more with a new one.
        *engine = Engine::new(&self.base, way.execution(), self.level)?;
        engine.submit(case.clone(), way == Way::Cold);
        let answer = engine.collect();
        Ok(answer.expect("a new engine answers its first case")?)
    }

    fn one(&mut self, case: &Arc<Case>, way: Way) -> Result<Outcome, RunError> {
        self.submit(case, way);
        self.collect(case, way)
    }

    /// The oracle's outcome for one case. It is asked again where the case seems to take too long: the process may have been interrupted.
    fn native(&mut self, case: &Case) -> Result<Outcome, RunError> {
        let mut tries = 3;
        loop {
            self.oracle.submit(&[case])?;
            let outcome = self.oracle.collect()?.remove(0);
            tries -= 1;
            if tries == 0 || outcome.ending != Ending::TimedOut {
                return Ok(outcome);
            }
        }
    }

    /// How one way of running a program differs from the oracle, if it does.
    fn difference(&mut self, program: &Program, way: Way) -> Result<Option<String>, RunError> {
        let Some(case) = program.assemble().map(Arc::new) else {
            return Ok(None);
        };
        let want = self.native(&case)?;
        if !comparable(&case, &want) {
            return Ok(None);
        }
        if way == Way::Warm {
            self.one(&case, Way::Cold)?;
        }
        let got = self.one(&case, way)?;
        Ok(match compare(&case, &want, &got) {
            Verdict::Different(text) => Some(text),
            _ => None,
        })
    }

    /// Drops instructions as long as the difference stays, and describes what is left.
    fn explain(
        &mut self,
        seed: u64,
        program: &Program,
        way: Way,
        first: &str,
    ) -> Result<String, RunError> {
        let mut smallest = program.clone();
        let Some(mut text) = self.difference(&smallest, way)? else {
            return Ok(format!(
                "seed {seed}, {way:?}: differs only after the programs before it\n{}{first}",
                program.describe()
            ));
        };
        loop {
            let mut changed = false;
            let mut n = smallest.items.len();
            while n > 0 {
                n -= 1;
                let mut less = smallest.clone();
                less.items.remove(n);
                if less.items.is_empty() {
                    continue;
                }
                if let Some(t) = self.difference(&less, way)?
                    && signature(&t) == signature(&text)
                {
                    (smallest, text, changed) = (less, t, true);
                }
            }
            if !changed {
                break;
            }
        }
        Ok(format!(
            "seed {seed}, {way:?}\n{}{text}",
            smallest.describe()
        ))
    }

    /// Runs one program natively and compares it in every way; gives how it ended, or what differs.
    pub fn check(&mut self, program: &Program) -> Result<Result<Ending, String>, RunError> {
        for &way in Way::of(program.flavour) {
            if let Some(text) = self.difference(program, way)? {
                return Ok(Err(format!("{way:?}\n{}{text}", program.describe())));
            }
        }
        let Some(case) = program.assemble() else {
            return Ok(Err("it has no encoding".into()));
        };
        Ok(Ok(self.native(&case)?.ending))
    }
}
