//! Watches: who is told of which change.

use crate::node::Perms;
use crate::path;
use crate::restriction;
use crate::tree::{Change, Error};
use crate::{ConnId, Store};

/// A watch of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Absolute.
    pub path: String,
    /// What to take off paths in events: the watch was set with a relative path.
    pub relative_to: Option<String>,
    pub token: String,
}

/// Something below a watched path changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    pub path: String,
    pub token: String,
}

impl Watch {
    fn concerns(&self, change: &Change) -> bool {
        if change.exact {
            self.path == change.path
        } else {
            path::is_within(&change.path, &self.path)
        }
    }

    fn is_same(&self, other: &Watch) -> bool {
        self.path == other.path && self.token == other.token
    }

    /// The path as its owner names it.
    pub fn shown<'a>(&self, path: &'a str) -> &'a str {
        self.relative_to
            .as_deref()
            .and_then(|home| path.strip_prefix(home))
            .unwrap_or(path)
    }
}

impl Store {
    /// Tells all watches of changes, in order: those whose owners may read the node or its parent, or could before.
    pub(crate) fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            for connection in self.connections.values_mut() {
                let target = self.targets.get(&connection.domid).copied();
                let reads = |p: &Perms| p.access_with(connection.domid, target).may_read();
                if !change.perms.iter().any(reads) {
                    continue;
                }
                let limit =
                    (connection.domid != hospes_units::DomId::HOST).then_some(self.quota.events);
                let events: Vec<(String, String)> = connection
                    .watches
                    .iter()
                    .filter(|w| w.concerns(change))
                    .map(|w| (w.shown(&change.path).to_owned(), w.token.clone()))
                    .collect();
                for (path, token) in events {
                    connection.event(&path, &token, limit);
                }
            }
        }
    }

    pub(crate) fn add_watch(
        &mut self,
        conn: ConnId,
        given: &str,
        token: &str,
    ) -> Result<(), Error> {
        let connection = self.connections.get(&conn).ok_or(Error::Invalid)?;
        let limit = match connection.restriction.clone() {
            Some(restriction) => {
                let path = path::watchable(given, connection.domid)?;
                let reach = restriction.reach(self.knows(&restriction));
                if !reach.holds(&path) {
                    return Err(Error::Access);
                }
                Some(restriction::QUOTA.watches)
            }
            None => (connection.domid != hospes_units::DomId::HOST).then_some(self.quota.watches),
        };
        self.add_watch_within(limit, conn, given, token)
    }

    /// As [`Store::add_watch`], with a limit of its own or none.
    pub(crate) fn add_watch_within(
        &mut self,
        limit: Option<usize>,
        conn: ConnId,
        given: &str,
        token: &str,
    ) -> Result<(), Error> {
        let connection = self.connections.get_mut(&conn).ok_or(Error::Invalid)?;
        let watch = watch_of(connection.domid, given, token)?;
        if connection.watches.iter().any(|w| w.is_same(&watch)) {
            return Err(Error::Exists);
        }
        if limit.is_some_and(|limit| connection.watches.len() >= limit) {
            return Err(Error::NoSpace);
        }
        connection.watches.push(watch);
        Ok(())
    }

    /// The event that follows each new watch.
    pub(crate) fn send_first_event(&mut self, conn: ConnId, given: &str, token: &str) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.event(given, token, None);
        }
    }

    pub(crate) fn remove_watch(
        &mut self,
        conn: ConnId,
        given: &str,
        token: &str,
    ) -> Result<(), Error> {
        let connection = self.connections.get_mut(&conn).ok_or(Error::Invalid)?;
        let watch = watch_of(connection.domid, given, token)?;
        let at = connection.watches.iter().position(|w| w.is_same(&watch));
        connection.watches.remove(at.ok_or(Error::NoEntry)?);
        Ok(())
    }
}

fn watch_of(domid: hospes_units::DomId, given: &str, token: &str) -> Result<Watch, Error> {
    let path = path::watchable(given, domid)?;
    let relative = !given.starts_with('/') && !given.starts_with('@');
    Ok(Watch {
        path,
        relative_to: relative.then(|| path::home(domid)),
        token: token.to_owned(),
    })
}
