//! A guest without a processor, for tests: real memory, a real Xen side and a real store; the test plays the front end.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hospes_engine::{CpuState, Segment, cr, reg, seg};
use hospes_engine_mock::{Control, FlatVcpu, RecordingVm};
use hospes_memory::{GuestMemory, Page, Range};
use hospes_ring::FrontRing;
use hospes_store::{LocalStore, StoreAccess};
use hospes_units::{DomId, Gfn, Gpa, GrantRef, VcpuId};
use hospes_xen::{Config, E820, Host, TrapInstruction, TscRate, Xen};
use hospes_xen_abi::memory::AddToPhysmap;
use hospes_xen_abi::{event, grant, hypercall as nr, memory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::frame::{Bus, DeviceId, RingPages};
use crate::lock;

const RAM_BYTES: u64 = 4 << 20;
/// Where arguments of hypercalls are.
const ARG: u64 = 0x8000;
/// Where the grant table is shown.
const GRANT_FRAME: u64 = 0x1000;
/// The first page that tests are given.
const FIRST_PAGE: u64 = 0x100;

struct NoHost;

impl Host for NoHost {
    fn wake(&self, _: VcpuId) {}

    fn console_write(&self, _: &[u8]) {}

    fn watchdog_expired(&self) -> bool {
        true
    }
}

/// The guest.
pub struct Guest {
    pub xen: Arc<Xen>,
    pub vm: Arc<RecordingVm>,
    pub store: Arc<LocalStore>,
    pub log: Arc<Mutex<Vec<String>>>,
    vcpu: Mutex<FlatVcpu>,
    next_page: AtomicUsize,
    next_gref: AtomicUsize,
}

pub const DOMID: DomId = DomId(5);

impl Guest {
    pub fn new() -> Guest {
        let ram = Range {
            start: 0,
            end: RAM_BYTES,
        };
        let memory = Arc::new(GuestMemory::new(&[ram]).unwrap());
        let config = Config {
            domid: DOMID,
            uuid: *b"0123456789abcdef",
            vcpus: 1,
            trap: TrapInstruction::Vmcall,
            memory_map: vec![E820 {
                addr: 0,
                size: RAM_BYTES,
                kind: 1,
            }],
            ram_pages: RAM_BYTES >> 12,
            pages: RAM_BYTES >> 12,
            store_gfn: Gfn(0xc),
            console_gfn: Gfn(0xd),
            grant_frames: 4,
            tsc: TscRate { hz: 2e9 },
            system_time_ns: 0,
        };
        let vm = Arc::new(RecordingVm::default());
        let xen = Xen::new(config, memory.clone(), vm.clone(), Arc::new(NoHost)).unwrap();
        let control = Arc::new(Control::default());
        xen.attach_vcpu(VcpuId(0), control.clone());
        let mut state = CpuState {
            cr0: cr::CR0_PE | cr::CR0_PG,
            ..CpuState::default()
        };
        state.msr.efer = cr::EFER_LMA | cr::EFER_LME;
        state.seg[seg::CS].attr = 0x9b | Segment::ATTR_L;
        state.seg[seg::SS].attr = 0x93;
        let guest = Guest {
            xen,
            vm,
            store: Arc::new(LocalStore::default()),
            log: Arc::default(),
            vcpu: Mutex::new(FlatVcpu {
                state,
                control,
                memory,
            }),
            next_page: AtomicUsize::new(FIRST_PAGE as usize),
            next_gref: AtomicUsize::new(grant::RESERVED_ENTRIES as usize),
        };
        let mut place = AddToPhysmap {
            domid: hospes_xen_abi::DOMID_SELF,
            space: 1,
            gpfn: GRANT_FRAME,
            ..AddToPhysmap::default()
        };
        assert_eq!(
            guest.call(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut place),
            0
        );
        guest
    }

    /// The guest's devices.
    pub fn bus(&self) -> Bus {
        let log = Arc::clone(&self.log);
        Bus::new(
            DOMID,
            self.store.clone(),
            self.xen.clone(),
            Arc::new(move |line| lock(&log).push(line.to_owned())),
        )
    }

    /// A hypercall with its argument in memory, which comes back as the call left it.
    fn call<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u64,
        cmd: u64,
        arg: &mut T,
    ) -> i64 {
        let mut vcpu = lock(&self.vcpu);
        self.xen.memory().write_obj(Gpa(ARG), arg).unwrap();
        vcpu.state.gpr[reg::RAX] = number;
        vcpu.state.gpr[reg::RDI] = cmd;
        vcpu.state.gpr[reg::RSI] = ARG;
        self.xen.hypercall(&mut *vcpu, VcpuId(0));
        *arg = self.xen.memory().read_obj(Gpa(ARG)).unwrap();
        vcpu.state.gpr[reg::RAX] as i64
    }

    /// An unused page of the guest.
    pub fn page(&self) -> Gfn {
        let gfn = Gfn(self.next_page.fetch_add(1, SeqCst) as u64);
        assert!(gfn.gpa().0 < RAM_BYTES, "the test uses too much memory");
        gfn
    }

    /// A grant of a frame to the host.
    pub fn grant(&self, gfn: Gfn, flags: u16) -> GrantRef {
        self.grant_to(gfn, flags, 0)
    }

    /// A grant of a frame to a domain.
    pub fn grant_to(&self, gfn: Gfn, flags: u16, domid: u16) -> GrantRef {
        let gref = GrantRef(self.next_gref.fetch_add(1, SeqCst) as u32);
        let entry = grant::EntryV1 {
            flags: grant::TYPE_PERMIT_ACCESS | flags,
            domid,
            frame: gfn.0 as u32,
        };
        let at = Gpa((GRANT_FRAME << 12) + u64::from(gref.0) * 8);
        self.xen.memory().write_obj(at, &entry).unwrap();
        gref
    }

    /// Ends a grant.
    pub fn revoke(&self, gref: GrantRef) {
        let at = Gpa((GRANT_FRAME << 12) + u64::from(gref.0) * 8);
        self.xen.memory().write_obj(at, &0u64).unwrap();
    }

    /// A port that waits for a back end.
    pub fn port(&self) -> u32 {
        let mut alloc = event::AllocUnbound {
            dom: hospes_xen_abi::DOMID_SELF,
            ..event::AllocUnbound::default()
        };
        assert_eq!(
            self.call(nr::EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, &mut alloc),
            0
        );
        alloc.port
    }

    /// Gives a port back.
    pub fn close(&self, port: u32) {
        assert_eq!(
            self.call(nr::EVENT_CHANNEL_OP, event::CLOSE, &mut port.clone()),
            0
        );
    }

    /// Sends an event.
    pub fn send(&self, port: u32) {
        assert_eq!(
            self.call(nr::EVENT_CHANNEL_OP, event::SEND, &mut port.clone()),
            0
        );
    }

    /// A ring in pages of the guest, and their grants.
    pub fn ring<Req, Rsp>(&self, pages: usize) -> (FrontRing<RingPages, Req, Rsp>, Vec<GrantRef>)
    where
        Req: IntoBytes + Immutable,
        Rsp: FromBytes + IntoBytes + Immutable,
    {
        let gfns: Vec<Gfn> = (0..pages).map(|_| self.page()).collect();
        let grefs = gfns.iter().map(|gfn| self.grant(*gfn, 0)).collect();
        (FrontRing::new(self.pages(&gfns)).unwrap(), grefs)
    }

    /// Pages as both sides see them.
    pub fn pages(&self, gfns: &[Gfn]) -> RingPages {
        let page = |gfn: &Gfn| Page::of_frame(self.xen.memory(), *gfn).unwrap();
        RingPages::new(gfns.iter().map(page).collect()).unwrap()
    }

    pub fn front(id: DeviceId) -> String {
        format!(
            "/local/domain/{DOMID}/device/{}/{}",
            id.kind.name(),
            id.devid
        )
    }

    pub fn back(id: DeviceId) -> String {
        format!(
            "/local/domain/0/backend/{}/{DOMID}/{}",
            id.kind.name(),
            id.devid
        )
    }

    /// Writes a node of the device's front end.
    pub fn write(&self, id: DeviceId, node: &str, value: impl ToString) {
        let path = format!("{}/{node}", Guest::front(id));
        self.store
            .write(&path, value.to_string().as_bytes())
            .unwrap();
    }

    /// A node of the back end.
    pub fn read(&self, id: DeviceId, node: &str) -> Option<String> {
        self.store.read_text(&format!("{}/{node}", Guest::back(id)))
    }

    /// Waits until the back end shows a state.
    pub fn wait_state(&self, id: DeviceId, state: &str) {
        wait(&format!("state {state}"), || {
            self.read(id, "state").as_deref() == Some(state)
        });
    }

    /// Log lines so far.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.log).clone()
    }
}

/// Waits for something that another thread does. A test whose condition never comes ends after a minute.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what} does not come"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}
