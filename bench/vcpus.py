"""The rows with several vCPUs or several guests, and those about what a guest costs beside its work: CPU time and memory.

They run on two CPUs of this machine, however many it has.
"""

import contextlib
import os
import time

import resident
import rows
import suite
import systems
import vm
from results import say

CPUS = 2
JOBS = 5
SMALL = {"ramdisk": "initramfs-jobs.cpio", "memory_mb": 256}
ONE_CPU = "User-Mode Linux has one processor"
# Of the memory rows' guests, and for how long their vCPUs have worked when they are looked at.
MEMORY_MB = 512
WARM_S = 3
READY_TIMEOUT_S = 120


@contextlib.contextmanager
def two_cpus(results):
    """This process and its children on two of the CPUs that it may use."""
    before = os.sched_getaffinity(0)
    if len(before) < CPUS:
        results.note(f"this machine gives us {len(before)} CPU: rows for two CPUs are measured on it")
    os.sched_setaffinity(0, sorted(before)[:CPUS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(plan, results, guests):
    with two_cpus(results):
        smp_guests(plan, results, guests)
        five_guests(plan, results, guests)
        idle_beside_busy(plan, results, guests)
    memory(plan, results, guests)


def smp_guests(plan, results, guests):
    """dhrystone_2vcpu_ratio and fair_one_guest: native and guests with two vCPUs in turn."""
    wanted = [row for row in ("dhrystone_2vcpu_ratio", "fair_one_guest") if plan.measures(row)]
    if not wanted:
        return
    results.missing("uml", wanted, ONE_CPU)
    with contextlib.ExitStack() as stack:
        able = [variant for variant in guests if variant.system != "uml"]
        workers = suite.start(plan, results, able, stack, level=False, vcpus=CPUS, **SMALL)
        for row in wanted:
            for number in range(plan.slow_pairs):
                for variant in in_turn(workers, number, plan.peer_samples if row != "fair_one_guest" else 1):
                    if row == "fair_one_guest":
                        jobs(results, {variant: [workers[variant]]}, row, number, plan.fair_box_ms, JOBS)
                    else:
                        suite.one(results, workers, variant, row, number, plan.copies_box_ms)
                results.save()
            say(suite.progress(results, row))


def in_turn(variants, number, peer_samples):
    """Native and Hospes in every round, the other first each time; peers in the first rounds."""
    held = [variant for variant in variants if variant.system in ("native", "hospes")]
    peers = [variant for variant in variants if variant not in held and number < peer_samples]
    return (*(reversed(held) if number % 2 else held), *peers)


def jobs(results, sets, row, number, box_ms, each):
    """`each` jobs at once in every worker of a set; the slowest over the fastest, and all of them together."""
    for variant, workers in sets.items():
        try:
            for worker in workers:
                worker.start(box_ms, "jobs", str(each))
            found = [worker.finish(box_ms / 1000 + systems.ROW_TIMEOUT_S) for worker in workers]
            totals = [values["jobs_total"] for values in found]
            slowest = found[0]["jobs"] if len(found) == 1 else min(totals) / max(totals)
        except (OSError, KeyError, vm.GuestError) as error:
            results.failed(variant, row, number, "its jobs did not finish", error)
            continue
        results.add(variant, row, number, slowest)
        results.add(variant, f"{row}_total", number, sum(totals))


def five_guests(plan, results, guests):
    """One job in each of five guests of one vCPU; natively five jobs. One system's guests are up at a time, and native beside Hospes."""
    row = "fair_five_guests"
    if not plan.measures(row):
        return
    for variant in guests:
        with contextlib.ExitStack() as stack:
            sets = {}
            try:
                if variant.system == "hospes" and "native" in plan.systems:
                    sets[systems.NATIVE] = [stack.enter_context(systems.worker(plan, results, systems.NATIVE))]
                sets[variant] = [
                    stack.enter_context(systems.worker(plan, results, variant, name=f"bench{number}", **SMALL)) for number in range(JOBS)
                ]
            except (OSError, vm.GuestError) as error:
                results.note(f"{variant}: {row}: not all guests came up: {error}")
                results.missing(variant.system, [row], "not all of its guests came up")
                continue
            for number in range(plan.slow_pairs if variant.system == "hospes" else 1):
                for chosen in in_turn(sets, number, 1):
                    jobs(results, {chosen: sets[chosen]}, row, number, plan.fair_box_ms, JOBS if chosen.system == "native" else 1)
                results.save()
        say(suite.progress(results, row))


def cpu_seconds(pids):
    """User and system time of processes so far, in seconds (proc(5)); one that has ended counts nothing."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
                fields = handle.read().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def idle_beside_busy(plan, results, guests):
    """What the processes of an idle guest use while another guest computes."""
    row = "idle_beside_busy"
    if row not in plan.rows:
        return
    results.missing("native", [row], "there is no guest")
    for variant in guests:
        number = 0
        try:
            with systems.worker(plan, results, variant, name="idle", **SMALL) as idle, systems.worker(
                plan, results, variant, name="busy", **SMALL
            ) as busy:
                time.sleep(WARM_S)
                for number in range(3):
                    busy.start((plan.idle + 2) * 1000, "jobs", "1")
                    time.sleep(1)
                    begin, used = time.monotonic(), cpu_seconds(resident.family(idle.run.processes()))
                    time.sleep(plan.idle)
                    used = cpu_seconds(resident.family(idle.run.processes())) - used
                    share = 100 * used / (time.monotonic() - begin)
                    busy.finish()
                    results.add(variant, row, number, share)
        except (OSError, vm.GuestError) as error:
            results.failed(variant, row, number, "its guests did not answer", error)
        results.save()
    say(suite.progress(results, row))


def memory(plan, results, guests):
    """Memory beside the guest's own: of an idle guest, and of guests all of whose vCPUs compute."""
    wanted = [row for row in rows.MEMORY if row in plan.rows]
    for row in wanted:
        vcpus = rows.MEMORY[row]
        results.missing("native", [row], "there is no guest")
        for variant in guests:
            if vcpus and variant.system == "uml":
                results.missing("uml", [row], ONE_CPU)
                continue
            try:
                value = busy_overhead(plan, results, variant, vcpus) if vcpus else idle_overhead(plan, variant)
                results.add(variant, row, 0, value)
            except (OSError, vm.GuestError) as error:
                results.note(f"{variant}: {row}: {error}")
                results.missing(variant.system, [row], "its guest did not come up")
        results.save()
        say(suite.progress(results, row))


def idle_overhead(plan, variant):
    spec = variant.spec(plan, command_line="quiet hospes.do=idle", memory_mb=MEMORY_MB, name="bench-idle")
    with vm.RunDirectory() as run, vm.Guest(spec.argv(variant.system), run.environment()) as guest:
        guest.wait_for("HOSPES-GUEST ready", READY_TIMEOUT_S)
        time.sleep(WARM_S)
        return resident.overhead_mb(resident.family(run.processes()))


def busy_overhead(plan, results, variant, vcpus):
    """With direct execution, unless that is chosen otherwise."""
    more = dict(SMALL, memory_mb=MEMORY_MB)
    with systems.worker(plan, results, variant, vcpus=vcpus, direct="1", **more) as worker:
        worker.start(2 * WARM_S * 1000, "jobs", str(vcpus))
        time.sleep(WARM_S + 1)
        found = resident.overhead_mb(resident.family(worker.run.processes()))
        worker.finish()
        return found
