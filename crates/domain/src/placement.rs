//! Where on the host a domain's vCPU threads may run, and where they last ran.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use hospes_units::{CpuSet, HOST_CPUS_MAX, VcpuId};
use rustix::process::Pid;
use rustix::thread::{self, CpuSet as Mask};

use crate::lock;

/// Host CPUs of a vCPU; `None` means all.
pub type Affinity = Option<CpuSet>;

#[derive(Debug, Default)]
struct Place {
    /// `None` until the thread runs.
    thread: Option<Pid>,
    hard: Affinity,
    soft: Affinity,
    /// The host CPU that the thread is to stay on for the moment.
    held: Option<u32>,
}

/// The places of all vCPUs of a domain.
#[derive(Debug)]
pub struct Placement(Vec<(Mutex<Place>, Condvar)>);

impl Placement {
    pub fn new(vcpus: u32) -> Placement {
        Placement((0..vcpus).map(|_| Default::default()).collect())
    }

    /// To be called by a vCPU's thread when it starts. An affinity that it inherits (of `taskset`, of a unit) is its hard one.
    pub fn thread_starts(&self, id: VcpuId) {
        let mut place = lock(&self.0[id.0 as usize].0);
        place.thread = Some(thread::gettid());
        place.hard = inherited();
        drop(place);
        self.0[id.0 as usize].1.notify_all();
    }

    /// Keeps the calling thread, which is this vCPU's, on the host CPU where it is, or lets it go. What [`Placement::set`] changes lets it go as well.
    pub fn stay(&self, id: VcpuId, stay: bool) {
        let mut place = lock(&self.0[id.0 as usize].0);
        let cpu = stay.then(|| thread::sched_getcpu() as u32);
        if cpu == place.held {
            return;
        }
        let set = cpu.map(|cpu| [cpu].into_iter().collect());
        // A host that refuses one has given the thread other CPUs by itself.
        let _ = thread::sched_setaffinity(None, &mask(set.as_ref().or(place.hard.as_ref())));
        place.held = cpu;
    }

    /// The threads of all vCPUs. Waits for those that are just being started.
    pub fn threads(&self) -> Vec<Pid> {
        let ids = (0..self.0.len() as u32).map(VcpuId);
        ids.filter_map(|id| self.started(id).thread).collect()
    }

    /// A vCPU's place once its thread runs.
    fn started(&self, id: VcpuId) -> MutexGuard<'_, Place> {
        let (place, started) = &self.0[id.0 as usize];
        started
            .wait_while(lock(place), |place| place.thread.is_none())
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes one vCPU's affinities; what is `None` stays. On an error nothing is changed. Waits for a thread that is just being started: before
    /// that the host's kernel would have nothing to refuse.
    pub fn set(
        &self,
        id: VcpuId,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), std::io::Error> {
        let mut place = self.started(id);
        let before = (place.hard.clone(), place.soft.clone());
        if let Some(hard) = hard {
            place.hard.clone_from(hard);
        }
        if let Some(soft) = soft {
            place.soft.clone_from(soft);
        }
        place.held = None;
        if let Err(error) = place.apply() {
            (place.hard, place.soft) = before;
            let _ = place.apply();
            return Err(error);
        }
        Ok(())
    }

    /// Hard and soft affinity.
    pub fn affinity(&self, id: VcpuId) -> (Affinity, Affinity) {
        let place = lock(&self.0[id.0 as usize].0);
        (place.hard.clone(), place.soft.clone())
    }

    /// The host CPU that a vCPU's thread runs on, or last ran on.
    pub fn host_cpu(&self, id: VcpuId) -> Option<u32> {
        let thread = lock(&self.0[id.0 as usize].0).thread?;
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
        processor_of(&stat)
    }
}

impl Place {
    fn apply(&self) -> Result<(), std::io::Error> {
        let preferred = match (&self.hard, &self.soft) {
            (_, None) => None,
            (None, Some(soft)) => Some(soft.clone()),
            (Some(hard), Some(soft)) => Some(soft.intersection(hard)),
        };
        // Linux knows no preference. The thread is moved there once; as it then has its caches there, the host's scheduler leaves it until
        // another CPU has nothing to do.
        if let Some(preferred) = preferred.filter(|set| !set.is_empty()) {
            let _ = thread::sched_setaffinity(self.thread, &mask(Some(&preferred)));
        }
        thread::sched_setaffinity(self.thread, &mask(self.hard.as_ref())).map_err(Into::into)
    }
}

/// The calling thread's affinity; `None` where it is not narrower than what it could get. Then it follows what the host allows later, too.
fn inherited() -> Affinity {
    let own = thread::sched_getaffinity(None).ok()?;
    thread::sched_setaffinity(None, &mask(None)).ok()?;
    if thread::sched_getaffinity(None).ok()? == own {
        return None;
    }
    let cpus = (0..HOST_CPUS_MAX).filter(|cpu| own.is_set(*cpu as usize));
    let _ = thread::sched_setaffinity(None, &own);
    Some(cpus.collect())
}

fn mask(affinity: Option<&CpuSet>) -> Mask {
    let mut mask = Mask::new();
    match affinity {
        Some(set) => set.iter().for_each(|cpu| mask.set(cpu as usize)),
        None => (0..HOST_CPUS_MAX).for_each(|cpu| mask.set(cpu as usize)),
    }
    mask
}

/// Field 39 of a `stat` file of proc(5). The name in the second field may contain anything.
fn processor_of(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(36)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_is_found_behind_any_thread_name() {
        let fields: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = format!("77 (a) 1 (b) S {}", fields.join(" "));
        assert_eq!(processor_of(&stat), Some(39));
        assert_eq!(processor_of("77 (x) S 1 2"), None);
        assert_eq!(processor_of(""), None);
    }

    #[test]
    fn affinity_is_the_threads() {
        let allowed = thread::sched_getaffinity(None).unwrap();
        let cpu = (0..HOST_CPUS_MAX)
            .rev()
            .find(|cpu| allowed.is_set(*cpu as usize))
            .unwrap();
        let one: Affinity = Some([cpu].into_iter().collect());
        let id = VcpuId(0);
        let placement = Placement::new(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                placement.thread_starts(id);
                placement.set(id, Some(&one), None).unwrap();
                assert_eq!(thread::sched_getaffinity(None).unwrap().count(), 1);
                assert_eq!(placement.host_cpu(id), Some(cpu));
                let nowhere: Affinity = Some([HOST_CPUS_MAX - 1].into_iter().collect());
                assert!(placement.set(id, Some(&nowhere), None).is_err());
                assert_eq!(placement.affinity(id), (one.clone(), None));
                placement.set(id, Some(&None), Some(&one)).unwrap();
                let now = thread::sched_getaffinity(None).unwrap();
                assert_eq!(now.count(), allowed.count());
                assert_eq!(placement.affinity(id), (None, one.clone()));
            });
        });
    }

    #[test]
    fn inherited_affinity_holds_until_another_is_set() {
        let count = || thread::sched_getaffinity(None).unwrap().count();
        let all = count();
        let one: CpuSet = [thread::sched_getcpu() as u32].into_iter().collect();
        let id = VcpuId(0);
        let placement = Placement::new(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                thread::sched_setaffinity(None, &mask(Some(&one))).unwrap();
                placement.thread_starts(id);
                assert_eq!(count(), 1);
                let narrow = (all > 1).then_some(one);
                assert_eq!(placement.affinity(id).0, narrow);
                placement.stay(id, true);
                placement.stay(id, false);
                placement.set(id, None, Some(&None)).unwrap();
                assert_eq!(count(), 1);
                placement.set(id, Some(&None), None).unwrap();
                assert_eq!(count(), all);
            });
        });
    }

    #[test]
    fn thread_stays_until_it_may_go_or_its_affinity_is_set() {
        let count = || thread::sched_getaffinity(None).unwrap().count();
        let all = count();
        let id = VcpuId(0);
        let placement = Placement::new(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                placement.thread_starts(id);
                for _ in 0..2 {
                    placement.stay(id, true);
                    placement.stay(id, true);
                    assert_eq!(count(), 1);
                    placement.stay(id, false);
                    assert_eq!(count(), all);
                }
                placement.stay(id, true);
                assert_eq!(placement.affinity(id), (None, None));
                placement.set(id, Some(&None), None).unwrap();
                assert_eq!(count(), all);
                let here = thread::sched_getcpu() as u32;
                let one: Affinity = Some([here].into_iter().collect());
                placement.set(id, Some(&one), None).unwrap();
                placement.stay(id, true);
                placement.stay(id, false);
                assert_eq!(count(), 1);
            });
        });
    }
}
