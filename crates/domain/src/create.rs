//! Making a domain, step by step.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use hospes_builder::{BuildSpec, Layout, MemmapEntry, ap_cpu_state, build, memory_layout};
use hospes_cpuid::{CpuidTable, HostCpu, Policy, Vendor};
use hospes_engine::Activity;
use hospes_memory::{GuestMemory, Page};
use hospes_store::DomainEntry;
use hospes_units::{PAGE_SIZE, VcpuId};
use hospes_xen::{
    Calibration, Config, ConsoleRing, E820, HostPort, StoreRing, TrapInstruction, Xen,
};

use crate::console::Console;
use crate::devices::Devices;
use crate::memory::{self, MemoryUse};
use crate::placement::Placement;
use crate::run::Run;
use crate::saved::{Saved, SavedStream, SavedVcpu, check_vcpus};
use crate::services::{GuestConnection, serve_console, serve_store};
use crate::share::Sharing;
use crate::signal::Signal;
use crate::vcpu::VcpuThread;
use crate::{CreateError, Domain, DomainSpec, EngineFactory, Identity, host_memory};

/// The TSC is measured at least this long, most of it while the kernel is being loaded.
const CALIBRATION: Duration = Duration::from_millis(20);

/// Xen's default size of a guest's grant table.
const GRANT_FRAMES: u32 = 64;

/// Makes a domain, to start its kernel or, with a stream, to go on where it was saved.
pub fn create(
    spec: DomainSpec,
    saved: Option<SavedStream>,
    engine: EngineFactory<'_>,
) -> Result<Domain, CreateError> {
    let calibration = Calibration::start();
    if spec.vcpus == 0 || spec.vcpus > hospes_xen::MAX_VCPUS {
        return Err(hospes_xen::XenError::Vcpus(spec.vcpus).into());
    }
    if spec.memory_bytes > spec.memory_max_bytes {
        return Err(CreateError::MemoryAboveMax {
            memory_mib: spec.memory_bytes >> 20,
            max_mib: spec.memory_max_bytes >> 20,
        });
    }
    let layout = memory_layout(spec.memory_max_bytes)?;
    let room = |bytes| {
        host_memory::room(bytes, (spec.promised)()).map_err(|shortage| CreateError::HostMemory {
            name: spec.name.clone(),
            shortage,
        })
    };
    room(spec.memory_bytes)?;
    let memory = Arc::new(GuestMemory::new(&layout.backed)?);
    (spec.confine)(&memory).map_err(CreateError::Confine)?;
    let content = fill(&spec, &layout, &memory, saved, &room)?;
    let tsc = calibration.finish(CALIBRATION);
    let cpuid = CpuidTable::new(
        &HostCpu::capture(),
        &Policy {
            vcpus: spec.vcpus,
            domid: spec.domid,
            tsc_khz: tsc.khz(),
            nomigrate: spec.nomigrate,
            level: spec.level,
            wishes: &spec.wishes,
            saved: content.saved.as_ref().map(|saved| &saved.features),
        },
    )?;
    if let Some(saved) = &content.saved {
        check_vcpus(&saved.vcpus, &cpuid)?;
    }
    let processor = cpuid.clone();
    let trap = match cpuid.vendor() {
        Vendor::Amd => TrapInstruction::Vmmcall,
        Vendor::Intel | Vendor::Other => TrapInstruction::Vmcall,
    };
    let vm = engine(Arc::clone(&memory), cpuid, spec.vcpus)?;
    let console = Arc::new(Console::new(spec.console));
    let run = Arc::new(Run::new(spec.vcpus, Arc::clone(&console)));
    let xen = Xen::new(
        Config {
            domid: spec.domid,
            uuid: spec.uuid,
            vcpus: spec.vcpus,
            trap,
            memory_map: layout.memmap().iter().map(e820).collect(),
            ram_pages: spec.memory_max_bytes / PAGE_SIZE,
            pages: spec.memory_bytes / PAGE_SIZE,
            store_gfn: layout.xenstore,
            console_gfn: layout.console,
            grant_frames: GRANT_FRAMES,
            tsc,
            system_time_ns: content.saved.as_ref().map_or(0, |s| s.system_time_ns),
        },
        memory,
        Arc::clone(&vm),
        run.clone(),
    )?;
    if let Some(saved) = &content.saved {
        xen.restore_balloon(&saved.balloon());
        xen.mask_all_ports();
    }
    let most_kib = content.saved.as_ref().and_then(|s| s.memory_most_kib);
    let placement = Arc::new(Placement::new(spec.vcpus));
    let mut vcpus = Vec::new();
    for (id, start) in (0..spec.vcpus).map(VcpuId).zip(content.vcpus) {
        let mut vcpu = vm.create_vcpu(id)?;
        if content.saved.is_some() {
            let waits = start.state.activity == Activity::WaitForSipi;
            run.restore(id, start.up, waits);
            xen.restore_up(id, start.up);
        }
        *vcpu.state() = start.state;
        vcpu.state_changed();
        let places = Arc::clone(&placement);
        vcpu.set_stay(Arc::new(move |stay| places.stay(id, stay)));
        xen.attach_vcpu(id, vcpu.control());
        run.attach(id, vcpu.control());
        vcpus.push(VcpuThread {
            id,
            vcpu,
            xen: Arc::clone(&xen),
            run: Arc::clone(&run),
            placement: Arc::clone(&placement),
        });
    }
    // The store's port comes first: Xen's tools number them so.
    let store_signal = Arc::new(Signal::default());
    let store_port = listen(&xen, &store_signal)?;
    let console_port = listen(&xen, console.signal())?;
    xen.set_store_port(store_port.port());
    xen.set_console_port(console_port.port());
    let waker = Arc::clone(&store_signal);
    let entry = DomainEntry {
        domid: spec.domid,
        uuid: uuid_text(&spec.uuid),
        name: spec.name.clone(),
        memory_kib: spec.memory_bytes / 1024,
        memory_max_kib: spec.memory_max_bytes / 1024,
        vcpus: spec.vcpus,
        console_port: console_port.port().0,
        console_ring: layout.console.0,
        store_port: store_port.port().0,
        store_ring: layout.xenstore.0,
    };
    let (guest, membership) = spec
        .store
        .add_domain(&entry, Arc::new(move || waker.set()))?;
    let store = spec.store.access();
    let log = Arc::clone(&spec.log);
    let devices = Devices::new(
        spec.domid,
        &spec.name,
        spec.vcpus,
        Arc::clone(&store),
        Arc::clone(&xen),
        spec.files,
        spec.log,
    );
    for disk in &spec.disks {
        devices.attach_disk(disk)?;
    }
    for vif in spec.vifs {
        devices.attach_vif(vif)?;
    }
    let mut domain = Domain {
        spec: Identity {
            domid: spec.domid,
            uuid: spec.uuid,
            name: spec.name,
            memory_max_bytes: spec.memory_max_bytes,
            vcpus: spec.vcpus,
        },
        processor,
        store,
        xen,
        run,
        devices,
        placement,
        sharing: Sharing::new(spec.scheduler),
        memory_use: MemoryUse::new(spec.memory_bytes / 1024),
        console,
        threads: Vec::new(),
        clock: None,
        membership: Mutex::new(Some(membership)),
        sending: Arc::default(),
    };
    if let Some(kib) = most_kib
        && let Err(fault) = domain.set_memory_max(kib, &*spec.promised)
    {
        // It goes on with what it is to have.
        log(&format!(
            "The guest may not have {kib} KiB of memory, as mem-max has said: {fault}"
        ));
    }
    let page = |gfn| Page::of_frame(domain.xen.memory(), gfn);
    let (console_page, store_page) = (page(layout.console)?, page(layout.xenstore)?);
    start_services(
        &mut domain,
        ConsoleRing::new(console_page, console_port),
        StoreRing::new(store_page, store_port),
        GuestConnection(guest),
        store_signal,
    )?;
    domain.clock = Some(domain.xen.start_clock()?);
    for vcpu in vcpus {
        domain.run.thread_starts();
        let name = format!("vcpu-{}", vcpu.id);
        match spawn(name, move || vcpu.main()) {
            Ok(thread) => domain.threads.push(thread),
            Err(error) => {
                domain.run.thread_ends();
                return Err(error);
            }
        }
    }
    Ok(domain)
}

/// What is in a domain's memory when it starts, and what its vCPUs do.
struct Content {
    vcpus: Vec<SavedVcpu>,
    /// `None` where a kernel is to be started.
    saved: Option<Saved>,
}

fn fill(
    spec: &DomainSpec,
    layout: &Layout,
    memory: &GuestMemory,
    saved: Option<SavedStream>,
    room: &dyn Fn(u64) -> Result<(), CreateError>,
) -> Result<Content, CreateError> {
    if let Some(stream) = saved {
        let saved = Saved::read(stream, memory, spec.memory_bytes, room, |saved| {
            saved.fits(spec.memory_max_bytes, spec.vcpus)
        })?;
        return Ok(Content {
            vcpus: saved.vcpus.clone(),
            saved: Some(saved),
        });
    }
    let boot = build(
        memory,
        &BuildSpec {
            kernel: &spec.kernel,
            ramdisk: spec.ramdisk.as_deref(),
            cmdline: &spec.cmdline,
            vcpus: spec.vcpus,
            layout,
            open: &*spec.open,
        },
    )?;
    let first = std::iter::once(boot.cpu_state);
    let states = first.chain((1..spec.vcpus).map(|id| ap_cpu_state(VcpuId(id))));
    Ok(Content {
        vcpus: states.map(|state| SavedVcpu { up: true, state }).collect(),
        saved: None,
    })
}

fn e820(entry: &MemmapEntry) -> E820 {
    E820 {
        addr: entry.addr,
        size: entry.size,
        kind: entry.kind,
    }
}

fn listen(xen: &Arc<Xen>, signal: &Arc<Signal>) -> Result<HostPort, CreateError> {
    let signal = Arc::clone(signal);
    Ok(xen.allocate_port(Arc::new(move || signal.set()))?)
}

fn start_services(
    domain: &mut Domain,
    console: ConsoleRing,
    mut store: StoreRing,
    mut guest: GuestConnection,
    signal: Arc<Signal>,
) -> Result<(), CreateError> {
    let run = Arc::clone(&domain.run);
    domain.run.on_end(Arc::clone(&signal));
    domain.threads.push(spawn("store".to_owned(), move || {
        serve_store(&mut store, &mut guest, &signal, &run);
    })?);
    let run = Arc::clone(&domain.run);
    domain.threads.push(spawn("console".to_owned(), move || {
        serve_console(&console, &run);
    })?);
    let (run, xen) = (Arc::clone(&domain.run), Arc::clone(&domain.xen));
    let max_pages = domain.spec.memory_max_bytes / PAGE_SIZE;
    let changed = Arc::clone(&domain.memory_use.changed);
    domain.run.on_end(Arc::clone(&changed));
    domain.threads.push(spawn("memory".to_owned(), move || {
        memory::watch(&xen, &run, &changed, max_pages);
    })?);
    Ok(())
}

fn spawn(name: String, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, CreateError> {
    std::thread::Builder::new()
        .name(name)
        .spawn(f)
        .map_err(CreateError::Thread)
}

/// The usual form with dashes.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_text_has_dashes() {
        let uuid = core::array::from_fn(|i| i as u8 * 17);
        assert_eq!(uuid_text(&uuid), "00112233-4455-6677-8899-aabbccddeeff");
    }
}
