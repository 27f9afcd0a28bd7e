//! Every instruction form, alone.

use hospes_difftest::program::Flavour;
use hospes_difftest::runner::{Budget, Runner};
use hospes_difftest::{forms, raw, single};

fn forms_agree(flavour: Flavour, rounds: u64) {
    let codes = forms::alone(flavour.bits());
    let codes: Vec<_> = codes
        .into_iter()
        .filter(|c| flavour != Flavour::Kernel64 || forms::classify(*c) == forms::Use::Anywhere)
        .collect();
    let count = codes.len() as u64;
    let report = Runner::new()
        .unwrap()
        .run(Budget::from_environment(count * rounds), |rng, n| {
            single::generate(codes[(n % count) as usize], flavour, rng)
        })
        .unwrap();
    report.check(&format!("{flavour:?}, {count} forms"));
}

#[test]
fn user_forms_agree_with_the_processor() {
    forms_agree(Flavour::User64, 30);
}

#[test]
fn kernel_forms_agree_with_the_processor() {
    forms_agree(Flavour::Kernel64, 6);
}

#[test]
fn compatibility_mode_forms_agree_with_the_processor() {
    forms_agree(Flavour::User32, 10);
}

#[test]
fn random_bytes_agree_with_the_processor() {
    let mut runner = Runner::new().unwrap();
    for flavour in [Flavour::User64, Flavour::Kernel64, Flavour::User32] {
        let report = runner
            .run(Budget::from_environment(60_000), |rng, _| {
                raw::generate(flavour, rng)
            })
            .unwrap();
        report.check(&format!("random bytes, {flavour:?}"));
    }
}
