"""The rows that one worker with one vCPU can measure by itself, and the boot to the first user instruction.

All systems are up at once and wait; a row is measured in rounds: native, native at the guest's level and Hospes one after the other;
peers follow in the first rounds. Only one works at a time.
"""

import contextlib
import time

import rows
import systems
import vm
from plan import BOTH
from results import say

BOOT_MEMORY_MB = 512
BOOT_TIMEOUT_S = 120


def measure(plan, results, guests):
    wanted = [row for row in rows.SUITE if plan.measures(row) or plan.wants_level(row)]
    if not wanted:
        return
    with contextlib.ExitStack() as stack:
        off = [systems.DIRECT_OFF] * (plan.direct == BOTH and systems.HOSPES in guests)
        workers = start(plan, results, [*guests, *off], stack, level=any(map(plan.wants_level, wanted)))
        for position, row in enumerate(wanted, 1):
            measure_row(plan, results, workers, row)
            results.save()
            say(f"{position} of {len(wanted)}: {progress(results, row)}")


def start(plan, results, guests, stack, level, **more):
    """{variant: Worker} for all that come up."""
    variants = [systems.NATIVE] * ("native" in plan.systems) + [systems.LEVELLED] * (level and "native" in plan.systems)
    workers = {}
    for variant in (*variants, *guests):
        try:
            workers[variant] = stack.enter_context(systems.worker(plan, results, variant, **more))
            say(f"{variant} is ready")
        except (OSError, vm.GuestError) as error:
            results.note(f"{variant}: the benchmark's guest did not come up: {error}")
            results.missing(variant.system, rows.ROWS, "its guest did not come up")
    return workers


def measure_row(plan, results, workers, row):
    spent = dict.fromkeys(workers, 0.0)
    for number in range(plan.pairs):
        held = [variant for variant in workers if variant.system not in ("tcg", "uml")]
        if not plan.wants_level(row) and systems.LEVELLED in held:
            held.remove(systems.LEVELLED)
        turn = number % max(1, len(held))
        peers = [variant for variant in workers if variant.system in ("tcg", "uml") and number < plan.peer_samples]
        for variant in (*held[turn:], *held[:turn], *peers):
            if variant in peers and spent[variant] > plan.peer_budget:
                continue
            begin = time.monotonic()
            one(results, workers, variant, row, number, plan.box_ms)
            spent[variant] += time.monotonic() - begin


def one(results, workers, variant, row, number, box_ms):
    """One figure. A worker that does not answer is left out of what follows."""
    try:
        value = workers[variant].measure(box_ms, row).get(row)
    except (OSError, vm.GuestError) as error:
        results.failed(variant, row, number, "its guest did not survive it", error)
        results.missing(variant.system, rows.ROWS, f"its guest did not survive {row}")
        del workers[variant]
        return
    if value is None:
        results.failed(variant, row, number, "its programs gave none")
    else:
        results.add(variant, row, number, value)


def progress(results, row):
    """One line about a row that is done."""
    found = results.against("native", row)
    values = ", ".join(f"{system} {value:.4g}" for system in rows.SYSTEMS if (value := results.value(system, row)) is not None)
    of_native = f"; {found.median:.3f} of native ({found.low:.3f} to {found.high:.3f})" if found else ""
    return f"{row}: {values} {rows.ROWS[row][0]}{of_native}"


def boots(plan, results, guests):
    """boot_to_user: from starting the monitor until the mark of the first process arrives."""
    if "boot_to_user" not in plan.rows:
        return
    results.missing("native", ["boot_to_user"], "this machine does not boot for a benchmark")
    for number in range(plan.boots):
        for variant in list(guests):
            spec = variant.spec(plan, ramdisk="initramfs-init.cpio", memory_mb=BOOT_MEMORY_MB, command_line="quiet", name="bench-boot")
            with vm.RunDirectory() as run, vm.Guest(spec.argv(variant.system), run.environment()) as guest:
                try:
                    mark = guest.wait_for("HOSPES-MARK", BOOT_TIMEOUT_S)
                    results.add(variant, "boot_to_user", number, guest.arrival(mark.start()))
                    guest.wait(BOOT_TIMEOUT_S)
                except vm.GuestError as error:
                    results.failed(variant, "boot_to_user", number, "it did not boot", error)
        results.save()
        say(f"boot {number + 1} of {plan.boots}: {progress(results, 'boot_to_user')}")
