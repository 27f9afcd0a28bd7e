//! A store in this process, and access to it: for tests, and for a domain that shares its store with nobody.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use hospes_units::DomId;

use crate::access::{
    DomainStore, GuestLink, Membership, NewNode, StoreAccess, Watch, WatchListener,
};
use crate::{ConnId, DomainEntry, Error, Perms, ProtocolError, Store, Waker};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Access to a [`Store`] in this process. Its watches are told by a thread, which ends with the last copy.
#[derive(Clone)]
pub struct LocalStore {
    shared: Arc<Shared>,
    _thread: Arc<Thread>,
}

/// Ends the thread.
struct Thread(Arc<Shared>);

struct Shared {
    store: Arc<Mutex<Store>>,
    conn: ConnId,
    listeners: Mutex<Listeners>,
    bell: Arc<Bell>,
}

#[derive(Default)]
struct Listeners {
    next: u64,
    /// By token.
    active: BTreeMap<String, WatchListener>,
}

/// What the thread sleeps on.
#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    ended: bool,
}

impl Bell {
    fn ring(&self, end: bool) {
        let mut state = lock(&self.state);
        state.rung = true;
        state.ended |= end;
        self.rung.notify_one();
    }

    /// False where the end has come.
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.rung {
            state = self
                .rung
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.rung = false;
        !state.ended
    }
}

impl Default for LocalStore {
    fn default() -> Self {
        LocalStore::new(Arc::default())
    }
}

impl LocalStore {
    /// Access to a store that others may use, too.
    pub fn new(store: Arc<Mutex<Store>>) -> LocalStore {
        let bell = Arc::new(Bell::default());
        let ring = Arc::clone(&bell);
        let conn = lock(&store).connect(DomId::HOST, Arc::new(move || ring.ring(false)));
        let shared = Arc::new(Shared {
            store,
            conn,
            listeners: Mutex::default(),
            bell: Arc::clone(&bell),
        });
        let weak = Arc::downgrade(&shared);
        std::thread::spawn(move || tell_listeners(&weak, &bell));
        let thread = Arc::new(Thread(Arc::clone(&shared)));
        LocalStore {
            shared,
            _thread: thread,
        }
    }

    /// The store itself.
    pub fn store(&self) -> &Arc<Mutex<Store>> {
        &self.shared.store
    }
}

fn tell_listeners(shared: &Weak<Shared>, bell: &Bell) {
    while bell.wait() {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        loop {
            let event = lock(&shared.store).next_event(shared.conn);
            let Some(event) = event else { break };
            let listener = lock(&shared.listeners).active.get(&event.token).cloned();
            if let Some(listener) = listener {
                listener(&event.path);
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        lock(&self.0.store).disconnect(self.0.conn);
        self.0.bell.ring(true);
    }
}

impl fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalStore")
    }
}

impl StoreAccess for LocalStore {
    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        lock(&self.shared.store).read(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), Error> {
        lock(&self.shared.store).write(path, value)
    }

    fn mkdir(&self, path: &str) -> Result<(), Error> {
        lock(&self.shared.store).mkdir(path)
    }

    fn remove(&self, path: &str) -> Result<(), Error> {
        lock(&self.shared.store).remove(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        lock(&self.shared.store).list(path)
    }

    fn set_perms(&self, path: &str, perms: &Perms) -> Result<(), Error> {
        lock(&self.shared.store).set_perms(path, perms.clone())
    }

    fn write_all(&self, nodes: &[NewNode]) -> Result<(), Error> {
        lock(&self.shared.store).write_all(nodes)
    }

    fn watch(&self, path: &str, listener: WatchListener) -> Result<Watch, Error> {
        let token = {
            let mut listeners = lock(&self.shared.listeners);
            listeners.next += 1;
            let token = listeners.next.to_string();
            listeners.active.insert(token.clone(), listener);
            token
        };
        let result = lock(&self.shared.store).watch(self.shared.conn, path, &token);
        if let Err(error) = result {
            lock(&self.shared.listeners).active.remove(&token);
            return Err(error);
        }
        let (weak, path) = (Arc::downgrade(&self.shared), path.to_owned());
        Ok(Watch::new(move || {
            if let Some(shared) = weak.upgrade() {
                lock(&shared.listeners).active.remove(&token);
                // The store may have closed the connection already.
                let _ = lock(&shared.store).unwatch(shared.conn, &path, &token);
            }
        }))
    }
}

/// A guest's connection to a store in this process.
struct LocalGuest {
    store: Arc<Mutex<Store>>,
    conn: ConnId,
}

impl GuestLink for LocalGuest {
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        lock(&self.store).input(self.conn, bytes)
    }

    fn output(&mut self, buf: &mut [u8]) -> usize {
        lock(&self.store).output(self.conn, buf)
    }

    fn accepts_input(&mut self) -> bool {
        lock(&self.store).accepts_input(self.conn)
    }

    fn reset(&mut self) {
        lock(&self.store).reset(self.conn);
    }
}

impl Drop for LocalGuest {
    fn drop(&mut self) {
        lock(&self.store).disconnect(self.conn);
    }
}

impl DomainStore for LocalStore {
    fn access(&self) -> Arc<dyn StoreAccess> {
        Arc::new(self.clone())
    }

    fn add_domain(
        &self,
        entry: &DomainEntry,
        waker: Waker,
    ) -> Result<(Box<dyn GuestLink>, Membership), Error> {
        let store = Arc::clone(&self.shared.store);
        let domid = entry.domid;
        lock(&store).add_domain(domid, &entry.uuid, &entry.name)?;
        let leaving = Arc::clone(&store);
        let membership = Membership::new(move || lock(&leaving).remove_domain(domid));
        lock(&store).write_all(&entry.nodes())?;
        lock(&store).introduce(domid);
        let conn = lock(&store).connect(domid, waker);
        let guest = LocalGuest { store, conn };
        Ok((Box::new(guest), membership))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn watched(store: &LocalStore, path: &str) -> (Watch, Receiver<String>) {
        let (sender, receiver) = channel();
        let sender = Mutex::new(sender);
        let listener = Arc::new(move |path: &str| {
            let _ = lock(&sender).send(path.to_owned());
        });
        (store.watch(path, listener).unwrap(), receiver)
    }

    #[test]
    fn watch_tells_of_changes_until_it_is_dropped() {
        let store = LocalStore::default();
        let (watch, told) = watched(&store, "/a");
        assert_eq!(told.recv().unwrap(), "/a");
        store.write("/a/b", b"1").unwrap();
        assert_eq!(told.recv().unwrap(), "/a/b");
        assert_eq!(store.read_text("/a/b").as_deref(), Some("1"));
        drop(watch);
        store.write("/a/c", b"1").unwrap();
        // The listener, and with it the sender, is gone.
        assert!(told.recv().is_err());
    }

    #[test]
    fn write_all_is_one_step_or_none() {
        let store = LocalStore::default();
        let perms = Perms::read_only(DomId(4));
        let good = NewNode::new("/x/y", "v", &perms);
        let bad = NewNode::new("/x//z", "v", &perms);
        assert_eq!(store.write_all(&[good.clone(), bad]), Err(Error::Invalid));
        assert_eq!(store.read("/x"), Err(Error::NoEntry));
        let (_watch, told) = watched(&store, "/x");
        assert_eq!(told.recv().unwrap(), "/x");
        let second = NewNode {
            path: "/x/a".into(),
            value: b"w".to_vec(),
            perms: None,
        };
        store.write_all(&[good, second]).unwrap();
        assert_eq!(store.list("/x").unwrap(), ["a", "y"]);
        assert_eq!(told.recv().unwrap(), "/x/y");
        assert_eq!(told.recv().unwrap(), "/x/a");
        store.remove("/x").unwrap();
        assert_eq!(store.mkdir("/x"), Ok(()));
        assert_eq!(store.set_perms("/nothing", &perms), Err(Error::NoEntry));
    }
}
