//! One virtual machine: the state its vCPUs share.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, RwLock};

use hospes_engine::{CpuState, EngineError, Vcpu, VcpuControl, Vm};
use hospes_memory::{FrameSet, GuestMemory};
use hospes_translate::{Stubs, Translator};
use hospes_units::{Gfn, Gpa, VcpuId};

use crate::blocks::Blocks;
use crate::cache::{CodeMemory, SNIPPET_BYTES, STUB_BYTES};
use crate::control::{Control, request};
use crate::exec::Vendor;
use crate::filled::Memory;
use crate::fpu::Wide;
use crate::frame::LAYOUT;
use crate::kernel_window::{Elsewhere, KernelWindow};
use crate::pages::CodePages;
use crate::stubs::{self, EntryPoints};
use crate::vcpu::BtVcpu;

/// What guests see of the processor; implemented by the domain's feature model.
pub trait Processor: Send + Sync {
    /// EAX, EBX, ECX, EDX of one CPUID leaf for this vCPU in its present state.
    fn cpuid(&self, vcpu: VcpuId, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4];

    fn vendor(&self) -> Vendor;

    /// IA32_ARCH_CAPABILITIES.
    fn arch_capabilities(&self) -> u64;
}

/// Choices that are not the guest's.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of the code cache.
    pub code_bytes: usize,
    pub execution: Execution,
}

/// By which means guest code is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// Every instruction alone, by the instruction semantics: slow, for comparison.
    Single,
    /// Translated.
    Translated,
    /// Translated, and long bursts of user code natively in processes of their own.
    Adaptive,
    /// As adaptive, but all user code natively that can be, whether it pays or not: for comparison.
    Direct,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            code_bytes: 128 << 20,
            execution: Execution::Adaptive,
        }
    }
}

pub(crate) struct Translations {
    pub blocks: Blocks,
    pub translator: Translator,
    pub elsewhere: Elsewhere,
}

pub(crate) struct Shared {
    pub memory: Arc<GuestMemory>,
    pub processor: Arc<dyn Processor>,
    pub options: Options,
    pub code: CodeMemory,
    pub stubs: Stubs,
    pub points: EntryPoints,
    pub pages: CodePages,
    pub translations: Mutex<Translations>,
    pub window: KernelWindow,
    /// The vCPUs made so far, by number.
    pub controls: RwLock<Vec<(VcpuId, Arc<Control>)>>,
    pub max_vcpus: usize,
    /// What all vCPUs' top tables map kernel code by while jumps between its pages are connected; 0 while none are.
    pub linked: AtomicU64,
    /// Guests have AVX-512.
    pub wide: Option<Wide>,
}

impl Shared {
    /// Has every vCPU but `except` forget which pages it may write: from now on none of them writes through what it remembers.
    pub fn forget_writable(&self, except: Option<VcpuId>) {
        let controls = self.controls.read().expect("vCPU list");
        let others = controls.iter().filter(|(id, _)| Some(*id) != except);
        Control::post_to_all(others.map(|(_, c)| &**c), request::WRITE_TAGS);
    }

    /// Drops what depends on these bytes, which were just written. True if there were blocks. `writer` is the vCPU that wrote them, if one did.
    pub fn invalidate(
        &self,
        t: &mut Translations,
        gpa: Gpa,
        len: u64,
        writer: Option<VcpuId>,
    ) -> bool {
        let before = self.pages.direct_changes();
        let any = t.blocks.invalidate_range(&self.code, &self.pages, gpa, len);
        if self.pages.direct_changes() != before {
            let controls = self.controls.read().expect("vCPU list");
            let others = controls.iter().filter(|(id, _)| Some(*id) != writer);
            Control::stop_direct(others.map(|(_, c)| &**c));
        }
        any
    }

    /// Posts a request to every vCPU but `except` and waits until each has seen it or is outside translated code.
    pub fn rendezvous(&self, except: Option<VcpuId>, bits: u32) {
        let controls = self.controls.read().expect("vCPU list");
        let others = || controls.iter().filter(|(id, _)| Some(*id) != except);
        for (_, c) in others() {
            c.post(bits);
        }
        for (_, c) in others() {
            c.wait_seen(bits);
        }
    }

    /// The oldest generation of blocks whose positions a vCPU but `except` may hold; the present one, `now`, where none does.
    pub fn oldest_positions(&self, except: VcpuId, now: u64) -> u64 {
        let controls = self.controls.read().expect("vCPU list");
        let others = controls.iter().filter(|(id, _)| *id != except);
        let held = others.filter_map(|(_, c)| c.positions_held());
        held.min().unwrap_or(now)
    }

    /// What a page walk in emitted code has to know of memory.
    pub fn memory_for_walks(&self) -> Memory {
        let ram = self.memory.ram();
        let low = ram.first().filter(|r| r.start == 0);
        let high = ram.get(usize::from(low.is_some()));
        Memory {
            base: self.memory.host_base() as u64,
            low_bytes: low.map_or(0, |r| r.end),
            high_start: high.map_or(0, |r| r.start),
            high_bytes: high.map_or(0, |r| r.end - r.start),
            code_pages: self.pages.bitmap(),
            unnoted: self.memory.log().bitmap(),
            code_cache: self.code.address(0) as u64,
        }
    }

    pub fn snippets(&self, id: VcpuId) -> std::ops::Range<usize> {
        let start = self.code.len() - SNIPPET_BYTES * (self.max_vcpus - id.0 as usize);
        start..start + SNIPPET_BYTES
    }
}

/// A virtual machine executed by the translator.
pub struct BtVm {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for BtVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BtVm").finish_non_exhaustive()
    }
}

pub(crate) fn host_error(what: &str, why: impl ToString) -> EngineError {
    EngineError::Host {
        engine: "bt",
        what: what.to_owned(),
        why: why.to_string(),
    }
}

/// Memory for translated code, for a machine that is still to be made.
#[derive(Debug)]
pub struct CodeCache(CodeMemory);

impl CodeCache {
    /// So many bytes. A process that has given up its rights may not be able to have them in huge pages.
    pub fn new(bytes: usize) -> Result<CodeCache, EngineError> {
        let memory = CodeMemory::new(bytes);
        let memory = memory.map_err(|e| host_error("memory for translated code", e))?;
        Ok(CodeCache(memory))
    }
}

impl BtVm {
    /// Prepares the code cache for up to `max_vcpus` vCPUs. Fails where the host's processor lacks what the translator itself uses.
    pub fn new(
        memory: Arc<GuestMemory>,
        processor: Arc<dyn Processor>,
        max_vcpus: u32,
        options: Options,
    ) -> Result<BtVm, EngineError> {
        let code = CodeCache::new(options.code_bytes)?;
        BtVm::with_code(memory, processor, max_vcpus, options, code)
    }

    /// The same with a code cache that is there already, of as many bytes as the options say.
    pub fn with_code(
        memory: Arc<GuestMemory>,
        processor: Arc<dyn Processor>,
        max_vcpus: u32,
        options: Options,
        CodeCache(code): CodeCache,
    ) -> Result<BtVm, EngineError> {
        if !(std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("bmi2")) {
            return Err(host_error(
                "AVX2 and BMI2",
                "the processor is older than x86-64-v3",
            ));
        }
        let nobody = CpuState::default();
        let wide = Wide::new(|n| processor.cpuid(VcpuId(0), &nobody, 0xd, n))
            .map_err(|e| host_error("AVX-512", e))?;
        if wide.is_some() && !std::is_x86_feature_detected!("avx512bw") {
            return Err(host_error(
                "AVX-512",
                "the domain's level needs it; choose a lower one",
            ));
        }
        let (bytes, stubs, points) = stubs::assemble(wide.is_some());
        assert!(bytes.len() <= STUB_BYTES, "stubs outgrew their place");
        code.put(0, &bytes);
        let end = code.len() - SNIPPET_BYTES * max_vcpus as usize;
        let frames = memory.reserved_bytes() >> 12;
        let mut translator = Translator::new(LAYOUT, stubs);
        translator.amd = processor.vendor() == Vendor::Amd;
        Ok(BtVm {
            shared: Arc::new(Shared {
                memory,
                processor,
                options,
                stubs,
                points,
                pages: CodePages::new(frames),
                translations: Mutex::new(Translations {
                    blocks: Blocks::new(STUB_BYTES, end),
                    translator,
                    elsewhere: Elsewhere::default(),
                }),
                window: KernelWindow::default(),
                controls: RwLock::default(),
                max_vcpus: max_vcpus as usize,
                linked: AtomicU64::new(0),
                wide,
                code,
            }),
        })
    }
}

impl BtVm {
    /// Bytes of kernel addresses that translated code accesses without a check.
    pub fn kernel_window_bytes(&self) -> u64 {
        self.shared.window.shown_bytes()
    }

    /// Has all code be translated again, where that is `wanted`: it goes by whether the kernel window shows anything.
    fn translate_anew(&self, wanted: bool) {
        if wanted {
            let mut t = self.shared.translations.lock().expect("translations");
            t.blocks.want_empty_cache();
        }
    }
}

impl Vm for BtVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        let control = Arc::new(Control::default());
        let vcpu = BtVcpu::new(self.shared.clone(), id, control.clone())?;
        self.shared
            .controls
            .write()
            .expect("vCPU list")
            .push((id, control));
        Ok(Box::new(vcpu))
    }

    fn mark_written(&self, gpa: Gpa, len: u64) {
        let s = &self.shared;
        // A page is marked before its bytes are read for translation: what is not marked now will be read as it was written. Back ends come here for
        // each page, and must not wait for vCPUs that translate.
        fence(Ordering::SeqCst);
        s.memory.log().note(gpa, len);
        s.window.follow_specials(&s.memory);
        let end = Gpa(gpa.0 + len.max(1) - 1).gfn();
        if !(gpa.gfn().0..=end.0).any(|gfn| s.pages.contains(Gfn(gfn))) {
            return;
        }
        let mut t = s.translations.lock().expect("translations");
        s.invalidate(&mut t, gpa, len, None);
    }

    fn begin_round(&self) -> FrameSet {
        // A vCPU writes unseen only through tags and mappings that it has had since a frame was noted: whatever it still writes through these, until it has forgotten
        // them, goes to frames that are taken here. New ones it gets only for frames that it has noted in the new round.
        self.translate_anew(self.shared.window.shut());
        let written = self.shared.memory.log().begin_round();
        self.shared.forget_writable(None);
        written
    }

    fn end_rounds(&self) {
        self.shared.memory.log().end();
        self.translate_anew(self.shared.window.open());
    }
}

impl Drop for BtVm {
    fn drop(&mut self) {
        for (_, c) in self.shared.controls.read().expect("vCPU list").iter() {
            c.kick();
        }
    }
}

/// Everything every vCPU has cached about where code lies.
pub(crate) const FORGET_CODE: u32 = request::JUMPS;
