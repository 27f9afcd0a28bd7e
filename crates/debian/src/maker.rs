//! From a recipe to the files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use hospes_sys::Termination;

use crate::configuration::{self, Files};
use crate::mirror::{self, Archives};
use crate::program::{Program, Runner};
use crate::recipe::{Format, Recipe, RecipeError};
use crate::seed::{self, SeedError};
use crate::work::{self, Unfinished};

/// The file system's UUID and hash seed: always the same, so that the same packages give the same bytes.
const FS_UUID: &str = "9a3b6c1e-7d52-4f0b-8c5a-686f73706573";
/// The time of everything in an image that has no older one, where `SOURCE_DATE_EPOCH` does not say: 2023-06-10, Debian 12.
const EPOCH_DEFAULT: u64 = 1_686_355_200;

const ESSENTIAL_HOOK: &str = include_str!("essential.sh");
const CUSTOMIZE_HOOK: &str = include_str!("customize.sh");
const LEFT_OUT: [&str; 4] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// What is going on, for people to see.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// The next of a handful of steps.
    Step(&'a str),
    /// A line of a program at work.
    Detail(&'a str),
}

/// The files of a finished image, absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub image: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Where cloud-init was wanted.
    pub seed: Option<PathBuf>,
    pub configuration: PathBuf,
}

impl Made {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.image, &self.kernel, &self.initrd, &self.configuration]
            .into_iter()
            .chain(&self.seed)
    }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error("{path} exists: give another name, or --force to write over it")]
    Exists { path: PathBuf },
    #[error("another image is being made in {path}: wait for it, or give another name")]
    Busy { path: PathBuf },
    #[error("{fault}\nAll that the programs said is in {log}.")]
    Logged {
        fault: Box<BuildError>,
        log: PathBuf,
    },
    // No `source` here and below: what prints a fault with its sources would say the same twice.
    #[error("cannot {what} {path}: {fault}")]
    File {
        what: &'static str,
        path: PathBuf,
        fault: io::Error,
    },
    #[error("{program} is not on this machine: install the package {package}")]
    Missing {
        program: String,
        package: &'static str,
    },
    #[error("{program} could not be run: {fault}")]
    Start { program: String, fault: io::Error },
    #[error("{program} failed ({status}); its last lines:\n{tail}")]
    Program {
        program: String,
        status: ExitStatus,
        tail: String,
    },
    #[error(
        "mmdebstrap needs a user name space here, which needs the package uidmap and a line for this user in /etc/subuid and \
         /etc/subgid (usermod --add-subuids); or run this as root. It said:\n{tail}"
    )]
    NoUserNamespace { tail: String },
    #[error("{path} is no public key of SSH: give the file that ends in .pub")]
    NoPublicKey { path: PathBuf },
    #[error("the first line of {path} is empty: write root's password there")]
    NoPassword { path: PathBuf },
    #[error("interrupted: no image has been made, and what was begun is removed")]
    Interrupted,
}

impl BuildError {
    pub(crate) fn file(what: &'static str, path: &Path, fault: io::Error) -> BuildError {
        BuildError::File {
            what,
            path: path.into(),
            fault,
        }
    }

    pub(crate) fn missing(program: &str) -> BuildError {
        let package = match program {
            "mke2fs" => "e2fsprogs",
            "qemu-img" => "qemu-utils",
            _ => "mmdebstrap",
        };
        BuildError::Missing {
            program: program.into(),
            package,
        }
    }
}

/// Makes the image and what lies beside it. Takes about a minute, most of it for packages, unless `termination` asks to end before that.
///
/// The thread that calls has to wait for it: mmdebstrap is killed when that thread ends.
pub fn build(
    recipe: &Recipe,
    termination: &Termination,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Made, BuildError> {
    recipe.check()?;
    let made = places(recipe)?;
    let unfinished = Unfinished::create(&made.image)?;
    if !recipe.force
        && let Some(path) = made.all().find(|path| path.exists())
    {
        return Err(BuildError::Exists { path: path.clone() });
    }
    let log = unfinished.file("log");
    let runner = Runner {
        log: &log,
        termination,
    };
    make(recipe, &made, &unfinished, &runner, progress).map_err(|fault| {
        if matches!(fault, BuildError::Interrupted) {
            return fault;
        }
        match work::keep_log(&log, &made.image) {
            Some(log) => BuildError::Logged {
                fault: Box::new(fault),
                log,
            },
            None => fault,
        }
    })?;
    Ok(made)
}

fn make(
    recipe: &Recipe,
    made: &Made,
    unfinished: &Unfinished,
    runner: &Runner<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), BuildError> {
    let mut keys = String::new();
    for path in &recipe.ssh_keys {
        let text = read_text(path)?;
        if !is_public_key(&text) {
            return Err(BuildError::NoPublicKey { path: path.clone() });
        }
        keys.push_str(&text);
        keys.push('\n');
    }
    // What is read of the user's files is read before the work begins.
    let seed = match &made.seed {
        Some(path) => Some((path, seed_volume(recipe, &keys)?)),
        None => None,
    };
    let disk = unfinished.file("disk");
    let kernel = unfinished.file("kernel");
    let initrd = unfinished.file("initrd");
    {
        let (_disk, disk_name) = work::writable(&disk, recipe.bytes)?;
        let (_kernel, kernel_name) = work::writable(&kernel, 0)?;
        let (_initrd, initrd_name) = work::writable(&initrd, 0)?;
        let mut program = bootstrap(recipe, unfinished)?;
        program
            .command
            .env("IMAGE", disk_name)
            .env("KERNEL", kernel_name)
            .env("INITRD", initrd_name)
            .env("SSH_KEYS", keys.trim());
        let packages = recipe.all_packages().len();
        runner
            .run(program, |line| work::translate(line, packages, progress))
            .map_err(explain)?;
    }
    let disk = match recipe.format {
        Format::Raw => disk,
        Format::Qcow2 => convert(unfinished, &disk, runner, progress)?,
    };
    // From here on it is a matter of moments, and the files belong together.
    if runner.termination.first().is_some() {
        return Err(BuildError::Interrupted);
    }
    work::finish(&disk, &made.image)?;
    work::finish(&kernel, &made.kernel)?;
    work::finish(&initrd, &made.initrd)?;
    if let Some((path, volume)) = seed {
        write(unfinished, path, &volume)?;
    }
    let files = Files {
        image: &made.image,
        kernel: &made.kernel,
        initrd: &made.initrd,
        seed: made.seed.as_deref(),
    };
    write(
        unfinished,
        &made.configuration,
        configuration::domain(recipe, &files).as_bytes(),
    )
}

fn places(recipe: &Recipe) -> Result<Made, BuildError> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).map_err(|fault| BuildError::file("find", &path, fault))
    };
    let seed = recipe
        .cloud_init
        .then(|| recipe.beside("seed.iso"))
        .transpose()?;
    Ok(Made {
        image: absolute(recipe.output.clone())?,
        kernel: absolute(recipe.beside("vmlinuz")?)?,
        initrd: absolute(recipe.beside("initrd")?)?,
        seed: seed.map(absolute).transpose()?,
        configuration: absolute(recipe.beside("cfg")?)?,
    })
}

/// Whether a file is for authorized_keys(5): lines that name an algorithm, behind options or not, and comments.
fn is_public_key(text: &str) -> bool {
    let mut lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .peekable();
    lines.peek().is_some()
        && lines.all(|line| {
            line.split_whitespace().any(|word| {
                ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-"]
                    .iter()
                    .any(|algorithm| word.starts_with(algorithm))
            })
        })
}

fn read_text(path: &Path) -> Result<String, BuildError> {
    fs::read_to_string(path).map_err(|fault| BuildError::file("read", path, fault))
}

fn write(unfinished: &Unfinished, path: &Path, content: &[u8]) -> Result<(), BuildError> {
    let new = unfinished.file("new");
    fs::write(&new, content).map_err(|fault| BuildError::file("write", path, fault))?;
    work::finish(&new, path)
}

/// The mmdebstrap command, whose hooks write the files.
fn bootstrap(recipe: &Recipe, unfinished: &Unfinished) -> Result<Program, BuildError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{path}:/usr/local/sbin:/usr/sbin:/sbin");
    if !std::env::split_paths(&path).any(|directory| directory.join("mmdebstrap").is_file()) {
        return Err(BuildError::missing("mmdebstrap"));
    }
    let mut program = Program::enclosed("mmdebstrap");
    // Where it is not enclosed it may be another user's files that remain, or mounts, which only mmdebstrap removes.
    let scratch = if program.enclosed {
        let scratch = unfinished.temporary()?;
        program.command.env("TMPDIR", &scratch);
        scratch
    } else {
        "/tmp".into()
    };
    let command = &mut program.command;
    command.args([
        "--variant=minbase",
        "--format=null",
        "--architectures=amd64",
    ]);
    command.args([
        "--aptopt=Acquire::Languages \"none\"",
        "--aptopt=APT::Install-Recommends \"false\"",
    ]);
    if !recipe.docs {
        command.args(LEFT_OUT.map(|rule| format!("--dpkgopt={rule}")));
    }
    command.arg(format!("--include={}", recipe.all_packages().join(",")));
    // As arguments, not as files: in a user name space the hooks may not read our directory.
    command.arg("--essential-hook=sh -euc \"$ESSENTIAL_HOOK\" essential \"$1\"");
    command.arg("--customize-hook=sh -euc \"$CUSTOMIZE_HOOK\" customize \"$1\"");
    command.args([&recipe.suite, "-"]);
    command.args(mirror::sources(
        &recipe.suite,
        recipe.mirror.as_deref(),
        &Archives::of_this_machine(),
    ));
    let password = match &recipe.password_file {
        Some(path) => match read_text(path)?.lines().next() {
            None | Some("") => return Err(BuildError::NoPassword { path: path.clone() }),
            Some(password) => password.to_string(),
        },
        None => String::new(),
    };
    let run = match &recipe.run {
        Some(path) => read_text(path)?,
        None => String::new(),
    };
    let epoch = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|text| text.parse().ok());
    command
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .env("ESSENTIAL_HOOK", ESSENTIAL_HOOK)
        .env("CUSTOMIZE_HOOK", CUSTOMIZE_HOOK)
        .env(
            "SOURCE_DATE_EPOCH",
            epoch.unwrap_or(EPOCH_DEFAULT).to_string(),
        )
        .env("HOSTNAME_OF_GUEST", &recipe.hostname)
        .env("AUTOLOGIN", if recipe.autologin { "yes" } else { "no" })
        .env("PASSWORD", password)
        .env("RUN", run)
        .env("SCRATCH", scratch)
        .env("FS_UUID", FS_UUID)
        .env("FS_BYTES", recipe.bytes.to_string())
        .current_dir("/");
    Ok(program)
}

fn explain(fault: BuildError) -> BuildError {
    match fault {
        BuildError::Program { tail, .. }
            if !rustix::process::geteuid().is_root() && wants_user_namespace(&tail) =>
        {
            BuildError::NoUserNamespace { tail }
        }
        fault => fault,
    }
}

/// Whether mmdebstrap has said that it cannot work without root here.
fn wants_user_namespace(tail: &str) -> bool {
    // The last is all that it says where newuidmap is missing, or the user's line in /etc/subuid.
    [
        "newuidmap",
        "subuid",
        "unshare",
        "unable to pick chroot mode",
    ]
    .iter()
    .any(|words| tail.contains(words))
}

fn convert(
    unfinished: &Unfinished,
    raw: &Path,
    runner: &Runner<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, BuildError> {
    progress(Progress::Step("converting to qcow2"));
    let path = unfinished.file("qcow2");
    let mut program = Program::new("qemu-img");
    program
        .command
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(raw)
        .arg(&path);
    runner.run(program, |line| progress(Progress::Detail(line)))?;
    Ok(path)
}

fn seed_volume(recipe: &Recipe, keys: &str) -> Result<Vec<u8>, BuildError> {
    let user_data = match &recipe.user_data {
        Some(path) => read_text(path)?,
        None => configuration::user_data(&recipe.hostname, keys),
    };
    let meta_data = configuration::meta_data(&recipe.hostname);
    let files = [
        ("user-data", user_data.as_bytes()),
        ("meta-data", meta_data.as_bytes()),
    ];
    Ok(seed::volume(&files)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_user_namespace_is_told_from_other_faults() {
        let said = "E: unable to pick chroot mode automatically (use --mode for manual selection)";
        assert!(wants_user_namespace(said));
        assert!(!wants_user_namespace("E: Unable to locate package nosuch"));
    }
}
