//! Every instruction form, alone.

use hospes_difftest::forms::Level;
use hospes_difftest::program::Flavour;
use hospes_difftest::runner::{Budget, Runner};
use hospes_difftest::{forms, raw, single};

fn forms_agree(flavour: Flavour, level: Level, rounds: u64) {
    if level == Level::V4 && !level.on_host() {
        println!("not run: this processor has no AVX-512");
        return;
    }
    let codes = forms::alone(flavour.bits(), level);
    let codes: Vec<_> = codes
        .into_iter()
        .filter(|c| {
            flavour != Flavour::Kernel64 || forms::classify(*c, level) == forms::Use::Anywhere
        })
        .collect();
    let count = codes.len() as u64;
    let report = Runner::new(level)
        .unwrap()
        .run(Budget::from_environment(count * rounds), |rng, n| {
            single::generate(codes[(n % count) as usize], flavour, level, rng)
        })
        .unwrap();
    report.check(&format!("{flavour:?}, {level:?}, {count} forms"));
}

#[test]
fn user_forms_agree_with_the_processor() {
    forms_agree(Flavour::User64, Level::V3, 30);
}

#[test]
fn kernel_forms_agree_with_the_processor() {
    forms_agree(Flavour::Kernel64, Level::V3, 6);
}

#[test]
fn compatibility_mode_forms_agree_with_the_processor() {
    forms_agree(Flavour::User32, Level::V3, 10);
}

#[test]
fn user_forms_of_avx512_agree_with_the_processor() {
    forms_agree(Flavour::User64, Level::V4, 24);
}

#[test]
fn kernel_forms_of_avx512_agree_with_the_processor() {
    forms_agree(Flavour::Kernel64, Level::V4, 6);
}

#[test]
fn compatibility_mode_forms_of_avx512_agree_with_the_processor() {
    forms_agree(Flavour::User32, Level::V4, 6);
}

#[test]
fn random_bytes_agree_with_the_processor() {
    for level in [Level::V3, Level::V4] {
        if level == Level::V4 && !level.on_host() {
            println!("not run: this processor has no AVX-512");
            continue;
        }
        let mut runner = Runner::new(level).unwrap();
        for flavour in [Flavour::User64, Flavour::Kernel64, Flavour::User32] {
            let report = runner
                .run(Budget::from_environment(60_000), |rng, _| {
                    raw::generate(flavour, level, rng)
                })
                .unwrap();
            report.check(&format!("random bytes, {flavour:?}, {level:?}"));
        }
    }
}
