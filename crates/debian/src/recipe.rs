//! What a user wants of an image, and which wishes cannot be had.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The least that holds the packages of the smallest recipe with room to breathe, bytes.
const BYTES_MIN: u64 = 768 << 20;
/// What ext4 with 4 KiB blocks and no 64-bit surprises can hold, bytes.
const BYTES_MAX: u64 = 16 << 40;
/// Block of the file system.
const BLOCK_BYTES: u64 = 4096;

/// Format of the disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes; blocks that hold nothing take no room.
    Raw,
    /// QEMU's format, written by qemu-img(1).
    Qcow2,
}

impl Format {
    /// The word that xl-disk-configuration(5) has for it.
    pub fn word(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl FromStr for Format {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<Format, RecipeError> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(RecipeError::Format(text.into())),
        }
    }
}

/// Which of Debian's kernels goes into the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// linux-image-cloud-amd64: small, with what virtual machines have.
    Cloud,
    /// linux-image-amd64: all drivers.
    Generic,
}

impl Kernel {
    /// The metapackage.
    pub fn package(self) -> &'static str {
        match self {
            Kernel::Cloud => "linux-image-cloud-amd64",
            Kernel::Generic => "linux-image-amd64",
        }
    }
}

impl FromStr for Kernel {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<Kernel, RecipeError> {
        match text {
            "cloud" => Ok(Kernel::Cloud),
            "generic" => Ok(Kernel::Generic),
            _ => Err(RecipeError::Kernel(text.into())),
        }
    }
}

/// One image.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The image; kernel, initial root file system and configuration lie beside it, with other extensions.
    pub output: PathBuf,
    pub suite: String,
    /// Address of the archive; that of this machine when not given.
    pub mirror: Option<String>,
    pub kernel: Kernel,
    /// Packages beside those that every image has.
    pub packages: Vec<String>,
    /// Size of the disk, bytes.
    pub bytes: u64,
    pub format: Format,
    pub hostname: String,
    /// Root is logged in on the console without being asked.
    pub autologin: bool,
    /// Files with the public keys that may log in as root by SSH.
    pub ssh_keys: Vec<PathBuf>,
    /// File whose first line becomes root's password.
    pub password_file: Option<PathBuf>,
    /// With cloud-init, and a seed disk for it.
    pub cloud_init: bool,
    /// cloud-init's user-data instead of one made from host name and keys.
    pub user_data: Option<PathBuf>,
    /// A program that is run in the new root once everything is installed.
    pub run: Option<PathBuf>,
    /// With manual pages, documentation and translations.
    pub docs: bool,
    /// Memory in the configuration file, MB.
    pub memory_mb: u32,
    /// Virtual CPUs in the configuration file.
    pub vcpus: u32,
    /// Write over what is there.
    pub force: bool,
}

/// Why a recipe cannot be followed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    #[error("there is no image format `{0}': use raw or qcow2")]
    Format(String),
    #[error("there is no kernel `{0}': use cloud or generic")]
    Kernel(String),
    #[error("`{0}' is no size: give a number with K, M, G or T, such as 4G")]
    Size(String),
    #[error("{0} bytes are no size for a Debian disk: give between 768M and 16T")]
    SizeOutOfRange(u64),
    #[error(
        "{0} bytes are no whole blocks of 4096 bytes: give the size with M, G or T, such as 4G"
    )]
    SizeNotInBlocks(u64),
    #[error("`{0}' is no host name: letters, digits and inner hyphens, at most 63")]
    Hostname(String),
    #[error("`{0}' is no package name: lower-case letters, digits, +, - and . are allowed")]
    Package(String),
    #[error("`{0}' is no suite: say bookworm, trixie or another name that the mirror knows")]
    Suite(String),
    #[error("`{0}' is no mirror: give an address that begins with http://, https:// or file:/")]
    Mirror(String),
    #[error(
        "nobody could log into this image: leave out --no-autologin, or give --root-password-file, --ssh-key or --user-data"
    )]
    NoLogin,
    #[error("user-data is read by cloud-init: give --cloud-init too")]
    UserDataWithoutCloudInit,
    #[error("`{0}' cannot name an image: its file name needs a stem before .img, .raw or .qcow2")]
    Output(PathBuf),
}

impl Recipe {
    /// A recipe with everything but the output as it is when nothing is said.
    pub fn new(output: impl Into<PathBuf>) -> Recipe {
        Recipe {
            output: output.into(),
            suite: "bookworm".into(),
            mirror: None,
            kernel: Kernel::Cloud,
            packages: Vec::new(),
            bytes: 4 << 30,
            format: Format::Raw,
            hostname: "debian".into(),
            autologin: true,
            ssh_keys: Vec::new(),
            password_file: None,
            cloud_init: false,
            user_data: None,
            run: None,
            docs: false,
            memory_mb: 512,
            vcpus: 1,
            force: false,
        }
    }

    /// Every wish that contradicts another one or that Debian would not take.
    pub fn check(&self) -> Result<(), RecipeError> {
        if !(BYTES_MIN..=BYTES_MAX).contains(&self.bytes) {
            return Err(RecipeError::SizeOutOfRange(self.bytes));
        }
        if !is_hostname(&self.hostname) {
            return Err(RecipeError::Hostname(self.hostname.clone()));
        }
        if let Some(name) = self.packages.iter().find(|name| !is_package(name)) {
            return Err(RecipeError::Package(name.clone()));
        }
        if !is_suite(&self.suite) {
            return Err(RecipeError::Suite(self.suite.clone()));
        }
        if let Some(mirror) = &self.mirror
            && !is_mirror(mirror)
        {
            return Err(RecipeError::Mirror(mirror.clone()));
        }
        if self.user_data.is_some() && !self.cloud_init {
            return Err(RecipeError::UserDataWithoutCloudInit);
        }
        let login = self.autologin
            || self.password_file.is_some()
            || !self.ssh_keys.is_empty()
            || self.user_data.is_some();
        if !login {
            return Err(RecipeError::NoLogin);
        }
        self.beside("cfg").map(drop)
    }

    /// The file beside the image with another extension: `web.img` has `web.vmlinuz`.
    pub(crate) fn beside(&self, extension: &str) -> Result<PathBuf, RecipeError> {
        let refused = || RecipeError::Output(self.output.clone());
        let name = self.output.file_name().and_then(|name| name.to_str());
        let stem = Path::new(name.ok_or_else(refused)?).file_stem();
        let stem = stem.and_then(|stem| stem.to_str()).ok_or_else(refused)?;
        let taken = ["vmlinuz", "initrd", "cfg", "iso", "log"];
        let own = self.output.extension().and_then(|own| own.to_str());
        if stem.is_empty() || own.is_some_and(|own| taken.contains(&own)) {
            return Err(refused());
        }
        Ok(self.output.with_file_name(format!("{stem}.{extension}")))
    }

    /// All packages of the image that are not in Debian's essential set.
    pub(crate) fn all_packages(&self) -> Vec<&str> {
        let mut all = vec![self.kernel.package()];
        all.extend(BASE);
        if self.cloud_init {
            all.push("cloud-init");
        }
        if !self.ssh_keys.is_empty() || self.cloud_init {
            all.push("openssh-server");
        }
        all.extend(self.packages.iter().map(String::as_str));
        all
    }
}

/// What makes Debian's essential packages a system that boots, has a network and can be worked in.
const BASE: [&str; 13] = [
    "tiny-initramfs",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "e2fsprogs",
    "procps",
    "iproute2",
    "iputils-ping",
    "netbase",
    "ca-certificates",
    "wget",
    "nano",
];

fn is_hostname(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Debian Policy 5.6.1.
fn is_package(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
}

fn is_suite(name: &str) -> bool {
    is_package(name)
}

fn is_mirror(address: &str) -> bool {
    ["http://", "https://", "file:/"].iter().any(|scheme| {
        address
            .strip_prefix(scheme)
            .is_some_and(|rest| !rest.is_empty())
    }) && address
        .bytes()
        .all(|b| b.is_ascii_graphic() && b != b'[' && b != b']')
}

/// A number of bytes with a binary unit: `4G`, `512M`; without one, bytes.
pub fn parse_size(text: &str) -> Result<u64, RecipeError> {
    let refused = || RecipeError::Size(text.into());
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        Some('T' | 't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| refused())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(refused)?;
    if bytes % BLOCK_BYTES != 0 {
        return Err(RecipeError::SizeNotInBlocks(bytes));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn check_default_recipe_is_accepted() {
        assert_eq!(Recipe::new("/tmp/a.img").check(), Ok(()));
    }

    #[test]
    fn check_recipe_without_login_is_refused() {
        let mut recipe = Recipe::new("a.img");
        recipe.autologin = false;
        assert_eq!(recipe.check(), Err(RecipeError::NoLogin));
        recipe.ssh_keys.push("key.pub".into());
        assert_eq!(recipe.check(), Ok(()));
    }

    #[test]
    fn check_wrong_names_are_refused() {
        let recipe = |change: fn(&mut Recipe)| {
            let mut recipe = Recipe::new("a.img");
            change(&mut recipe);
            recipe.check()
        };
        assert!(matches!(
            recipe(|r| r.hostname = "-a".into()),
            Err(RecipeError::Hostname(_))
        ));
        assert!(matches!(
            recipe(|r| r.hostname = "a b".into()),
            Err(RecipeError::Hostname(_))
        ));
        assert!(matches!(
            recipe(|r| r.packages = vec!["--x".into()]),
            Err(RecipeError::Package(_))
        ));
        assert!(matches!(
            recipe(|r| r.suite = "a b".into()),
            Err(RecipeError::Suite(_))
        ));
        assert!(matches!(
            recipe(|r| r.mirror = Some("ftp://x".into())),
            Err(RecipeError::Mirror(_))
        ));
        assert!(matches!(
            recipe(|r| r.bytes = 1 << 20),
            Err(RecipeError::SizeOutOfRange(_))
        ));
        assert!(matches!(
            recipe(|r| r.output = "a.cfg".into()),
            Err(RecipeError::Output(_))
        ));
        assert!(matches!(
            recipe(|r| r.output = "a.log".into()),
            Err(RecipeError::Output(_))
        ));
        assert!(matches!(
            recipe(|r| r.output = "/".into()),
            Err(RecipeError::Output(_))
        ));
        assert_eq!(
            recipe(|r| r.user_data = Some("u".into())),
            Err(RecipeError::UserDataWithoutCloudInit)
        );
    }

    #[test]
    fn beside_replaces_the_last_extension() {
        let recipe = Recipe::new("/a/web.1.img");
        assert_eq!(recipe.beside("cfg").unwrap(), Path::new("/a/web.1.cfg"));
        assert_eq!(
            Recipe::new("web").beside("initrd").unwrap(),
            Path::new("web.initrd")
        );
    }

    #[test]
    fn parse_size_units_are_binary() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("768m"), Ok(768 << 20));
        assert_eq!(parse_size("8192"), Ok(8192));
        for parts in ["100", "10K"] {
            let fault = parse_size(parts).expect_err("half a block");
            assert!(fault.to_string().contains("whole blocks"), "{fault}");
        }
        for wrong in ["", "G", "1.5G", "-1G", "4096T4", "99999999999T"] {
            assert_eq!(
                parse_size(wrong),
                Err(RecipeError::Size(wrong.into())),
                "{wrong}"
            );
        }
    }

    proptest! {
        #[test]
        fn parse_size_any_text_does_not_panic(text in "\\PC{0,12}") {
            let _ = parse_size(&text);
        }
    }
}
