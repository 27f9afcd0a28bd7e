//! Against QEMU's own tools: they make, check and compare images.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;

use crate::testing::{Directory, discard, flush, pattern, read, spec, write};
use crate::{Format, Image, IoError, OpenSpec, Queue, create_overlay, create_qcow2, info, open};

pub(in crate::qcow2) fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("qemu-utils are installed");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

pub(in crate::qcow2) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// No error, and no cluster that nobody uses.
pub(in crate::qcow2) fn check(path: &Path) {
    let said = qemu("qemu-img", &["check", "-f", "qcow2", text(path)]);
    assert!(said.contains("No errors were found"), "{said}");
}

pub(in crate::qcow2) fn qcow2(path: &Path) -> Arc<dyn Image> {
    open(&spec(path, Format::Qcow2)).expect("the image opens")
}

/// A new image.
fn fresh(path: &Path, bytes: u64) -> Arc<dyn Image> {
    create_qcow2(path, bytes).expect("there is room");
    qcow2(path)
}

fn refusal(path: &Path) -> String {
    let refused = open(&spec(path, Format::Qcow2));
    refused.err().expect("it is refused").to_string()
}

/// All of the disk, as QEMU reads it.
fn content(path: &Path, directory: &Directory) -> Vec<u8> {
    let out = directory.join("content.raw");
    qemu(
        "qemu-img",
        &["convert", "-O", "raw", text(path), text(&out)],
    );
    std::fs::read(out).unwrap()
}

pub(in crate::qcow2) fn all(queue: &mut dyn Queue, bytes: u64) -> Vec<u8> {
    read(queue, 0, bytes as usize).unwrap()
}

#[test]
fn create_makes_an_image_that_qemu_finds_no_fault_with() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    create_qcow2(&path, 5 << 30).unwrap();
    check(&path);
    let found = info(&path).unwrap();
    assert_eq!((found.format, found.bytes), (Format::Qcow2, 5 << 30));
    assert!(create_qcow2(&path, 5 << 30).is_err(), "it exists");
    assert!(create_qcow2(&directory.join("b"), 100).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u64),
    Discard(u64, u64),
    Flush,
    Reopen,
}

const SECTORS: u64 = 4096;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..SECTORS, 1..300u64)
        .prop_map(|(start, count)| (start * 512, count.min(SECTORS - start) * 512));
    let step = prop_oneof![
        6 => (range.clone(), any::<u64>()).prop_map(|((at, bytes), seed)| Step::Write(at, bytes, seed)),
        2 => range.prop_map(|(at, bytes)| Step::Discard(at, bytes)),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

/// Does the steps to an image that starts as `model`, and holds each read against the model.
fn follow(path: &Path, model: &mut [u8], steps: &[Step]) {
    let mut image = qcow2(path);
    let mut queue = image.queue().unwrap();
    for step in steps {
        match *step {
            Step::Write(at, bytes, seed) => {
                let data = pattern(seed, bytes as usize);
                write(&mut *queue, at, &data).unwrap();
                model[at as usize..(at + bytes) as usize].copy_from_slice(&data);
            }
            Step::Discard(at, bytes) => {
                discard(&mut *queue, at, bytes).unwrap();
                let range = at as usize..(at + bytes) as usize;
                let now = read(&mut *queue, at, bytes as usize).unwrap();
                // What was discarded reads as zeros or as before.
                for (new, old) in now.iter().zip(&model[range.clone()]) {
                    assert!(*new == 0 || new == old);
                }
                model[range].copy_from_slice(&now);
            }
            Step::Flush => flush(&mut *queue).unwrap(),
            Step::Reopen => {
                drop(queue);
                drop(image);
                check(path);
                image = qcow2(path);
                queue = image.queue().unwrap();
            }
        }
    }
    assert!(all(&mut *queue, model.len() as u64) == model);
    flush(&mut *queue).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_steps_on_images_of_all_kinds_give_what_a_model_gives(
        steps in steps(),
        cluster_bits in 9u32..18,
        refcount_bits in 0u32..7,
        old in any::<bool>(),
        backing in any::<bool>(),
        snapshot in any::<bool>(),
    ) {
        let directory = Directory::new();
        let (path, base) = (directory.join("a.qcow2"), directory.join("base.raw"));
        let bytes = SECTORS * 512;
        let mut model = vec![0; bytes as usize];
        // A snapshot needs refcounts above 1.
        let refcount_bits = if old { 4 } else { refcount_bits.max(u32::from(snapshot)) };
        let options = format!(
            "cluster_size={},compat={},refcount_bits={}",
            1 << cluster_bits,
            if old { "0.10" } else { "1.1" },
            1 << refcount_bits,
        );
        let size = bytes.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &*options];
        if backing {
            // Shorter than the image: behind its end there are zeros.
            model[..bytes as usize / 2].copy_from_slice(&pattern(99, bytes as usize / 2));
            std::fs::write(&base, &model[..bytes as usize / 2]).unwrap();
            arguments.extend(["-b", text(&base), "-F", "raw"]);
        }
        arguments.extend([text(&path), &size]);
        qemu("qemu-img", &arguments);
        let kept = if snapshot {
            qemu("qemu-io", &["-c", "write -P 7 0 300k", "-c", "write -P 8 1M 70k", text(&path)]);
            model[..300 << 10].fill(7);
            model[1 << 20..][..70 << 10].fill(8);
            qemu("qemu-img", &["snapshot", "-c", "before", text(&path)]);
            Some(model.clone())
        } else {
            None
        };
        follow(&path, &mut model, &steps);
        check(&path);
        prop_assert!(content(&path, &directory) == model);
        if let Some(kept) = kept {
            qemu("qemu-img", &["snapshot", "-a", "before", text(&path)]);
            check(&path);
            prop_assert!(content(&path, &directory) == kept);
        }
    }
}

#[test]
fn overlay_of_overlay_reads_through_and_writes_on_top() {
    let directory = Directory::new();
    let (base, middle, top) = (
        directory.file("base.raw", 1 << 20),
        directory.join("middle.qcow2"),
        directory.join("top.qcow2"),
    );
    std::fs::write(&base, pattern(1, 1 << 20)).unwrap();
    create_overlay(&middle, Path::new("base.raw"), Format::Raw).unwrap();
    let image = qcow2(&middle);
    write(&mut *image.queue().unwrap(), 4096, &[5; 4096]).unwrap();
    drop(image);
    create_overlay(&top, &middle, Format::Auto).unwrap();
    let image = qcow2(&top);
    let mut queue = image.queue().unwrap();
    write(&mut *queue, 1 << 19, &[6; 512]).unwrap();
    let mut model = pattern(1, 1 << 20);
    model[4096..8192].fill(5);
    model[1 << 19..][..512].fill(6);
    assert!(all(&mut *queue, 1 << 20) == model);
    let refused = open(&spec(&middle, Format::Qcow2)).err().unwrap();
    assert!(
        refused.to_string().contains("is locked by the test"),
        "{refused}"
    );
    // Other overlays share it.
    let other = directory.join("other.qcow2");
    create_overlay(&other, &middle, Format::Qcow2).unwrap();
    qcow2(&other);
    drop((queue, image));
    assert!(content(&top, &directory) == model);
    check(&top);
}

#[test]
fn open_of_a_backing_loop_is_refused() {
    let directory = Directory::new();
    let (a, b) = (directory.join("a.qcow2"), directory.join("b.qcow2"));
    create_qcow2(&a, 1 << 20).unwrap();
    create_overlay(&b, &a, Format::Qcow2).unwrap();
    let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu("qemu-img", &[&rebase[..], &[text(&b), text(&a)]].concat());
    assert!(refusal(&a).contains("is an image on top of it"));
    qemu(
        "qemu-img",
        &[&rebase[..], &["nbd://host/disk", text(&a)]].concat(),
    );
    assert!(refusal(&a).contains("is not a local path"));
}

#[test]
fn open_without_the_backing_file_names_both_images() {
    let directory = Directory::new();
    let path = |name| directory.join(name);
    let (base, middle, top) = (path("base.raw"), path("middle.qcow2"), path("top.qcow2"));
    std::fs::write(&base, [0; 4096]).unwrap();
    create_overlay(&middle, &base, Format::Raw).unwrap();
    create_overlay(&top, &middle, Format::Qcow2).unwrap();
    for (gone, refers) in [(&base, &middle), (&middle, &top)] {
        std::fs::remove_file(gone).unwrap();
        let refusal = refusal(&top);
        for named in [gone, refers] {
            assert!(refusal.contains(text(named)), "{refusal}");
        }
        assert!(refusal.contains("No such file"), "{refusal}");
    }
}

#[test]
fn read_of_compressed_clusters_unpacks_them_and_writes_replace_them() {
    let directory = Directory::new();
    let raw = directory.join("a.raw");
    let mut model = b"a text that is easily compressed. ".repeat(40_000);
    model.resize(1 << 20, 3);
    std::fs::write(&raw, &model).unwrap();
    for kind in ["zlib", "zstd"] {
        let path = directory.join(kind);
        let option = format!("compression_type={kind}");
        let convert = ["convert", "-c", "-O", "qcow2", "-o"];
        qemu(
            "qemu-img",
            &[&convert[..], &[&option, text(&raw), text(&path)]].concat(),
        );
        let image = qcow2(&path);
        let mut queue = image.queue().unwrap();
        assert!(all(&mut *queue, 1 << 20) == model);
        let mut changed = model.clone();
        for at in [512, 300_032, 900_096] {
            write(&mut *queue, at, &[1; 1024]).unwrap();
            changed[at as usize..][..1024].fill(1);
        }
        assert!(all(&mut *queue, 1 << 20) == changed);
        drop((queue, image));
        check(&path);
        assert!(content(&path, &directory) == changed);
    }
}

#[test]
fn open_of_what_is_not_supported_names_it() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let create = |options: &[&str]| {
        let _ = std::fs::remove_file(&path);
        let arguments = [
            &["create", "-q", "-f", "qcow2"],
            options,
            &[text(&path), "1M"],
        ]
        .concat();
        qemu("qemu-img", &arguments);
    };
    create(&["-o", "extended_l2=on"]);
    assert!(refusal(&path).contains("'extended L2 entries', which is not supported"));
    let data = format!("data_file={}", text(&directory.join("data")));
    create(&["-o", &data]);
    assert!(refusal(&path).contains("'external data file'"));
    // The method of encryption, LUKS: qemu-img measures the host's speed to make such an image, and fails on a busy one.
    create(&[]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[35] = 2;
    std::fs::write(&path, bytes).unwrap();
    assert!(refusal(&path).contains("encrypted"));
    std::fs::write(&path, [0; 65536]).unwrap();
    assert!(refusal(&path).contains("no qcow2 image"));
    create(&[]);
    // The bit that says that its tables are broken.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 2;
    std::fs::write(&path, bytes).unwrap();
    assert!(refusal(&path).contains("marked as corrupt"));
    let reader = OpenSpec {
        read_only: true,
        ..spec(&path, Format::Qcow2)
    };
    open(&reader).unwrap();
}

#[test]
fn write_through_an_entry_that_names_metadata_is_refused() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let image = fresh(&path, 1 << 20);
    write(&mut *image.queue().unwrap(), 0, &[1; 512]).unwrap();
    drop(image);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = at(&bytes, 40) as usize;
    let l2 = (at(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // The disk's second cluster is the header, says the table; the third is far behind the file.
    for (entry, offset) in [(1, 0u64), (2, 1 << 40)] {
        let offset = if offset == 0 { l1 as u64 } else { offset };
        bytes[l2 + entry * 8..][..8].copy_from_slice(&(offset | 1 << 63).to_be_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    let image = qcow2(&path);
    let mut queue = image.queue().unwrap();
    for cluster in [1, 2] {
        let result = write(&mut *queue, cluster << 16, &[9; 512]);
        assert!(
            matches!(result, Err(crate::IoError::Damaged(_))),
            "{result:?}"
        );
    }
    drop((queue, image));
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

/// What was there does not read as zeros, and nothing makes the file grow again: not as the image itself, and not below another.
#[test]
fn requests_to_a_file_that_was_cut_fail_and_the_file_stays_as_it_is() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let image = fresh(&path, 4 << 20);
    let mut queue = image.queue().unwrap();
    let content = pattern(6, 2 << 20);
    write(&mut *queue, 0, &content).unwrap();
    flush(&mut *queue).unwrap();
    let cut = 1 << 20;
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(cut).unwrap();
    let is_cut = |result: &Result<(), IoError>| matches!(result, Err(IoError::Cut { bytes }) if *bytes == cut);
    assert_eq!(read(&mut *queue, 0, 65536).unwrap(), content[..65536]);
    let lost = read(&mut *queue, (2 << 20) - 65536, 65536).map(drop);
    assert!(is_cut(&lost), "{lost:?}");
    for offset in [0, 2 << 20] {
        let written = write(&mut *queue, offset, &[8; 65536]);
        assert!(is_cut(&written), "{written:?}");
    }
    drop((queue, image));
    assert_eq!(file.metadata().unwrap().len(), cut);

    let top = directory.join("top.qcow2");
    let (below, above) = (directory.join("b.qcow2"), text(&top));
    write(&mut *fresh(&below, 4 << 20).queue().unwrap(), 0, &content).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu("qemu-img", &[&create[..], &[text(&below), above]].concat());
    let image = qcow2(&top);
    let mut queue = image.queue().unwrap();
    write(&mut *queue, 3 << 20, &content[..65536]).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&below)
        .unwrap()
        .set_len(cut)
        .unwrap();
    let lost = read(&mut *queue, (2 << 20) - 65536, 65536).map(drop);
    assert!(is_cut(&lost), "{lost:?}");
    write(&mut *queue, 3 << 20, &content[..65536]).unwrap();
    flush(&mut *queue).unwrap();
}

#[test]
fn resize_grows_the_disk_and_its_tables() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    // One L1 entry for 32 KiB.
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    qemu("qemu-img", &[&create[..], &[text(&path), "1M"]].concat());
    let image = qcow2(&path);
    let mut queue = image.queue().unwrap();
    write(&mut *queue, 0, &pattern(4, 1 << 20)).unwrap();
    image.resize(16 << 20).unwrap();
    assert_eq!(image.geometry().bytes, 16 << 20);
    write(&mut *queue, 15 << 20, &pattern(5, 1 << 20)).unwrap();
    assert!(
        image
            .resize(1 << 20)
            .err()
            .unwrap()
            .to_string()
            .contains("cannot shrink")
    );
    let error = image.resize(u64::MAX - 511).unwrap_err().to_string();
    assert!(error.contains("less than 8 EiB"), "{error}");
    drop((queue, image));
    check(&path);
    let found = content(&path, &directory);
    assert!(found[..1 << 20] == pattern(4, 1 << 20) && found[15 << 20..] == pattern(5, 1 << 20));
}

#[test]
fn discard_gives_space_back_to_the_host_and_to_later_writes() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let image = fresh(&path, 64 << 20);
    let mut queue = image.queue().unwrap();
    for round in 0..4 {
        for at in 0..8u64 {
            write(&mut *queue, (round * 8 + at) << 20, &pattern(at, 1 << 20)).unwrap();
        }
        flush(&mut *queue).unwrap();
        discard(&mut *queue, (round * 8) << 20, 8 << 20).unwrap();
        flush(&mut *queue).unwrap();
    }
    let found = info(&path).unwrap();
    assert!(found.host_bytes < 2 << 20, "{found:?}");
    drop((queue, image));
    assert!(std::fs::metadata(&path).unwrap().len() < 12 << 20);
    check(&path);
}

#[test]
fn requests_in_parallel_to_the_same_clusters_keep_the_tables_right() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let image = fresh(&path, 16 << 20);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                let mut queue = image.queue().unwrap();
                for round in 0..200u64 {
                    // Each has its own sectors of clusters that all use.
                    let at = (round * 4 + thread) * 512;
                    write(&mut *queue, at, &pattern(at, 512)).unwrap();
                    match round % 23 {
                        0 => flush(&mut *queue).unwrap(),
                        7 => discard(&mut *queue, (8 + thread) << 20, 1 << 20).unwrap(),
                        9 => write(&mut *queue, (8 + thread) << 20, &pattern(1, 1 << 18)).unwrap(),
                        _ => {}
                    }
                }
            });
        }
    });
    let mut queue = image.queue().unwrap();
    for sector in 0..800u64 {
        let found = read(&mut *queue, sector * 512, 512).unwrap();
        assert!(found == pattern(sector * 512, 512), "sector {sector}");
    }
    drop((queue, image));
    check(&path);
}
