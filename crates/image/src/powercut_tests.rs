//! Writes, flushes and discards, a cut at any write, and what must be there afterwards. Also on a host that fails now and then before the cut.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use super::{PowerCut, Random};
use crate::files::HostFiles;
use crate::host::HostFile;
use crate::open::open_on;
use crate::storage::{Aligned, Storage, part};
use crate::testing::{Directory, flush, pattern, read, spec, wait, write};
use crate::{Buffer, Completion, Format, Image, Op, Request, create_overlay, create_qcow2, open};

const SECTORS: u64 = 8192;
/// Sectors of a write at most.
const LONGEST: u64 = 280;
/// Writes at once; each has its own part of the disk.
const LANES: u64 = 4;

/// A disk that fails one in so many writes and syncs while there is power; the write may have been done for a part or as a whole.
struct Failing {
    below: Arc<PowerCut>,
    random: Mutex<Random>,
    one_in: u64,
    /// The sync of this number from now on is done, and said to have failed.
    late: AtomicU64,
}

impl Failing {
    /// A number where it is to fail.
    fn fails(&self) -> Option<u64> {
        let mut random = self.random.lock().unwrap();
        (random.below(self.one_in) == 0).then(|| random.next())
    }
}

fn failed() -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EIO))
}

impl Storage for Failing {
    fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        self.below.read(buffers, offset)
    }

    fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()> {
        let Some(number) = self.fails() else {
            return self.below.write(buffers, offset);
        };
        let sectors = buffers.iter().map(|b| b.len as u64).sum::<u64>() / 512;
        let done = number % (sectors + 1) * 512;
        if done > 0 {
            self.below.write(&part(buffers, 0, done), offset)?;
        }
        failed()
    }

    fn sync(&self) -> io::Result<()> {
        match self.fails() {
            Some(_) => failed(),
            None if self.late.fetch_sub(1, SeqCst) == 1 => self.below.sync().and(failed()),
            None => self.below.sync(),
        }
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.below.discard(offset, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.below.set_len(bytes)
    }

    fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>> {
        None
    }
}

/// What a sector may have after the cut: one of the seeds of its writes since the last flush, or of the last before that was done.
#[derive(Clone)]
struct Model {
    may_be: Vec<Vec<Sector>>,
}

/// A write of one sector.
#[derive(Clone, Copy)]
struct Sector {
    seed: u64,
    done: bool,
}

impl Model {
    fn new() -> Model {
        let before = Sector {
            seed: BEFORE,
            done: true,
        };
        Model {
            may_be: vec![vec![before]; SECTORS as usize],
        }
    }

    /// Any of it may be there from now on.
    fn begin(&mut self, sectors: Range<u64>, seed: u64) {
        for seeds in &mut self.may_be[sectors.start as usize..sectors.end as usize] {
            seeds.push(Sector { seed, done: false });
        }
    }

    fn done(&mut self, sectors: Range<u64>, seed: u64) {
        for seeds in &mut self.may_be[sectors.start as usize..sectors.end as usize] {
            for write in seeds.iter_mut().filter(|write| write.seed == seed) {
                write.done = true;
            }
        }
    }

    fn flushed(&mut self) {
        for seeds in &mut self.may_be {
            let last = seeds.iter().rposition(|write| write.done);
            seeds.drain(..last.unwrap_or(0));
        }
    }
}

/// Seed of what nobody has written.
const BEFORE: u64 = 0;

fn content(seed: u64, sector: u64, before: &[u8]) -> Vec<u8> {
    if seed == BEFORE {
        return before[sector as usize * 512..][..512].to_vec();
    }
    pattern(seed ^ (sector << 20), 512)
}

struct Write {
    first: u64,
    count: u64,
    seed: u64,
    memory: Aligned,
}

impl Write {
    fn sectors(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

fn writes(random: &mut Random) -> Vec<Write> {
    let lane = SECTORS / LANES;
    (0..LANES)
        .map(|number| {
            let count = 1 + random.below(LONGEST);
            let first = number * lane + random.below(lane - count);
            let seed = random.next() | 1;
            let mut memory = Aligned::new(count as usize * 512);
            for sector in 0..count {
                memory[sector as usize * 512..][..512].copy_from_slice(&content(
                    seed,
                    first + sector,
                    &[],
                ));
            }
            Write {
                first,
                count,
                seed,
                memory,
            }
        })
        .collect()
}

/// Works on the image until the power is cut. The model knows what was flushed.
fn work(image: &dyn Image, layer: &PowerCut, random: &mut Random, larger: bool) -> Model {
    let mut queue = image.queue().unwrap();
    let mut model = Model::new();
    while !layer.is_cut() {
        let mut writes = writes(random);
        for write in &writes {
            model.begin(write.sectors(), write.seed);
        }
        for (id, write) in writes.iter_mut().enumerate() {
            queue.submit(Request {
                id: id as u64,
                op: Op::Write,
                offset: write.first * 512,
                bytes: write.count * 512,
                buffers: vec![Buffer::of(&mut write.memory)],
            });
        }
        queue.flush_submissions();
        let mut done: Vec<Completion> = Vec::new();
        while done.len() < writes.len() {
            wait(&mut *queue, &mut done);
        }
        for completion in done.iter().filter(|completion| completion.result.is_ok()) {
            let write = &writes[completion.id as usize];
            model.done(write.sectors(), write.seed);
        }
        match random.below(4) {
            0 if flush(&mut *queue).is_ok() => model.flushed(),
            1 => {
                // Whole clusters are given up; they are written at once, so that the model knows what is there.
                let first = random.below(SECTORS / 256) * 256;
                model.begin(first..first + 256, ZEROS);
                let _ = crate::testing::discard(&mut *queue, first * 512, 256 * 512);
                if write(&mut *queue, first * 512, &[0; 256 * 512]).is_ok() {
                    model.done(first..first + 256, ZEROS);
                }
            }
            2 if larger && random.below(4) == 0 => {
                // It may fail, and the size matters to nobody here: a larger disk has more tables.
                let _ = image.resize(image.geometry().bytes + (4 << 20));
            }
            _ => {}
        }
    }
    model
}

/// Seed of zeros.
const ZEROS: u64 = u64::MAX - 1;

fn verify(path: &Path, format: Format, model: &Model, before: &[u8], name: &str) {
    let image = open(&spec(path, format)).expect("the image opens after the cut");
    let mut queue = image.queue().unwrap();
    let found = read(&mut *queue, 0, SECTORS as usize * 512).unwrap();
    for (sector, writes) in model.may_be.iter().enumerate() {
        let is = &found[sector * 512..][..512];
        let known = writes.iter().any(|write| match write.seed {
            ZEROS => is == [0; 512],
            seed => is == content(seed, sector as u64, before),
        });
        // What was given up after the last flush may read as zeros, also before zeros were written.
        let given_up = writes.iter().any(|write| write.seed == ZEROS) && is == [0; 512];
        assert!(
            known || given_up,
            "{name}: sector {sector} is wrong after the cut"
        );
    }
}

fn check_tables(path: &Path, name: &str) {
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(path)
        .output()
        .expect("qemu-img runs");
    // 3: clusters that nobody uses, which a cut may leave.
    let code = check.status.code();
    assert!(
        matches!(code, Some(0 | 3)),
        "{name}: {}{}",
        String::from_utf8_lossy(&check.stdout),
        String::from_utf8_lossy(&check.stderr)
    );
}

/// Of a disk that fails one in `one_in` writes before its power is cut, if that is given.
fn cut_runs(
    runs: u64,
    format: Format,
    one_in: Option<u64>,
    make: impl Fn(&Directory, u64) -> (PathBuf, Vec<u8>),
) {
    for run in 0..runs {
        // The layer is what makes a sync count here: in memory it is quick.
        let directory = Directory::below(Path::new("/dev/shm"));
        let (path, before) = make(&directory, run);
        let mut random = Random(run * 1000 + 17);
        // Early cuts meet tables that are being made.
        let writes = 1 + random.below(if run % 2 == 0 { 30 } else { 200 });
        let name = format!("run {run}, cut at write {writes}");
        let mut layer = None;
        let image = open_on(&spec(&path, format), &HostFiles, |storage| {
            let below = Arc::new(PowerCut::new(storage, 512, run, writes, || {})?);
            layer = Some(below.clone());
            let random = Mutex::new(Random(run ^ 0xfa11));
            Ok(match one_in {
                Some(one_in) => Arc::new(Failing {
                    below,
                    random,
                    one_in,
                    late: AtomicU64::new(0),
                }),
                None => below,
            })
        });
        let (image, _) = image.unwrap();
        let larger = format == Format::Qcow2 && one_in.is_some();
        let model = work(&*image, &layer.unwrap(), &mut random, larger);
        drop(image);
        if format == Format::Qcow2 {
            check_tables(&path, &name);
        }
        verify(&path, format, &model, &before, &name);
        if format == Format::Qcow2 {
            check_tables(&path, &name);
        }
    }
}

fn raw_image(directory: &Directory, _: u64) -> (PathBuf, Vec<u8>) {
    let path = directory.file("a.img", SECTORS * 512);
    (path, vec![0; SECTORS as usize * 512])
}

/// One of three kinds.
fn qcow2_image(directory: &Directory, run: u64) -> (PathBuf, Vec<u8>) {
    let path = directory.join("a.qcow2");
    let mut before = vec![0; SECTORS as usize * 512];
    let base = directory.join("base.raw");
    match run % 3 {
        0 => create_qcow2(&path, SECTORS * 512).unwrap(),
        1 => {
            before = pattern(77, before.len());
            std::fs::write(&base, &before).unwrap();
            create_overlay(&path, &base, Format::Raw).unwrap();
        }
        // Small clusters: tables grow and move all the time. And a snapshot, which shares all there is.
        _ => {
            let run = |program: &str, arguments: &[&str]| {
                let status = Command::new(program).args(arguments).arg(&path).output();
                assert!(status.expect("qemu-utils run").status.success());
            };
            let size = (SECTORS * 512).to_string();
            let status = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=1k"])
                .args([path.as_os_str(), size.as_ref()])
                .status();
            assert!(status.expect("qemu-img runs").success());
            run("qemu-io", &["-c", "write -P 9 0 1M"]);
            run("qemu-img", &["snapshot", "-c", "before"]);
            before[..1 << 20].fill(9);
        }
    }
    (path, before)
}

#[test]
fn cut_of_a_raw_image_keeps_what_was_flushed() {
    cut_runs(60, Format::Raw, None, raw_image);
}

#[test]
fn cut_of_a_qcow2_image_keeps_what_was_flushed_and_its_tables() {
    cut_runs(90, Format::Qcow2, None, qcow2_image);
}

#[test]
fn cut_of_a_host_that_failed_before_keeps_what_was_flushed_and_the_tables() {
    cut_runs(15, Format::Raw, Some(20), raw_image);
    cut_runs(45, Format::Qcow2, Some(20), qcow2_image);
}

#[test]
fn flush_after_one_that_failed_at_its_end_counts_before_it_refers() {
    for seed in 0..20 {
        let directory = Directory::below(Path::new("/dev/shm"));
        let path = directory.join("a.qcow2");
        create_qcow2(&path, 1 << 20).unwrap();
        let mut layers = None;
        let image = open_on(&spec(&path, Format::Qcow2), &HostFiles, |storage| {
            let below = Arc::new(PowerCut::new(storage, 512, seed, u64::MAX, || {})?);
            let failing = Arc::new(Failing {
                below: below.clone(),
                random: Mutex::new(Random(seed)),
                one_in: u64::MAX,
                late: AtomicU64::new(0),
            });
            layers = Some((below, failing.clone()));
            Ok(failing)
        });
        let ((image, _), (cut, failing)) = (image.unwrap(), layers.unwrap());
        let mut queue = image.queue().unwrap();
        write(&mut *queue, 0, &[1; 1 << 16]).unwrap();
        // Of the first step, and of that which links the new table.
        failing.late.store(2, SeqCst);
        assert!(flush(&mut *queue).is_err());
        // Data, counts, and what refers to both.
        cut.cut_at(3);
        write(&mut *queue, 1 << 16, &[2; 1 << 16]).unwrap();
        assert!(flush(&mut *queue).is_err() && cut.is_cut());
        drop((queue, image, cut, failing));
        check_tables(&path, &format!("seed {seed}"));
    }
}

#[test]
fn flush_completes_after_a_sync_each_time() {
    let directory = Directory::new();
    let (raw, qcow2) = (directory.file("a.img", 1 << 20), directory.join("a.qcow2"));
    create_qcow2(&qcow2, 1 << 20).unwrap();
    for (path, format) in [(raw, Format::Raw), (qcow2, Format::Qcow2)] {
        let mut layer = None;
        let image = open_on(&spec(&path, format), &HostFiles, |storage| {
            let cut = Arc::new(PowerCut::new(storage, 512, 1, u64::MAX, || {})?);
            layer = Some(cut.clone());
            Ok(cut)
        });
        let (image, _) = image.unwrap();
        let layer = layer.unwrap();
        let mut queue = image.queue().unwrap();
        for round in 0..20u64 {
            if round % 3 > 0 {
                write(&mut *queue, round * 4096, &[round as u8; 4096]).unwrap();
            }
            let before = layer.syncs();
            flush(&mut *queue).unwrap();
            assert!(layer.syncs() > before, "round {round}");
        }
    }
}
