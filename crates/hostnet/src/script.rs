//! Hot-plug scripts of administrators, called as Xen's tools call them (xl-network-configuration(5), `script`).

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::Error;
use crate::running::Running;
use crate::tools::{self, run_with};

/// Where scripts without a path lie.
const DIRECTORY: &str = "/etc/xen/scripts";

/// Xen's own script for bridges: it puts the tap on the bridge, as [`open`](crate::open) does without it.
const BRIDGE_SCRIPT: &str = "vif-bridge";

/// How long those scripts may take, all together, that put in order what a destroyed domain leaves: less than `destroy` waits before it kills the domain's process.
const FAREWELL: Duration = Duration::from_secs(5);
/// What each of them has at least.
const FAREWELL_EACH: Duration = Duration::from_secs(1);

/// What scripts are told of their domain, also while they run: that it is destroyed.
#[derive(Clone, Debug, Default)]
pub struct Haste(Arc<OnceLock<Instant>>);

impl Haste {
    /// The domain is destroyed: a script that makes a device ready is killed, others are when their time is over.
    pub fn hurry(&self) {
        self.0.get_or_init(Instant::now);
    }

    /// Why a script that has run for so long is to be killed, where it is.
    fn over(&self, action: Action, ran: Duration) -> Option<String> {
        let destroyed = self.0.get()?.elapsed();
        match action {
            Action::Online => Some("it was killed, for its domain was destroyed".into()),
            Action::Offline if destroyed >= FAREWELL && ran >= FAREWELL_EACH => {
                Some("it was killed, for its domain was destroyed and it did not end soon".into())
            }
            Action::Offline => None,
        }
    }
}

/// What happens to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Online,
    Offline,
}

/// A device's script and what it is told.
#[derive(Clone, Debug)]
pub struct Script {
    program: PathBuf,
    /// The back end's directory in the xenstore, below domain 0's.
    backend_path: String,
    interface: String,
    bridge: Option<String>,
    gateway_device: Option<String>,
    haste: Haste,
    run_directory: PathBuf,
    /// The socket of the store, for the tools that it calls; without one they look for the host's own.
    store: Option<PathBuf>,
}

impl Script {
    pub fn new(
        program: &str,
        backend_path: &str,
        interface: &str,
        bridge: Option<&str>,
        gateway_device: Option<&str>,
        haste: &Haste,
        run_directory: &Path,
    ) -> Script {
        Script {
            program: Path::new(DIRECTORY).join(program),
            backend_path: backend_path.to_owned(),
            interface: interface.to_owned(),
            bridge: bridge.map(str::to_owned),
            gateway_device: gateway_device.map(str::to_owned),
            haste: haste.clone(),
            run_directory: run_directory.to_owned(),
            store: None,
        }
    }

    /// Has it find this store, which its domain is in.
    pub fn with_store(self, socket: &Path) -> Script {
        Script {
            store: Some(socket.to_owned()),
            ..self
        }
    }

    /// Whether this is Xen's own script for bridges, by its name alone or with the directory of Xen's scripts.
    pub fn is_for_bridges(program: &str) -> bool {
        Path::new(DIRECTORY).join(program) == Path::new(DIRECTORY).join(BRIDGE_SCRIPT)
    }

    /// Whether a script of a configuration is there.
    pub fn is_installed(program: &str) -> bool {
        Path::new(DIRECTORY).join(program).exists()
    }

    /// The script's whole path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs the script to its end. One that takes too long is killed, with what it started, and so is one whose domain's process is killed, by the next
    /// [`sweep`](crate::sweep).
    pub fn run(&self, action: Action) -> Result<(), Error> {
        let word = match action {
            Action::Online => "online",
            Action::Offline => "offline",
        };
        let program = self.program.display().to_string();
        let mut environment = vec![
            ("script", program.as_str()),
            ("XENBUS_TYPE", "vif"),
            ("XENBUS_PATH", &self.backend_path),
            ("XENBUS_BASE_PATH", "backend"),
            ("vif", &self.interface),
        ];
        let store = self.store.as_ref().map(|socket| socket.to_string_lossy());
        if let Some(socket) = &store {
            environment.push(("XENSTORED_PATH", socket));
        }
        if let Some(bridge) = &self.bridge {
            environment.push(("bridge", bridge));
        }
        if let Some(device) = &self.gateway_device {
            environment.push(("netdev", device));
            environment.push(("gatewaydev", device));
        }
        let arguments = [word, "type_if=vif"];
        // What cannot be written down on a full host runs all the same.
        let mut running = Running::begin(&self.run_directory, &self.interface).ok();
        let started = |pid| {
            if let Some(running) = &mut running {
                let _ = running.set(pid);
            }
        };
        run_with(
            &self.program,
            &arguments,
            "",
            &environment,
            started,
            |ran| {
                let hurried = self.haste.over(action, ran);
                hurried.or_else(|| tools::over(ran, tools::RUN))
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn script_without_a_path_is_xens() {
        for (program, expected) in [
            ("vif-route", "/etc/xen/scripts/vif-route"),
            ("/x/y", "/x/y"),
        ] {
            let haste = Haste::default();
            let script = Script::new(program, "b", "v", None, None, &haste, Path::new("/r"));
            assert_eq!(script.program(), Path::new(expected));
        }
    }

    #[test]
    fn script_for_bridges_is_known_by_both_of_its_names() {
        for (program, expected) in [
            ("vif-bridge", true),
            ("/etc/xen/scripts/vif-bridge", true),
            ("/etc/xen/scripts//vif-bridge", true),
            ("vif-route", false),
            ("/usr/local/bin/vif-bridge", false),
            ("vif-bridge2", false),
        ] {
            assert_eq!(Script::is_for_bridges(program), expected, "{program}");
        }
        assert!(!Script::is_installed("/nonexistent/vif-bridge"));
        assert!(Script::is_installed("/"));
    }

    /// A script with this text in a directory of its own.
    struct Written {
        directory: PathBuf,
        haste: Haste,
    }

    impl Written {
        fn new(test: &str, text: &str) -> Written {
            let name = format!("hospes-script-{test}-{}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            let program = directory.join("s");
            std::fs::write(
                &program,
                format!("#!/bin/sh\ncd {}\n{text}\n", directory.display()),
            )
            .unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            let haste = Haste::default();
            Written { directory, haste }
        }

        fn script(&self) -> Script {
            let program = self.directory.join("s").display().to_string();
            let (bridge, haste) = (Some("br"), &self.haste);
            Script::new(
                &program,
                PATH,
                "vif1.0",
                bridge,
                None,
                haste,
                &self.directory,
            )
            .with_store(Path::new("/r/socket"))
        }

        /// What it has written; waits until there is something.
        fn said(&self) -> String {
            loop {
                let text = std::fs::read_to_string(self.directory.join("said"));
                match text {
                    Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
                    _ => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    const PATH: &str = "backend/vif/1/0";

    #[test]
    fn run_gives_the_environment_and_reports_failure() {
        let written = Written::new(
            "run",
            "echo \"$@ $vif $XENBUS_PATH $bridge $XENSTORED_PATH\" >said; [ $1 = online ] || { echo no way >&2; exit 3; }",
        );
        let script = written.script();
        script.run(Action::Online).unwrap();
        assert_eq!(
            written.said(),
            format!("online type_if=vif vif1.0 {PATH} br /r/socket")
        );
        let error = script.run(Action::Offline).unwrap_err().to_string();
        assert!(error.contains("no way"), "{error}");
    }

    #[test]
    fn script_of_a_destroyed_domain_is_killed_with_what_it_started() {
        for action in [Action::Online, Action::Offline] {
            let written = Written::new("haste", "sleep 1000 & echo $! >said; wait");
            let script = written.script();
            let running = std::thread::spawn(move || script.run(action).unwrap_err().to_string());
            let started = format!("/proc/{}/stat", written.said());
            written.haste.hurry();
            let error = running.join().unwrap();
            assert!(error.contains("its domain was destroyed"), "{error}");
            assert!(error.contains("hospes-script-haste"), "{error}");
            wait_for_end(&started);
        }
    }

    /// Waits for the end of the process with this file in /proc. Killed, it may still have to be waited for by the process that takes orphans.
    fn wait_for_end(stat: &str) {
        let ended = |stat: String| stat.contains(") Z ") || stat.contains(") X ");
        while !std::fs::read_to_string(stat).map_or(true, ended) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn script_of_a_killed_process_is_ended_by_the_sweep_with_what_it_started() {
        let written = Written::new("killed", "sleep 1000 & echo $! >said; wait");
        let script = written.script();
        let running = std::thread::spawn(move || script.run(Action::Online).unwrap_err());
        let started = format!("/proc/{}/stat", written.said());
        let files = || {
            let files = std::fs::read_dir(written.directory.join("scripts")).unwrap();
            files.map(|file| file.unwrap().path()).collect::<Vec<_>>()
        };
        // It has its process when that has said something, or a moment later.
        let file = files().pop().unwrap();
        let left = loop {
            let left = std::fs::read(&file).unwrap();
            match left.is_empty() {
                true => std::thread::sleep(Duration::from_millis(5)),
                false => break left,
            }
        };
        // One that runs for a process which lives is left alone.
        crate::sweep(&written.directory).unwrap();
        assert_eq!(files(), [&*file]);
        assert!(std::fs::exists(&started).unwrap());
        // A process that is killed leaves the same: its file without a lock.
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, left).unwrap();
        crate::sweep(&written.directory).unwrap();
        wait_for_end(&started);
        let error = running.join().unwrap().to_string();
        assert!(error.contains("signal: 9"), "{error}");
        assert_eq!(files().len(), 0);
    }

    #[test]
    fn script_that_puts_in_order_what_a_destroyed_domain_leaves_may_end() {
        let written = Written::new("order", "sleep 0.3; echo done >said");
        written.haste.hurry();
        written.script().run(Action::Offline).unwrap();
        assert_eq!(written.said(), "done");
    }
}
