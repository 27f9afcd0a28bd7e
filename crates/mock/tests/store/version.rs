//! A store process of another version than its clients.

use hospes_store::wire::kind;
use hospes_store::{Error, StoreAccess};
use rustix::process::{Pid, test_kill_process};

use crate::common::{Bench, Guest, wait_until};

fn wait_for_end(process: Option<Pid>) {
    let process = process.expect("there was one");
    wait_until("the process has ended", || {
        test_kill_process(process).is_err()
    });
}

#[test]
fn process_of_another_version_that_no_domain_needs_makes_room() {
    let bench = Bench::new();
    bench.client().write("/here", b"still").expect("written");
    let before = bench.store_pid();
    bench.make_store_another();
    let again = bench.client().read_text("/here");
    assert_eq!(again.as_deref(), Some("still"));
    assert_ne!(bench.store_pid(), before);
    wait_for_end(before);
    let once_more = bench.store_pid();
    assert!(bench.client().read("/here").is_ok());
    assert_eq!(bench.store_pid(), once_more);
}

#[test]
fn process_of_another_version_stays_for_its_domains() {
    let bench = Bench::new();
    let mut guest = Guest::new(&bench, &bench.client(), 7);
    let before = bench.store_pid();
    bench.make_store_another();
    assert_eq!(bench.client().read("/here"), Err(Error::OtherVersion));
    assert_eq!(bench.store_pid(), before);
    assert_eq!(guest.ask(kind::READ, "domid\0"), Ok("7".to_owned()));
    drop(guest);
    assert_eq!(bench.client().list("/local/domain/7"), Err(Error::NoEntry));
    wait_for_end(before);
}

#[test]
fn create_says_that_the_store_is_of_another_version() {
    let bench = Bench::new();
    bench.create("one");
    bench.make_store_another();
    let kernel = format!("kernel='{}'", bench.file("kernel"));
    let config = "name='two'; type='pvh'; memory=64";
    let mut command = bench.command();
    let output = command.args(["create", "-q", "/dev/null", config, &kernel]);
    let output = output.output().expect("starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("another version"),
        "{said}"
    );
}
