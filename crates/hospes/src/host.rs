//! The host as a machine process sees it: by its keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use hospes_config::VifConfig;
use hospes_domain::net::{Again, NetConfig, Renew, Wire};
use hospes_domain::{HostScheduler, ShareGroup, VifSpec};
use hospes_image::{self as image, Access, Files, ImageError, Report};
use hospes_toolstack::{self as toolstack, Asker, MachineError};
use serde::de::DeserializeOwned;

use crate::wants::{Done, Opened, Plugged, Want};

/// Asks the keeper.
#[derive(Clone, Debug)]
pub struct Host(Asker);

/// Tells the keeper when it goes.
struct Until {
    host: Host,
    /// `None` once it was told.
    then: Option<Want>,
}

impl Drop for Until {
    fn drop(&mut self) {
        if let Some(want) = self.then.take() {
            // A keeper that does not hear it is gone, and this process is next.
            let _ = self.host.ask::<()>(&want);
        }
    }
}

impl Host {
    pub fn new(asker: Asker) -> Host {
        Host(asker)
    }

    fn ask<T: DeserializeOwned>(&self, want: &Want) -> Result<(T, Vec<OwnedFd>), MachineError> {
        let (value, descriptors) = self.0.program(serde_json::to_value(want)?)?;
        Ok((serde_json::from_value(value)?, descriptors))
    }

    fn until(&self, then: Want) -> Until {
        Until {
            host: self.clone(),
            then: Some(then),
        }
    }

    /// Plugs an interface in, and says by which number its script is run where it has one.
    pub fn plug(&self, vif: &VifConfig) -> Result<(VifSpec, Option<u64>), MachineError> {
        let want = Want::Plug(vif.devid.unwrap_or(0));
        let (plugged, queues): (Plugged, _) = self.ask(&want)?;
        let id = plugged.id;
        let script = plugged.script.is_some().then_some(id);
        let facts = plugged.facts(vif);
        let (mtu, rate) = (facts.mtu, facts.rate);
        let spec = VifSpec {
            facts,
            trusted: vif.trusted,
            net: NetConfig {
                wire: match plugged.is_stream {
                    false => Wire::Frames,
                    true => Wire::Stream,
                },
                queues,
                mtu,
                rate,
                guard: plugged.guard.map(Into::into),
                leave: script.map(|id| {
                    let left = self.until(Want::Offline(id));
                    Box::new(move || drop(left)) as Box<dyn FnOnce() + Send>
                }),
                renew: plugged.renews.then(|| self.renew(id)),
                again: plugged.returns.then(|| self.again(vif)),
                keep: Box::new(self.until(Want::Unplugged(id))),
                log: Arc::new(toolstack::log_line),
            },
        };
        Ok((spec, script))
    }

    fn renew(&self, id: u64) -> Renew {
        let host = self.clone();
        Arc::new(move || {
            let asked = host.ask::<()>(&Want::Renew(id));
            let (_, descriptors) = asked.map_err(|fault| fault.to_string())?;
            let stream = descriptors.into_iter().next();
            stream.ok_or_else(|| "the keeper has given no stream".to_owned())
        })
    }

    /// Plugs an interface in that was let go of while its device stayed.
    fn again(&self, vif: &VifConfig) -> Again {
        let (host, vif) = (self.clone(), vif.clone());
        Box::new(move || {
            let spec = host.plug_ready(&vif).map_err(|fault| fault.to_string())?;
            Ok(spec.net)
        })
    }

    /// Plugs an interface in and runs its script, before the guest hears of it.
    pub fn plug_ready(&self, vif: &VifConfig) -> Result<VifSpec, MachineError> {
        let (mut spec, script) = self.plug(vif)?;
        if let Err(fault) = self.bring_online(script) {
            // Its script puts in order what it has begun while the interface is still there.
            if let Some(leave) = spec.net.leave.take() {
                leave();
            }
            return Err(fault);
        }
        Ok(spec)
    }

    /// Runs the scripts of interfaces that are plugged in.
    pub fn bring_online(&self, scripts: impl IntoIterator<Item = u64>) -> Result<(), MachineError> {
        for id in scripts {
            self.ask::<()>(&Want::Online(id))?;
        }
        Ok(())
    }

    /// Asks the host's scheduler.
    fn schedule(&self, want: &Want) -> io::Result<()> {
        let (done, _): (Done, _) = self.ask(want).map_err(io::Error::other)?;
        done.map_err(io::Error::from_raw_os_error)
    }
}

impl Files for Host {
    fn open(&self, path: &Path, access: Access, _: &str) -> Result<image::Opened, ImageError> {
        let want = Want::Open {
            path: path.to_owned(),
            access,
        };
        let asked = self.ask(&want);
        let refused = |fault: String| ImageError::from(Report::new(fault));
        let (opened, descriptors): (Opened, _) =
            asked.map_err(|fault| refused(fault.to_string()))?;
        match opened {
            Opened::Here { id, facts } => {
                let keep = Box::new(self.until(Want::Closed(id)));
                let opened = image::Opened::from_parts(facts, descriptors, keep);
                opened.map_err(|fault| refused(fault.to_string()))
            }
            Opened::Refused(report) => Err(report.into()),
        }
    }
}

/// The group that the keeper has made.
#[derive(Debug)]
struct KeptGroup(Host);

impl Drop for KeptGroup {
    fn drop(&mut self) {
        // As for what else the keeper is told.
        let _ = self.0.ask::<()>(&Want::Ungroup);
    }
}

impl ShareGroup for KeptGroup {
    fn set(&self, weight: u16, cap: u16, vcpus: u32) -> io::Result<()> {
        self.0.schedule(&Want::Share(weight, cap, vcpus))
    }
}

impl HostScheduler for Host {
    fn group(&self, threads: &[i32]) -> io::Result<Box<dyn ShareGroup>> {
        self.schedule(&Want::Group(threads.to_vec()))?;
        Ok(Box::new(KeptGroup(self.clone())))
    }

    fn renice(&self, threads: &[i32], nice: i32) -> io::Result<()> {
        self.schedule(&Want::Renice(threads.to_vec(), nice))
    }

    fn renice_session(&self, nice: i32) -> io::Result<()> {
        self.schedule(&Want::ReniceSession(nice))
    }
}
