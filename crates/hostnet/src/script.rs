//! Hot-plug scripts of administrators, called as Xen's tools call them (xl-network-configuration(5), `script`).

use std::path::{Path, PathBuf};

use crate::Error;
use crate::tools::{self, run_with};

/// Where scripts without a path lie.
const DIRECTORY: &str = "/etc/xen/scripts";

/// Xen's own script for bridges: it puts the tap on the bridge, as [`open`](crate::open) does without it.
const BRIDGE_SCRIPT: &str = "vif-bridge";

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
    /// The back end's directory in the xenstore.
    backend_path: String,
    interface: String,
    bridge: Option<String>,
    gateway_device: Option<String>,
}

impl Script {
    pub fn new(
        program: &str,
        backend_path: &str,
        interface: &str,
        bridge: Option<&str>,
        gateway_device: Option<&str>,
    ) -> Script {
        Script {
            program: Path::new(DIRECTORY).join(program),
            backend_path: backend_path.to_owned(),
            interface: interface.to_owned(),
            bridge: bridge.map(str::to_owned),
            gateway_device: gateway_device.map(str::to_owned),
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

    /// Runs the script to its end.
    pub fn run(&self, action: Action) -> Result<(), Error> {
        let action = match action {
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
        if let Some(bridge) = &self.bridge {
            environment.push(("bridge", bridge));
        }
        if let Some(device) = &self.gateway_device {
            environment.push(("netdev", device));
            environment.push(("gatewaydev", device));
        }
        let arguments = [action, "type_if=vif"];
        run_with(&self.program, &arguments, "", &environment, tools::RUN)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn script_without_a_path_is_xens() {
        let script = Script::new("vif-route", "b", "vif1.0", None, None);
        assert_eq!(script.program(), Path::new("/etc/xen/scripts/vif-route"));
        assert_eq!(
            Script::new("/x/y", "b", "v", None, None).program(),
            Path::new("/x/y")
        );
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

    #[test]
    fn run_gives_the_environment_and_reports_failure() {
        let directory = std::env::temp_dir().join(format!("hospes-script-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (program, said) = (directory.join("s"), directory.join("said"));
        let text = format!(
            "#!/bin/sh\necho \"$@ $vif $XENBUS_PATH $bridge\" >{}\n[ $1 = online ] || {{ echo no way >&2; exit 3; }}\n",
            said.display()
        );
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = "/local/domain/0/backend/vif/1/0";
        let script = Script::new(
            &program.display().to_string(),
            path,
            "vif1.0",
            Some("br"),
            None,
        );
        script.run(Action::Online).unwrap();
        let line = std::fs::read_to_string(&said).unwrap();
        assert_eq!(line.trim(), format!("online type_if=vif vif1.0 {path} br"));
        let error = script.run(Action::Offline).unwrap_err().to_string();
        assert!(error.contains("no way"), "{error}");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
