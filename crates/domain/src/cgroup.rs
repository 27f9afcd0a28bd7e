//! A control group of the host's `cpu` controller for the vCPUs of one domain: version 1 where it is mounted, else version 2.
//!
//! The group is made in the process's own group, named after the domain's process, and removed when dropped. One whose process was killed is removed by
//! the next that makes a group. In version 2 it is a threaded one: it divides the time of the own group alone, and the process stays where whoever
//! started it (systemd, a container) put it. The host's root group and the groups of others are never touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Beginning of the groups' names.
const PREFIX: &str = "hospes-";
/// Weight of what says nothing: a domain in Xen, a group in version 1 and in version 2. In both a group of it counts as much as one thread beside it.
const XEN_WEIGHT: u64 = 256;
const V1_SHARES: u64 = 1024;
const V2_WEIGHT: u64 = 100;
/// Whether the kernel has a group for each session.
const AUTOGROUP: &str = "/proc/sys/kernel/sched_autogroup_enabled";
/// Least time in microseconds that the host's kernel takes for a quota, and the shortest period used here.
const QUOTA_MIN_US: u64 = 1_000;
const PERIOD_MIN_US: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The file of a group that lists its threads and takes others.
    fn threads(self) -> &'static str {
        match self {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        }
    }

    /// Files of a group with what limits and prefers nobody.
    fn defaults(self) -> [(&'static str, String); 2] {
        match self {
            Version::V1 => [
                ("cpu.cfs_quota_us", "-1".to_owned()),
                ("cpu.shares", V1_SHARES.to_string()),
            ],
            Version::V2 => [
                ("cpu.max", "max".to_owned()),
                ("cpu.weight", V2_WEIGHT.to_string()),
            ],
        }
    }
}

/// Where groups can be made: the process's own group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    version: Version,
    parent: PathBuf,
}

/// A group with a domain's vCPU threads in it.
#[derive(Debug)]
pub struct Group {
    place: Place,
    path: PathBuf,
}

/// How long a thread that was joined may still count as one of its group.
const GONE_TRIES: u32 = 20;
const GONE_WAIT: Duration = Duration::from_millis(1);

impl Group {
    /// Makes a group and moves the given threads of a process into it.
    pub fn new(process: u32, threads: &[i32]) -> io::Result<Group> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}"));
        let place = find(&read("mounts")?, &read("cgroup")?).ok_or(io::ErrorKind::NotFound)?;
        Group::make(&place, process, threads)
    }

    fn make(place: &Place, process: u32, threads: &[i32]) -> io::Result<Group> {
        remove_abandoned(&place.parent);
        let path = place.parent.join(format!("{PREFIX}{process}"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Dropped, and so undone, where a step fails.
        let group = Group {
            place: place.clone(),
            path,
        };
        if place.version == Version::V2 {
            // Only a group that has threaded children may give them controllers while it has processes itself.
            fs::write(group.path.join("cgroup.type"), "threaded")?;
            fs::write(place.parent.join("cgroup.subtree_control"), "+cpu")?;
        }
        for thread in threads {
            fs::write(group.path.join(place.version.threads()), thread.to_string())?;
        }
        Ok(group)
    }

    /// Sets the weight as Xen has it and the limit in percent of one CPU, 0 for none.
    pub fn set(&self, weight: u16, cap: u16, vcpus: u32) -> io::Result<()> {
        let put = |name: &str, value: String| fs::write(self.path.join(name), value);
        let (period, quota) = period_and_quota(cap);
        let autogroup = fs::read_to_string(AUTOGROUP).unwrap_or_default();
        let weight = u64::from(weight) * u64::from(self.counts_for(vcpus, &autogroup));
        match self.place.version {
            Version::V1 => {
                let shares = weight * V1_SHARES / XEN_WEIGHT;
                put("cpu.shares", shares.clamp(2, 262_144).to_string())?;
                // The old quota may not fit into the new period.
                put("cpu.cfs_quota_us", "-1".to_owned())?;
                put("cpu.cfs_period_us", period.to_string())?;
                if let Some(quota) = quota {
                    put("cpu.cfs_quota_us", quota.to_string())?;
                }
                Ok(())
            }
            Version::V2 => {
                let weight = (weight * V2_WEIGHT / XEN_WEIGHT).clamp(1, 10_000);
                put("cpu.weight", weight.to_string())?;
                let quota = quota.map_or("max".to_owned(), |us| us.to_string());
                put("cpu.max", format!("{quota} {period}"))
            }
        }
    }

    /// For how many threads of other domains this group has to count: each for itself, so for as many as it has. Where the kernel has a group for each
    /// session, which it has for what is in the root group of version 1, all threads of another domain count as one.
    fn counts_for(&self, vcpus: u32, autogroup: &str) -> u32 {
        // The root group alone has that file.
        let in_root =
            self.place.version == Version::V1 && self.place.parent.join("release_agent").exists();
        if in_root && autogroup.trim() == "1" {
            1
        } else {
            vcpus
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let version = self.place.version;
        for (name, value) in version.defaults() {
            let _ = fs::write(self.path.join(name), value);
        }
        let left = fs::read_to_string(self.path.join(version.threads())).unwrap_or_default();
        for thread in left.lines() {
            let _ = fs::write(self.place.parent.join(version.threads()), thread);
        }
        for _ in 0..GONE_TRIES {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(GONE_WAIT);
                }
                _ => break,
            }
        }
    }
}

/// Period and, where there is a limit, quota in microseconds.
fn period_and_quota(cap: u16) -> (u64, Option<u64>) {
    if cap == 0 {
        return (PERIOD_MIN_US, None);
    }
    let cap = u64::from(cap);
    let period = (QUOTA_MIN_US * 100).div_ceil(cap).max(PERIOD_MIN_US);
    (period, Some(period * cap / 100))
}

/// Removes groups whose process is gone.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if let Some(process) = process.and_then(|process| process.parse::<u32>().ok())
            && !Path::new(&format!("/proc/{process}")).exists()
        {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Where groups can be made, from the texts of /proc/self/mounts and /proc/self/cgroup.
fn find(mounts: &str, groups: &str) -> Option<Place> {
    let mut second = None;
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(1);
        let (Some(directory), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let directory = PathBuf::from(directory);
        if kind == "cgroup" && options.split(',').any(|option| option == "cpu") {
            let own = groups.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                controllers.split(',').any(|c| c == "cpu").then_some(path)
            });
            let own = directory.join(own.unwrap_or("/").trim_start_matches('/'));
            return Some(Place {
                version: Version::V1,
                // In a container the path may be one of the host's.
                parent: if own.is_dir() { own } else { directory },
            });
        }
        if kind == "cgroup2" {
            second = Some(directory);
        }
    }
    find_v2(&second?, groups)
}

/// The same in version 2, mounted there.
fn find_v2(mount: &Path, groups: &str) -> Option<Place> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // In a container the path may be one that leads out of the mount.
    if own.split('/').any(|part| part == "..") {
        return None;
    }
    let parent = mount.join(own);
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).ok()?;
    // The host's root group is the one without a type.
    let usable =
        parent.join("cgroup.type").exists() && controllers.split_whitespace().any(|c| c == "cpu");
    usable.then_some(Place {
        version: Version::V2,
        parent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path =
                std::env::temp_dir().join(format!("hospes-cgroup-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn find_prefers_version_1() {
        let d = Directory::new("find");
        let dir = d.0.display();
        let v1 = format!(
            "none /proc proc rw 0 0\ncgroup2 {dir}/u cgroup2 rw 0 0\ncgroup {dir} cgroup rw,cpu,cpuacct 0 0\n"
        );
        let place = find(&v1, "4:memory:/x\n3:cpu,cpuacct:/\n0::/y\n").unwrap();
        assert_eq!((place.version, &place.parent), (Version::V1, &d.0.join("")));
        let gone = find(&v1, "3:cpu:/not/there\n").unwrap();
        assert_eq!(gone.parent, d.0);
        assert_eq!(find("", ""), None);
    }

    #[test]
    fn find_takes_the_own_group_of_version_2() {
        let d = Directory::new("own");
        let v2 = format!("cgroup2 {} cgroup2 rw 0 0\n", d.0.display());
        let own = d.0.join("a/b");
        fs::create_dir_all(&own).unwrap();
        for group in [&d.0, &d.0.join("a"), &own] {
            fs::write(group.join("cgroup.controllers"), "memory cpu io\n").unwrap();
        }
        assert_eq!(find(&v2, "0::/\n"), None, "the host's root group");
        fs::write(own.join("cgroup.type"), "domain\n").unwrap();
        let place = find(&v2, "1:name=systemd:/\n0::/a/b\n").unwrap();
        assert_eq!((place.version, &place.parent), (Version::V2, &own));
        assert_eq!(find(&v2, "0::/a/c\n"), None, "not there");
        assert_eq!(find(&v2, "0::/../a/b\n"), None, "outside");
        fs::write(own.join("cgroup.controllers"), "memory io\n").unwrap();
        assert_eq!(find(&v2, "0::/a/b\n"), None, "no controller");
    }

    #[test]
    fn group_of_version_1_gets_its_threads_and_values() {
        let d = Directory::new("v1");
        fs::create_dir(d.0.join("hospes-4294967295")).unwrap();
        let place = Place {
            version: Version::V1,
            parent: d.0.clone(),
        };
        let group = Group::make(&place, 77, &[5]).unwrap();
        assert!(
            !d.0.join("hospes-4294967295").exists(),
            "its process is gone"
        );
        group.set(512, 150, 2).unwrap();
        let read = |name: &str| fs::read_to_string(d.0.join("hospes-77").join(name)).unwrap();
        assert_eq!(read("tasks"), "5");
        assert_eq!(read("cpu.shares"), "4096");
        assert_eq!(read("cpu.cfs_period_us"), "10000");
        assert_eq!(read("cpu.cfs_quota_us"), "15000");
    }

    #[test]
    fn group_of_version_2_is_threaded_and_gets_its_threads_and_values() {
        let d = Directory::new("v2");
        let place = Place {
            version: Version::V2,
            parent: d.0.clone(),
        };
        let group = Group::make(&place, 78, &[5]).unwrap();
        group.set(128, 5, 4).unwrap();
        let read = |name: &str| fs::read_to_string(d.0.join(name)).unwrap();
        assert_eq!(read("hospes-78/cgroup.type"), "threaded");
        assert_eq!(read("cgroup.subtree_control"), "+cpu");
        assert_eq!(read("hospes-78/cgroup.threads"), "5");
        assert!(
            !d.0.join("hospes-78/cgroup.procs").exists(),
            "the process stays"
        );
        assert_eq!(read("hospes-78/cpu.weight"), "200");
        assert_eq!(read("hospes-78/cpu.max"), "1000 20000");
        group.set(256, 0, 4).unwrap();
        assert_eq!(read("hospes-78/cpu.max"), "max 10000");
    }

    #[test]
    fn group_counts_as_one_where_sessions_are_groups() {
        let d = Directory::new("autogroup");
        let group = |version| Group {
            place: Place {
                version,
                parent: d.0.clone(),
            },
            path: d.0.join("none"),
        };
        let v1 = group(Version::V1);
        assert_eq!(v1.counts_for(4, "1\n"), 4, "not in the root group");
        fs::write(d.0.join("release_agent"), "").unwrap();
        assert_eq!(v1.counts_for(4, "1\n"), 1);
        assert_eq!(v1.counts_for(4, "0\n"), 4);
        assert_eq!(v1.counts_for(4, ""), 4, "a kernel without");
        assert_eq!(group(Version::V2).counts_for(4, "1\n"), 4);
    }

    #[test]
    fn group_that_is_dropped_limits_nobody_and_gives_its_threads_back() {
        let d = Directory::new("drop");
        let read = |name: &str| fs::read_to_string(d.0.join(name)).unwrap();
        let drop_one = |version, process| {
            let place = Place {
                version,
                parent: d.0.clone(),
            };
            let group = Group::make(&place, process, &[process as i32]).unwrap();
            group.set(128, 50, 1).unwrap();
        };
        drop_one(Version::V2, 79);
        assert_eq!(read("hospes-79/cpu.max"), "max");
        assert_eq!(read("hospes-79/cpu.weight"), "100");
        assert_eq!(read("cgroup.threads"), "79");
        drop_one(Version::V1, 80);
        assert_eq!(read("hospes-80/cpu.cfs_quota_us"), "-1");
        assert_eq!(read("hospes-80/cpu.shares"), "1024");
        assert_eq!(read("tasks"), "80");
    }

    #[test]
    fn group_that_cannot_be_made_takes_no_threads() {
        let d = Directory::new("refused");
        let place = Place {
            version: Version::V2,
            parent: d.0.clone(),
        };
        // A directory takes no text, as a file without rights to it.
        fs::create_dir(d.0.join("cgroup.subtree_control")).unwrap();
        assert!(Group::make(&place, 81, &[5]).is_err());
        let threads = d.0.join("hospes-81/cgroup.threads");
        assert!(!threads.exists() && !d.0.join("cgroup.threads").exists());
    }

    #[test]
    fn quota_is_never_below_what_the_kernel_takes() {
        for cap in 1..=u16::MAX {
            let (period, quota) = period_and_quota(cap);
            let quota = quota.unwrap();
            assert!(quota >= QUOTA_MIN_US && (PERIOD_MIN_US..=100_000).contains(&period));
            let wanted = period * u64::from(cap) / 100;
            assert_eq!(quota, wanted, "{cap}");
        }
    }
}
