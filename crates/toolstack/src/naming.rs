//! The name and UUID of a domain, and who else is told of them: the registry, the store, the logs.

use hospes_config::{DomainConfig, Uuid};

use crate::instance::{ChangeError, Instance, lock};
use crate::log::log;
use crate::logfile::move_log;
use crate::paths::Paths;

impl Instance {
    /// Gives the domain another name, which its logs get too.
    pub(crate) fn rename(&self, name: &str) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let mut record = lock(&self.record).clone();
        let old = std::mem::replace(&mut record.name, name.to_string());
        if old == name {
            return Ok(());
        }
        record.config.name = name.to_string();
        self.check_free(name)?;
        // First where it can fail when the name is free: the machine may have ended.
        self.machine.rename(name).map_err(ChangeError::Machine)?;
        let written = self.registry.update_and(self.domid, &record, |paths| {
            self.move_logs(paths, &old, name);
        });
        if let Err(fault) = written {
            if let Err(fault) = self.machine.rename(&old) {
                log!("The store knows the domain as {name}: {fault}");
            }
            return Err(fault.into());
        }
        *lock(&self.record) = record;
        Ok(())
    }

    /// Gives a domain that has come from another host the name and UUID that it had there.
    pub(crate) fn settle_in(&self, name: &str, uuid: Uuid) -> std::result::Result<(), ChangeError> {
        let _changes = lock(&self.changes);
        let mut record = lock(&self.record).clone();
        let old = std::mem::replace(&mut record.name, name.to_string());
        record.uuid = uuid;
        self.registry.update_and(self.domid, &record, |paths| {
            self.move_logs(paths, &old, name);
        })?;
        *lock(&self.record) = record;
        self.machine
            .become_another(name, uuid)
            .map_err(ChangeError::Machine)
    }

    fn move_logs(&self, paths: &Paths, old: &str, name: &str) {
        log!("Domain {old} has the name {name} from here on");
        let (from, to) = (paths.domain_log(old), paths.domain_log(name));
        let (console_from, console_to) = (paths.console_log(old), paths.console_log(name));
        let console = self.hub.move_log(&console_from, &console_to);
        // A domain kept by `rename-restart` has none under its name.
        let own = if from.exists() {
            move_log(&from, &to)
        } else {
            Ok(())
        };
        if let Err(fault) = own.and(console) {
            log!("A log keeps its name: {fault}");
        }
    }

    /// Gives its name and UUID up to a domain that comes behind it, and keeps the name with something behind it. Returns the configuration of the other, with all
    /// changes that were made before.
    pub(crate) fn become_another(
        &self,
        suffix: &str,
        uuid: Uuid,
    ) -> std::result::Result<DomainConfig, ChangeError> {
        let _changes = lock(&self.changes);
        let config = self.next_config();
        let name = format!("{}{suffix}", config.name);
        log!("Preserving domain {} {} as {name}", self.domid, config.name);
        self.be_another(&name, uuid)?;
        Ok(config)
    }

    /// Gives it another name and UUID, for who keeps the domain as it is.
    pub(crate) fn be_another(
        &self,
        name: &str,
        uuid: Uuid,
    ) -> std::result::Result<(), ChangeError> {
        let before = lock(&self.record).clone();
        let mut record = before.clone();
        record.name = name.to_string();
        record.uuid = uuid;
        self.set_record(record)?;
        self.machine.become_another(name, uuid).map_err(|fault| {
            // The store knows it as before.
            if let Err(fault) = self.set_record(before) {
                log!("The domain keeps the name {name}: {fault}");
            }
            ChangeError::Machine(fault)
        })
    }
}
