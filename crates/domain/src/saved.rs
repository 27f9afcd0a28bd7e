//! What a domain is when it is saved, and how it comes back.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use hospes_backends::frame::DeviceInfo;
use hospes_backends::frame::state::Phase;
use hospes_cpuid::{CpuidTable, SavedFeatures};
use hospes_engine::{CpuState, XsaveImage};
use hospes_memory::{GuestMemory, MemoryError};
use hospes_migration::{Reader, Record, StreamError, Writer};
use hospes_units::{PAGE_SIZE, VcpuId};
use hospes_xen::Balloon;
use serde::{Deserialize, Serialize};

use crate::live::Live;
use crate::pages::{OTHER_PAGES_MAX, Received, Sent, stream_pages_max};
use crate::requests::{LOOK, SUSPEND};
use crate::suspend::Suspension;
use crate::{AttachError, CreateError, Domain, EndReason, RequestError};

/// The stream that a domain comes back from, behind its configuration.
pub type SavedStream = Reader<Box<dyn Read + Send>>;

/// A stream that a domain is saved to.
pub type SaveStream<'a> = Writer<&'a mut dyn Write>;

/// Why a domain does not come back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the saved domain cannot be restored: {0}")]
    Stream(#[from] StreamError),
    #[error(
        "the saved domain cannot be restored: it is damaged: its state is not understood ({0})"
    )]
    Text(serde_json::Error),
    #[error(
        "the saved domain cannot be restored: its {what} is {saved}, and the configuration says {configured}: change the configuration"
    )]
    Differs {
        what: &'static str,
        saved: u64,
        configured: u64,
    },
    #[error("the saved domain cannot be restored: {0}")]
    Invalid(&'static str),
}

/// Why a domain cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("the guest is not suspended")]
    Running,
    #[error("its memory is being sent already: try again when that has ended")]
    Sending,
    #[error("{0}")]
    Request(#[from] RequestError),
    #[error(
        "the guest uses memory that it has given back: try again when it has what mem-set asked it to have"
    )]
    TooMuch,
    #[error("{0}")]
    Check(#[from] RestoreError),
    #[error("its memory cannot be read: {0}")]
    Memory(#[from] MemoryError),
    #[error("its state cannot be written as text: {0}")]
    Text(#[from] serde_json::Error),
    #[error("{0}")]
    Disks(#[from] AttachError),
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
}

/// One vCPU of a suspended guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedVcpu {
    /// As the guest's hypercalls have left it.
    pub up: bool,
    pub state: CpuState,
}

/// All of a domain but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// What the memory map lists.
    pub memory_max_bytes: u64,
    /// What the guest may have, in KiB, where that was set apart from what it is to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_most_kib: Option<u64>,
    pub system_time_ns: u64,
    pub features: SavedFeatures,
    /// Frames that the guest has given back: first ones and numbers.
    pub given_back: Vec<(u64, u64)>,
    /// Frames that it has still to give back, as it was started with fewer than its memory map lists.
    pub on_demand: u64,
    pub vcpus: Vec<SavedVcpu>,
}

impl Saved {
    /// Takes a domain out of a stream: fills the memory and gives the rest. The host has `target_bytes` for it and is asked by `room` for more, before that is
    /// used; `fits` says whether what comes is what is wanted.
    pub fn read(
        mut stream: SavedStream,
        memory: &GuestMemory,
        target_bytes: u64,
        room: &dyn Fn(u64) -> Result<(), CreateError>,
        fits: impl Fn(&Saved) -> Result<(), RestoreError>,
    ) -> Result<Saved, CreateError> {
        let mut saved: Option<Saved> = None;
        let mut received = Received::new(memory, target_bytes, room);
        loop {
            match stream.next().map_err(RestoreError::from)? {
                Record::Config(_) => {
                    return Err(RestoreError::Invalid("it has two configurations").into());
                }
                Record::Machine(text) => {
                    let machine: Saved =
                        serde_json::from_slice(text).map_err(RestoreError::Text)?;
                    fits(&machine)?;
                    // It may have been saved on its way to a smaller target.
                    let bytes = machine.current_bytes().max(target_bytes);
                    received.set_size(bytes, machine.frames_max())?;
                    saved = Some(machine);
                }
                Record::Pages { first, bytes } => received.take(first, bytes)?,
                Record::End => break,
            }
        }
        Ok(saved.ok_or(RestoreError::Invalid("it has no state"))?)
    }

    /// Memory that the guest had.
    pub fn current_bytes(&self) -> u64 {
        let runs = self.given_back.iter();
        let out = runs.fold(self.on_demand, |sum, (_, count)| sum.saturating_add(*count));
        self.memory_max_bytes
            .saturating_sub(out.saturating_mul(PAGE_SIZE))
    }

    /// Most frames that may have something in them.
    fn frames_max(&self) -> u64 {
        self.current_bytes() / PAGE_SIZE + OTHER_PAGES_MAX
    }

    /// What the guest had given back of its memory.
    pub fn balloon(&self) -> Balloon {
        Balloon {
            given_back: self.given_back.clone(),
            on_demand: self.on_demand,
        }
    }

    /// Whether it is what the configuration says.
    pub fn fits(&self, memory_max_bytes: u64, vcpus: u32) -> Result<(), RestoreError> {
        let differs = |what, saved, configured| {
            if saved == configured {
                return Ok(());
            }
            Err(RestoreError::Differs {
                what,
                saved,
                configured,
            })
        };
        differs(
            "largest memory in MiB (`maxmem')",
            self.memory_max_bytes >> 20,
            memory_max_bytes >> 20,
        )?;
        differs(
            "number of vCPUs (`maxvcpus')",
            self.vcpus.len() as u64,
            vcpus.into(),
        )
    }
}

/// Whether vCPUs are in a state that a processor with this table can be in, as far as the host would notice.
pub(crate) fn check_vcpus(vcpus: &[SavedVcpu], table: &CpuidTable) -> Result<(), RestoreError> {
    for (vcpu, id) in vcpus.iter().zip(0..) {
        let state = &vcpu.state;
        let canonical = |address: u64| (address << 16) as i64 >> 16 == address as i64;
        let segments = [&state.seg[4], &state.seg[5], &state.tr, &state.ldtr];
        let msr = &state.msr;
        let bases = segments.iter().map(|segment| segment.base);
        let addresses = bases.chain([
            state.gdtr.base,
            state.idtr.base,
            msr.lstar,
            msr.cstar,
            msr.kernel_gs_base,
            msr.sysenter_esp,
            msr.sysenter_eip,
        ]);
        let wrong = if state.cr4 & !table.valid_cr4_bits() != 0 {
            "CR4 has bits that are not offered"
        } else if msr.efer & !table.valid_efer_bits() != 0 {
            "EFER has bits that are not offered"
        } else if state.xcr0 & !table.supported_xcr0() != 0 {
            "XCR0 has bits that are not offered"
        } else if !is_loadable(&state.xsave, table.supported_xcr0()) {
            "an XSAVE image cannot be loaded"
        } else if !{ addresses }.all(canonical) {
            "a base address is not canonical"
        } else if state.lapic.id != 2 * id {
            "a local APIC has the id of another"
        } else {
            continue;
        };
        return Err(RestoreError::Invalid(wrong));
    }
    Ok(())
}

/// Whether XRSTOR loads an image in the standard format without a fault.
fn is_loadable(image: &XsaveImage, components: u64) -> bool {
    const HEADER: usize = 512;
    const MXCSR: usize = 24;
    let word = |at: usize| {
        image.0[at..]
            .first_chunk()
            .map_or(0, |b| u64::from_le_bytes(*b))
    };
    let mxcsr = word(MXCSR) as u32;
    mxcsr & !0xffff == 0
        && word(HEADER) & !components == 0
        && (1..8).all(|n| word(HEADER + 8 * n) == 0)
}

/// How long a guest may take to suspend itself, as in xl.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest may take to find a new device before it counts as one that has no driver for it.
const FIND: Duration = Duration::from_secs(5);

impl Domain {
    /// Has the guest suspend itself and returns when its vCPUs are held: it can be saved then, until [`Domain::resume`] or the end of the domain. Asks
    /// `given_up` now and then whether to go on waiting. After an error the guest goes on, whenever it suspends itself.
    pub fn suspend(&self, given_up: &dyn Fn() -> bool) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        if self.run.is_paused() {
            return Err(RequestError::Paused);
        }
        self.check_disks()?;
        let suspension = self.run.suspension();
        if !suspension.begin() {
            return Err(RequestError::Suspending);
        }
        let path = self.shutdown_path();
        let deadline = Instant::now() + PATIENCE;
        let given_up = || given_up() || self.run.has_ended() || self.run.is_paused();
        self.wait_found(&given_up);
        // A guest that was asked to shut down would not hear of it where it finds another word in the same node.
        let is_free = self.wait_heard(&path, deadline, &given_up);
        let asked = match is_free {
            true => self.store.write(&path, SUSPEND.as_bytes()),
            false => Ok(()),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if suspension.wait(left, || !is_free || asked.is_err() || given_up()) {
            // A vCPU that has left a copy since then is held.
            self.run.vcpu_states();
            if !self.run.has_ended() {
                return Ok(());
            }
        }
        // Where it is suspended by now, that is over.
        self.resume();
        asked?;
        // A guest that has not taken the request does not have to see it.
        if self.store.read_text(&path).as_deref() == Some(SUSPEND) {
            let _ = self.store.write(&path, b"");
        }
        match self.run.end_reason() {
            Some(reason) => Err(RequestError::Ended(reason)),
            None if self.run.is_paused() => Err(RequestError::Paused),
            None if given_up() => Err(RequestError::TakenBack),
            None => self.check_disks().and(Err(RequestError::NoSuspend {
                seconds: PATIENCE.as_secs(),
            })),
        }
    }

    /// Waits until the guest has connected to devices that it was given a moment ago. Linux' network driver does not survive a suspension between
    /// finding an interface and connecting to it, and what would be saved crashes at each restore.
    fn wait_found(&self, given_up: &dyn Fn() -> bool) {
        let is_new =
            |device: &DeviceInfo| device.phase == Phase::Waiting && device.since.elapsed() < FIND;
        while self.devices.list().iter().any(is_new) && !given_up() {
            std::thread::sleep(LOOK);
        }
    }

    /// Writes all of a suspended guest but its configuration: with what [`Domain::send_live`] has come to, into the same stream, what that has left. Refuses what would
    /// not be restored. What the guest has written to its disks is durable when this returns: where it goes on it takes for granted that it is there.
    pub fn save(&self, to: &mut SaveStream<'_>, live: Option<Live>) -> Result<(), SaveError> {
        let vcpus = self.held_vcpus().ok_or(SaveError::Running)?;
        check_vcpus(&vcpus, &self.processor)?;
        write(self, vcpus, to, live)?;
        Ok(self.devices.flush()?)
    }

    /// The vCPUs of a suspended guest, as they go on in a new domain.
    fn held_vcpus(&self) -> Option<Vec<SavedVcpu>> {
        let caller = self.run.suspension().caller()?;
        let states = (0..).map(VcpuId).zip(self.run.vcpu_states());
        let saved = states.map(|(id, state)| {
            let mut state = state?;
            if id == caller {
                Suspension::set_done(&mut state);
            }
            let up = self.xen.is_up(id);
            Some(SavedVcpu { up, state })
        });
        saved.collect()
    }

    /// Whether the vCPUs are held because the guest is suspended; a domain that has ended is not.
    pub fn is_suspended(&self) -> bool {
        self.run.suspension().is_held() && !self.run.has_ended()
    }

    /// Ends a suspended domain, which is somewhere else now; false where it has gone on.
    pub fn end_saved(&self) -> bool {
        self.run
            .suspension()
            .while_held(|| self.run.end(EndReason::Destroyed))
    }

    /// Lets a suspended guest go on here as if nothing had been. Does nothing to others.
    pub fn resume(&self) {
        if self.run.suspension().release() {
            self.xen.mark_stopped();
            self.xen.renew_watchdogs();
            self.run.go_on();
        }
    }
}

/// Writes all of a suspended guest but its configuration.
fn write(
    domain: &Domain,
    vcpus: Vec<SavedVcpu>,
    to: &mut SaveStream<'_>,
    live: Option<Live>,
) -> Result<(), SaveError> {
    let xen = &domain.xen;
    let memory = xen.memory();
    let Balloon {
        given_back,
        on_demand,
    } = xen.balloon();
    let saved = Saved {
        memory_max_bytes: domain.spec.memory_max_bytes,
        memory_most_kib: domain.memory_use.most_kib(),
        system_time_ns: xen.system_time_ns(),
        features: domain.processor.features(),
        given_back,
        on_demand,
        vcpus,
    };
    let text = serde_json::to_vec(&saved)?;
    let mut sent = if let Some(live) = live {
        // It has less memory than it had in rounds before, perhaps: first what it has given back is to be empty.
        let sent = live.rest(to)?;
        to.machine(&text)?;
        sent
    } else {
        to.machine(&text)?;
        let mut sent = Sent::default();
        sent.all(memory, to, &|| Ok(()))?;
        sent
    };
    // Threads of the domain may have written into these meanwhile.
    for gfn in xen.ring_frames() {
        sent.page_of_rings(memory, gfn, domain.run.rings(), to)?;
    }
    if sent.filled() > saved.frames_max() || to.pages_written() > stream_pages_max(memory) {
        return Err(SaveError::TooMuch);
    }
    Ok(())
}
