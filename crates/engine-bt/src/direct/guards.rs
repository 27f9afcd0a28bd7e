//! Which of many instructions in a page are executed first, whatever the way to them.
//!
//! Libraries ask CPUID a dozen times in one function, and keep other code in the same page. Only the instructions that others cannot be reached without need breakpoints, as
//! long as the page goes back to the translator once one has been reached. Ways that the page does not show (a jump through a register, or from another page, into the middle of a
//! function) can miss the breakpoint: this is for instructions that tell facts about the host's processor and do nothing else.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

const PAGE: u64 = 4096;

/// An instruction of the page, as it is decoded from the start.
struct Node {
    at: u16,
    /// Whether it only tells something.
    tells: bool,
    /// Execution goes on behind it.
    goes_on: bool,
    /// Whatever leads here comes by one of the ways that the page shows.
    known: bool,
    /// Where it may jump to, as an offset in the page.
    target: Option<u64>,
}

/// Whether an instruction tells something about the host's processor and does nothing else.
fn tells(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Cpuid | Xgetbv | Rdtscp | Rdpid)
}

fn nodes(page: &[u8]) -> Vec<Node> {
    let mut decoder = Decoder::with_ip(64, page, 0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let (mut nodes, mut called) = (Vec::<Node>::new(), Vec::new());
    while decoder.can_decode() {
        let at = decoder.position() as u16;
        decoder.decode_out(&mut instruction);
        let flow = instruction.flow_control();
        let target = Some(instruction.near_branch_target()).filter(|&t| t < PAGE);
        if flow == FlowControl::Call {
            called.extend(target);
        }
        let jumps = matches!(
            flow,
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        let stops = nodes.last().is_none_or(|n| !n.goes_on);
        nodes.push(Node {
            at,
            tells: tells(&instruction),
            goes_on: !matches!(
                flow,
                FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Return
                    | FlowControl::Exception
            ),
            // Functions begin at such addresses.
            known: !(stops && at.is_multiple_of(16)),
            target: target.filter(|_| jumps),
        });
    }
    for node in &mut nodes {
        node.known &= !called.contains(&u64::from(node.at));
    }
    nodes
}

/// Those of the suspects of a page that need a breakpoint. All of them where nothing is gained.
pub fn guards(page: &[u8], suspects: &[u16]) -> Vec<u16> {
    let nodes = nodes(page);
    let index = |at: u64| nodes.binary_search_by_key(&at, |n| u64::from(n.at)).ok();
    let mut ways = vec![Vec::new(); nodes.len()];
    for (n, node) in nodes.iter().enumerate() {
        if node.goes_on && n + 1 < nodes.len() {
            ways[n + 1].push(n);
        }
        if let Some(target) = node.target {
            let Some(to) = index(target) else {
                // What is decoded here is not what is executed.
                return suspects.to_vec();
            };
            ways[to].push(n);
        }
    }
    let is_suspect = |n: usize| suspects.binary_search(&nodes[n].at).is_ok();
    // Whether a suspect is always executed before: at first believed, then taken back where it is not so.
    let mut behind: Vec<bool> = nodes.iter().map(|n| n.known).collect();
    loop {
        let mut changed = false;
        for n in 0..nodes.len() {
            let passed = |&from: &usize| behind[from] || is_suspect(from);
            let others = ways[n].is_empty() || !ways[n].iter().all(passed);
            if behind[n] && others {
                behind[n] = false;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    let covered = |at: &u16| {
        let node = index(u64::from(*at));
        node.is_some_and(|n| nodes[n].tells && behind[n])
    };
    let found: Vec<u16> = suspects.iter().copied().filter(|at| !covered(at)).collect();
    if found.is_empty() {
        return suspects.to_vec();
    }
    found
}

/// Those of the suspects of a page that need a breakpoint while nothing outside of the page is executed: what code which begins at some offsets of it can come to by ways
/// that the page shows, and all that do more than tell something, whatever leads there.
pub fn reachable(page: &[u8], suspects: &[u16], from: impl IntoIterator<Item = u16>) -> Vec<u16> {
    let mut decoder = Decoder::with_ip(64, page, 0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut seen = vec![false; page.len()];
    let mut left: Vec<u64> = from.into_iter().map(u64::from).collect();
    while let Some(at) = left.pop() {
        let new = seen
            .get_mut(at as usize)
            .is_some_and(|s| !std::mem::replace(s, true));
        if !new || decoder.set_position(at as usize).is_err() {
            continue;
        }
        decoder.set_ip(at);
        decoder.decode_out(&mut instruction);
        let flow = instruction.flow_control();
        if instruction.op0_kind() == OpKind::NearBranch64 {
            left.push(instruction.near_branch_target());
        }
        if !matches!(
            flow,
            FlowControl::UnconditionalBranch
                | FlowControl::IndirectBranch
                | FlowControl::Return
                | FlowControl::Exception
        ) {
            left.push(instruction.next_ip());
        }
    }
    let mut needs = |at: u16| {
        seen[usize::from(at)] || {
            // Any offset of the page can be decoded from; what is no instruction is taken for the worst.
            let set = decoder.set_position(at.into());
            set.is_err() || !tells(&decoder.decode())
        }
    };
    suspects.iter().copied().filter(|&at| needs(at)).collect()
}

#[cfg(test)]
mod tests {
    use iced_x86::IcedError;
    use iced_x86::code_asm::*;

    use super::super::scan::suspects;
    use super::*;

    /// A page of NOPs with this at 256, and where its suspects are.
    fn page(
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> (Vec<u8>, Vec<u16>) {
        let mut a = CodeAssembler::new(64).unwrap();
        write(&mut a).unwrap();
        let code = a.assemble(256).unwrap();
        let mut page = vec![0x90; 4096];
        page[256..256 + code.len()].copy_from_slice(&code);
        let found = suspects(&page);
        (page, found)
    }

    #[test]
    fn guards_of_one_function_are_its_first() {
        let (page, suspects) = page(|a| {
            let (mut other, mut end) = (a.create_label(), a.create_label());
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.cmp(eax, 7)?;
            a.jb(other)?;
            a.cpuid()?;
            a.call(4000u64)?;
            a.cpuid()?;
            a.jmp(end)?;
            a.set_label(&mut other)?;
            a.cpuid()?;
            a.set_label(&mut end)?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 5);
        assert_eq!(guards(&page, &suspects), [258]);
    }

    #[test]
    fn guards_are_on_each_way() {
        let (page, suspects) = page(|a| {
            let (mut other, mut end) = (a.create_label(), a.create_label());
            a.test(edi, edi)?;
            a.je(other)?;
            a.cpuid()?;
            a.jmp(end)?;
            a.set_label(&mut other)?;
            a.cpuid()?;
            a.set_label(&mut end)?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 3);
        assert_eq!(guards(&page, &suspects), suspects[..2]);
    }

    #[test]
    fn guards_of_functions_that_are_called_or_begin_there_are_their_own() {
        let (page, suspects) = page(|a| {
            let mut called = a.create_label();
            a.cpuid()?;
            a.call(called)?;
            a.ret()?;
            a.set_label(&mut called)?;
            a.cpuid()?;
            a.ret()?;
            a.nop()?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 3);
        assert_eq!(guards(&page, &suspects), suspects);
    }

    #[test]
    fn guards_of_what_does_more_than_tell_are_all() {
        let (page, suspects) = page(|a| {
            a.cpuid()?;
            a.vmmcall()?;
            a.db(&[0xcd, 0x80])?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 4);
        assert_eq!(guards(&page, &suspects), suspects[..3]);
    }

    #[test]
    fn reachable_are_those_that_code_leads_to() {
        let (page, suspects) = page(|a| {
            let (mut again, mut other, mut called) =
                (a.create_label(), a.create_label(), a.create_label());
            // At 256: a loop, a way out of it, a call, and nothing of it behind the jump.
            a.set_label(&mut again)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.test(eax, eax)?;
            a.jz(other)?;
            a.call(called)?;
            a.call(rax)?;
            a.jmp(5000u64)?;
            a.cpuid()?;
            a.set_label(&mut other)?;
            a.rdpid(rax)?;
            a.xgetbv()?;
            a.ret()?;
            a.cpuid()?;
            a.set_label(&mut called)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.ret()?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 6);
        let [_, pid, xgetbv, _, called, last] = suspects[..] else {
            unreachable!()
        };
        assert_eq!(reachable(&page, &suspects, [256]), [pid, xgetbv, called]);
        assert_eq!(reachable(&page, &suspects, [xgetbv]), [xgetbv]);
        assert_eq!(reachable(&page, &suspects, [last]), [last]);
        assert_eq!(reachable(&page, &suspects, [last + 2]), [0; 0]);
        assert_eq!(reachable(&page, &suspects, [last, xgetbv]), [xgetbv, last]);
        // From the start, over the NOPs.
        assert_eq!(reachable(&page, &suspects, [0]), [pid, xgetbv, called]);
    }

    #[test]
    fn reachable_are_all_that_do_more_than_tell() {
        let (page, suspects) = page(|a| {
            a.ret()?;
            a.cpuid()?;
            a.vmmcall()?;
            a.db(&[0xcd, 0x80])?;
            a.xsave(ptr(rax))?;
            a.cpuid()?;
            a.ret()
        });
        assert_eq!(suspects.len(), 5);
        assert_eq!(reachable(&page, &suspects, [256]), suspects[1..4]);
    }

    #[test]
    fn guards_inside_other_instructions_are_all() {
        let (page, suspects) = page(|a| {
            a.cpuid()?;
            a.mov(eax, 0x90a2_0f90u32 as i32)?;
            a.ret()
        });
        assert_eq!(suspects.len(), 2);
        assert_eq!(guards(&page, &suspects), suspects);
    }
}
