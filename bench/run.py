#!/usr/bin/env python3
"""The benchmark: the same programs on this machine, in QEMU TCG, in User-Mode Linux and in Hospes, in turn in one run.

    bench/run.py        BENCH=quick for a few minutes, ROWS=a,b and SYSTEMS=native,tcg,uml,hospes to select

Writes target/bench/results.json, a list of rows {name, unit, better, native, tcg, uml, hospes}; a value is the median of all
rounds, null where a system cannot do the row. For tcg it is the better of `-cpu max` and `-cpu qemu64`, row by row. The table
says how many times slower than native Hospes is, and how many times faster than TCG. docs/bench.md describes the rows.
"""

import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import devices  # noqa: E402
import resident  # noqa: E402
import vm  # noqa: E402

SYSTEMS = ("native", "tcg", "uml", "hospes")
TCG_CPUS = ("max", "qemu64")
HIGHER, LOWER = "higher", "lower"
ROWS = {
    "boot_to_user": ("s", LOWER),
    "dhrystone": ("DMIPS", HIGHER),
    "whetstone": ("MWIPS", HIGHER),
    "monte_carlo": ("histories/s", HIGHER),
    "openssl_sha256": ("MB/s", HIGHER),
    "openssl_aes256gcm": ("MB/s", HIGHER),
    "openssl_rsa2048": ("sign/s", HIGHER),
    "gzip9": ("s", LOWER),
    "shell_loop": ("s", LOWER),
    "python_mix": ("s", LOWER),
    "getppid": ("/s", HIGHER),
    "pipe": ("round trips/s", HIGHER),
    "context_switch": ("round trips/s", HIGHER),
    "fork_exit": ("/s", HIGHER),
    "fork_exec": ("/s", HIGHER),
    "page_fault": ("/s", HIGHER),
    "mmap_unmap": ("/s", HIGHER),
    "signal": ("/s", HIGHER),
    "tmpfs_files": ("/s", HIGHER),
    "mem_copy": ("GB/s", HIGHER),
    "mem_triad": ("GB/s", HIGHER),
    "chase_64m": ("Mloads/s", HIGHER),
    "rss_overhead": ("MB", LOWER),
    "boot_to_login": ("s", LOWER),
    **{row[0]: (row[4], HIGHER) for row in devices.FIO},
    "iperf_to_guest": ("Gbit/s", HIGHER),
    "iperf_from_guest": ("Gbit/s", HIGHER),
    "ab": ("requests/s", HIGHER),
    "ping": ("ms", LOWER),
}
# Row, what it is held against, and how many times as good it has to be.
BARS = (
    *((row, "native", 0.9) for row in ("fio_seq_read", "fio_seq_write")),
    *((row[0], "tcg", 3) for row in devices.FIO if row[0].startswith("fio_rand")),
    *((row, "tcg", 8) for row in ("iperf_to_guest", "iperf_from_guest", "ab")),
    ("boot_to_login", "tcg", 5),
)
COMPUTE = (
    "dhrystone", "whetstone", "monte_carlo", "openssl_sha256", "openssl_aes256gcm", "openssl_rsa2048", "gzip9",
    "shell_loop", "python_mix",
)
# Not measured by suite.sh.
OUTSIDE = ("boot_to_user", "rss_overhead", *devices.ROWS)
SUITE_MEMORY_MB = 1024
BOOT_MEMORY_MB = 512
SUITE_TIMEOUT_S = 900
BOOT_TIMEOUT_S = 120
CLOCK_TOLERANCE = 0.02


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Plan:
    """What to run, from the environment."""

    def __init__(self, environment):
        self.quick = environment.get("BENCH") == "quick"
        self.rounds = 1 if self.quick else 3
        self.boots = 3 if self.quick else 5
        self.box_ms = 300 if self.quick else 1000
        self.fio_s = 1 if self.quick else 3
        self.network_s = 2 if self.quick else 5
        self.systems = self._chosen(environment.get("SYSTEMS"), SYSTEMS, "system")
        self.rows = self._chosen(environment.get("ROWS"), tuple(ROWS), "row")
        self.suite_rows = [row for row in self.rows if row not in OUTSIDE]

    @staticmethod
    def _chosen(text, known, what):
        names = [name for name in (text or "").split(",") if name] or list(known)
        for name in names:
            if name not in known:
                raise SystemExit(f"bench: no {what} is called {name!r}: choose from {', '.join(known)}")
        return [name for name in known if name in names]

    def variants(self):
        """(system, argument of vm.Spec) for each way of running a guest."""
        for system in self.systems:
            if system == "tcg":
                yield from (("tcg", cpu) for cpu in TCG_CPUS)
            elif system != "native":
                yield system, "max"


class Results:
    def __init__(self):
        self.samples = {}
        self.notes = []
        self.mitigations = {}

    def add(self, variant, row, value):
        self.samples.setdefault((variant, row), []).append(value)

    def value(self, system, row):
        """The median; for several variants of a system the better one. None without a sample."""
        medians = [
            statistics.median(values) for (variant, name), values in self.samples.items() if name == row and variant[0] == system
        ]
        if not medians:
            return None
        return max(medians) if ROWS[row][1] == HIGHER else min(medians)

    def read(self, variant, text):
        """Takes the rows and clock lines of one run of suite.sh; returns the seconds that its own clock counted."""
        clock = {}
        for line in text.splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "ROW" and words[1] in ROWS:
                self.add(variant, words[1], float(words[2]))
            elif len(words) == 3 and words[0] == "CLOCK":
                clock[words[1]] = float(words[2])
            elif words and words[0] == "WRONG":
                self.note(f"{variant[0]}: a program found its own result wrong: {' '.join(words[1:])}")
        return clock.get("end", 0.0) - clock.get("begin", 0.0)

    def note(self, text):
        say(text)
        self.notes.append(text)


def run_native(plan, results):
    root = vm.GUESTS / "bench-root"
    script = (
        'mount -t tmpfs tmpfs "$0/tmp" && mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && '
        'cd / && exec chroot "$0" /bench/suite.sh "$@"'
    )
    # Mounts of our own in a name space of our own; without root that needs a user name space as well.
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    done = subprocess.run(
        [*unshare, "sh", "-c", script, str(root), *plan.suite_rows], env=dict(os.environ, BENCH_BOX_MS=str(plan.box_ms)),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SUITE_TIMEOUT_S, check=False,
    )
    if done.returncode != 0:
        results.note(f"native: the suite ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    results.read(("native", ""), done.stdout)
    path = pathlib.Path("/sys/devices/system/cpu/vulnerabilities")
    results.mitigations["native"] = [f"{entry.name}:{entry.read_text().strip()}" for entry in sorted(path.glob("*"))]


def run_guest(plan, results, variant):
    system, cpu = variant
    spec = vm.Spec(
        ramdisk="initramfs-bench.cpio", memory_mb=SUITE_MEMORY_MB, name="bench", tcg_cpu=cpu,
        command_line=f"quiet bench.rows={','.join(plan.suite_rows)} bench.box_ms={plan.box_ms}",
    )
    with vm.RunDirectory() as run, vm.Guest(spec.argv(system), run.environment()) as guest:
        try:
            begin = guest.arrival(guest.wait_for("CLOCK begin", BOOT_TIMEOUT_S).start())
            end = guest.arrival(guest.wait_for("CLOCK end", SUITE_TIMEOUT_S).start())
            guest.wait_for("HOSPES-END suite", 10)
        except vm.GuestError as error:
            results.note(f"{system}: the suite did not finish: {error}")
            begin = end = None
        counted = results.read(variant, guest.console)
        try:
            found = vm.between(guest.console, "mitigations")
            results.mitigations[system] = sorted(found.splitlines())
        except vm.GuestError:
            results.mitigations[system] = []
    # A guest whose clock runs slow would look fast: its seconds have to be ours.
    if end and abs(counted - (end - begin)) > max(0.1, CLOCK_TOLERANCE * (end - begin)):
        results.note(f"{system}: its clock counted {counted:.2f} s while {end - begin:.2f} s passed here")


def boot_once(results, variant):
    system, cpu = variant
    spec = vm.Spec(
        ramdisk="initramfs-init.cpio", memory_mb=BOOT_MEMORY_MB, command_line="quiet", name="bench-boot", tcg_cpu=cpu
    )
    with vm.RunDirectory() as run, vm.Guest(spec.argv(system), run.environment()) as guest:
        try:
            mark = guest.wait_for("HOSPES-MARK", BOOT_TIMEOUT_S)
            results.add(variant, "boot_to_user", guest.arrival(mark.start()))
            guest.wait(BOOT_TIMEOUT_S)
        except vm.GuestError as error:
            results.note(f"{system}: no boot: {error}")


def measure_overhead(results, variant):
    system, cpu = variant
    spec = vm.Spec(command_line="quiet hospes.do=idle", memory_mb=BOOT_MEMORY_MB, name="bench-idle", tcg_cpu=cpu)
    with vm.RunDirectory() as run, vm.Guest(spec.argv(system), run.environment()) as guest:
        try:
            guest.wait_for("HOSPES-GUEST ready", BOOT_TIMEOUT_S)
        except vm.GuestError as error:
            results.note(f"{system}: no idle guest: {error}")
            return
        time.sleep(3)
        results.add(variant, "rss_overhead", resident.overhead_mb(run.processes()))


def available(plan, results):
    """The chosen variants that can start here; says why of the others."""
    needed = {"tcg": "qemu-system-x86_64", "uml": str(vm.GUESTS / "linux-uml"), "hospes": vm.hospes_binary()}
    for variant in plan.variants():
        found = subprocess.run(["sh", "-c", f"command -v '{needed[variant[0]]}'"], capture_output=True, check=False)
        if found.returncode == 0:
            yield variant
        else:
            results.note(f"{variant[0]}: {needed[variant[0]]} is not there: left out")


def slower(row, value, base):
    """How many times slower (or larger) `value` is than `base`; None where one is missing."""
    if not value or not base:
        return None
    return base / value if ROWS[row][1] == HIGHER else value / base


def number(value):
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def times(value):
    return "-" if value is None else f"{value:.2f}"


def table(plan, rows):
    line = "{:<18} {:<14} {:>12} {:>12} {:>12} {:>12} {:>8} {:>8}"
    yield line.format("row", "unit", "native", "tcg", "uml", "hospes", "slower", "x tcg")
    compute = []
    for row in rows:
        base = slower(row["name"], row["hospes"], row["native"])
        gain = slower(row["name"], row["tcg"], row["hospes"])
        values = [number(row[system]) for system in SYSTEMS]
        yield line.format(row["name"], row["unit"], *values, times(base), times(gain))
        if row["name"] in COMPUTE and base:
            compute.append(base)
    yield "slower: times slower than native; x tcg: times faster than QEMU TCG"
    wanted = [name for name in COMPUTE if name in plan.rows]
    if compute:
        mean = math.exp(statistics.fmean(map(math.log, compute)))
        yield f"geometric mean over {len(compute)} of {len(wanted)} compute rows: {mean:.3f} times slower than native"


def collect(plan):
    results = Results()
    variants = list(available(plan, results))
    for number_of_round in range(1, plan.rounds + 1):
        if not plan.suite_rows:
            break
        if "native" in plan.systems:
            say(f"round {number_of_round} of {plan.rounds}: native")
            run_native(plan, results)
        for variant in variants:
            say(f"round {number_of_round} of {plan.rounds}: {' -cpu '.join(variant) if variant[0] == 'tcg' else variant[0]}")
            run_guest(plan, results, variant)
    if "boot_to_user" in plan.rows:
        for boot in range(1, plan.boots + 1):
            say(f"boot {boot} of {plan.boots}")
            for variant in variants:
                boot_once(results, variant)
    if "rss_overhead" in plan.rows:
        for variant in variants:
            say(f"memory beside the guest's: {variant[0]}")
            measure_overhead(results, variant)
    if any(row in plan.rows for row in devices.ROWS):
        for number_of_round in range(1, plan.rounds + 1):
            collect_devices(plan, results, variants, number_of_round)
    return results


def collect_devices(plan, results, variants, number_of_round):
    label = f"Debian, round {number_of_round} of {plan.rounds}"
    if "native" in plan.systems:
        say(f"{label}: native")
        devices.native(plan, lambda row, value: results.add(("native", ""), row, value), results.note)
    for variant in variants:
        say(f"{label}: {' -cpu '.join(variant) if variant[0] == 'tcg' else variant[0]}")
        devices.guest(plan, lambda row, value, variant=variant: results.add(variant, row, value), results.note, variant)


def bars(rows):
    """A line for each row with a bar that can be held against it."""
    by_name = {row["name"]: row for row in rows}
    for name, system, least in BARS:
        row = by_name.get(name, {})
        gain = slower(name, row.get(system), row.get("hospes")) if row else None
        if gain:
            word = "met" if gain >= least else "MISSED"
            yield f"bar: {name}: {gain:.2f} times {system}, wanted {least}: {word}"


def main():
    plan = Plan(os.environ)
    started = time.monotonic()
    results = collect(plan)
    rows = [
        {
            "name": name, "unit": ROWS[name][0], "better": ROWS[name][1],
            **{system: results.value(system, name) for system in SYSTEMS},
        }
        for name in plan.rows
    ]
    directory = vm.ROOT / "target" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join((*table(plan, rows), *bars(rows))))
    for system, lines in results.mitigations.items():
        print(f"mitigations, {system}: " + "; ".join(lines or ["none shown"]))
    for note in results.notes:
        print(f"note: {note}")
    say(f"{time.monotonic() - started:.0f} s; {directory / 'results.json'}")
    missing = [row["name"] for row in rows if "hospes" in plan.systems and row["hospes"] is None]
    if missing:
        raise SystemExit(f"bench: Hospes has no result for {', '.join(missing)}")


if __name__ == "__main__":
    main()
