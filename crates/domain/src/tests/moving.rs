//! Domains that move: what they show to another host, and what they let go of for it.

use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::{Duration, Instant};

use hospes_image::OpenSpec;

use super::*;

const MEMORY: u64 = 64 << 20;

fn idle() -> Domain {
    try_domain(2, MEMORY, Sink::default(), |_| Ok(Exit::Yield)).unwrap()
}

fn host(memory_bytes: u64) -> Host<'static> {
    Host {
        name: "test",
        vcpus: 2,
        level: Level::V3,
        wishes: &[],
        memory_bytes,
        promised_bytes: 0,
    }
}

#[test]
fn passport_is_admitted_where_the_domain_could_live() {
    let d = idle();
    assert!(matches!(d.passport(), Err(RequestError::Paused)));
    d.unpause();
    let passport = d.passport().unwrap();
    host(MEMORY).admits(&passport).unwrap();
    let fault = host(1 << 60).admits(&passport).unwrap_err();
    assert!(matches!(fault, CreateError::HostMemory { .. }), "{fault}");
    let hidden = [("avx2".to_owned(), Wish::Hide)];
    let lacking = Host {
        wishes: &hidden,
        ..host(MEMORY)
    };
    let fault = lacking.admits(&passport).unwrap_err();
    assert!(fault.to_string().contains("AVX2"), "{fault}");
    for hostile in ["", "{}", "[1]", &passport[1..]] {
        let fault = host(MEMORY).admits(hostile).unwrap_err();
        assert!(matches!(fault, CreateError::Restore(_)), "{fault}");
    }
    d.destroy();
    d.wait();
    assert!(matches!(d.passport(), Err(RequestError::Ended(_))));
}

/// A disk of 1 MiB in this file.
fn disk_in(file: &KernelFile) -> DiskSpec {
    std::fs::write(&file.0, vec![0; 1 << 20]).unwrap();
    DiskSpec {
        devid: 51712,
        vdev: "xvda".to_owned(),
        target: file.0.clone(),
        format: ImageFormat::Raw,
        read_only: false,
        cdrom: false,
        discard: true,
        direct: false,
        trusted: true,
    }
}

#[test]
fn suspend_waits_until_a_new_device_is_connected_or_gone() {
    let d = idle();
    let file = KernelFile::new();
    d.unpause();
    d.attach_disk(&disk_in(&file)).unwrap();
    let node = "/local/domain/3/control/shutdown";
    let is_asked = || d.store().read_text(node).as_deref() == Some("suspend");
    let (looks, asked) = (AtomicU32::new(0), AtomicBool::new(false));
    let look = || {
        let look = looks.fetch_add(1, SeqCst);
        if look == 5 {
            assert!(!is_asked(), "the guest has not found its disk yet");
            d.detach(frame::Kind::Vbd, 51712, true).unwrap();
        }
        asked.fetch_or(look > 5 && is_asked(), SeqCst)
    };
    assert!(matches!(d.suspend(&look), Err(RequestError::TakenBack)));
}

#[test]
fn disks_are_free_while_they_are_let_go() {
    let d = idle();
    let file = KernelFile::new();
    d.attach_disk(&disk_in(&file)).unwrap();
    let open = || {
        hospes_image::open(&OpenSpec {
            path: file.0.clone(),
            lock_owner: "another host".to_owned(),
            ..OpenSpec::default()
        })
    };
    assert!(open().is_err());
    d.let_go_of_devices().unwrap();
    let other = open().unwrap();
    let fault = d.take_devices_again().unwrap_err().to_string();
    assert!(fault.contains("locked by another host"), "{fault}");
    hospes_image::flush(&*other, Instant::now() + Duration::from_secs(10)).unwrap();
    drop(other);
    d.take_devices_again().unwrap();
    assert!(open().is_err());
    d.resize_disk(51712, 2 << 20).unwrap();
}
