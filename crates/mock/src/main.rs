//! The whole command line, with a machine that has no guest: for tests of what happens around a guest.
//!
//! Once unpaused it prints `mock guest ready` and obeys the lines it gets on its console: `poweroff`, `reboot`, `crash`,
//! `watchdog` and `suspend` end it, `flood` prints 4 MiB, anything else is answered with `echo: ` and the line. With
//! Devices and keys are said on the console: `attached disk xvdb`, `sysrq h`. Its balloon driver follows at once, and it may have what a host of 1 TiB has left. A disk whose target is called `bad` cannot be
//! attached, one called `stuck` is not given back but by force, and `slow` is attached when the file `.taken` beside its kernel is gone. With `deaf` in its kernel command line it does not hear requests to shut down,
//! for which a process that is asked to end gives it two seconds; with `slow` it hears them, and shuts down when it is told to on its console. A kernel that is no file is an error. It suspends itself when it is to be saved, unless it
//! is paused, and what is saved of it is what it was told last; `broken` cannot be saved, and what is no text cannot be restored; its core is the same, and 4096 sevens behind a hole. To another host `foreign` is not
//! admitted, `unwelcome` fails there, and `clings` fails when its devices are let go of, after which `restless` does not stay suspended; they cannot be had again while beside its kernel there is a file `.taken`.
//! While there is a file `.lingering` its end is known to nobody who waits for it, while there is one `.staying` it does not leave, and while there is one `.unready` it
//! is not ready to start, while there is one `.unbuilt` it is not there at all, and while there is one `.unheard` it acknowledges nothing.
#![forbid(unsafe_code)]

mod machine;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use hospes_migration::Record;
use hospes_toolstack::{
    Asker, Device, DeviceKind, Keeper, Machine, MachineError, MachineSpec, Program, SavedStream,
    Share,
};
use serde_json::Value;

use machine::{HOST_BYTES, make};

struct Mocks;

/// What such a machine asks its keeper for: nothing.
struct NoKeeper;

impl Keeper for NoKeeper {
    fn answer(&self, ask: Value) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        Err(format!("nobody asks {ask}").into())
    }

    fn permit(&self, _: Device<'_>) -> Result<(), MachineError> {
        Ok(())
    }

    fn revoke(&self, _: DeviceKind, _: u32) {}

    fn share(&self, _: Share) {}

    fn hurry(&self) {}

    fn release(&self) {}
}

impl Program for Mocks {
    fn keeper(&self, _: &MachineSpec<'_>, _: u32) -> Result<Arc<dyn Keeper>, MachineError> {
        Ok(Arc::new(NoKeeper))
    }

    fn build(
        &self,
        spec: &MachineSpec<'_>,
        saved: Option<SavedStream>,
        mut console: Box<dyn Write + Send>,
        _: Asker,
    ) -> Result<Arc<dyn Machine>, MachineError> {
        let Some(mut saved) = saved else {
            let kernel = &spec.config.kernel;
            if !kernel.is_file() {
                return Err(
                    format!("the kernel {} is no file: give another", kernel.display()).into(),
                );
            }
            return make(spec, String::new(), console);
        };
        let mut heard = String::new();
        loop {
            match saved.next()? {
                Record::Machine(text) => heard = String::from_utf8(text.to_vec())?,
                Record::End => break,
                Record::Config(_) | Record::Pages { .. } => {}
            }
        }
        if heard == "unwelcome" {
            return Err("there is no place for it".into());
        }
        let others = spec.promised.bytes();
        if others.saturating_add(spec.config.memory_kib() << 10) > HOST_BYTES {
            return Err(format!("others may take {others} bytes of the host").into());
        }
        writeln!(console, "restored: {heard}")?;
        make(spec, heard, console)
    }

    fn admit(&self, _: &MachineSpec<'_>, passport: &str) -> Result<(), MachineError> {
        match passport {
            "foreign" => Err("the processor lacks it".into()),
            _ => Ok(()),
        }
    }

    fn shutdown_patience(&self) -> Duration {
        Duration::from_secs(2)
    }

    fn sweep(&self, _: &Path) -> Result<(), MachineError> {
        Ok(())
    }
}

fn main() -> ExitCode {
    hospes_cli::run(std::env::args_os(), &Mocks)
}
