//! A run-time directory of its own for every test, and the program run in it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// After so long a test gives up: no measure of anything.
const GIVE_UP: Duration = Duration::from_secs(60);

pub struct Bench {
    dir: PathBuf,
}

impl Bench {
    pub fn new() -> Bench {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("hospes-mock-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temporary directory");
        std::fs::write(dir.join("kernel"), "no kernel").expect("writable");
        Bench { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path("log").join(name)).unwrap_or_default()
    }

    pub fn domain_dir(&self, id: u32) -> PathBuf {
        self.path("run/domains").join(id.to_string())
    }

    /// The process of a domain.
    pub fn pid(&self, id: u32) -> i32 {
        self.process(id, "pid")
    }

    /// The process that the guest is in.
    pub fn machine(&self, id: u32) -> i32 {
        self.process(id, "machine")
    }

    fn process(&self, id: u32, which: &str) -> i32 {
        let text = std::fs::read(self.domain_dir(id).join("domain.json")).expect("a record");
        let record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        i32::try_from(record[which].as_i64().expect("a pid")).expect("a pid")
    }

    pub fn command(&self) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_hospes-mock")))
    }

    /// The same of a program by another name.
    pub fn command_of(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("HOSPES_RUN_DIR", self.path("run"))
            .env("HOSPES_LOG_DIR", self.path("log"))
            .env("HOSPES_DUMP_DIR", self.path("dump"));
        command
    }

    /// The arguments that create a domain of this name.
    pub fn creation(&self, name: &str, options: &[&str]) -> Vec<String> {
        let mut arguments = vec!["create".to_string()];
        arguments.extend(options.iter().map(|option| option.to_string()));
        arguments.push("/dev/null".into());
        arguments.push(format!("name='{name}'; type='pvh'; memory=64"));
        arguments.push(format!("kernel='{}'", self.path("kernel").display()));
        arguments
    }

    pub fn run<A: AsRef<str>>(&self, arguments: &[A]) -> Output {
        let arguments = arguments.iter().map(AsRef::as_ref);
        self.command()
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("the program can be started")
    }

    /// Runs a command that has to succeed; its standard output.
    pub fn ok<A: AsRef<str>>(&self, arguments: &[A]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that has to fail with this status; its standard error.
    pub fn fails<A: AsRef<str>>(&self, status: i32, arguments: &[A]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}");
        said
    }

    pub fn create(&self, name: &str, more: &[&str]) {
        let mut arguments = self.creation(name, &["-q"]);
        arguments.extend(more.iter().map(|argument| argument.to_string()));
        self.ok(&arguments);
    }

    /// Has a domain's guest hear a line.
    pub fn tell(&self, name: &str, line: &str) {
        let mut console = self.spawn(&["console", name]);
        console.send(&format!("{line}\n"));
        console.expect(&format!("echo: {line}"));
        console.stdin = None;
    }

    /// The columns of a domain's row in the list: name, id, memory, vCPUs, state, time.
    pub fn row(&self, name: &str) -> Option<Vec<String>> {
        let table = self.ok(&["list"]);
        let row = table
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name))?;
        Some(row.split_whitespace().map(String::from).collect())
    }

    /// Has nobody else use the registry while it is kept.
    pub fn hold_registry(&self) -> File {
        let registry = File::open(self.path("run/lock")).expect("there");
        flock(&registry, FlockOperation::LockExclusive).expect("a file");
        registry
    }

    pub fn spawn<A: AsRef<str>>(&self, arguments: &[A]) -> Session {
        let mut child = self
            .command()
            .args(arguments.iter().map(AsRef::as_ref))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the program can be started");
        let stdin = child.stdin.take();
        let output = read_in_thread(child.stdout.take().expect("piped"));
        Session {
            child,
            stdin,
            output,
            seen: String::new(),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Ok(listing) = std::fs::read_dir(self.path("run/domains")) {
            for item in listing.flatten() {
                let name = item.file_name();
                let _ = self
                    .command()
                    .arg("destroy")
                    .arg(&name)
                    .stderr(Stdio::null())
                    .status();
            }
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A connection to a domain's control socket.
pub struct Control(BufReader<UnixStream>);

impl Control {
    pub fn open(bench: &Bench, id: u32) -> Control {
        let stream =
            UnixStream::connect(bench.domain_dir(id).join("control.sock")).expect("it listens");
        let patience = Some(Duration::from_secs(60));
        stream.set_read_timeout(patience).expect("a socket");
        Control(BufReader::new(stream))
    }

    pub fn send(&self, request: &str) {
        let line = format!("{{\"version\":1,\"body\":{request}}}\n");
        self.0
            .get_ref()
            .write_all(line.as_bytes())
            .expect("it listens");
    }

    /// The answer, which is empty where the connection was closed without one.
    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer or the end");
        line
    }
}

/// A request for it.
pub const REBOOT: &str = r#"{"op":"shutdown","kind":"reboot"}"#;

/// Everything that can be read, as it comes.
pub fn read_in_thread(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = from.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if length == 0 || sender.send(text).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A running command.
pub struct Session {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    output: Receiver<String>,
    seen: String,
}

impl Session {
    pub fn send(&mut self, text: &str) {
        self.stdin
            .as_mut()
            .expect("open")
            .write_all(text.as_bytes())
            .expect("it listens");
    }

    /// Reads until `text` has come, and forgets what came up to there.
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + GIVE_UP;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            match self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(more) => self.seen.push_str(&more),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended without {text:?}: {:?}", self.seen)
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} has come: {:?}", self.seen),
            }
        }
    }

    /// The exit status.
    pub fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        until("the command ends", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is so.
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + GIVE_UP;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never was so that {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// How often the guest of the domain "one" is known to have said something.
pub fn said(bench: &Bench, text: &str) -> usize {
    bench.log("one.console.log").matches(text).count()
}

/// Waits until it has said something so often: its words come to the log when they can, the answers to commands before or after them.
#[track_caller]
pub fn until_said(bench: &Bench, text: &str, times: usize) {
    until(&format!("`{text}' is said {times} times"), || {
        said(bench, text) == times
    });
}

/// The fields of /proc/PID/stat behind the name: state, parent, process group, session.
pub fn process_fields(pid: i32) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))
        .expect("a process");
    let (_, fields) = text.rsplit_once(')').expect("its form");
    fields.split_whitespace().map(String::from).collect()
}
