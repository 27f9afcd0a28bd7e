#!/usr/bin/env python3
"""Moves running guests to another host, which is this one, and sees that they run in exactly one place whatever fails.

    tests/migration.py [--list] [WORD...]

Only tests whose name contains one of the WORDs run, all without any. What stands for ssh is a command of the shell; as root every test has a
network namespace of its own. The last line is "N passed, N failed"; the exit status is 0 when nothing failed.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import commands
from commands import Shell
from runner import Failure, expect, wait_until

import vm


class Moved:
    """A guest that counts, and writes to its disk what it can check, while it is moved about on this host."""

    COUNT = "cat /dev/shm/count"

    def __init__(self, bench, name, disk_format="raw"):
        self.bench, self.name = bench, name
        path = bench.path(f"{name}.{disk_format}")
        subprocess.run(["qemu-img", "create", "-q", "-f", disk_format, path, "64M"], check=True)
        self.disk = vm.Disk(path, format=disk_format)
        self.guest = bench.boot(name, vcpus=4, disks=(self.disk,), vifs=("mac=00:16:3e:00:00:07,vifname=moved",))
        self.guest.run("mkdir -p /dev/shm")
        self.forever("i=$((i+1)); echo $i >/dev/shm/next; mv /dev/shm/next /dev/shm/count; sleep 0.02")
        self.guest.run("dd if=/dev/urandom of=/dev/shm/random bs=1M count=16 2>/dev/null; sha256sum </dev/shm/random >/dev/shm/sum")
        # Always the same, so that what is there is right whenever it is looked at, once it was written.
        self.guest.run("dd if=/dev/shm/random of=/dev/xvda bs=1M oflag=direct 2>/dev/null")
        self.forever("dd if=/dev/shm/random of=/dev/xvda bs=64k oflag=direct; echo w >>/dev/shm/written")

    def forever(self, commands_):
        self.guest.run(f"(while :; do {commands_}; done) >/dev/null 2>&1 & true")

    def value(self, pattern, command):
        """What a command prints on a line of its own, without what the terminal shows besides."""
        said = self.guest.run(command)
        found = re.findall(rf"(?m)^{pattern}", said)
        expect(found, f"`{command}` says {said!r}")
        return found[-1]

    def receiver(self):
        return f"{vm.hospes_binary()} migrate-receive"

    def migrate(self, command=None, *options):
        """The command, whatever becomes of it; `command` stands for ssh."""
        return self.bench.tried("migrate", *options, "-s", "", self.name, command or self.receiver())

    def moves(self):
        done = self.migrate()
        expect(done.returncode == 0 and "Migration successful." in done.stderr, f"`migrate` failed: {done.stderr}")
        self.guest = Shell.again(self.bench, self.name)

    def names(self):
        return [line.split()[0] for line in self.bench.hospes("list").splitlines()[2:]]

    def goes_on(self):
        """Looks from inside that all is as it was, and goes on."""
        expect(self.names() == [self.name], f"there are {self.names()}")
        counted = self.value(r"(\d+)\r?$", self.COUNT)
        self.guest.until(f"test $({self.COUNT}) -gt {counted}")
        self.guest.run("rm -f /dev/shm/written")
        self.guest.until("test -s /dev/shm/written")
        self.guest.run("dd if=/dev/xvda bs=1M count=16 iflag=direct 2>/dev/null | sha256sum | cmp - /dev/shm/sum")
        self.guest.run("sha256sum </dev/shm/random | cmp - /dev/shm/sum")

    def off(self):
        """Ends the guest; its disk is right for others, too."""
        self.guest.expect_calm()
        self.guest.send("poweroff -f\n")
        wait_until(lambda: not self.names(), "a migrated guest does not power off")


def migrated_guests_go_on(bench):
    """Programs, memory, disks at work and network interfaces, three times in a row."""
    for disk_format in ("raw", "qcow2"):
        moved = Moved(bench, "moved", disk_format)
        interface = "cat /sys/class/net/eth0/address"
        for _ in range(3):
            moved.moves()
            moved.goes_on()
            expect("00:16:3e:00:00:07" in moved.guest.run(interface), "the interface has another address")
        moved.off()


def stays(moved, command):
    """A migration that fails, after which the guest goes on here."""
    done = moved.migrate(command)
    expect(done.returncode == 1 and "the domain goes on here" in done.stderr, f"by `{command}`: {done.returncode}, {done.stderr}")
    wait_until(lambda: moved.names() == [moved.name], f"after `{command}` there are {moved.names()}")
    moved.goes_on()


def migrations_that_fail_leave_the_guest_where_it_is(bench):
    """The stream and the answers are cut off anywhere, and what reads or writes them is killed."""
    moved = Moved(bench, "kept", "qcow2")
    receiver = moved.receiver()
    first = "perl -e '$n = {}; while ($n && ($r = sysread(STDIN, $b, $n < 65536 ? $n : 65536))) {{ syswrite(STDOUT, $b); $n -= $r }}'"
    # The handshake, the configuration, pages, and nearly all of them.
    for length in (0, 40, 300, 100_000, 5_000_000):
        stays(moved, f"{first.format(length)} | {receiver}")
    for length in (0, 20, 60, 80):
        stays(moved, f"{receiver} | ({first.format(length)}; kill -9 $$)")
    # All of it is there, and the answer that says so is lost: the disks have changed hands and come back.
    stays(moved, f"{receiver} | (sed -u /ready/Q; kill -9 $$)")
    for command in ("false", "echo Welcome", "echo hospes migration target, version 99"):
        stays(moved, command)
    moved.moves()
    moved.goes_on()
    moved.off()
    check = subprocess.run(["qemu-img", "check", moved.disk.path], capture_output=True, text=True, check=False)
    expect(check.returncode == 0, f"the image is not right: {check.stdout}{check.stderr}")


def hosts_without_what_it_needs_refuse(bench):
    """Before the guest is suspended, and with the reason."""
    available = int(re.search(r"MemAvailable: *(\d+)", pathlib.Path("/proc/meminfo").read_text(encoding="ascii"))[1]) >> 10
    # What is promised to the one is not there for the other.
    large = bench.boot("large", memory_mb=available * 6 // 10)
    receiver = f"{vm.hospes_binary()} migrate-receive"
    bench.refused("cannot have its memory", "migrate", "-s", "", "large", receiver)
    large.off()
    moved = Moved(bench, "moved")
    config = bench.path("other.cfg")
    original = json.loads(bench.hospes("list", "-l", "moved"))[0]["config"]
    cases = (
        ("/nowhere/disk.img", "", "", "the disk /nowhere/disk.img cannot be opened there"),
        (moved.disk.path, "bridge=none7", "", "there is no bridge none7"),
        (moved.disk.path, "script=/nowhere/vif-own", "", "there is no script /nowhere/vif-own"),
        (moved.disk.path, "", 'cpus="4000"', "4000"),
    )
    for disk, vif, cpus, why in cases:
        lines = [
            'name="moved"', 'type="pvh"', "memory=256", "vcpus=4", f'kernel="{original["b_info"]["kernel"]}"', f'disk=["{disk},raw,xvda,w"]',
            f'vif=["{vif}"]', cpus,
        ]
        pathlib.Path(config).write_text("\n".join(lines) + "\n", encoding="utf-8")
        bench.refused(why, "migrate", "-C", config, "-s", "", "moved", receiver)
    moved.goes_on()
    log = pathlib.Path(bench.run.environment()["HOSPES_LOG_DIR"], "moved.log").read_text(encoding="utf-8")
    expect("is asked to suspend itself" not in log, "it was suspended for a host that refuses it")
    moved.off()


# Some five megabytes a second, so that there is time for commands while the guest runs.
SLOWLY = "perl -e 'while (sysread(STDIN, $b, 65536)) { syswrite(STDOUT, $b); select(undef, undef, undef, 0.0125) }'"


def guests_hear_commands_while_they_are_sent(bench):
    """What needs no more than a guest that runs, up to when it is suspended; a guest that shuts down ends the migration."""
    moved = Moved(bench, "asked")
    slow = f"{SLOWLY} | {moved.receiver()}"

    def order():
        bench.hospes("sysrq", "asked", "h")
        bench.hospes("trigger", "asked", "nmi", "1")
        bench.hospes("vcpu-pin", "asked", "0", "0")
        bench.refused("try again when that has ended", "mem-set", "asked", "200")

    def pinned():
        return bench.hospes("vcpu-list", "asked").splitlines()[1].split()[6]

    def arrived():
        moved.guest.until("dmesg | grep -q 'sysrq: HELP'")
        moved.guest.until("dmesg | grep -qi 'nmi.*reason'")
        moved.guest.run("dmesg -c >/dev/null")

    moving = begun(moved, "Ready to receive", slow)
    order()
    for pid in descendants(moving.pid):
        os.kill(pid, signal.SIGKILL)
    expect(moving.wait(commands.ANSWER_S) == 1, "a migration without its connection has succeeded")
    moving.stderr.close()
    wait_until(lambda: moved.names() == ["asked"], "the guest does not stay")
    expect(pinned() == "0", f"vCPU 0 is pinned to {pinned()}")
    arrived()
    moving = begun(moved, "Ready to receive", slow)
    order()
    said = moving.stderr.read()
    expect(moving.wait(commands.ANSWER_S) == 0, f"the migration failed: {said}")
    moving.stderr.close()
    moved.guest = Shell.again(bench, "asked")
    expect(pinned() == "all", f"the pinning of vCPU 0, {pinned()}, has moved")
    arrived()
    moved.goes_on()
    moving = begun(moved, "Ready to receive", slow)
    bench.hospes("shutdown", "asked")
    said = moving.stderr.read()
    expect(moving.wait(commands.ANSWER_S) == 1 and "the domain has ended here as well" in said, f"a guest that shuts down is migrated: {said}")
    moving.stderr.close()
    expect(not moved.names(), f"there are {moved.names()}")


def descendants(pid):
    """All processes that came of one, the oldest first."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [process for child in children for process in [int(child), *descendants(child)]]


def record(bench, name):
    """The process of a domain by its name, from its record."""
    for path in pathlib.Path(bench.run.environment()["HOSPES_RUN_DIR"]).glob("domains/*/domain.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["name"] == name:
                return [found["pid"]]
    return []


def settled(moved, what):
    """Does what the messages advise until there is one domain, and looks that its guest goes on."""
    away = f"{moved.name}--migratedaway"

    def is_one():
        names = moved.names()
        if names == [away]:
            moved.bench.tried("unpause", away)
        elif sorted(names) == [moved.name, away]:
            moved.bench.tried("destroy", away)
        return names == [moved.name]

    wait_until(is_one, f"{what} was killed, and there is not one domain")
    moved.guest = Shell.again(moved.bench, moved.name)
    moved.goes_on()


def begun(moved, moment, receiver=None):
    """A migration that has got so far; the one before may still have to see that it was killed."""
    for _ in range(50):
        command = subprocess.Popen(
            moved.bench.command(vm.hospes_binary(), "migrate", "-s", "", moved.name, f"{receiver or moved.receiver()}; exit $?"),
            env=moved.bench.run.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        said = []
        for line in iter(command.stderr.readline, ""):
            said.append(line)
            if moment in line:
                return command
        command.wait(commands.ANSWER_S)
        command.stderr.close()
        expect("try again when that has ended" in "".join(said), f"nothing is said of {moment}: {''.join(said)}")
        time.sleep(0.1)
    raise Failure(f"no other migration can begin: {''.join(said)}")


def killed_processes_leave_one_guest(bench):
    """What takes part is killed at all steps."""
    moved = Moved(bench, "one")
    victims = {
        "the command": lambda command: [command.pid],
        "what stands for ssh": lambda command: descendants(command.pid)[:1],
        "the receiver": lambda command: descendants(command.pid)[1:2] or descendants(command.pid)[:1],
        "the domain that comes": lambda command: record(bench, "one--incoming"),
    }
    moments = ("Ready to receive", "Transfer complete", "Giving target permission", "Got permission")
    for moment in moments:
        for what, find in victims.items():
            command = begun(moved, moment)
            for pid in find(command):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            command.wait(commands.ANSWER_S)
            command.stderr.close()
            settled(moved, f"at {moment!r} {what}")
    moved.off()


TESTS = (
    migrated_guests_go_on, hosts_without_what_it_needs_refuse, migrations_that_fail_leave_the_guest_where_it_is, killed_processes_leave_one_guest,
    guests_hear_commands_while_they_are_sent,
)


if __name__ == "__main__":
    sys.exit(commands.main(__doc__, TESTS))
