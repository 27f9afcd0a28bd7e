//! Where a domain stands between two hosts, and so who may let its guest run.

use std::time::{Duration, Instant};

use hospes_config::Uuid;

use crate::ending::Ending;
use crate::error::Error;
use crate::instance::{ChangeError, Instance, lock};
use crate::log::log;
use crate::protocol::ShutdownKind;

/// Where a domain stands. The guest of one that is not [`Standing::Here`] runs nowhere, as far as this process has a say.
#[derive(Debug, Default)]
pub(crate) enum Standing {
    #[default]
    Here,
    /// It comes from another host: it is not ours before it is said to be.
    Arriving,
    /// Who moves it decides what becomes of it. With its name and UUID where it was given away.
    Leaving(Option<(String, Uuid)>),
    /// The user decides, for this reason. As before, name and UUID are those that it had.
    Held(String, Option<(String, Uuid)>),
}

/// How long a held domain that is to go on waits for its devices, and how often it tries.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(100);

/// What is said to those who want something of a domain that is not here yet.
const ARRIVING: &str = "it is on its way here from another host: try again when it has arrived";
/// The same of one that may be somewhere else soon.
const LEAVING: &str = "it is being migrated: try again when that has ended";

impl Instance {
    pub(crate) fn set_standing(&self, standing: Standing) {
        *lock(&self.standing) = standing;
    }

    /// Whether it is on its way to another host, or from one.
    pub(crate) fn is_moving(&self) -> bool {
        matches!(
            *lock(&self.standing),
            Standing::Arriving | Standing::Leaving(_)
        )
    }

    /// Whether it was given away, so that only another host or the user may have its guest run.
    pub(crate) fn is_given_away(&self) -> bool {
        matches!(
            *lock(&self.standing),
            Standing::Leaving(Some(_)) | Standing::Held(_, Some(_))
        )
    }

    /// Why the user has to decide what becomes of it.
    pub(crate) fn held(&self) -> Option<String> {
        match &*lock(&self.standing) {
            Standing::Held(why, _) => Some(why.clone()),
            _ => None,
        }
    }

    /// Why its guest cannot be asked for anything, as it runs nowhere or not for sure here.
    pub(crate) fn is_elsewhere(&self) -> Option<String> {
        match &*lock(&self.standing) {
            Standing::Held(why, _) => Some(why.clone()),
            Standing::Arriving => Some(ARRIVING.into()),
            Standing::Leaving(_) => Some(LEAVING.into()),
            Standing::Here => None,
        }
    }

    /// Why nothing can be changed now.
    pub(crate) fn is_fixed(&self) -> Option<String> {
        let saving = || self.is_being_saved().then(|| Instance::SAVING.into());
        self.is_elsewhere().or_else(saving)
    }

    /// Pauses the domain. One that is on its way would not stay so.
    pub(crate) fn pause(&self) -> Result<(), ChangeError> {
        match &*lock(&self.standing) {
            Standing::Arriving => return Err(ChangeError::Moving(ARRIVING)),
            Standing::Leaving(_) => return Err(ChangeError::Moving(LEAVING)),
            Standing::Here | Standing::Held(..) => self.machine().pause(),
        }
        Ok(())
    }

    /// Whether no other domain has this name.
    pub(crate) fn check_free(&self, name: &str) -> Result<(), Error> {
        let mut entries = self.registry.entries()?.into_iter();
        match entries.find(|entry| entry.record.name == name && entry.domid != self.domid) {
            Some(entry) => Err(Error::NameTaken {
                name: entry.record.name,
                domid: entry.domid,
            }),
            None => Ok(()),
        }
    }

    /// Unpauses the domain. One that is held goes on here, as the user says that it runs nowhere else; who had its devices may be about to end.
    pub(crate) fn unpause(&self) -> Result<(), ChangeError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.unpause_now() {
                Err(ChangeError::Machine(_))
                    if Instant::now() < deadline
                        && !self.is_destroyed()
                        && !self.machine().has_ended() =>
                {
                    std::thread::sleep(LOOK);
                }
                outcome => return outcome,
            }
        }
    }

    fn unpause_now(&self) -> Result<(), ChangeError> {
        // Whoever changes something looks where the domain stands, and not the other way round.
        let _changes = self.held().map(|_| lock(&self.changes));
        let mut standing = lock(&self.standing);
        match &mut *standing {
            Standing::Arriving => return Err(ChangeError::Moving(ARRIVING)),
            Standing::Leaving(None) => return Err(ChangeError::Moving(LEAVING)),
            // Nothing waits for it here.
            Standing::Here | Standing::Leaving(Some(_)) => self.machine().unpause(),
            Standing::Held(_, identity) => {
                // Where it runs on this host after all, this is what is refused.
                if let Some((name, _)) = identity {
                    self.check_free(name)?;
                }
                self.machine().take_again().map_err(ChangeError::Machine)?;
                if let Some((name, uuid)) = identity
                    && let Err(fault) = self.be_another(name, *uuid)
                {
                    // It stays as it was.
                    if let Err(fault) = self.machine().let_go() {
                        log!("The devices are not let go of: {fault}");
                    }
                    return Err(fault);
                }
                *standing = Standing::Here;
                log!("The domain goes on here, as the user wishes");
                self.machine().unpause();
                self.machine().resume();
            }
        }
        Ok(())
    }

    /// Leaves it to the user what becomes of the domain.
    pub(crate) fn hold(&self, why: String) {
        let mut standing = lock(&self.standing);
        log!("The domain is held: {why}");
        let identity = match std::mem::take(&mut *standing) {
            Standing::Leaving(identity) | Standing::Held(_, identity) => identity,
            Standing::Here | Standing::Arriving => None,
        };
        *standing = Standing::Held(why, identity);
        // What `list` shows; the guest is suspended besides.
        self.machine().pause();
    }

    /// The guest of a domain that stays goes on; what was asked of it meanwhile is asked again.
    pub(crate) fn stay(&self, ending: &Ending) {
        self.set_standing(Standing::Here);
        self.machine().resume();
        if ending.is_asked()
            && let Err(fault) = ending.ask(ShutdownKind::Poweroff)
        {
            log!("The guest cannot be asked to shut down: {fault}");
        }
    }

    /// The same of a domain that has ended meanwhile: what comes behind it is not decided here.
    pub(crate) fn stay_ended(&self) {
        log!("The domain has ended");
        let mut standing = lock(&self.standing);
        if matches!(*standing, Standing::Leaving(None)) {
            *standing = Standing::Here;
        }
    }

    /// Has the guest of a domain that is asked to end for good run, so that it can follow; false where that has to wait, or why it cannot be. Nothing can make the
    /// domain leave meanwhile.
    pub(crate) fn wake(&self) -> Result<bool, String> {
        let standing = lock(&self.standing);
        match &*standing {
            Standing::Here => {
                self.machine().unpause();
                self.machine().resume();
                Ok(true)
            }
            Standing::Leaving(_) => Ok(false),
            Standing::Arriving => Err(ARRIVING.into()),
            Standing::Held(why, _) => Err(why.clone()),
        }
    }
}
