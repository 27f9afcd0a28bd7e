#!/usr/bin/env python3
"""The soak: self-checking programs of many kinds in a Debian guest for some minutes, held against the same programs here.

    soak/run.py MINUTES [--system hospes|tcg] [--vcpus N] [--direct 0|1] [--skip TASK,TASK]

What a task prints in the guest has to be what it prints natively; stressors have to verify themselves; the guest's clocks
have to keep pace with this machine's and never step back; the domain is stopped and continued by signals under way; the
kernel's log has to be free of complaints. Progress goes to the console, everything to target/soak/<time>.log. The last line is
"N passed, N failed"; the exit status is 0 when nothing failed.
"""

import argparse
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import dmesg  # noqa: E402
import vm  # noqa: E402

# A task works on 1.2 GB, and the root file system is in memory.
MEMORY_MB = 2560
BOOT_S = 180
# A round that has begun when the time is over is finished; a slow machine needs a while for it.
LAST_ROUND_S = 900
# No task takes half as long, in QEMU either: after that it hangs.
STALL_S = 180
STOPPED_S = 2
PROGRESS_S = 15
DRIFT_PPM_MAX = 50
# Below this many stamps a side the drift cannot be told from the console's delay.
STAMPS_MIN = 20


class Score:
    """Counts, prints and logs."""

    def __init__(self, log):
        self.log = log
        self.passed = self.failed = 0

    def say(self, text):
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def judge(self, good, name, detail=""):
        if good:
            self.passed += 1
            self.log.write(f"ok   {name}\n")
        else:
            self.failed += 1
            self.say(f"FAIL {name}: {detail}")


def expected_results(skip=()):
    """Name -> result of each task that is not to be skipped, from one native run in the same root file system.

    SystemExit where one fails here: that it fails in the guest as well would say nothing.
    """
    script = (
        'mount -t tmpfs tmpfs "$0/tmp" && mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && '
        'cd / && exec chroot "$0" /soak/tasks.sh'
    )
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    # Nothing else of this environment is in the guest; a make under a make says so.
    environment = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("SOAK_")}
    done = subprocess.run(
        [*unshare, "sh", "-c", script, str(vm.GUESTS / "soak-root")], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=600, check=False, env=environment,
    )
    results = dict(re.findall(r"^RESULT (\S+) (\S+)$", done.stdout, re.M))
    if done.returncode != 0 or not results:
        raise SystemExit(f"soak: the tasks do not run on this machine (status {done.returncode}): {done.stderr.strip()[-500:]}")
    results = {name: value for name, value in results.items() if name not in skip}
    failed = [name for name, value in results.items() if not value.endswith("-0")]
    if failed:
        raise SystemExit(f"soak: on this machine itself these tasks fail (soak/run.py --skip leaves them out): {', '.join(failed)}")
    return results


def signal_all(run, number):
    for pid in run.processes():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def watch(guest, run, seconds, score):
    """Follows the guest to the end of its soak, with one stop in each quarter; returns the number of stops."""
    stops, next_stop, next_progress = 0, seconds / 8, PROGRESS_S
    started = last_result = time.monotonic()
    results = 0
    while True:
        passed = time.monotonic() - started
        try:
            guest.wait_for("HOSPES-END soak", 1)
            return stops
        except vm.GuestError:
            if guest.open_streams == 0 or passed > seconds + LAST_ROUND_S:
                raise
        now_results = guest.console.count("\nRESULT ")
        if now_results > results:
            results, last_result = now_results, time.monotonic()
        elif time.monotonic() - last_result > STALL_S:
            task = (re.findall(r"^START (\S+)", guest.console, re.M) or ["the first task"])[-1]
            raise vm.GuestError(f"{task} hangs: no result for {time.monotonic() - last_result:.0f} s; the last lines:\n{guest.tail()}")
        if passed >= next_stop and stops < 4 and passed < seconds:
            signal_all(run, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            signal_all(run, signal.SIGCONT)
            stops += 1
            next_stop += seconds / 4
        if passed >= next_progress:
            next_progress += PROGRESS_S
            rounds = re.findall(r"^ROUND (\d+)", guest.console, re.M)
            score.say(f"soak: {passed:.0f} of {seconds} s, round {rounds[-1] if rounds else 0}, {results} results, {stops} stops")


def judge_results(console, expected, score):
    seen = re.findall(r"^RESULT (\S+) (.*)$", console, re.M)
    for name, value in seen:
        wanted = "ok" if name.startswith("stress_") else expected.get(name, "no such task")
        score.judge(value == wanted, name, f"{value} instead of {wanted}")
    for name in expected:
        score.judge(any(name == found for found, _ in seen), f"{name} ran", "the guest never finished it")
    score.judge(any(found.startswith("stress_") for found, _ in seen), "stressors ran", "the guest never finished one")


def stamps(guest):
    """(arrival here, monotonic, realtime, late_us median, late_us max) for each complete clock line."""
    found = []
    for match in re.finditer(r"^CLOCK (\d+\.\d+) (\d+\.\d+) (-?\d+) (-?\d+)\n", guest.console, re.M):
        found.append((guest.arrival(match.start()), *map(float, match.groups())))
    return found


def drift_ppm(points):
    """How much faster the guest's clock runs than ours, in millionths, from (arrival here, time there).

    A line arrives late by an unknown delay that is never negative, so the earliest arrival in the first and in the last third
    tells how far the clocks are apart there.
    """
    third = len(points) // 3
    first = min(points[:third], key=lambda p: p[0] - p[1])
    last = min(points[-third:], key=lambda p: p[0] - p[1])
    here, there = last[0] - first[0], last[1] - first[1]
    return (there - here) / here * 1e6


def judge_clocks(guest, score):
    found = stamps(guest)
    backwards = re.findall(r"^BACKWARDS .*$", guest.console, re.M)
    score.judge(not backwards, "clocks never step back", "; ".join(backwards[:3]))
    for index, name in ((1, "monotonic"), (2, "realtime")):
        ordered = all(before[index] < after[index] for before, after in zip(found, found[1:]))
        score.judge(ordered, f"{name} stamps ascend", "a later stamp is smaller")
        if len(found) < 2 * STAMPS_MIN:
            score.judge(False, f"{name} drift", f"only {len(found)} time stamps arrived")
            continue
        ppm = drift_ppm([(stamp[0], stamp[index]) for stamp in found])
        score.say(f"soak: {name} clock runs {ppm:+.1f} ppm against this machine's over {found[-1][0] - found[0][0]:.0f} s")
        score.judge(abs(ppm) < DRIFT_PPM_MAX, f"{name} drift", f"{ppm:+.1f} ppm; the limit is {DRIFT_PPM_MAX}")
    if found:
        medians = sorted(stamp[3] for stamp in found)
        within = sum(1 for median in medians if median < 1000) * 100 // len(medians)
        score.say(
            f"soak: a sleep of 1 ms is late by {medians[len(medians) // 2]:.0f} us (median), "
            f"at worst {max(stamp[4] for stamp in found):.0f} us; below 1 ms in {within} % of the seconds"
        )


def soak(options, seconds, skip, score):
    score.say("soak: running the tasks on this machine for the expected results")
    expected = expected_results(skip)
    spec = vm.Spec(
        ramdisk="initramfs-soak.cpio", memory_mb=MEMORY_MB, name="soak", vcpus=options.vcpus,
        settings=() if options.direct is None else (f"engine_direct={options.direct}",),
        command_line=f"quiet soak.seconds={seconds}" + (f" soak.skip={','.join(skip)}" if skip else ""),
    )
    with vm.RunDirectory() as run, vm.Guest(spec.argv(options.system), run.environment()) as guest:
        try:
            guest.wait_for("HOSPES-BEGIN soak", BOOT_S)
            score.say(f"soak: the guest is up after {time.monotonic() - guest.started:.1f} s; {seconds} s of work begin")
            stops = watch(guest, run, seconds, score)
            status = guest.wait(60)
            score.judge(status == 0, "exit status", f"{status} instead of 0\n{guest.tail()}")
            score.judge(stops > 0, "stopped and continued", "the soak was too short for a stop")
            log = vm.between(guest.console, "dmesg")
            complaints = dmesg.complaints(log)
            score.judge(not complaints, "kernel log", "\n".join(complaints))
        except vm.GuestError as error:
            score.judge(False, "the guest", str(error))
        score.log.write(f"---- console\n{guest.console}\n---- errors\n{guest.errors}\n---- results\n")
        judge_results(guest.console, expected, score)
        judge_clocks(guest, score)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--system", choices=("hospes", "tcg"), default="hospes")
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--direct", choices=("0", "1"), help="the domain's engine_direct; the default's without")
    parser.add_argument("--skip", default="", help="tasks to leave out, to look past one that fails")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("MINUTES has to be above 0")
    directory = vm.ROOT / "target" / "soak"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.log"
    with open(path, "w", encoding="utf-8") as log:
        score = Score(log)
        score.say(f"soak: {options.minutes:g} minutes; log in {path}")
        soak(options, int(options.minutes * 60), [name for name in options.skip.split(",") if name], score)
        score.say(f"{score.passed} passed, {score.failed} failed")
    return 1 if score.failed else 0


if __name__ == "__main__":
    sys.exit(main())
