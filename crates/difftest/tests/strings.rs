//! Repeated MOVS and STOS that go on from page to page, with and without the pages in the TLB, up to where they may not.

use hospes_difftest::forms::Level;
use hospes_difftest::layout::{CODE, DATA, LOW, PAGE, READ_ONLY, STACK};
use hospes_difftest::program::{Flavour, Program, What};
use hospes_difftest::rng::Rng;
use hospes_difftest::runner::Runner;
use hospes_difftest::state::{Ending, Regs};

const RCX: usize = 1;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// REP MOVS and REP STOS of 1, 2, 4 and 8 bytes.
const INSTRUCTIONS: [(&[u8], u64); 8] = [
    (&[0xf3, 0xa4], 1),
    (&[0x66, 0xf3, 0xa5], 2),
    (&[0xf3, 0xa5], 4),
    (&[0xf3, 0x48, 0xa5], 8),
    (&[0xf3, 0xaa], 1),
    (&[0x66, 0xf3, 0xab], 2),
    (&[0xf3, 0xab], 4),
    (&[0xf3, 0x48, 0xab], 8),
];

/// `add byte [rbx + page], 0`
fn touch(page: u64) -> What {
    let at = (page * PAGE) as u32;
    What::Bytes([&[0x80, 0x83][..], &at.to_le_bytes(), &[0]].concat())
}

fn program(rng: &mut Rng, flavour: Flavour) -> Program {
    let (code, size) = rng.pick(&INSTRUCTIONS);
    let mut regs = Regs::random(Level::V3, rng);
    regs.rflags = 0x202;
    regs.gpr[RSP] = LOW + STACK + PAGE;
    regs.gpr[RBX] = LOW + DATA;
    // Four pages that may be written, one that may be read, none.
    let at = |rng: &mut Rng| {
        let page = LOW + DATA + PAGE * rng.below(4);
        let near_end = PAGE - rng.below(3 * size);
        let offset = if rng.one_in(2) {
            near_end
        } else {
            rng.below(PAGE)
        };
        let aligned = if rng.one_in(2) { size } else { 1 };
        (page + offset) / aligned * aligned
    };
    regs.gpr[RSI] = at(rng);
    regs.gpr[RDI] = at(rng);
    regs.gpr[RCX] = rng.below(3 * PAGE / size);
    let mut p = Program::new(flavour, LOW + CODE, regs);
    if rng.one_in(2) {
        for page in 0..4 {
            p.push(touch(page));
        }
    }
    p.push(What::Bytes(code.to_vec()));
    p
}

#[test]
fn strings_across_pages_agree_with_the_processor() {
    let mut runner = Runner::new(Level::V3).unwrap();
    let mut rng = Rng::new(17);
    let (mut ended, mut written, mut read) = (0, 0, 0);
    for n in 0..600 {
        let flavour = if n % 3 == 0 {
            Flavour::Kernel64
        } else {
            Flavour::User64
        };
        let p = program(&mut rng, flavour);
        match runner.check(&p).unwrap() {
            Ok(Ending::Exception { vector: 3, .. }) => ended += 1,
            Ok(Ending::Exception {
                vector: 14, cr2, ..
            }) if cr2 < LOW + READ_ONLY + PAGE => {
                written += 1;
            }
            Ok(Ending::Exception { vector: 14, .. }) => read += 1,
            Ok(other) => panic!("{other:?}\n{}", p.describe()),
            Err(text) => panic!("{text}"),
        }
    }
    // Each way to end is among them.
    assert!(
        ended > 100 && written > 50 && read > 20,
        "{ended} {written} {read}"
    );
}
