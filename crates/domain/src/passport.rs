//! What a domain shows of itself to the host that it is to move to, while it runs.

use hospes_cpuid::{CpuidTable, HostCpu, Policy, SavedFeatures};
use hospes_units::DomId;
use serde::{Deserialize, Serialize};

use crate::saved::RestoreError;
use crate::{CreateError, Domain, Level, RequestError, Wish, host_memory};

#[derive(Debug, Serialize, Deserialize)]
struct Passport {
    features: SavedFeatures,
    /// Memory that the guest has now.
    current_bytes: u64,
}

/// A host that a domain wants to come to, and as what.
#[derive(Debug)]
pub struct Host<'a> {
    pub name: &'a str,
    pub vcpus: u32,
    pub level: Level,
    pub wishes: &'a [(String, Wish)],
    pub memory_bytes: u64,
    /// Memory of the host that is free and yet spoken for.
    pub promised_bytes: u64,
}

impl Domain {
    /// What [`Host::admits`] reads. Refuses what could not be suspended or let go of now.
    pub fn passport(&self) -> Result<String, RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        if self.run.is_paused() {
            return Err(RequestError::Paused);
        }
        self.check_disks()?;
        let passport = Passport {
            features: self.processor.features(),
            current_bytes: self.info().memory_kib << 10,
        };
        serde_json::to_string(&passport).map_err(RequestError::Text)
    }

    /// Refuses where requests of a disk wait: the guest's programs wait for them, and cannot be frozen.
    pub(crate) fn check_disks(&self) -> Result<(), RequestError> {
        let troubled = self.devices.list().into_iter();
        let mut troubled = troubled.filter_map(|device| Some((device.id, device.trouble?)));
        match troubled.find(|(id, _)| id.kind == crate::frame::Kind::Vbd) {
            Some((id, why)) => Err(RequestError::Held(id.to_string(), why)),
            None => Ok(()),
        }
    }
}

impl Host<'_> {
    /// Whether a domain with this passport could live here now, as far as can be told before it comes.
    pub fn admits(&self, passport: &str) -> Result<(), CreateError> {
        let passport: Passport = serde_json::from_str(passport).map_err(RestoreError::Text)?;
        let needed = passport.current_bytes.max(self.memory_bytes);
        host_memory::room(needed, self.promised_bytes).map_err(|shortage| {
            CreateError::HostMemory {
                name: self.name.to_owned(),
                shortage,
            }
        })?;
        CpuidTable::new(
            &HostCpu::capture(),
            &Policy {
                vcpus: self.vcpus,
                domid: DomId(1),
                // What is measured later is not compared.
                tsc_khz: 1_000_000,
                nomigrate: true,
                level: self.level,
                wishes: self.wishes,
                saved: Some(&passport.features),
            },
        )?;
        Ok(())
    }
}
