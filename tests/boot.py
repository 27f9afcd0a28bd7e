#!/usr/bin/env python3
"""Boots real Debian kernels in Hospes and looks at what they say and how they end.

    tests/boot.py [--system hospes|tcg] [--boots N] [--list] [WORD...]

Only tests whose name contains one of the WORDs run, all without any. `--system tcg` boots the same guests in QEMU, which
checks the guests and the tests themselves; what only Hospes can do is then left out. The last line is "N passed, N failed";
the exit status is 0 when nothing failed.
"""

import functools
import os
import pathlib
import re
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import direct  # noqa: E402
import dmesg  # noqa: E402
import levels  # noqa: E402
import runner  # noqa: E402
import vm  # noqa: E402
from runner import Failure, expect, wait_until  # noqa: E402

KERNELS = {"amd64": "xz", "cloud": "lz4", "bpo": "zstd"}
BOOT_S = 120
END_S = 60


class Bench:
    """What every test gets: the monitor to use and a fresh run-time directory."""

    def __init__(self, system, run):
        self.system = system
        self.run = run

    def boot(self, **spec):
        return vm.Guest(vm.Spec(**spec).argv(self.system), self.run.environment())

    def expect_no_domain(self, name):
        if self.system == "hospes":
            listed = self.run.hospes("list").stdout
            expect(name not in listed, f"{name} has ended but `hospes list` still shows it:\n{listed}")


# ---- to the shell ---------------------------------------------------------------------------------------------------


def boots_to_shell(bench, kernel):
    with bench.boot(kernel=f"vmlinuz-{kernel}", command_line="quiet hospes.do=shell", name="shell") as guest:
        guest.wait_for("guest# ", BOOT_S)
        guest.send("echo answer-$((6 * 7)); uname -r\n")
        guest.wait_for(r"answer-42\n\d+\.\d+", END_S)
        guest.send("poweroff -f\n")
        status = guest.wait(END_S)
        expect(status == 0, f"the domain powered itself off and the exit status is {status} instead of 0\n{guest.tail()}")
    bench.expect_no_domain("shell")


def says_nothing_forbidden(bench, kernel):
    with bench.boot(kernel=f"vmlinuz-{kernel}", command_line="quiet hospes.do=dmesg", name="log") as guest:
        guest.wait_for("HOSPES-END dmesg", BOOT_S)
        guest.wait(END_S)
    log = vm.between(guest.console, "dmesg")
    expect(log.count("\n") > 50, f"the log has only {log.count(chr(10))} lines")
    complaints = dmesg.complaints(log)
    expect(not complaints, "the kernel says what it must not say:\n" + "\n".join(complaints))
    if bench.system == "hospes":
        # A PVH guest is an HVM guest to the kernel when it looks for hypervisors.
        for line in ("Hypervisor detected: Xen HVM", "Booting kernel on Xen PVH"):
            expect(line in log, f"the kernel does not say {line!r}")


def boots_with_memory(bench, memory_mb):
    with bench.boot(command_line="quiet hospes.do=visit", name="memory", memory_mb=memory_mb) as guest:
        match = guest.wait_for(r"MemTotal:\s+(\d+) kB", BOOT_S)
        seen_mb = int(match.group(1)) // 1024
        expect(memory_mb * 0.5 < seen_mb <= memory_mb, f"a guest of {memory_mb} MB sees {seen_mb} MB")
        expect(guest.wait(END_S) == 0, f"the exit status is {guest.process.returncode}\n{guest.tail()}")


def starts_all_vcpus(bench, vcpus):
    """Also with more than the machine has CPUs: no lock-up, no stall, all of one speed."""
    memory_mb = 512 if vcpus <= 16 else 1024
    with bench.boot(command_line="quiet hospes.do=dmesg", name="many", vcpus=vcpus, memory_mb=memory_mb) as guest:
        guest.wait_for("HOSPES-END dmesg", 3 * BOOT_S)
        status = guest.wait(END_S)
        expect(status == 0, f"the exit status is {status}\n{guest.tail()}")
    log = vm.between(guest.console, "dmesg")
    expect(f"smp: Brought up 1 node, {vcpus} CPUs" in log, f"the kernel has not brought up {vcpus} processors")
    complaints = dmesg.complaints(log)
    expect(not complaints, "the kernel says what it must not say:\n" + "\n".join(complaints))
    expect("PV spinlocks enabled" in log, "the kernel does not use Xen's spin locks")


def boots_every_time(bench, count, vcpus=1, settings=()):
    for number in range(1, count + 1):
        spec = {"ramdisk": "initramfs-init.cpio", "command_line": "quiet", "name": f"again{number}", "vcpus": vcpus}
        spec["settings"] = settings
        with bench.boot(**spec) as guest:
            try:
                guest.wait_for("HOSPES-MARK", BOOT_S)
                status = guest.wait(END_S)
            except vm.GuestError as error:
                raise Failure(f"boot {number} of {count}: {error}") from None
            expect(status == 0, f"boot {number} of {count} ended with status {status}\n{guest.tail()}")


# ---- how it ends ----------------------------------------------------------------------------------------------------


def ends_by_itself(bench, way):
    action = {"poweroff": "on_poweroff", "halt": "on_poweroff", "reboot": "on_reboot", "panic": "on_crash"}[way]
    with bench.boot(command_line=f"quiet hospes.do={way}", name="ends", settings=(f'{action}="destroy"',)) as guest:
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        status = guest.wait(END_S)
        expect(guest.console.count("HOSPES-GUEST ready") == 1, f"{action}=destroy and the guest booted again")
        expect(status == 0, f"the domain ended by itself ({way}) and the exit status is {status}\n{guest.tail()}")
    bench.expect_no_domain("ends")


def starts_again(bench, way):
    action = {"reboot": "on_reboot", "panic": "on_crash", "poweroff": "on_poweroff"}[way]
    with bench.boot(command_line=f"quiet hospes.do={way}", name="again", settings=(f'{action}="restart"',)) as guest:
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        ended = bench.run.hospes("destroy", "again")
        expect(ended.returncode == 0, f"`hospes destroy again` failed: {ended.stderr}")
        guest.wait(END_S)
    bench.expect_no_domain("again")


def is_preserved(bench, way):
    action = {"poweroff": "on_poweroff", "panic": "on_crash"}[way]
    with bench.boot(command_line=f"quiet hospes.do={way}", name="kept", settings=(f'{action}="preserve"',)) as guest:
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        letter = {"poweroff": "s", "panic": "c"}[way]
        deadline = time.monotonic() + END_S
        while True:
            rows = [row.split() for row in bench.run.hospes("list").stdout.splitlines() if row.startswith("kept ")]
            if rows and letter in rows[0][4]:
                break
            expect(time.monotonic() < deadline, f"{action}=preserve and `hospes list` never shows state {letter}: {rows}")
            time.sleep(0.2)
        ended = bench.run.hospes("destroy", "kept")
        expect(ended.returncode == 0, f"`hospes destroy kept` failed: {ended.stderr}")
    bench.expect_no_domain("kept")


# ---- from outside ---------------------------------------------------------------------------------------------------


def obey(bench, *command):
    done = bench.run.hospes(*command)
    expect(done.returncode == 0, f"`hospes {' '.join(command)}` failed: {done.stderr}")
    return done.stdout


def listed(bench, name):
    """The fields of a domain's line in `hospes list`: name, id, memory, processors, state, time; None without one."""
    rows = [row.split() for row in obey(bench, "list").splitlines()]
    return next((row for row in rows if row[0] == name), None)


def process(bench, subcommand):
    """The process of the only domain of this run with this hidden subcommand."""
    for pid in bench.run.processes():
        if subcommand in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise Failure(f"the domain has no process {subcommand.decode()}")


def obeys_commands(bench):
    spec = vm.Spec(command_line="quiet hospes.do=idle", name="obedient").argv("hospes")
    detached = [argument for argument in spec[2:] if argument != "-c"]
    obey(bench, "create", "-p", *detached)
    expect(listed(bench, "obedient")[4] == "--p---", "a domain made with -p is not paused")
    obey(bench, "unpause", "obedient")
    with vm.Guest([spec[0], "console", "obedient"], bench.run.environment()) as console:
        console.wait_for("HOSPES-GUEST ready", BOOT_S)
        obey(bench, "pause", "obedient")
        expect(listed(bench, "obedient")[4] == "--p---", "a domain that was paused does not show it")
        obey(bench, "unpause", "obedient")
        before = listed(bench, "obedient")[1]
        obey(bench, "reboot", "obedient")
        console.wait_for("HOSPES-GUEST ready", BOOT_S)
        expect(listed(bench, "obedient")[1] != before, "a domain that has rebooted has its old id")
        obey(bench, "shutdown", "-w", "obedient")
        expect(console.wait(END_S) == 0, f"the console of a domain that has ended fails\n{console.tail()}")
    bench.expect_no_domain("obedient")


def is_quiet_after_a_stop(bench, seconds):
    """The machine process does not run for a while: time goes on, and the guest's watchdogs stay calm."""
    with bench.boot(command_line="quiet hospes.do=shell", name="stopped") as guest:
        guest.wait_for("guest# ", BOOT_S)
        # The clocks of the kernel and of user space, without a rest.
        guest.send("dmesg -c >/dev/null; while :; do date +%s >/dev/null; done &\n")
        guest.wait_for("guest# ", END_S)
        guest.send("echo up $(cut -d. -f1 /proc/uptime) before\n")
        before = int(guest.wait_for(r"\nup (\d+) before", END_S).group(1))
        machine = process(bench, b"__machine")
        os.kill(machine, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(machine, signal.SIGCONT)
        # Long enough for the guest's watchdogs, which look every few seconds.
        time.sleep(6)
        guest.send("dmesg -r; echo up $(cut -d. -f1 /proc/uptime) after\n")
        match = guest.wait_for(r"\nup (\d+) after", END_S)
        passed = int(match.group(1)) - before
        expect(passed >= seconds, f"the process was stopped for {seconds} s and the guest's clock went on {passed} s")
        said = dmesg.complaints(guest.console)
        expect(not said, "the kernel complains:\n" + "\n".join(said))
        guest.send("poweroff -f\n")
        expect(guest.wait(END_S) == 0, f"the guest does not power off\n{guest.tail()}")


def store_process(bench):
    """The store process of this run, started where there is none."""
    bench.run.hospes("list")
    for pid in bench.run.processes():
        if b"__store" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    return None


def kill_store(bench):
    """Kills the store process; a domain whose connection broke starts another."""
    found = []
    wait_until(lambda: found.append(store_process(bench)) or found[-1], "there is no store process")
    os.kill(found[-1], signal.SIGKILL)


# The guest's own connection: READ of "domid", a header of 16 bytes and the path; the answer ends with the value.
ASK = (
    r"exec 3<>/dev/xen/xenbus; ask() { printf '\2\0\0\0\0\0\0\0\0\0\0\0\6\0\0\0domid\0' >&3; "
    r"dd bs=16 count=1 <&3 >/dev/null 2>&1; dd bs=16 count=1 <&3 2>/dev/null; }"
)


def survives_a_killed_store(bench):
    with bench.boot(command_line="quiet hospes.do=shell", name="reader") as guest:
        guest.wait_for("guest# ", BOOT_S)
        domid = listed(bench, "reader")[1]
        guest.send(ASK + "\n")
        for number in range(5):
            kill_store(bench)
            guest.send(f"echo answer-$((40 + {number})) $(ask)\n")
            guest.wait_for(rf"\nanswer-{40 + number} {domid}\n", END_S)
        said = dmesg.complaints(guest.console)
        expect(not said, "the kernel complains:\n" + "\n".join(said))
        guest.send("poweroff -f\n")
        expect(guest.wait(END_S) == 0, f"the guest does not power off\n{guest.tail()}")
    # The guest's watches were set before the process was killed.
    with bench.boot(command_line="quiet hospes.do=idle", name="watcher") as guest:
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        kill_store(bench)
        obey(bench, "shutdown", "-w", "watcher")
        expect(guest.wait(END_S) == 0, f"the guest does not shut down\n{guest.tail()}")
    bench.expect_no_domain("watcher")


def leaves_nothing_when_killed(bench):
    for attempt in range(2):
        with bench.boot(command_line="quiet hospes.do=idle", name="killed") as guest:
            guest.wait_for("HOSPES-GUEST ready", BOOT_S)
            if attempt == 0:
                os.kill(process(bench, b"__domain"), signal.SIGKILL)
                expect(guest.wait(END_S) == 1, "the domain process was killed and `create -c` ends well")
                expect("SIGKILL" in guest.errors, f"`create -c` does not say what happened: {guest.errors}")
                bench.expect_no_domain("killed")
            else:
                obey(bench, "destroy", "killed")
                expect(guest.wait(END_S) == 0, f"the domain was destroyed and `create -c` fails\n{guest.tail()}")


def crashes_with_its_machine_process(bench):
    """The guest's process is killed: the domain process lives on, says so and does what is to be done about a crash."""
    with bench.boot(command_line="quiet hospes.do=idle", name="twice", settings=('on_crash="restart"',)) as guest:
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        keeper, first = process(bench, b"__domain"), process(bench, b"__machine")
        os.kill(first, signal.SIGKILL)
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        expect(process(bench, b"__domain") == keeper, "the domain process is another")
        expect(process(bench, b"__machine") != first, "the guest has come back in the process that was killed")
        log = "".join(path.read_text(errors="replace") for path in pathlib.Path(bench.run.path).rglob("twice.log"))
        expect("machine process has ended (signal: 9" in log, f"the log does not say how the guest ended: {log[-1000:]}")
        obey(bench, "destroy", "twice")
        guest.wait(END_S)
    bench.expect_no_domain("twice")


# What a machine process may have open beside memory and what has no path.
OWN_FILES = ("/memfd:", "socket:", "pipe:", "anon_inode:", "/dev/null", "/proc/")


def has_no_rights(bench):
    """What the kernel shows of the process that the guest is in."""
    with tempfile.TemporaryDirectory(prefix="hospes-wall-") as directory:
        disk = image(directory, "disk.img", bytes(1 << 20))
        with bench.boot(command_line="quiet hospes.do=idle", name="walled", disks=(vm.Disk(disk),)) as guest:
            guest.wait_for("HOSPES-GUEST ready", BOOT_S)
            machine = pathlib.Path("/proc") / str(process(bench, b"__machine"))
            status = (machine / "status").read_text()
            none = "\t" + 16 * "0" + "\n"
            for wanted in ("Seccomp:\t2\n", "NoNewPrivs:\t1\n", f"CapEff:{none}", f"CapPrm:{none}", f"CapBnd:{none}", f"CapAmb:{none}"):
                expect(wanted in status or os.geteuid() != 0 and "CapBnd" in wanted, f"the process's status has no {wanted!r}:\n{status}")
            if os.geteuid() == 0:
                users = re.search(r"\nUid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)\nGid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)\n", status).groups()
                expect(len(set(users)) == 1 and int(users[0]) >= 0x7E000000, f"the process is the users and groups {users}")
                expect("\nGroups:\t \n" in status, f"the process is in other groups:\n{status}")
            tasks = [(task / "status").read_text() for task in (machine / "task").iterdir()]
            expect(all("Seccomp:\t2\n" in task for task in tasks), "a thread of the process is not confined")
            files = {os.readlink(entry) for entry in (machine / "fd").iterdir()}
            others = {file for file in files if not file.startswith(OWN_FILES) and not file.endswith("walled.log")}
            expect(others == {disk}, f"the process has these files open: {sorted(others)}")
            log = "".join(path.read_text(errors="replace") for path in pathlib.Path(bench.run.path).rglob("walled.log"))
            expect("The machine process is confined: " in log, f"the log does not tell what confines the process: {log}")
            obey(bench, "destroy", "walled")
            guest.wait(END_S)


# ---- wrong input ----------------------------------------------------------------------------------------------------


def image(directory, name, content):
    path = os.path.join(directory, name)
    with open(path, "wb") as handle:
        handle.write(content)
    return path


def damaged(content):
    """The same image with 4 KiB of its compressed part inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 4096]) + content[middle + 4096 :]


def bad_kernels(directory):
    """Name of the case -> path of a file that cannot be booted."""
    good = (vm.GUESTS / "vmlinuz-cloud").read_bytes()
    return {
        "missing": os.path.join(directory, "nowhere"),
        "directory": directory,
        "empty": image(directory, "empty", b""),
        "text": image(directory, "text", b"this is no kernel\n" * 100),
        "without-pvh-note": str(vm.GUESTS / "init-mark"),
        "truncated": image(directory, "half", good[: len(good) // 2]),
        "truncated-header": image(directory, "header", good[:700]),
        "damaged": image(directory, "damaged", damaged(good)),
    }


BAD_SETTINGS = {
    "memory-too-small": ("memory=1",),
    "memory-too-large": ("memory=999999999",),
    "memory-below-kernel": ("memory=16",),
    "no-vcpu": ("vcpus=0",),
    "unknown-action": ('on_poweroff="explode"',),
    "syntax": ('extra="never ends',),
    "ramdisk-missing": ('ramdisk="/nonexistent/initramfs"',),
    "empty-name": ('name=""',),
    "unknown-level": ('cpu_level="x86-64-v9"',),
    "unknown-feature": ('cpuid="host,turbo=1"',),
    "impossible-feature": ('cpuid="host,hle=1"',),
}


def refuses(bench, settings, kernel=None):
    spec = vm.Spec(name="refused", settings=settings)
    if kernel:
        spec.kernel = kernel
    with vm.Guest(spec.argv("hospes"), bench.run.environment()) as guest:
        status = guest.wait(END_S)
        sentence = guest.errors.strip()
    expected = 1 if "the configuration has errors" in sentence else 3
    expect(status == expected, f"the exit status is {status} instead of {expected}; it says: {sentence}")
    expect("panicked" not in sentence, f"the monitor panicked: {sentence}")
    said = [line for line in sentence.splitlines() if not line.startswith("Parsing config") and ": note: " not in line]
    expect(len(" ".join(said).split()) >= 5, f"the message is no sentence: {sentence!r}")
    bench.expect_no_domain("refused")


def refuses_kernel(bench, case):
    with tempfile.TemporaryDirectory(prefix="hospes-bad-") as directory:
        refuses(bench, (), bad_kernels(directory)[case])


BAD_KERNELS = (
    "missing", "directory", "empty", "text", "without-pvh-note", "truncated", "truncated-header", "damaged",
)


def tests(boots):
    """(name, works under QEMU too, function of the bench) in the order in which they run."""
    part = functools.partial
    for kernel, compression in KERNELS.items():
        yield f"boots_to_shell_{kernel}_{compression}", True, part(boots_to_shell, kernel=kernel)
        yield f"says_nothing_forbidden_{kernel}", True, part(says_nothing_forbidden, kernel=kernel)
    # What Debian's kernel itself needs, and more than lies below 4 GiB.
    for memory_mb in (80, 128, 2048, 6144):
        yield f"boots_with_{memory_mb}_mb", True, part(boots_with_memory, memory_mb=memory_mb)
    for way in ("poweroff", "halt", "reboot", "panic"):
        yield f"ends_by_{way}", False, part(ends_by_itself, way=way)
    for way in ("reboot", "panic", "poweroff"):
        yield f"starts_again_after_{way}", False, part(starts_again, way=way)
    for way in ("poweroff", "panic"):
        yield f"is_preserved_after_{way}", False, part(is_preserved, way=way)
    yield "obeys_commands", False, obeys_commands
    yield "is_quiet_after_a_stop", False, part(is_quiet_after_a_stop, seconds=10)
    yield "survives_a_killed_store", False, survives_a_killed_store
    yield "leaves_nothing_when_killed", False, leaves_nothing_when_killed
    yield "crashes_with_its_machine_process", False, crashes_with_its_machine_process
    yield "has_no_rights", False, has_no_rights
    for case in BAD_KERNELS:
        yield f"refuses_kernel_{case}", False, part(refuses_kernel, case=case)
    for case, settings in BAD_SETTINGS.items():
        yield f"refuses_{case}", False, part(refuses, settings=settings)
    yield "has_avx512", False, part(levels.has_avx512, direct=0)
    yield "has_avx512_with_direct_execution", False, part(levels.has_avx512, direct=1)
    yield "has_openssl_with_avx512", False, levels.has_openssl_with_avx512
    yield "has_no_avx512_by_default", False, levels.has_no_avx512
    yield "hides_features", False, levels.hides_features
    for vcpus in (2, 16, 128):
        yield f"starts_{vcpus}_vcpus", False, part(starts_all_vcpus, vcpus=vcpus)
    yield f"boots_{boots}_times_in_a_row", True, part(boots_every_time, count=boots)
    yield f"boots_{boots}_times_with_2_vcpus", True, part(boots_every_time, count=boots, vcpus=2)
    for vcpus in (1, 2):
        spec = {"count": boots, "vcpus": vcpus, "settings": ("engine_direct=0",)}
        yield f"boots_{boots}_times_without_direct_execution_with_{vcpus}_vcpus", False, part(boots_every_time, **spec)
    yield from direct.tests()


def main():
    parser = runner.parser(__doc__)
    parser.add_argument("--system", choices=("hospes", "tcg"), default="hospes")
    parser.add_argument("--boots", type=int, default=int(os.environ.get("BOOTS", "5")))
    options = parser.parse_args()

    def run(function):
        with vm.RunDirectory() as directory:
            function(Bench(options.system, directory))

    wanted = {name: function for name, portable, function in tests(options.boots) if portable or options.system == "hospes"}
    chosen = runner.select(options, wanted)
    return runner.conclude([runner.passes(name, functools.partial(run, wanted[name])) for name in chosen])


if __name__ == "__main__":
    sys.exit(main())
