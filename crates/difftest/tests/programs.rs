//! Random programs, and programs that change themselves.

use hospes_difftest::forms::Level;
use hospes_difftest::layout::{HIGH, LOW, OTHER};
use hospes_difftest::program::{Flavour, Program};
use hospes_difftest::rng::Rng;
use hospes_difftest::runner::{Budget, Runner};
use hospes_difftest::{blocks, grouped, saved, selfmod};

fn programs_agree(
    what: &str,
    flavour: Flavour,
    count: u64,
    generate: impl Fn(Flavour, Level, &mut Rng) -> Option<Program>,
) {
    programs_of_level_agree(what, flavour, Level::V3, count, generate);
}

fn programs_of_level_agree(
    what: &str,
    flavour: Flavour,
    level: Level,
    count: u64,
    generate: impl Fn(Flavour, Level, &mut Rng) -> Option<Program>,
) {
    if level == Level::V4 && !level.on_host() {
        println!("not run: this processor has no AVX-512");
        return;
    }
    let report = Runner::new(level)
        .unwrap()
        .run(Budget::from_environment(count), |rng, _| {
            generate(flavour, level, rng)
        })
        .unwrap();
    report.check(&format!("{what}, {flavour:?}, {level:?}"));
}

#[test]
fn user_blocks_agree_with_the_processor() {
    programs_agree("blocks", Flavour::User64, 20_000, blocks::generate);
}

#[test]
fn kernel_blocks_agree_with_the_processor() {
    programs_agree("blocks", Flavour::Kernel64, 6_000, blocks::generate);
}

#[test]
fn compatibility_mode_blocks_agree_with_the_processor() {
    programs_agree("blocks", Flavour::User32, 6_000, blocks::generate);
}

#[test]
fn accesses_off_one_register_agree_with_the_processor() {
    programs_agree("groups", Flavour::User64, 20_000, grouped::generate);
    programs_agree("groups", Flavour::Kernel64, 6_000, grouped::generate);
    programs_agree("groups", Flavour::User32, 8_000, grouped::generate);
}

#[test]
fn self_modifying_code_agrees_with_the_processor() {
    programs_agree("self-modifying", Flavour::User64, 4_000, selfmod::generate);
    programs_agree(
        "self-modifying",
        Flavour::Kernel64,
        2_000,
        selfmod::generate,
    );
    programs_agree("self-modifying", Flavour::User32, 2_000, selfmod::generate);
}

#[test]
fn saved_states_agree_with_the_processor() {
    programs_agree("saved states", Flavour::User64, 6_000, saved::generate);
    programs_agree("saved states", Flavour::Kernel64, 3_000, saved::generate);
    programs_agree("saved states", Flavour::User32, 3_000, saved::generate);
}

/// The same bytes in the same physical pages, at one virtual address and then at another: what was translated for one is copied for the other.
#[test]
fn code_at_another_address_agrees_with_the_processor() {
    type Generate = fn(u64, Flavour, Level, &mut Rng) -> Option<Program>;
    let kinds: [(&str, Generate, u64); 3] = [
        ("blocks", blocks::generate_at, 20_000),
        ("groups", grouped::generate_at, 10_000),
        ("self-modifying", selfmod::generate_at, 6_000),
    ];
    for (what, generate, count) in kinds {
        let report = Runner::new(Level::V3)
            .unwrap()
            .run(Budget::from_environment(count), |_, n| {
                let window = [HIGH, OTHER, LOW][(n % 3) as usize];
                generate(window, Flavour::User64, Level::V3, &mut Rng::new(n / 3))
            })
            .unwrap();
        report.check(&format!("{what} in several windows"));
    }
}

#[test]
fn blocks_with_avx512_agree_with_the_processor() {
    for (flavour, count) in [
        (Flavour::User64, 10_000),
        (Flavour::Kernel64, 4_000),
        (Flavour::User32, 3_000),
    ] {
        programs_of_level_agree("blocks", flavour, Level::V4, count, blocks::generate);
    }
}

#[test]
fn accesses_with_avx512_off_one_register_agree_with_the_processor() {
    programs_of_level_agree(
        "groups",
        Flavour::User64,
        Level::V4,
        8_000,
        grouped::generate,
    );
}

#[test]
fn saved_states_with_avx512_agree_with_the_processor() {
    for flavour in [Flavour::User64, Flavour::Kernel64, Flavour::User32] {
        programs_of_level_agree("saved states", flavour, Level::V4, 4_000, saved::generate);
    }
}
