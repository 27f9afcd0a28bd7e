//! What a guest is asked through the store.

use super::failing::Failing;
use super::*;

const NODE: &str = "/local/domain/3/control/shutdown";

#[test]
fn request_shutdown_writes_the_node() {
    let d = domain(|_| Exit::Yield);
    for (kind, word) in [
        (ShutdownKind::PowerOff, "poweroff"),
        (ShutdownKind::Halt, "halt"),
        (ShutdownKind::Reboot, "reboot"),
    ] {
        d.request_shutdown(kind).unwrap();
        assert_eq!(d.store().read_text(NODE).as_deref(), Some(word));
    }
}

#[test]
fn wait_acknowledged_returns_when_the_guest_has_emptied_the_node() {
    let d = domain(|_| Exit::Yield);
    d.request_shutdown(ShutdownKind::Reboot).unwrap();
    let given_up = d.wait_acknowledged(&|| true);
    assert!(matches!(given_up, Err(RequestError::Unacknowledged { .. })));
    assert_eq!(d.store().read_text(NODE).as_deref(), Some("reboot"));
    let looks = AtomicU32::new(0);
    let acknowledge = || {
        if looks.fetch_add(1, SeqCst) == 5 {
            d.store().write(NODE, b"").unwrap();
        }
        false
    };
    d.wait_acknowledged(&acknowledge).unwrap();
    assert!(looks.load(SeqCst) > 5, "it was not waited for");
}

#[test]
fn wait_acknowledged_returns_when_the_guest_has_ended() {
    let d = domain(|_| Exit::Yield);
    d.request_shutdown(ShutdownKind::PowerOff).unwrap();
    let looks = AtomicU32::new(0);
    let end = || {
        if looks.fetch_add(1, SeqCst) == 5 {
            d.destroy();
        }
        false
    };
    d.wait_acknowledged(&end).unwrap();
    assert_eq!(d.store().read_text(NODE).as_deref(), Some("poweroff"));
}

#[test]
fn store_that_cannot_be_read_acknowledges_nothing() {
    let mut d = domain(|_| Exit::Yield);
    d.request_shutdown(ShutdownKind::Reboot).unwrap();
    d.store = Arc::new(Failing {
        below: Arc::clone(&d.store),
        devices: Arc::default(),
        reads: Arc::new(AtomicU32::new(3)),
    });
    let looks = AtomicU32::new(0);
    let given_up = || looks.fetch_add(1, SeqCst) == 5;
    let result = d.wait_acknowledged(&given_up);
    assert!(matches!(result, Err(RequestError::Unacknowledged { .. })));
}
