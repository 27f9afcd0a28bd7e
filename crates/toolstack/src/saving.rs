//! Saving a domain into a file, and making a domain of one.
//!
//! The command writes the file, and the domain process does what only it can: after the request and [`Reply::Saving`] the stream of `hospes_migration` comes
//! over the control connection. When the command has it safely it says what becomes of the domain, an [`AfterSave`]; where it cannot say that, the guest
//! goes on as if nothing had been.

use std::fs::{File, Metadata};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hospes_config::{DomainConfig, check_name};
use hospes_migration::{Reader, StreamError, Writer};
use hospes_units::DomId;
use serde::{Deserialize, Serialize};

use crate::client::{CONNECT_PATIENCE, Host, done, read_reply, send, unexpected};
use crate::each::check_goes_on;
use crate::error::{Error, Result, at};
use crate::images::SavedImage;
use crate::instance::Instance;
use crate::launch::{self, Created};
use crate::log::log;
use crate::protocol::{self, AfterSave, Reply, Request};
use crate::target::Target;

/// How long a guest may take to suspend itself: longer than the domain process waits for it.
pub(crate) const SUSPEND_PATIENCE: Duration = Duration::from_secs(90);
/// How much of a stream is on its way at a time, in bytes.
pub(crate) const BUFFER: usize = 1 << 20;

/// What a stream says of the domain before its state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedConfig {
    pub(crate) config: DomainConfig,
    /// What it is started with the next time, where that was set apart.
    #[serde(default)]
    pub(crate) next: Option<DomainConfig>,
    /// What it shows of itself where it comes from another host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) passport: Option<String>,
    /// The images of its disks, where its guest is suspended already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) images: Vec<SavedImage>,
}

impl SavedConfig {
    /// A domain's own, or another for the same domain.
    pub(crate) fn new(instance: &Instance, config: Option<DomainConfig>) -> SavedConfig {
        let (config, next) = match config {
            Some(config) => {
                let uuid = config.uuid.or(instance.config().uuid);
                (DomainConfig { uuid, ..config }, None)
            }
            None => (instance.config(), instance.prepared_config()),
        };
        SavedConfig {
            config,
            next,
            passport: None,
            images: Vec::new(),
        }
    }

    /// Of the text in a stream.
    pub(crate) fn read(text: &[u8]) -> std::result::Result<SavedConfig, String> {
        let saved: SavedConfig = serde_json::from_slice(text).map_err(|why| why.to_string())?;
        for config in [&saved.config].into_iter().chain(&saved.next) {
            check_name(&config.name).map_err(|why| why.to_string())?;
        }
        Ok(saved)
    }
}

/// A saved domain that is about to be restored.
pub struct SavedDomain {
    reader: Reader<Box<dyn Read>>,
    path: PathBuf,
    /// Of the domain as it was saved.
    pub config: DomainConfig,
    next: Option<DomainConfig>,
    images: Vec<SavedImage>,
    /// When the file was complete.
    saved: Option<SystemTime>,
}

impl std::fmt::Debug for SavedDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SavedDomain({})", self.path.display())
    }
}

impl SavedDomain {
    /// Opens a file that a domain was saved in.
    pub fn open(path: &Path) -> Result<SavedDomain> {
        let file = File::open(path).map_err(at("cannot open", path))?;
        let metadata = file.metadata().ok().filter(Metadata::is_file);
        let file: Box<dyn Read> = Box::new(BufReader::with_capacity(BUFFER, file));
        let fault = |source| Error::SavedFile {
            path: path.to_path_buf(),
            source,
        };
        let (reader, text) = Reader::new(file).map_err(fault)?;
        let saved = SavedConfig::read(&text).map_err(|why| {
            Error::Protocol(format!(
                "{}: the configuration of the saved domain is not understood ({why})",
                path.display()
            ))
        })?;
        Ok(SavedDomain {
            reader,
            path: path.to_path_buf(),
            config: saved.config,
            next: saved.next,
            images: saved.images,
            saved: metadata.and_then(|metadata| metadata.modified().ok()),
        })
    }

    /// What shows that the disks are not as the guest left them, a sentence for each.
    pub fn changed_disks(&self) -> Vec<String> {
        let images = self.images.iter();
        images
            .filter_map(|image| image.change(&self.config, self.saved))
            .collect()
    }

    /// Takes another configuration in place of the one that was saved; the domain stays the same by its UUID where it has none.
    pub fn set_config(&mut self, config: DomainConfig) {
        let uuid = config.uuid.or(self.config.uuid);
        self.config = DomainConfig { uuid, ..config };
        self.next = None;
    }
}

impl Host {
    /// Saves a domain in a file, which has all of it and is on the disk when this returns. After an error it is as it was before, unless that is
    /// [`Error::SavedUnsure`]. Calls `progress` with the pages written.
    pub fn save(
        &self,
        who: &str,
        path: &Path,
        config: Option<DomainConfig>,
        after: AfterSave,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let config = config
            .map(|mut config| launch::resolve(&mut config).map(|()| Box::new(config)))
            .transpose()?;
        // Before the guest stops for it.
        let mut target = Target::open(path)?;
        let (domid, stream) = self.ask_to_save(who, &Request::Save { config })?;
        let fault = |source| Error::Unreachable { domid, source };
        let mut from = BufReader::with_capacity(BUFFER, &stream);
        let timeout = |time| stream.set_read_timeout(time).map_err(fault);
        timeout(Some(SUSPEND_PATIENCE))?;
        match read_reply(domid, &mut from)? {
            Reply::Saving => {}
            reply => return Err(unexpected(&reply)),
        }
        timeout(None)?;
        copy(&mut from, &mut target.file, path, progress).map_err(|fault| match fault {
            Error::SavedFile {
                source: StreamError::Truncated,
                ..
            } => Error::Refused {
                domid,
                message: "it has not written all of itself: its log says why".into(),
            },
            fault => fault,
        })?;
        target.finish()?;
        // From here on the file is there, whatever comes.
        let unsure = |why| Error::SavedUnsure {
            path: path.to_path_buf(),
            why: Box::new(why),
        };
        target.settle().map_err(unsure)?;
        // The domain closes its disks behind this moment. Where the time stays the last write's, which is a little before, that does little harm.
        let _ = target.file.set_modified(SystemTime::now());
        let told = protocol::send(&stream, &after)?.map_err(fault);
        let ended = told.and_then(|()| done(read_reply(domid, &mut from)?));
        ended.map_err(unsure)
    }

    /// Asks for the stream of a domain.
    pub(crate) fn ask_to_save(&self, who: &str, request: &Request) -> Result<(DomId, UnixStream)> {
        let entry = self.find(who)?;
        check_goes_on(&entry)?;
        self.check_room()?;
        let stream = send(&entry, request, CONNECT_PATIENCE)?;
        Ok((entry.domid, stream))
    }

    /// Makes a domain of a saved one and returns when it is there. Calls `progress` with the pages read.
    pub fn restore(
        &self,
        saved: SavedDomain,
        paused: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Created> {
        self.check_room()?;
        let SavedDomain {
            mut reader,
            path,
            config,
            next,
            ..
        } = saved;
        let mut feed = |to: &mut dyn Write| {
            reader
                .pass_on(io::BufWriter::with_capacity(BUFFER, to), &mut *progress)
                .map_err(|source| Error::SavedFile {
                    path: path.clone(),
                    source,
                })
        };
        launch::restore(self.paths(), config, next, paused, &mut feed)
    }
}

/// Writes a stream as it comes, from its beginning to its end.
fn copy(from: impl Read, to: &mut File, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let fault = |source| Error::SavedFile {
        path: path.to_path_buf(),
        source,
    };
    let mut to = io::BufWriter::with_capacity(BUFFER, to);
    let (mut reader, config) = Reader::new(from).map_err(fault)?;
    // The beginning is written anew; what is read is what was written there.
    Writer::new(&mut to, &config).map_err(|source| fault(StreamError::Write(source)))?;
    reader.pass_on(&mut to, progress).map_err(fault)
}

/// Answers [`Request::Save`] on a connection: the domain's side. `None` where the client has left.
pub(crate) fn answer(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
    instance: &Instance,
    config: Option<DomainConfig>,
    has_left: &dyn Fn() -> bool,
) -> Option<Answer> {
    let Some(saving) = instance.begin_save() else {
        let message = instance.is_fixed();
        let message = message.unwrap_or_else(|| Instance::SAVING.into());
        return Some(Answer::Reply(Reply::Error { message }));
    };
    let machine = instance.machine();
    saving.is_to_suspend();
    log!("Saving: the guest is asked to suspend itself");
    if let Err(fault) = machine.suspend(has_left) {
        log!("The domain is not saved: {fault}");
        return Some(Answer::Reply(Reply::Error {
            message: fault.to_string(),
        }));
    }
    let sent = instance
        .end_client_too(stream)
        .map_err(AnyError::from)
        .and_then(|()| send_stream(stream, instance, config))
        .and_then(|()| receive_verdict(stream, reader));
    instance.let_client_be();
    match sent {
        Ok(AfterSave::Destroy) if machine.end_saved() => {
            log!("The domain is saved");
            Some(Answer::Destroy)
        }
        Ok(AfterSave::Destroy) => {
            log!("The domain has gone on while it was saved");
            let message = "it has gone on while it was saved: do not restore the file".into();
            Some(Answer::Reply(Reply::Error { message }))
        }
        Ok(AfterSave::GoOn { paused }) => {
            log!("The domain is saved and goes on");
            if paused {
                machine.pause();
            }
            machine.resume();
            Some(Answer::Reply(Reply::Done))
        }
        Err(fault) => {
            log!("The domain is not saved and goes on: {fault}");
            machine.resume();
            None
        }
    }
}

/// What [`answer`] has come to.
pub(crate) enum Answer {
    Reply(Reply),
    /// The domain is to be destroyed, for it is somewhere else now.
    Destroy,
}

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn send_stream(
    mut stream: &UnixStream,
    instance: &Instance,
    config: Option<DomainConfig>,
) -> std::result::Result<(), AnyError> {
    let mut saved = SavedConfig::new(instance, config);
    saved.images = SavedImage::all(&instance.config());
    let text = serde_json::to_vec(&saved)?;
    protocol::send(stream, &Reply::Saving)??;
    let mut buffered = io::BufWriter::with_capacity(BUFFER, &mut stream);
    let to: &mut dyn Write = &mut buffered;
    let mut writer = Writer::new(to, &text)?;
    instance.machine().save(&mut writer)?;
    writer.end()?;
    Ok(())
}

/// However long the client takes to write what it has: it is there or it is not.
fn receive_verdict(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
) -> std::result::Result<AfterSave, AnyError> {
    stream.set_read_timeout(None)?;
    let line = protocol::read_line(reader)??;
    let line = line.ok_or("the command that was to keep it has gone")?;
    Ok(protocol::decode(&line)?)
}
