//! What a machine process leaves where its keeper was killed: the kernel ends that one with its keeper, and not what it has started.
//!
//! A guest that has broken out can start processes. As root's they are a user's of their own, by which they are found.

use std::fs;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use hospes_sys::process_stat;
use rustix::process::{
    Pid, Signal, Uid, dumpable_behavior, geteuid, kill_process_group, set_dumpable_behavior,
};
use rustix::thread::{CapabilitySet, capabilities, set_thread_res_uid};

use crate::log::log;
use crate::{DOMAIN_SUBCOMMAND, MACHINE_SUBCOMMAND};

/// The machine process of a number is this user and the number, where root has started it: nobody else is, nor owns anything. Linux gives processes numbers below 2^22, and
/// distributions use other users.
const USERS: u32 = 0x7e00_0000;
/// Whoever ends processes of those users is this user and its own number besides.
const ENDERS: u32 = USERS + (1 << 22);

/// How long the end of a guest's process is waited for that must come, and how often it is looked for.
const DEATH_PATIENCE: Duration = Duration::from_secs(3);
const DEATH_LOOK: Duration = Duration::from_millis(2);

/// The user and the group that the machine process of this number becomes.
pub fn machine_user(process: u32) -> u32 {
    USERS + process
}

/// Whether a process that a guest was in, whose keeper is dead, has not ended yet: it must, and until then it has what the domain had.
pub(crate) fn is_dying(pid: u32) -> bool {
    // What it has open it has for a while after its memory, and so its words, are gone.
    word(pid).is_none_or(|word| word == MACHINE_SUBCOMMAND.as_bytes())
        && !is_over(pid)
        && !is_kept(pid)
}

/// Waits until processes are not dying any more, for all together no longer than that may take.
pub(crate) fn wait_for_deaths(pids: &[u32]) {
    let deadline = Instant::now() + DEATH_PATIENCE;
    while pids.iter().any(|pid| is_dying(*pid)) && Instant::now() < deadline {
        thread::sleep(DEATH_LOOK);
    }
}

/// Ends what machine processes have started that are gone, where root has started them.
pub(crate) fn end_started(pids: &[u32]) {
    if !geteuid().is_root() {
        return;
    }
    let gone = pids.iter().filter(|pid| !is_kept(**pid));
    let users = gone.map(|pid| machine_user(*pid));
    let users: Vec<u32> = users.filter(|user| !is_elsewhere_too(*user)).collect();
    if users.is_empty() {
        return;
    }
    // What changes the user may not be looked into by others from then on, the whole process.
    let before = dumpable_behavior();
    let (done, all_done) = channel::<()>();
    for user in users {
        let done = done.clone();
        // A thread has rights of its own. Theirs may slow it down while it has them.
        let ending = thread::Builder::new().spawn(move || {
            end_all_of(user);
            drop(done);
        });
        if let Err(fault) = ending {
            log!(
                "processes of user {user} may be left, the host has no thread to end them: {fault}"
            );
        }
    }
    drop(done);
    let _ = all_done.recv_timeout(DEATH_PATIENCE);
    if let Ok(before) = before {
        let _ = set_dumpable_behavior(before);
    }
}

/// Whether a process of this user lives in a PID namespace below this one, where the numbers, and so the users, are others': it would be ended as well.
fn is_elsewhere_too(user: u32) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut states =
        processes.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    states.any(|state| {
        let words = |name: &str| {
            let line = state.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().split_whitespace()
        };
        words("Uid:").any(|id| id.parse() == Ok(user)) && words("NSpid:").count() > 1
    })
}

/// Whether the number is that of another machine process by now, which has a keeper. While one lives that the dead one has started there is none: a number is not
/// given to another before the group of processes of that number is empty.
fn is_kept(pid: u32) -> bool {
    let parent = process_stat(pid).and_then(|stat| stat.split(' ').nth(1)?.parse().ok());
    parent.and_then(word).as_deref() == Some(DOMAIN_SUBCOMMAND.as_bytes())
}

/// Whether all threads of a process have ended.
fn is_over(pid: u32) -> bool {
    let others = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.skip(1).count());
    let ended = |stat: String| stat.starts_with(['Z', 'X']);
    others == 0 && process_stat(pid).is_none_or(ended)
}

/// The first argument that a process was started with.
fn word(pid: u32) -> Option<Vec<u8>> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    words.split(|byte| *byte == 0).nth(1).map(<[u8]>::to_vec)
}

/// Ends all processes of a user: the calling thread, which is root's and has no use after this, takes that user's rights.
fn end_all_of(user: u32) {
    let Ok(number) = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()) else {
        return;
    };
    // Another real and saved user than theirs: they cannot do the same to this thread.
    let (own, theirs) = (Uid::from_raw(ENDERS + number), Uid::from_raw(user));
    let becomes = set_thread_res_uid(own, theirs, own).is_ok() && geteuid() == theirs;
    let may_do_more = |held: CapabilitySet| held.contains(CapabilitySet::KILL);
    // With root's rights it would be all processes of the host.
    if becomes && capabilities(None).is_ok_and(|held| !may_do_more(held.effective)) {
        // The group of the first process stands for all processes that one may end, but for one's own. Where there are none there is nothing to end.
        let _ = kill_process_group(Pid::INIT, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::registry::testing::{record, registry};

    /// The number of a process that has ended.
    fn ended() -> u32 {
        let mut child = Command::new("true").spawn().expect("a process");
        child.wait().expect("its end");
        child.id()
    }

    /// A process of a user, or of one's own.
    fn sleeper(user: Option<u32>) -> Child {
        let mut command = Command::new("sleep");
        command.arg("1000");
        if let Some(user) = user {
            command.uid(user);
        }
        command.spawn().expect("a process")
    }

    fn lives(child: &mut Child) -> bool {
        child.try_wait().expect("a child").is_none()
    }

    fn end(mut child: Child) {
        child.kill().expect("a child");
        child.wait().expect("its end");
    }

    #[test]
    fn what_a_killed_domain_has_left_is_ended_and_nothing_else() {
        let (registry, _directory) = registry("orphans");
        let machine = ended();
        let dead = || {
            let mut dead = record("a", 1);
            dead.machine = Some(machine);
            // As after SIGKILL: the lock is gone, the files are not.
            drop(registry.allocate(&dead).expect("free"));
            assert_eq!(registry.entries().expect("list"), []);
        };
        let mut own = sleeper(None);
        if !geteuid().is_root() {
            dead();
            assert!(lives(&mut own));
            return end(own);
        }
        let mut left = sleeper(Some(machine_user(machine)));
        let mut other = sleeper(Some(machine_user(machine + 1)));
        dead();
        let status = left.wait().expect("its end");
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
        assert!(lives(&mut own) && lives(&mut other));
        end(own);
        end(other);
    }

    #[test]
    fn machines_that_die_slowly_keep_nobody_from_the_registry() {
        let (registry, directory) = registry("slow-deaths");
        fs::create_dir(&directory.paths.log).expect("writable");
        fs::write(directory.paths.run.join("__machine"), "read forever").expect("writable");
        // Waited for one behind the other they would take longer than a command waits for the lock.
        let machines = [1, 2, 3, 4, 5].map(|number| {
            let machine = Command::new("sh")
                .arg("__machine")
                .current_dir(&directory.paths.run)
                .stdin(Stdio::piped())
                .spawn();
            let machine = machine.expect("a process");
            let mut dead = record(&format!("d{number}"), number);
            dead.machine = Some(machine.id());
            (machine, dead)
        });
        let slots: Vec<_> = machines
            .iter()
            .map(|(_, dead)| registry.allocate(dead).expect("free"))
            .collect();
        let living = registry.allocate(&record("living", 8)).expect("free");
        drop(slots);
        let listing = [(); 3].map(|()| {
            let registry = registry.clone();
            thread::spawn(move || registry.entries())
        });
        let next = registry.replace(&living, |record| record);
        let (next, _) = next.expect("its own name");
        for listing in listing {
            let entries = listing.join().expect("no panic").expect("a list");
            assert_eq!(entries.len(), 1);
        }
        assert!(next.dir().exists());
        for (machine, dead) in machines {
            let log = fs::read_to_string(directory.paths.domain_log(&dead.name)).expect("a log");
            assert_eq!(log.lines().count(), 1, "{log}");
            end(machine);
        }
    }

    #[test]
    fn machine_process_of_the_same_number_lives_on() {
        let directory = std::env::temp_dir().join(format!("hospes-kept-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("writable");
        fs::write(directory.join("__domain"), "sh __machine & wait").expect("writable");
        fs::write(directory.join("__machine"), "echo $$; exec sleep 1000").expect("writable");
        let mut keeper = Command::new("sh")
            .arg("__domain")
            .current_dir(&directory)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut said = String::new();
        let output = keeper.stdout.take().expect("piped");
        BufReader::new(output).read_line(&mut said).expect("a line");
        let machine = said.trim().parse().expect("a number");
        assert!(is_kept(machine) && !is_kept(keeper.id()));
        let user = geteuid().is_root().then(|| machine_user(machine));
        let mut its = sleeper(user);
        assert!(!is_dying(machine));
        end_started(&[machine]);
        assert!(lives(&mut its) && is_kept(machine));
        end(its);
        end(keeper);
        let machine = Pid::from_raw(i32::try_from(machine).expect("small"));
        rustix::process::kill_process(machine.expect("not 0"), Signal::KILL).expect("it is there");
        fs::remove_dir_all(&directory).expect("there");
    }
}
