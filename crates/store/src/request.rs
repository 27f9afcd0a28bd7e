//! Requests: from a message to an operation and back to a reply.

use std::sync::Arc;

use hospes_units::DomId;

use crate::node::{Perm, Perms};
use crate::quota::Quota;
use crate::restriction::Restriction;
use crate::tree::{Caller, Error, Tree, View};
use crate::wire::{self, PAYLOAD_MAX, Request, kind};
use crate::{ConnId, Store, path, restriction};

const OK: &[u8] = b"OK\0";

/// What a connection may do, and how much.
struct Rights {
    domid: DomId,
    target: Option<DomId>,
    quota: Quota,
    restriction: Option<Arc<Restriction>>,
    /// The restriction's domain is known by the restriction's UUID.
    is_known: bool,
}

impl Rights {
    fn caller(&self) -> Caller<'_> {
        let restriction = self.restriction.as_deref();
        Caller {
            domid: self.domid,
            target: self.target,
            reach: restriction.map(|r| r.reach(self.is_known)),
            quota: &self.quota,
        }
    }
}

impl Store {
    pub(crate) fn handle(&mut self, conn: ConnId, request: Request) {
        let Some(connection) = self.connections.get(&conn) else {
            return;
        };
        let domid = connection.domid;
        if connection.restriction.is_some() && !restriction::allows(request.kind) {
            return self.reply(conn, &request, Err(Error::Access));
        }
        let result = match request.kind {
            kind::DIRECTORY
            | kind::READ
            | kind::GET_PERMS
            | kind::DIRECTORY_PART
            | kind::WRITE
            | kind::MKDIR
            | kind::RM
            | kind::SET_PERMS => {
                // Replies first, then the events that the request caused.
                let (result, changes) = self.on_tree(conn, domid, &request);
                self.reply(conn, &request, result);
                self.fire(&changes);
                return;
            }
            kind::WATCH => {
                let result = self.on_watch(conn, &request);
                let watched = result.is_ok();
                self.reply(conn, &request, result);
                if let (true, Some(&[path, token])) =
                    (watched, wire::strings(&request.payload).as_deref())
                {
                    self.send_first_event(conn, path, token);
                }
                return;
            }
            kind::TRANSACTION_END => {
                let result = self.on_transaction_end(conn, domid, &request);
                let (result, changes) = match result {
                    Ok(changes) => (Ok(OK.to_vec()), changes),
                    Err(e) => (Err(e), Vec::new()),
                };
                self.reply(conn, &request, result);
                self.fire(&changes);
                return;
            }
            kind::UNWATCH => self.on_unwatch(conn, &request),
            kind::RESET_WATCHES => self.on_reset_watches(conn),
            kind::TRANSACTION_START => self.on_transaction_start(conn, &request),
            kind::GET_DOMAIN_PATH => domid_argument(&request).map(|d| {
                let home = path::home(d);
                wire::join([home.trim_end_matches('/')])
            }),
            kind::IS_DOMAIN_INTRODUCED
            | kind::INTRODUCE
            | kind::RELEASE
            | kind::RESUME
            | kind::SET_TARGET => self.on_domains(conn, &request),
            kind::CONTROL => self.on_control(conn, &request),
            _ => Err(Error::NotImplemented),
        };
        self.reply(conn, &request, result);
    }

    fn reply(&mut self, conn: ConnId, request: &Request, result: Result<Vec<u8>, Error>) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let result = result.and_then(|payload| match payload.len() {
            0..=PAYLOAD_MAX => Ok(payload),
            _ => Err(Error::TooBig),
        });
        match result {
            Ok(payload) => connection.reply(request, request.kind, &payload),
            Err(e) => connection.reply(request, kind::ERROR, &wire::join([e.name()])),
        }
    }

    /// An operation on nodes, inside the request's transaction or on its own.
    fn on_tree(
        &mut self,
        conn: ConnId,
        domid: DomId,
        request: &Request,
    ) -> (Result<Vec<u8>, Error>, Vec<crate::tree::Change>) {
        let rights = self.rights(conn, domid);
        let caller = rights.caller();
        let mut changes = Vec::new();
        if let Some(result) = special_operation(&mut self.tree, &caller, request) {
            return (result, changes);
        }
        if request.transaction == 0 {
            let mut view = View::Direct(&mut self.tree, &mut changes);
            let result = node_operation(&mut view, &caller, request);
            return (result, changes);
        }
        let transactions = self.connections.get_mut(&conn).map(|c| &mut c.transactions);
        let open = transactions.map(|open| {
            let all: usize = open.values().map(|t| t.overlay.bytes()).sum();
            (all, open.get_mut(&request.transaction))
        });
        let Some((bytes, Some(transaction))) = open else {
            return (Err(Error::NoEntry), changes);
        };
        // The limit on bytes is on all of them together.
        let mut quota = rights.quota;
        let others = bytes - transaction.overlay.bytes();
        quota.transaction_bytes = quota.transaction_bytes.saturating_sub(others);
        let caller = Caller {
            quota: &quota,
            ..caller
        };
        let mut view = View::Overlay(&self.tree, &mut transaction.overlay);
        (node_operation(&mut view, &caller, request), changes)
    }

    fn rights(&self, conn: ConnId, domid: DomId) -> Rights {
        let connection = self.connections.get(&conn);
        let restriction = connection.and_then(|c| c.restriction.clone());
        Rights {
            domid,
            target: self.targets.get(&domid).copied(),
            quota: match restriction {
                Some(_) => restriction::QUOTA,
                None => self.quota,
            },
            is_known: restriction.as_ref().is_some_and(|r| self.knows(r)),
            restriction,
        }
    }

    fn on_watch(&mut self, conn: ConnId, request: &Request) -> Result<Vec<u8>, Error> {
        let (path, token) = two_strings(request)?;
        self.add_watch(conn, path, token)?;
        Ok(OK.to_vec())
    }

    fn on_unwatch(&mut self, conn: ConnId, request: &Request) -> Result<Vec<u8>, Error> {
        let (path, token) = two_strings(request)?;
        self.remove_watch(conn, path, token)?;
        Ok(OK.to_vec())
    }

    fn on_reset_watches(&mut self, conn: ConnId) -> Result<Vec<u8>, Error> {
        let connection = self.connections.get_mut(&conn).ok_or(Error::Invalid)?;
        connection.watches.clear();
        connection.transactions.clear();
        Ok(OK.to_vec())
    }

    fn on_transaction_start(&mut self, conn: ConnId, request: &Request) -> Result<Vec<u8>, Error> {
        if request.transaction != 0 {
            return Err(Error::Busy);
        }
        let connection = self.connections.get_mut(&conn).ok_or(Error::Invalid)?;
        let most = match connection.restriction {
            Some(_) => restriction::QUOTA.transactions,
            None if connection.domid == DomId::HOST => usize::MAX,
            None => self.quota.transactions,
        };
        if connection.transactions.len() >= most {
            return Err(Error::NoSpace);
        }
        Ok(wire::join([connection.start_transaction().to_string()]))
    }

    fn on_transaction_end(
        &mut self,
        conn: ConnId,
        domid: DomId,
        request: &Request,
    ) -> Result<Vec<crate::tree::Change>, Error> {
        let commit = match &request.payload[..] {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err(Error::Invalid),
        };
        let connection = self.connections.get_mut(&conn).ok_or(Error::Invalid)?;
        let transaction = connection
            .transactions
            .remove(&request.transaction)
            .ok_or(Error::NoEntry)?;
        if !commit {
            return Ok(Vec::new());
        }
        let rights = self.rights(conn, domid);
        transaction.commit(&mut self.tree, &rights.caller())
    }

    fn on_domains(&mut self, conn: ConnId, request: &Request) -> Result<Vec<u8>, Error> {
        let domid = domid_argument(request);
        if !self.may_manage(conn, request.kind, domid.unwrap_or(DomId::HOST)) {
            return Err(Error::Access);
        }
        let domid = domid?;
        match request.kind {
            kind::IS_DOMAIN_INTRODUCED => {
                let known = domid == DomId::HOST || self.is_introduced(domid);
                return Ok(wire::join([if known { "T" } else { "F" }]));
            }
            kind::INTRODUCE => self.introduce(domid),
            kind::RELEASE => match self.domains.get(&domid) {
                // One that has a UUID has a process, which takes it out.
                Some(known) if known.uuid.is_some() => return Err(Error::Busy),
                Some(_) => self.release(domid),
                None => return Err(Error::NoEntry),
            },
            kind::SET_TARGET => {
                let target = domid_at(request, 1)?;
                if !self.is_introduced(domid) {
                    return Err(Error::NoEntry);
                }
                self.set_target(domid, target);
            }
            _ => {
                if !self.is_introduced(domid) {
                    return Err(Error::NoEntry);
                }
                self.resume(domid);
            }
        }
        Ok(OK.to_vec())
    }
}

fn two_strings(request: &Request) -> Result<(&str, &str), Error> {
    match wire::strings(&request.payload).as_deref() {
        Some(&[a, b]) => Ok((a, b)),
        _ => Err(Error::Invalid),
    }
}

fn domid_argument(request: &Request) -> Result<DomId, Error> {
    domid_at(request, 0)
}

fn domid_at(request: &Request, index: usize) -> Result<DomId, Error> {
    let strings = wire::strings(&request.payload).ok_or(Error::Invalid)?;
    let text = strings.get(index).ok_or(Error::Invalid)?;
    text.parse().map(DomId).map_err(|_| Error::Invalid)
}

fn node_operation(
    view: &mut View<'_>,
    caller: &Caller<'_>,
    request: &Request,
) -> Result<Vec<u8>, Error> {
    // The path is the first string of every request; what follows it in a WRITE is not text.
    let end = request.payload.iter().position(|b| *b == 0);
    let (path, rest) = request.payload.split_at(end.ok_or(Error::Invalid)?);
    let path = std::str::from_utf8(path).map_err(|_| Error::Invalid)?;
    let path = &path::absolute(path, caller.domid)?;
    caller.check_reach(path)?;
    if matches!(
        request.kind,
        kind::WRITE | kind::MKDIR | kind::RM | kind::SET_PERMS
    ) {
        caller.check_change(path)?;
    }
    let rest = &rest[1..];
    if rest.is_empty()
        || matches!(
            request.kind,
            kind::WRITE | kind::SET_PERMS | kind::DIRECTORY_PART
        )
    {
        match request.kind {
            kind::READ => return Ok(view.readable(caller, path)?.value.clone()),
            kind::DIRECTORY => return Ok(wire::join(&view.readable(caller, path)?.children)),
            kind::GET_PERMS => return Ok(perms_answer(&view.readable(caller, path)?.perms)),
            kind::DIRECTORY_PART => return directory_part(view, caller, path, rest),
            kind::WRITE => view.write(caller, path, rest)?,
            kind::MKDIR => view.mkdir(caller, path)?,
            kind::RM => view.remove(caller, path)?,
            _ => view.set_perms(caller, path, perms_argument(rest)?)?,
        }
        return Ok(OK.to_vec());
    }
    Err(Error::Invalid)
}

fn perms_argument(strings: &[u8]) -> Result<Perms, Error> {
    let strings = wire::strings(strings).ok_or(Error::Invalid)?;
    let entries: Option<Vec<Perm>> = strings.into_iter().map(Perm::parse).collect();
    let perms = entries.and_then(|e| Perms::from_entries(&e));
    perms.ok_or(Error::Invalid)
}

/// An operation on the permissions of a path that is no node: done at once, also inside a transaction. `None` where the request is another.
fn special_operation(
    tree: &mut Tree,
    caller: &Caller<'_>,
    request: &Request,
) -> Option<Result<Vec<u8>, Error>> {
    let end = request.payload.iter().position(|b| *b == 0)?;
    let (path, rest) = (&request.payload[..end], &request.payload[end + 1..]);
    let path = std::str::from_utf8(path).ok()?;
    let old = tree.special_perms(path)?.clone();
    let may = |is_right: bool| match is_right {
        true => caller.check_reach(path),
        false => Err(Error::Access),
    };
    match request.kind {
        kind::GET_PERMS if rest.is_empty() => {
            let readable = may(caller.access(&old).may_read());
            Some(readable.map(|()| perms_answer(&old)))
        }
        kind::SET_PERMS => {
            let new = may(caller.owns(&old)).and_then(|()| perms_argument(rest));
            let new = new.and_then(|perms| caller.check_entries(&perms).map(|()| perms));
            Some(new.map(|perms| {
                tree.set_special_perms(path, perms);
                OK.to_vec()
            }))
        }
        _ => None,
    }
}

fn perms_answer(perms: &Perms) -> Vec<u8> {
    wire::join(perms.entries().map(|p| p.to_string()))
}

/// As many whole names as fit, from a byte offset into the list of all; a guest that sees the generation change starts over.
fn directory_part(
    view: &mut View<'_>,
    caller: &Caller<'_>,
    path: &str,
    rest: &[u8],
) -> Result<Vec<u8>, Error> {
    let offset: usize = match wire::strings(rest).as_deref() {
        Some(&[offset]) => offset.parse().map_err(|_| Error::Invalid)?,
        _ => return Err(Error::Invalid),
    };
    let node = view.readable(caller, path)?;
    let names = wire::join(&node.children);
    let left = names.get(offset..).ok_or(Error::Invalid)?;
    let mut reply = wire::join([node.generation.to_string()]);
    let room = PAYLOAD_MAX - reply.len() - 1;
    if left.len() <= room {
        reply.extend(left);
        reply.push(0);
        return Ok(reply);
    }
    let whole = left[..room].iter().rposition(|b| *b == 0);
    reply.extend(&left[..whole.map_or(0, |at| at + 1)]);
    Ok(reply)
}

/// Feeds arbitrary bytes to a store as a guest's requests and fetches what comes of them; for fuzzing. Panics only where the store has a bug.
pub fn fuzz_requests(data: &[u8]) {
    let mut store = Store::default();
    let entry = crate::DomainEntry {
        domid: DomId(1),
        uuid: "00000000-0000-0000-0000-000000000001".to_owned(),
        name: "fuzz".to_owned(),
        memory_kib: 65536,
        memory_max_kib: 65536,
        vcpus: 1,
        console_port: 2,
        console_ring: 0xfefff,
        store_port: 1,
        store_ring: 0xfeffc,
    };
    let entered = store.add_domain(entry.domid, &entry.uuid, &entry.name);
    entered
        .and_then(|()| store.write_all(&entry.nodes()))
        .expect("an empty store takes a domain");
    store.introduce(DomId(1));
    let conn = store.connect(DomId(1), Arc::new(|| {}));
    let mut buf = [0; 1024];
    for chunk in data.chunks(1024) {
        if store.input(conn, chunk).is_err() {
            store.reset(conn);
        }
        while store.output(conn, &mut buf) > 0 {}
    }
}
