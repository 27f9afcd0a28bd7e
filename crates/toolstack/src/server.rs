//! The sockets of a domain process.

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use hospes_config::{CpuList, DomainConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::ending::Ending;
use crate::error::{Result, at};
use crate::hub::{ConsoleHub, Watcher};
use crate::instance::Instance;
use crate::log::log;
use crate::machine::{Machine, MachineError};
use crate::protocol::{self, Ended, Reply, Request, ShutdownKind, Until};
use crate::scheduling::{host_cpus, resolve};
use crate::{dumping, leaving, saving, shutting_down};

/// Most connections at a time, per socket.
const CONNECTIONS_MAX: usize = 32;
/// A control connection without a request for so long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// How long to wait before another connection is accepted where one could not be.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How often a waiting connection looks whether its client is still there.
const MOMENT: Duration = Duration::from_millis(500);
/// How long input waits for room in the guest before it tries again.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// The two listening sockets.
pub(crate) struct Server {
    listeners: Vec<UnixListener>,
}

impl Server {
    /// Binds the sockets in a domain's directory and serves them from threads.
    pub(crate) fn start(
        dir: &Path,
        instance: &Arc<Instance>,
        hub: &Arc<ConsoleHub>,
        ending: &Arc<Ending>,
    ) -> Result<Server> {
        let mut server = Server {
            listeners: Vec::new(),
        };
        let for_console = hub.clone();
        server.listen(
            &dir.join("console.sock"),
            |mut stream| {
                // Whoever does not get it is gone.
                let _ = writeln!(stream, "{}\r", full());
            },
            || (),
            move |stream, ()| serve_console(&stream, &for_console),
        )?;
        // An idle connection must not keep an ended machine's memory.
        let instance = Arc::downgrade(instance);
        let to_announce = instance.clone();
        let ending = ending.clone();
        server.listen(
            &dir.join("control.sock"),
            |stream| refuse(stream, &full()),
            move || Announced::new(&to_announce),
            move |stream, announced| serve_control(&stream, announced, &instance, &ending),
        )?;
        Ok(server)
    }

    /// Accepts connections in one thread, in their order, and serves each in a thread of its own, with what was made of it when it was accepted.
    /// One that is too many is told so and closed; what fits into a new socket's buffer does not block.
    fn listen<T: Send + 'static>(
        &mut self,
        path: &Path,
        turn_away: impl Fn(&UnixStream) + Send + 'static,
        accepted: impl Fn() -> T + Send + 'static,
        serve: impl Fn(UnixStream, T) + Send + Sync + 'static,
    ) -> Result<()> {
        let listener = UnixListener::bind(path).map_err(at("cannot make the socket", path))?;
        fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(at("cannot protect the socket", path))?;
        let accepting = listener
            .try_clone()
            .map_err(at("cannot use the socket", path))?;
        let serve = Arc::new(serve);
        let connections = Arc::new(AtomicUsize::new(0));
        thread::spawn(move || {
            loop {
                let stream = match accepting.accept() {
                    Ok((stream, _)) => stream,
                    // The socket is shut down.
                    Err(fault) if fault.kind() == ErrorKind::InvalidInput => return,
                    // The client has left, or the host lacks files or memory for a while.
                    Err(_) => {
                        thread::sleep(ACCEPT_RETRY);
                        continue;
                    }
                };
                if !is_allowed(&stream) {
                    continue;
                }
                if connections.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
                    turn_away(&stream);
                    continue;
                }
                let place = Place::take(&connections);
                let (serve, accepted) = (serve.clone(), accepted());
                let served = thread::Builder::new().spawn(move || {
                    serve(stream, accepted);
                    drop(place);
                });
                if let Err(fault) = served {
                    log!("a command cannot be served, the host has no thread for it: {fault}");
                }
            }
        });
        self.listeners.push(listener);
        Ok(())
    }

    /// Takes no more connections; those that are there stay.
    pub(crate) fn stop(&self) {
        for listener in &self.listeners {
            if let Err(fault) = rustix::net::shutdown(listener, rustix::net::Shutdown::Both) {
                log!("a socket cannot be closed: {fault}");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The place of a connection among those that there may be at a time.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(places: &Arc<AtomicUsize>) -> Place {
        places.fetch_add(1, Ordering::Relaxed);
        Place(places.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The peer has to be this user or root. The directory's mode says so already; a passed file descriptor would not.
fn is_allowed(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// While there is one the process does not end before its connection has been answered.
struct Announced(Weak<Instance>);

impl Announced {
    fn new(instance: &Weak<Instance>) -> Announced {
        if let Some(instance) = instance.upgrade() {
            instance.add_waiting();
        }
        Announced(instance.clone())
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if let Some(instance) = self.0.upgrade() {
            instance.forget_waiting();
        }
    }
}

/// `first` is from the moment the connection was accepted: somebody who asks for the end, and then for what brings it about, is told.
fn serve_control(
    stream: &UnixStream,
    first: Announced,
    instance: &Weak<Instance>,
    ending: &Ending,
) {
    if stream.set_read_timeout(Some(IDLE)).is_err() {
        return;
    }
    let mut announced = Some(first);
    let mut reader = BufReader::new(stream);
    loop {
        let line = match protocol::read_line(&mut reader) {
            Ok(Ok(Some(line))) => line,
            Ok(_) => return,
            Err(fault) => return refuse(stream, &fault),
        };
        let request = match protocol::decode(&line) {
            Ok(request) => request,
            Err(fault) => return refuse(stream, &fault),
        };
        let Some(instance) = instance.upgrade() else {
            return;
        };
        let announced = announced
            .take()
            .unwrap_or_else(|| Announced::new(&Arc::downgrade(&instance)));
        let answered = answer(stream, &mut reader, &instance, ending, request)
            .is_some_and(|reply| reply_to(stream, &reply));
        drop(announced);
        if !answered {
            return;
        }
    }
}

fn refuse(stream: &UnixStream, fault: &dyn Display) {
    reply_to(
        stream,
        &Reply::Error {
            message: fault.to_string(),
        },
    );
}

/// What a connection is told that is one too many.
fn full() -> String {
    format!(
        "it has {CONNECTIONS_MAX} connections already and takes no more: end commands or consoles that wait for it, or try again later"
    )
}

/// False where the peer is gone.
fn reply_to(stream: &UnixStream, reply: &Reply) -> bool {
    matches!(protocol::send(stream, reply), Ok(Ok(())))
}

/// The reply to a request to save the domain; `None` where the client has left.
fn save(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
    instance: &Instance,
    config: Option<Box<DomainConfig>>,
) -> Option<Reply> {
    let left = || has_left(stream, Some(Duration::ZERO));
    let answer = saving::answer(stream, reader, instance, config.map(|c| *c), &left)?;
    conclude(stream, instance, answer)
}

/// Does what a domain is to do that has been saved or moved.
fn conclude(stream: &UnixStream, instance: &Instance, answer: saving::Answer) -> Option<Reply> {
    match answer {
        saving::Answer::Reply(reply) => Some(reply),
        saving::Answer::Destroy => {
            instance.destroy();
            match wait(stream, instance, Until::Death)? {
                Reply::Ended(Ended {
                    next: Some(next), ..
                }) => Some(Reply::Error {
                    message: format!("it has started anew as domain {next}"),
                }),
                _ => Some(Reply::Done),
            }
        }
    }
}

/// The reply to a request to move the domain; `None` where the client has left or is told otherwise.
fn migrate(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
    instance: &Instance,
    ending: &Ending,
    config: Option<Box<DomainConfig>>,
) -> Option<Reply> {
    let left = || has_left(stream, Some(Duration::ZERO));
    let config = config.map(|c| *c);
    let answer = leaving::answer(stream, reader, instance, ending, config, &left)?;
    conclude(stream, instance, answer)
}

/// `None` where the client has left, or has to ask the domain's next instance.
fn answer(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
    instance: &Instance,
    ending: &Ending,
    request: Request,
) -> Option<Reply> {
    let machine = instance.machine();
    if request.asks_guest() && instance.has_shut_down() {
        let message = if instance.returns() {
            Instance::RETURNS
        } else if matches!(
            request,
            Request::Shutdown {
                kind: ShutdownKind::Poweroff,
                ..
            }
        ) {
            // What was wanted has come already: nobody's script has to fail for that.
            return Some(Reply::Done);
        } else {
            "it has shut down already: destroy it"
        };
        return Some(Reply::Error {
            message: message.into(),
        });
    }
    if request.is_change() && instance.has_handed_on() {
        return None;
    }
    if request.is_change()
        && !request.is_order()
        && let Some(message) = instance.is_fixed()
    {
        return Some(Reply::Error { message });
    }
    Some(match request {
        Request::Info => Reply::Info(Box::new(instance.info())),
        Request::Pause => done(instance.pause()),
        Request::Unpause => done(instance.unpause()),
        Request::Shutdown { kind, last: true } => done(ending.ask(kind)),
        Request::Shutdown { kind, .. } => {
            let left = || has_left(stream, Some(Duration::ZERO));
            shutting_down::answer(instance, kind, &left)?
        }
        Request::Destroy => {
            instance.destroy();
            match wait(stream, instance, Until::Death)? {
                // Too late: the domain goes on under another id.
                Reply::Ended(Ended { next: Some(_), .. }) => return None,
                _ => Reply::Done,
            }
        }
        Request::Wait { until } => wait(stream, instance, until)?,
        Request::AttachDisk { disk } => done(instance.attach_disk(disk)),
        Request::AttachVif { vif } => done(instance.attach_vif(vif)),
        Request::DetachDevice { kind, devid, force } => done(instance.detach(kind, devid, force)),
        Request::ResizeDisk { devid, bytes } => done(instance.resize_disk(devid, bytes)),
        Request::ChangeMedium { disk } => done(instance.change_medium(disk)),
        Request::Sysrq { key } => done(instance.order(|machine| machine.send_sysrq(key))),
        Request::Trigger { trigger, vcpu } => {
            done(instance.order(|machine| machine.trigger(trigger, vcpu)))
        }
        Request::Rename { name } => done(instance.rename(&name)),
        Request::UpdateConfig { config } => done(instance.update_config(*config)),
        Request::Describe => {
            for line in machine.describe().lines() {
                log!("{line}");
            }
            Reply::Done
        }
        Request::DumpCore => dumping::answer(stream, instance)?,
        Request::Vcpus => Reply::Vcpus {
            vcpus: machine.vcpus(),
        },
        Request::Pin { vcpu, hard, soft } => {
            done(instance.order(|machine| pin(machine, vcpu, hard.as_ref(), soft.as_ref())))
        }
        Request::Share => Reply::Share(machine.share()),
        Request::SetShare { weight, cap } => done(instance.set_share(weight, cap)),
        Request::SetVcpus { online } => done(instance.set_vcpus(online)),
        Request::SetMemoryTarget { kib } => done(instance.set_memory_target(kib)),
        Request::SetMemoryMax { kib } => done(instance.set_memory_max(kib)),
        Request::Migrate { config } => migrate(stream, reader, instance, ending, config)?,
        Request::Save { config } => save(stream, reader, instance, config)?,
    })
}

fn done<E: Display>(result: std::result::Result<(), E>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(fault) => Reply::Error {
            message: fault.to_string(),
        },
    }
}

fn pin(
    machine: &dyn Machine,
    vcpu: Option<u32>,
    hard: Option<&CpuList>,
    soft: Option<&CpuList>,
) -> std::result::Result<(), MachineError> {
    let host = host_cpus();
    let meaning = |list: Option<&CpuList>| list.map(|list| resolve(list, &host)).transpose();
    let (hard, soft) = (meaning(hard)?, meaning(soft)?);
    machine.pin(vcpu, hard.as_ref(), soft.as_ref())
}

fn wait(stream: &UnixStream, instance: &Instance, until: Until) -> Option<Reply> {
    loop {
        if let Some(ended) = instance.wait_moment(until, MOMENT) {
            return Some(Reply::Ended(ended));
        }
        if has_left(stream, Some(Duration::ZERO)) {
            return None;
        }
    }
}

/// Whether the peer has closed its end altogether; waits for that so long, for ever without a time.
fn has_left(stream: &UnixStream, time: Option<Duration>) -> bool {
    let mut descriptors = [PollFd::new(stream, PollFlags::empty())];
    let time = time.map(|time| Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    loop {
        match poll(&mut descriptors, time.as_ref()) {
            Ok(_) => {
                return descriptors[0]
                    .revents()
                    .intersects(PollFlags::HUP | PollFlags::ERR);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

fn serve_console(stream: &UnixStream, hub: &Arc<ConsoleHub>) {
    let watcher = hub.attach();
    thread::scope(|scope| {
        scope.spawn(|| {
            pass_output(stream, &watcher);
            watcher.finish();
            // Ends the other direction too.
            let _ = stream.shutdown(Shutdown::Both);
        });
        pass_input(stream, hub);
        // A client may close its input and go on reading.
        has_left(stream, None);
        watcher.close();
    });
}

fn pass_output(mut stream: &UnixStream, watcher: &Watcher) {
    while let Some(chunk) = watcher.next() {
        if stream.write_all(&chunk).is_err() {
            return;
        }
    }
}

fn pass_input(mut stream: &UnixStream, hub: &ConsoleHub) {
    let mut buffer = [0; 1024];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 {
            return;
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let taken = hub.input(rest).min(rest.len());
            rest = &rest[taken..];
            if taken == 0 {
                if has_left(stream, Some(Duration::ZERO)) {
                    return;
                }
                thread::sleep(INPUT_RETRY);
            }
        }
    }
}
