//! Writes, flushes and discards, a cut at any write, and what must be there afterwards.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::{PowerCut, Random};
use crate::files::HostFiles;
use crate::open::open_on;
use crate::storage::Aligned;
use crate::testing::{Directory, flush, pattern, read, spec, wait, write};
use crate::{Buffer, Completion, Format, Op, Queue, Request, create_overlay, create_qcow2, open};

const SECTORS: u64 = 8192;
/// Sectors of a write at most.
const LONGEST: u64 = 280;
/// Writes at once; each has its own part of the disk.
const LANES: u64 = 4;

/// What a sector may have after the cut: one of the seeds of its writes since the last flush, or of the last before.
#[derive(Clone)]
struct Model {
    may_be: Vec<Vec<u64>>,
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
fn work(queue: &mut dyn Queue, random: &mut Random) -> Model {
    let mut model = Model {
        may_be: vec![vec![BEFORE]; SECTORS as usize],
    };
    loop {
        let mut writes = writes(random);
        // Before they are submitted: any of it may be there from now on.
        for write in &writes {
            for sector in write.first..write.first + write.count {
                model.may_be[sector as usize].push(write.seed);
            }
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
            wait(queue, &mut done);
        }
        if done.iter().any(|completion| completion.result.is_err()) {
            return model;
        }
        match random.below(4) {
            0 => {
                if flush(queue).is_err() {
                    return model;
                }
                for seeds in &mut model.may_be {
                    seeds.drain(..seeds.len() - 1);
                }
            }
            1 => {
                // Whole clusters are given up; they are written at once, so that the model knows what is there.
                let first = random.below(SECTORS / 256) * 256;
                let given_up = crate::testing::discard(queue, first * 512, 256 * 512);
                let zeros = write(queue, first * 512, &[0; 256 * 512]);
                for sector in first..first + 256 {
                    model.may_be[sector as usize].push(ZEROS);
                }
                if given_up.is_err() || zeros.is_err() {
                    return model;
                }
            }
            _ => {}
        }
    }
}

/// Seed of zeros.
const ZEROS: u64 = u64::MAX - 1;

fn verify(path: &Path, format: Format, model: &Model, before: &[u8], name: &str) {
    let image = open(&spec(path, format)).expect("the image opens after the cut");
    let mut queue = image.queue().unwrap();
    let found = read(&mut *queue, 0, SECTORS as usize * 512).unwrap();
    for (sector, seeds) in model.may_be.iter().enumerate() {
        let is = &found[sector * 512..][..512];
        let known = seeds.iter().any(|seed| match *seed {
            ZEROS => is == [0; 512],
            seed => is == content(seed, sector as u64, before),
        });
        // What was given up after the last flush may read as zeros, also before zeros were written.
        let given_up = seeds.contains(&ZEROS) && is == [0; 512];
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

fn cut_runs(runs: u64, format: Format, make: impl Fn(&Directory, u64) -> (PathBuf, Vec<u8>)) {
    for run in 0..runs {
        // The layer is what makes a sync count here: in memory it is quick.
        let directory = Directory::below(Path::new("/dev/shm"));
        let (path, before) = make(&directory, run);
        let mut random = Random(run * 1000 + 17);
        // Early cuts meet tables that are being made.
        let writes = 1 + random.below(if run % 2 == 0 { 30 } else { 200 });
        let name = format!("run {run}, cut at write {writes}");
        let image = open_on(&spec(&path, format), &HostFiles, |storage| {
            Ok(Arc::new(PowerCut::new(storage, 512, run, writes, || {})?))
        });
        let (image, _) = image.unwrap();
        let mut queue = image.queue().unwrap();
        let model = work(&mut *queue, &mut random);
        drop((queue, image));
        if format == Format::Qcow2 {
            check_tables(&path, &name);
        }
        verify(&path, format, &model, &before, &name);
        if format == Format::Qcow2 {
            check_tables(&path, &name);
        }
    }
}

#[test]
fn cut_of_a_raw_image_keeps_what_was_flushed() {
    cut_runs(60, Format::Raw, |directory, _| {
        let path = directory.file("a.img", SECTORS * 512);
        (path, vec![0; SECTORS as usize * 512])
    });
}

#[test]
fn cut_of_a_qcow2_image_keeps_what_was_flushed_and_its_tables() {
    cut_runs(90, Format::Qcow2, |directory, run| {
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
    });
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
