//! A domain's devices: what they are made of, and their coming and going.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use hospes_backends::block::Block;
use hospes_backends::frame::{
    Bus, DeviceError, DeviceId, DeviceInfo, DeviceNodes, Kind, Log, back_directory, back_path,
    back_paths,
};
use hospes_backends::net::{Net, NetConfig, Rate};
use hospes_image::{Facts, Files, Format, Image, ImageError, OpenSpec, open_with};
use hospes_store::{NewNode, StoreAccess};
use hospes_units::DomId;
use hospes_xen::Xen;

use crate::lock;

/// A disk to be attached.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Number of the virtual device: 51712 is xvda.
    pub devid: u32,
    /// Its name in the configuration.
    pub vdev: String,
    /// An image file or a block device of the host.
    pub target: PathBuf,
    pub format: Format,
    pub read_only: bool,
    /// A medium: read-only, and said to be removable.
    pub cdrom: bool,
    /// Whether the guest may give space back to the host.
    pub discard: bool,
    /// Go past the host's page cache where possible.
    pub direct: bool,
    /// Whether the guest is told to trust the back end.
    pub trusted: bool,
}

/// What tools and scripts are told of a network interface.
#[derive(Clone, Debug)]
pub struct VifFacts {
    /// Its place, from 0 on.
    pub devid: u32,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// The host's interface; a user-mode network has none.
    pub interface: Option<String>,
    pub bridge: Option<String>,
    /// As they were configured.
    pub ip: Vec<String>,
    pub rate: Option<Rate>,
    /// What makes it ready, and says so.
    pub script: Option<String>,
    pub gateway_device: Option<String>,
}

/// A network interface to be attached. It is used once: what it is plugged into goes with it.
///
/// Scripts of the host read what they are to do in the directory of its back end, which is therefore not made here: who runs them makes it as [`VifFacts::directory`] says,
/// before the interface is attached, and removes it when it is detached.
#[derive(Debug)]
pub struct VifSpec {
    pub facts: VifFacts,
    /// Whether the guest is told to trust the back end.
    pub trusted: bool,
    pub net: NetConfig,
}

/// Why a device cannot be attached, changed or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{0}")]
    Image(#[from] ImageError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "{fault}; what was there before could not be put back either, so that the drive is empty: {lost}"
    )]
    Emptied {
        /// Why the other could not be attached.
        fault: Box<AttachError>,
        /// Why the one before could not be attached again.
        lost: Box<AttachError>,
    },
}

/// The devices of a domain.
pub struct Devices {
    domid: DomId,
    name: String,
    vcpus: u32,
    log: Log,
    bus: Bus,
    files: Arc<dyn Files>,
    images: Arc<Images>,
}

/// A disk that was attached. Its image is gone where it was detached.
struct Attached {
    disk: DiskSpec,
    facts: Facts,
    image: Weak<dyn Image>,
}

impl Attached {
    fn new(disk: &DiskSpec, (image, facts): &Opened) -> Attached {
        Attached {
            disk: disk.clone(),
            facts: *facts,
            image: Arc::downgrade(image),
        }
    }

    /// What [`Devices::show`] takes, where it is still attached.
    fn opened(&self) -> Option<(DiskSpec, Opened)> {
        let image = self.image.upgrade()?;
        Some((self.disk.clone(), (image, self.facts)))
    }
}

/// By number.
type Images = Mutex<BTreeMap<u32, Attached>>;

/// An open image, and what is known of its file.
type Opened = (Arc<dyn Image>, Facts);

impl Devices {
    pub fn new(
        domid: DomId,
        name: &str,
        vcpus: u32,
        store: Arc<dyn StoreAccess>,
        xen: Arc<Xen>,
        files: Arc<dyn Files>,
        log: Log,
    ) -> Devices {
        Devices {
            domid,
            name: name.to_owned(),
            vcpus,
            bus: Bus::new(domid, store, xen, log.clone()),
            log,
            files,
            images: Arc::default(),
        }
    }

    /// Opens and locks the image, and shows the disk to the guest.
    pub fn attach_disk(&self, disk: &DiskSpec) -> Result<(), AttachError> {
        self.show(disk, self.open(disk)?)
    }

    /// Puts another disk in the place of one, or none. After an error but [`AttachError::Emptied`] the first is still there, or there again. Its image stays open until the
    /// other disk is attached: both have to be read-only where they may be the same.
    pub fn replace_disk(&self, devid: u32, other: Option<&DiskSpec>) -> Result<(), AttachError> {
        let opened = match other {
            Some(disk) => Some((disk, self.open(disk)?)),
            None => None,
        };
        let id = disk_id(devid);
        let mut before = None;
        if self.bus.list().iter().any(|device| device.id == id) {
            if other.is_some() {
                before = lock(&self.images).get(&devid).and_then(Attached::opened);
            }
            self.bus.detach(id, false)?;
        }
        let Some((disk, opened)) = opened else {
            return Ok(());
        };
        let Err(fault) = self.show(disk, opened) else {
            return Ok(());
        };
        let Some((disk, opened)) = before else {
            return Err(fault);
        };
        match self.show(&disk, opened) {
            Ok(()) => Err(fault),
            Err(lost) => Err(AttachError::Emptied {
                lost: Box::new(lost),
                fault: Box::new(fault),
            }),
        }
    }

    fn open(&self, disk: &DiskSpec) -> Result<Opened, ImageError> {
        open_with(&self.open_spec(disk), &*self.files)
    }

    fn open_spec(&self, disk: &DiskSpec) -> OpenSpec {
        let read_only = disk.read_only || disk.cdrom;
        OpenSpec {
            path: disk.target.clone(),
            format: disk.format,
            read_only,
            direct: disk.direct,
            discard: disk.discard && !read_only,
            sector_bytes: None,
            lock_owner: format!("domain {} ({})", self.domid, self.name),
        }
    }

    fn show(&self, disk: &DiskSpec, opened: Opened) -> Result<(), AttachError> {
        let attached = Attached::new(disk, &opened);
        let (images, open, files) = (
            Arc::clone(&self.images),
            self.open_spec(disk),
            Arc::clone(&self.files),
        );
        let again = disk.clone();
        let reopen = move || {
            let opened = open_with(&open, &*files).map_err(|fault| fault.to_string())?;
            lock(&images).insert(again.devid, Attached::new(&again, &opened));
            Ok(opened.0)
        };
        let (image, facts) = opened;
        let block = Block::new(image, disk.cdrom, self.vcpus, self.log.clone())
            .with_reopen(Box::new(reopen));
        let id = disk_id(disk.devid);
        self.bus
            .attach(id, &disk_nodes(disk, &facts), Box::new(block))?;
        lock(&self.images).insert(disk.devid, attached);
        Ok(())
    }

    /// Shows a network interface to the guest.
    pub fn attach_vif(&self, vif: VifSpec) -> Result<(), AttachError> {
        let nodes = vif_nodes(&vif);
        let id = vif_id(vif.facts.devid);
        Ok(self.bus.attach(id, &nodes, Box::new(Net::new(vif.net)))?)
    }

    /// Takes all network interfaces away at once.
    pub fn detach_vifs(&self) {
        for device in self.bus.list() {
            if device.id.kind == Kind::Vif {
                // One that somebody else has taken away meanwhile is gone as well.
                let _ = self.bus.remove(device.id);
            }
        }
    }

    /// Takes a device away; what it stood for is free when this returns.
    pub fn detach(&self, id: DeviceId, force: bool) -> Result<(), AttachError> {
        Ok(self.bus.detach(id, force)?)
    }

    /// Changes the size of a disk, in bytes, and tells the guest. With the size it has, looks at the host's device again.
    pub fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), AttachError> {
        let id = disk_id(devid);
        let image = lock(&self.images)
            .get(&devid)
            .and_then(|attached| attached.image.upgrade());
        let image = image.ok_or(DeviceError::Missing(id))?;
        image.resize(bytes)?;
        Ok(self.bus.renew(id)?)
    }

    /// All devices.
    pub fn list(&self) -> Vec<DeviceInfo> {
        self.bus.list()
    }

    /// Makes durable what a suspended guest has written to its disks.
    pub fn flush(&self) -> Result<(), AttachError> {
        Ok(self.bus.flush()?)
    }

    /// Lets go of what the devices of a suspended guest stand for.
    pub fn let_go(&self) -> Result<(), AttachError> {
        Ok(self.bus.let_go()?)
    }

    /// Takes all again that was let go of; may be called once more after an error.
    pub fn take_again(&self) -> Result<(), AttachError> {
        Ok(self.bus.take_again()?)
    }

    /// Finishes what is in flight and takes all devices away.
    pub fn close(&self) {
        self.bus.close();
    }
}

fn disk_id(devid: u32) -> DeviceId {
    DeviceId {
        kind: Kind::Vbd,
        devid,
    }
}

fn vif_id(devid: u32) -> DeviceId {
    DeviceId {
        kind: Kind::Vif,
        devid,
    }
}

/// What libxl writes of a disk.
fn disk_nodes(disk: &DiskSpec, facts: &Facts) -> DeviceNodes {
    let node = |name: &str, value: String| (name.to_owned(), value);
    let flag = |set: bool| u8::from(set).to_string();
    let read_only = disk.read_only || disk.cdrom;
    let device_type = if disk.cdrom { "cdrom" } else { "disk" };
    let target = disk.target.display();
    let mut back = vec![
        node("removable", flag(disk.cdrom)),
        node("bootable", "1".to_owned()),
        node("dev", disk.vdev.clone()),
        node("mode", if read_only { "r" } else { "w" }.to_owned()),
        node("device-type", device_type.to_owned()),
        node("discard-enable", flag(disk.discard && !read_only)),
        node("direct-io-safe", flag(disk.direct)),
    ];
    match facts.device() {
        Some(number) if disk.format != Format::Qcow2 => {
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            back.extend([
                node("type", "phy".to_owned()),
                node("params", target.to_string()),
                node("physical-device", format!("{major:x}:{minor:x}")),
                node("physical-device-path", target.to_string()),
            ]);
        }
        _ => {
            let format = match disk.format {
                Format::Raw => "raw",
                Format::Qcow2 => "qcow2",
                Format::Auto => "auto",
            };
            back.extend([
                node("type", "qdisk".to_owned()),
                node("params", format!("{format}:{target}")),
            ]);
        }
    }
    back.push(node("hotplug-status", "connected".to_owned()));
    DeviceNodes {
        front: vec![
            node("virtual-device", disk.devid.to_string()),
            // Linux' front end leaves media to emulated drives, which a PVH guest does not have: it gets them as disks.
            node("device-type", "disk".to_owned()),
            node("trusted", flag(disk.trusted)),
        ],
        back,
        kept: false,
    }
}

impl VifFacts {
    /// The directory of the interface's back end, parents first.
    pub fn directory(&self, domid: DomId) -> Vec<NewNode> {
        back_directory(domid, vif_id(self.devid), &self.back())
    }

    /// Where that is.
    pub fn path(domid: DomId, devid: u32) -> String {
        back_path(domid, vif_id(devid))
    }

    /// Where those of all interfaces of a domain are.
    pub fn paths(domid: DomId) -> String {
        back_paths(domid, Kind::Vif)
    }

    /// What libxl writes of a network interface.
    fn back(&self) -> Vec<(String, String)> {
        let is_ready = self.script.is_none();
        // Xen's scripts give the interface this name, and end with an error where there is one of that name: here it has it from the start.
        let name = self.interface.clone().filter(|_| is_ready);
        let rate = self
            .rate
            .map(|rate| format!("{},{}", rate.bytes, rate.interval.as_micros()));
        let nodes = [
            ("handle", Some(self.devid.to_string())),
            ("mac", Some(mac_text(self.mac))),
            ("mtu", Some(self.mtu.to_string())),
            ("type", Some("vif".to_owned())),
            ("script", self.script.clone()),
            ("bridge", self.bridge.clone()),
            ("vifname", name),
            ("gatewaydev", self.gateway_device.clone()),
            ("ip", (!self.ip.is_empty()).then(|| self.ip.join(" "))),
            ("rate", rate),
            ("hotplug-status", is_ready.then(|| "connected".to_owned())),
        ];
        let nodes = nodes.into_iter();
        nodes
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect()
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What libxl writes of a network interface.
fn vif_nodes(vif: &VifSpec) -> DeviceNodes {
    let node = |name: &str, value: String| (name.to_owned(), value);
    let facts = &vif.facts;
    DeviceNodes {
        front: vec![
            node("handle", facts.devid.to_string()),
            node("trusted", u8::from(vif.trusted).to_string()),
            node("mac", mac_text(facts.mac)),
            node("mtu", facts.mtu.to_string()),
        ],
        back: facts.back(),
        kept: true,
    }
}
