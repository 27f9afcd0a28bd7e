#!/usr/bin/env python3
"""Gives the commands to running guests, and looks from inside what has become of them.

    tests/commands.py [--list] [WORD...]

Only tests whose name contains one of the WORDs run, all without any. The guests are a Debian kernel with busybox and the drivers of
disks and networks. As root every test has a network namespace of its own; tests that need root are left out otherwise, with a
note. The last line is "N passed, N failed"; the exit status is 0 when nothing failed.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import network  # noqa: E402
import runner  # noqa: E402
import vm  # noqa: E402
from place import Place  # noqa: E402
from runner import ANSWER_S, expect, wait_until  # noqa: E402

BOOT_S = 120


class Bench(Place):
    """What every test gets: a place, and the commands of the monitor in it."""

    def __init__(self, stack):
        super().__init__(stack, "commands")

    def tried(self, *arguments):
        """One command of the monitor, whatever becomes of it."""
        return subprocess.run(
            self.command(vm.hospes_binary(), *arguments), env=self.run.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=ANSWER_S, check=False,
        )

    def hospes(self, *arguments):
        """What a command of the monitor prints that has to succeed."""
        done = self.tried(*arguments)
        expect(done.returncode == 0, f"`hospes {' '.join(arguments)}` failed: {done.stderr}")
        return done.stdout

    def refused(self, sentence, *arguments):
        done = self.tried(*arguments)
        expect(done.returncode == 1 and sentence in done.stderr, f"`hospes {' '.join(arguments)}`: {done.returncode}, {done.stderr}")

    def seen(self):
        """What the commands, the logs and the kernels of the guests that are still there say, for who looks for a fault."""
        for line in self.tried("list").stdout.splitlines()[2:]:
            # All that the kernel says is to be seen: where each processor is, and what waits for something.
            for key in ("9", "l", "w"):
                self.tried("sysrq", line.split()[0], key)
        time.sleep(1)
        said = [self.tried(command).stdout for command in ("list", "vcpu-list")]
        for log in sorted(pathlib.Path(self.run.environment()["HOSPES_LOG_DIR"]).glob("*.log*")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said.append("\n".join([f"{log.name}:", *lines[-60 if ".console." in log.name else -8 :]]))
        return "\n".join(said)

    def row(self, name):
        """A domain's line in `list`; None without one."""
        return next((line for line in self.hospes("list").splitlines() if line.split()[0] == name), None)

    def states(self, command, name):
        """Device number -> state, as `block-list` and `network-list` show it."""
        rows = [line.split() for line in self.hospes(command, name).splitlines()[1:]]
        column = {"block-list": 3, "network-list": 4}[command]
        return {row[0]: row[column] for row in rows}

    def boot(self, name, **more):
        return self.stack.enter_context(Shell(self, name, **more))


# Linux 6.1 allocates memory when its clock is suspended already, for its run-state times; an allocator that wants new random numbers just then asks the clock for
# the age of those it has.
SUSPENDED_CLOCK = re.compile(r"WARNING: CPU: \d+ PID: \d+ at kernel/time/timekeeping\.c:\d+ ktime_get_seconds")


class Shell(network.Shell):
    """A guest with a shell on its console and the drivers of all devices."""

    COUNTS = itertools.count(1000, 1000)

    def __init__(self, bench, name, **more):
        more.setdefault("memory_mb", 256)
        self.spec = vm.Spec(ramdisk="initramfs-devices.cpio", command_line="quiet sysrq_always_enabled", name=name, **more)
        vm.Guest.__init__(self, bench.command(*self.spec.argv("hospes")), bench.run.environment())
        self.name = name
        self.count = 0
        try:
            self.wait_for("guest# ", BOOT_S)
        except vm.GuestError:
            self.kill()
            raise

    @classmethod
    def again(cls, bench, name):
        """The shell of a domain that was made by another command than `create -c`."""
        shell = cls.__new__(cls)
        vm.Guest.__init__(shell, bench.command(vm.hospes_binary(), "console", name), bench.run.environment())
        bench.stack.enter_context(shell)
        # Behind the last output, which is shown first, with the marks of others.
        shell.name, shell.count = name, next(cls.COUNTS)
        return shell

    def expect_calm(self):
        """Looks that the kernel of a guest that was suspended has not complained."""
        said = self.run("dmesg")
        found = re.search(r"WARNING:|BUG:|stalls|not quiescent|I/O error", SUSPENDED_CLOCK.sub("", said))
        expect(not found, f"the kernel complains:\n{said[max(0, found.start() - 500) :][:3000] if found else ''}")

    def until(self, condition):
        """Waits in the guest until a command succeeds."""
        self.run(f"for i in $(seq 300); do ( {condition} ) >/dev/null 2>&1 && break; sleep 0.1; done; {condition}")


def blank(path, megabytes, content=b""):
    """A raw image that begins with `content`."""
    with open(path, "wb") as handle:
        handle.write(content)
        handle.truncate(megabytes << 20)
    return path


# ---- devices ----------------------------------------------------------------------------------------------------------


def disks_come_and_go(bench):
    shell = bench.boot("plug")
    extra = blank(bench.path("extra.img"), 16, b"first\n")
    disk = f"format=raw,vdev=xvdf,access=rw,target={extra}"
    # At once again: the guest has to have seen the one go before it sees the next.
    for number in range(5):
        bench.hospes("block-attach", "plug", disk)
        shell.until("[ -b /dev/xvdf ]")
        expect(bench.states("block-list", "plug") == {"51792": "4"}, f"block-list shows {bench.states('block-list', 'plug')}")
        shell.run(f"dd if=/dev/xvdf bs=512 count=1 2>/dev/null | head -n 1 | grep -q first && echo {number} | dd of=/dev/xvdf seek=1 conv=fsync 2>/dev/null")
        bench.refused("is in use already", "block-attach", "plug", disk)
        bench.hospes("block-detach", "plug", "51792" if number % 2 else "xvdf")
        expect(bench.states("block-list", "plug") == {}, "block-list shows a disk that was taken away")
    bench.hospes("block-attach", "plug", f"{extra},raw,xvdf,r")
    shell.until("[ -b /dev/xvdf ]")
    shell.run("dd if=/dev/xvdf bs=512 skip=1 count=1 2>/dev/null | head -n 1 | grep -qx 4")
    shell.run("! dd if=/dev/zero of=/dev/xvdf count=1 conv=fsync")
    bench.hospes("block-detach", "plug", "xvdf")
    bench.refused("not connected", "block-detach", "plug", "xvdf")
    bench.refused("plug", "block-attach", "plug", "format=raw,vdev=xvdf,access=rw,target=/nonexistent/plug.img")
    shell.until("! [ -b /dev/xvdf ]")
    shell.off()


def disks_change_their_size(bench):
    image = blank(bench.path("size.img"), 16)
    shell = bench.boot("size", disks=(vm.Disk(image, vdev="xvdb"),))
    size = "[ $(cat /sys/block/xvdb/size) = {} ]"
    shell.until(size.format(16 * 2048))
    for megabytes in (64, 24):
        bench.hospes("block-resize", "size", "xvdb", f"{megabytes}M")
        shell.until(size.format(megabytes * 2048))
        expect(os.path.getsize(image) == megabytes << 20, f"the image has {os.path.getsize(image)} bytes")
        shell.run(f"dd if=/dev/zero of=/dev/xvdb bs=1M seek={megabytes - 1} count=1 conv=fsync")
    shell.run("! dd if=/dev/zero of=/dev/xvdb bs=1M seek=24 count=1 conv=fsync")
    heading, _, row = bench.hospes("top", "-b", "-i", "1").splitlines()
    counted = dict(zip(heading.split(), row.split()))
    expect((counted["NETS"], counted["VBDS"]) == ("0", "1"), f"`top` shows other devices: {counted}")
    expect(int(counted["VBD_WSECT"]) == 2 * 2048 and 0 < int(counted["VBD_WR"]) <= 512, f"`top` counts other writes: {counted}")
    bench.refused("not connected", "block-resize", "size", "xvdc", "1G")
    shell.off()


def disks_that_the_host_cuts_fail(bench):
    """What was there is not read as zeros, and a write does not make the image grow again."""
    image = blank(bench.path("cut.img"), 16)
    shell = bench.boot("cut", disks=(vm.Disk(image, vdev="xvdb"),))
    shell.until("[ -b /dev/xvdb ]")
    shell.run("dd if=/dev/zero bs=1M count=16 | tr '\\0' x | dd of=/dev/xvdb bs=1M conv=fsync")
    os.truncate(image, 8 << 20)
    shell.run("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/xvdb bs=1M count=8 2>/dev/null | tr -d x | wc -c | grep -qx 0")
    shell.run("! dd if=/dev/xvdb of=/dev/null bs=4k skip=2048 count=1")
    shell.run("! dd if=/dev/zero of=/dev/xvdb bs=1M seek=10 count=1 conv=fsync")
    expect(os.path.getsize(image) == 8 << 20, f"the image has grown to {os.path.getsize(image)} bytes")
    expect(f"the image ends after {8 << 20} bytes" in bench.hospes("dmesg"), "the log does not tell")
    told = bench.hospes("dmesg").count("the image ends")
    # Where the format has tables, and the file has grown while it was in use.
    image = bench.path("cut.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    bench.hospes("block-attach", "cut", f"{image},qcow2,xvdc,w")
    shell.until("[ -b /dev/xvdc ]")
    shell.run("dd if=/dev/zero bs=1M count=16 | tr '\\0' x | dd of=/dev/xvdc bs=1M conv=fsync")
    os.truncate(image, 8 << 20)
    shell.run("echo 3 >/proc/sys/vm/drop_caches; ! dd if=/dev/xvdc of=/dev/null bs=4k skip=4000 count=1")
    shell.run("! dd if=/dev/zero of=/dev/xvdc bs=1M seek=15 count=1 conv=fsync")
    bench.hospes("block-detach", "cut", "xvdc")
    expect(os.path.getsize(image) == 8 << 20, f"the image has grown to {os.path.getsize(image)} bytes")
    expect(bench.hospes("dmesg").count("the image ends") > told, "the log does not tell of the second")
    shell.off()


def disks_in_use_are_taken_by_force(bench):
    """The guest holds the disk open while it is taken; a new one in its place works at once."""
    image = blank(bench.path("used.img"), 16)
    shell = bench.boot("used", disks=(vm.Disk(image, vdev="xvdb"),))
    disk = f"format=raw,vdev=xvdb,access=rw,target={image}"
    shell.until("[ -b /dev/xvdb ]")
    for _ in range(5):
        shell.run("exec 5<>/dev/xvdb; dd if=/dev/zero bs=1M count=4 >&5")
        bench.hospes("block-detach", "-f", "used", "xvdb")
        bench.hospes("block-attach", "used", disk)
        wait_until(lambda: bench.states("block-list", "used") == {"51728": "4"}, f"the disk is in state {bench.states('block-list', 'used')}")
        shell.run("exec 5>&-")
        shell.until("[ -b /dev/xvdb ]")
        shell.run("dd if=/dev/zero of=/dev/xvdb bs=1M count=2 conv=fsync && dd if=/dev/xvdb of=/dev/null bs=1M")
    shell.off()


def media_are_changed(bench):
    one, other = (blank(bench.path(f"{name}.iso"), 4, f"medium {name}\n".encode()) for name in ("one", "other"))
    shell = bench.boot("player", disks=(vm.Disk(one, vdev="xvdc", read_only=True, cdrom=True),))
    medium = "dd if=/dev/xvdc bs=512 count=1 2>/dev/null | head -n 1 | grep -q 'medium {}'"
    shell.until(medium.format("one"))
    for name, path in (("other", other), ("one", one)):
        bench.hospes("cd-insert", "player", "xvdc", path)
        shell.until(medium.format(name))
    # One that cannot be opened leaves the medium where it is.
    bench.refused("a directory", "cd-insert", "player", "xvdc", os.path.dirname(one))
    shell.run("echo 3 >/proc/sys/vm/drop_caches; " + medium.format("one"))
    bench.hospes("cd-eject", "player", "xvdc")
    shell.until("! [ -b /dev/xvdc ]")
    bench.refused("Cannot stat file", "cd-insert", "player", "xvdc", "/nonexistent.iso")
    bench.hospes("cd-insert", "player", "xvdc", other)
    shell.until(medium.format("other"))
    shell.run("[ $(cat /sys/block/xvdc/ro) = 1 ]")
    shell.off()


def interfaces_come_and_go(bench):
    if not bench.space:
        print("note interfaces_come_and_go: networks are left alone without root")
        return
    shell = bench.boot("wire")
    mac = "00:16:3e:11:22:33"
    for number in range(4):
        bench.hospes("network-attach", "wire", f"mac={mac}")
        shell.until(f"grep -q {mac} /sys/class/net/eth0/address")
        shell.run("ip link set eth0 up")
        shell.until("[ $(cat /sys/class/net/eth0/carrier) = 1 ]")
        wait_until(lambda: bench.states("network-list", "wire") == {"0": "4"}, "the interface is not connected")
        expect(mac in bench.hospes("network-list", "wire"), "network-list does not show its address")
        bench.hospes("network-detach", "wire", mac if number % 2 else "0")
        shell.until("! [ -e /sys/class/net/eth0 ]")
        expect(bench.states("network-list", "wire") == {}, "network-list shows an interface that was taken away")
    bench.refused("Unknown device", "network-detach", "wire", "0")
    shell.off()


def writes_wait_for_a_full_host(bench):
    """Seen in `list` until there is room; the guest gets no error."""
    if os.geteuid() != 0:
        print("note writes_wait_for_a_full_host: a file system that is full takes root")
        return
    small = bench.path("small")
    os.mkdir(small)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=True)
    bench.stack.callback(subprocess.run, ["umount", "-l", small], check=False)
    image = blank(os.path.join(small, "disk.img"), 32)
    shell = bench.boot("full", disks=(vm.Disk(image, vdev="xvdb"),))
    shell.until("[ -b /dev/xvdb ]")
    held = lambda: json.loads(bench.hospes("list", "-l", "full"))[0].get("held", [])  # noqa: E731
    expect(held() == [], f"a disk is held before anything is written: {held()}")
    shell.run("(dd if=/dev/zero of=/dev/xvdb bs=1M count=16 conv=fsync; echo written $?) >/tmp/done 2>&1 & true")
    wait_until(lambda: [device["device"] for device in held()] == ["xvdb"], f"`list -l` shows {held()}")
    listed = bench.tried("list")
    expect(f"full: xvdb: the host's file system with {image} is full" in listed.stderr, f"`list` does not say why: {listed.stderr}")
    # Programs that count columns go on.
    expect(len(bench.row("full").split()) == 6, f"`list` shows {bench.row('full')}")
    expect("held: xvdb\n" in bench.hospes("list", "-v"), "`list -v` does not show it")
    expect("Disk requests wait" in bench.hospes("dmesg"), "the log does not tell")
    bench.refused("use --force", "block-detach", "full", "xvdb")
    # Nor is the guest stopped for what cannot come to an end: its programs wait for the disk.
    began = time.monotonic()
    bench.refused("see to that first", "save", "full", bench.path("saved"))
    expect(time.monotonic() - began < 10, f"save took {time.monotonic() - began:.0f} seconds")
    subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
    shell.until("grep -q 'written 0' /tmp/done")
    wait_until(lambda: held() == [], f"there is room and `list -l` shows {held()}")
    # Full again: what waits ends with an error once the disk is taken by force, and the guest goes on.
    subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
    shell.run("(dd if=/dev/zero of=/dev/xvdb bs=1M seek=16 count=16 conv=fsync; echo written $?) >/tmp/done 2>&1 & true")
    wait_until(lambda: held() != [], "the disk is not held a second time")
    bench.hospes("block-detach", "--force", "full", "xvdb")
    shell.until("grep -q 'written 1' /tmp/done")
    shell.until("! [ -b /dev/xvdb ]")
    shell.run("sync")
    shell.off()


def full_directories_of_state_are_named(bench):
    """Commands that have to write something down say at once that they cannot, and work again when there is room."""
    if os.geteuid() != 0:
        print("note full_directories_of_state_are_named: a file system that is full takes root")
        return
    directory = bench.run.environment()["HOSPES_RUN_DIR"]
    os.mkdir(directory, 0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", directory], check=True)
    bench.stack.callback(subprocess.run, ["umount", "-l", directory], check=False)
    shell = bench.boot("room")
    disk = f"format=raw,vdev=xvdf,access=rw,target={blank(bench.path('extra.img'), 8)}"
    filler = os.path.join(directory, "filler")
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False)
    began = time.monotonic()
    for command in (("block-attach", "room", disk), ("network-attach", "room"), ("shutdown", "room"), ("rename", "room", "other")):
        bench.refused(f"the file system with {directory} is full", *command)
    expect(bench.row("room") is not None, "the domain is not listed")
    expect(time.monotonic() - began < 5, f"the commands took {time.monotonic() - began:.0f} seconds")
    # A change that has no room keeps the store from answering, until there is some.
    change = "for node in 1 2 3; do xenstore-write /tool/$node $(printf %02000d 0); done"
    socket = os.path.join(directory, "xenstored", "socket")
    changing = subprocess.Popen(["sh", "-c", change], env=dict(os.environ, XENSTORED_PATH=socket))
    bench.stack.callback(changing.kill)
    wait_until(lambda: "cannot be written" in pathlib.Path(bench.run.environment()["HOSPES_LOG_DIR"], "store.log").read_text(), "the store is not held")
    began = time.monotonic()
    bench.refused("make room there", "block-list", "room")
    expect(time.monotonic() - began < 5, f"block-list took {time.monotonic() - began:.0f} seconds")
    os.remove(filler)
    expect(changing.wait(ANSWER_S) == 0, "what waited for room has not happened")
    bench.hospes("block-attach", "room", disk)
    shell.until("[ -b /dev/xvdf ]")
    bench.hospes("block-detach", "room", "xvdf")
    shell.off()


def disks_of_paused_guests_stay(bench):
    shell = bench.boot("stopped", disks=(vm.Disk(blank(bench.path("kept.img"), 8), vdev="xvdb"),))
    shell.until("[ -b /dev/xvdb ]")
    shell.run("dd if=/dev/zero of=/dev/xvdb bs=1M count=4 conv=fsync")
    bench.hospes("pause", "stopped")
    bench.refused("does not let go", "block-detach", "stopped", "xvdb")
    bench.hospes("unpause", "stopped")
    shell.run("dd if=/dev/zero of=/dev/xvdb bs=1M count=8 conv=fsync")
    bench.hospes("block-detach", "stopped", "xvdb")
    shell.until("! [ -b /dev/xvdb ]")
    shell.off()


def images_on_loop_devices_are_in_use(bench):
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        print("note images_on_loop_devices_are_in_use: there are no loop devices for this user")
        return
    image = blank(bench.path("loop.img"), 8)
    device = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False).stdout.strip()
    if not device:
        print("note images_on_loop_devices_are_in_use: the host gives no loop device")
        return
    bench.stack.callback(subprocess.run, ["losetup", "-d", device], check=False)
    shell = bench.boot("looped")
    bench.refused(f"loop device {device}", "block-attach", "looped", f"{image},raw,xvdb,w")
    bench.hospes("block-attach", "looped", f"{device},raw,xvdb,w")
    bench.refused("is locked by domain", "block-attach", "looped", f"{image},raw,xvdc,w")
    bench.refused("it has the image already", "block-attach", "looped", f"{device},raw,xvdc,w")
    shell.off()


# ---- the domain ---------------------------------------------------------------------------------------------------------


def names_and_shares_change(bench):
    shell = bench.boot("before")
    domid = bench.hospes("domid", "before").strip()
    bench.hospes("rename", "before", "after")
    expect(bench.hospes("domname", domid).strip() == "after" and bench.row("before") is None, "the old name is still there")
    expect(bench.hospes("domid", "after").strip() == domid, "the new name has another id")
    bench.hospes("sched-credit2", "-d", "after", "-w", "512", "-c", "50")
    expect(bench.hospes("sched-credit2", "-d", "after").split()[-4:] == ["after", domid, "512", "50"], bench.hospes("sched-credit2"))
    # Half a processor, whatever there is.
    shell.run("(while :; do :; done) & echo $! >/tmp/busy")
    time.sleep(2)
    before, began = float(bench.row("after").split()[5]), time.monotonic()
    time.sleep(4)
    used = (float(bench.row("after").split()[5]) - before) / (time.monotonic() - began)
    expect(used < 0.75, f"a domain with a cap of 50 % uses {used * 100:.0f} %")
    shell.run("kill $(cat /tmp/busy)")
    bench.hospes("reboot", "after")
    shell.wait_for("HOSPES-GUEST ready", BOOT_S)
    row = bench.hospes("sched-credit2", "-d", "after").split()[-4:]
    expect(row[1] != domid and row[2:] == ["512", "50"], f"after a reboot the share is {row}")
    bench.hospes("destroy", "after")
    shell.wait(ANSWER_S)


def configuration_is_that_of_the_next_start(bench):
    shell = bench.boot("next")
    first = int(re.search(r"(\d+)", shell.run("grep MemTotal /proc/meminfo")).group(1))
    changed = vm.Spec(**dict(vars(shell.spec), memory_mb=384)).argv("hospes")
    bench.hospes("config-update", "next", *changed[3:])
    expect(int(bench.row("next").split()[2]) == 256, "the running domain has changed")
    bench.hospes("reboot", "next")
    shell.wait_for("HOSPES-GUEST ready", BOOT_S)
    shell.wait_for("guest# ", BOOT_S)
    second = int(re.search(r"(\d+)", shell.run("grep MemTotal /proc/meminfo")).group(1))
    expect(second > first + 100 * 1024, f"MemTotal was {first} kB and is {second} kB after config-update and reboot")
    shell.off()


def processors_are_taken_and_given(bench):
    shell = bench.boot("cpus", vcpus=3, settings=("maxvcpus=3",))
    online = "[ $(cat /sys/devices/system/cpu/online) = {} ]"
    shell.until(online.format("0-2"))
    bench.hospes("vcpu-set", "cpus", "1")
    shell.until(online.format("0"))
    wait_until(lambda: bench.row("cpus").split()[3] == "1", f"`list` shows {bench.row('cpus')}")
    states = [line.split()[4] for line in bench.hospes("vcpu-list", "cpus").splitlines()[1:]]
    expect(states[1:] == ["--p", "--p"], f"`vcpu-list` shows {states}")
    bench.hospes("vcpu-set", "-i", "cpus", "3")
    shell.until("cd /sys/devices/system/cpu; for c in cpu1 cpu2; do echo 1 >$c/online; done; " + online.format("0-2"))
    wait_until(lambda: bench.row("cpus").split()[3] == "3", f"`list` shows {bench.row('cpus')}")
    bench.refused("4", "vcpu-set", "-i", "cpus", "4")
    bench.hospes("vcpu-set", "cpus", "2")
    bench.hospes("reboot", "cpus")
    shell.wait_for("HOSPES-GUEST ready", BOOT_S)
    shell.until(online.format("0-1"))
    shell.off()


def total_mib(shell):
    return int(re.search(r"MemTotal: +(\d+) kB", shell.run("grep MemTotal /proc/meminfo")).group(1)) >> 10


def host_mib(bench, name):
    """What the host has given a domain for its guest's memory: the file's blocks, and what the process has of all shared memory."""
    directory = pathlib.Path(bench.run.environment()["HOSPES_RUN_DIR"]) / "domains" / bench.hospes("domid", name).strip()
    process = pathlib.Path("/proc") / str(json.loads((directory / "domain.json").read_text())["machine"])
    files = {
        os.stat(link).st_ino: os.stat(link).st_blocks for link in (process / "fd").iterdir() if "memfd:hospes-guest" in os.readlink(link)
    }
    resident = re.search(r"RssShmem:\s+(\d+)", (process / "status").read_text()).group(1)
    return sum(files.values()) * 512 >> 20, int(resident) >> 10


def memory_is_given_and_taken(bench):
    shell = bench.boot("memory", memory_mb=512, settings=("maxmem=1024",))
    claims = lambda: int(bench.hospes("info", "outstanding_claims"))  # noqa: E731
    build = lambda: json.loads(bench.hospes("list", "-l", "memory"))[0]["config"]["b_info"]  # noqa: E731
    has = lambda mib: wait_until(  # noqa: E731
        lambda: int(bench.row("memory").split()[2]) == mib and mib * 0.8 - 30 < total_mib(shell) <= mib,
        f"the guest is to have {mib} MiB: {bench.row('memory')}",
    )
    # The kernel waits for its balloon before it starts the first program.
    expect(380 < total_mib(shell) <= 512, f"after the boot the guest has {total_mib(shell)} MiB")
    expect((build()["max_memkb"], build()["target_memkb"]) == (1024 << 10, 512 << 10), f"`list -l` shows {build()}")
    shell.run("mkdir /big && mount -t tmpfs -o size=1g big /big")
    fill = "dd if=/dev/zero of=/big/file bs=1M count={} 2>/dev/null && [ $(stat -c %s /big/file) = $(({} << 20)) ]"
    shell.run(fill.format(330, 330))
    full = host_mib(bench, "memory")
    expect(min(full) > 330, f"the guest has filled 330 MiB, the host has given it {full}")
    shell.run("rm /big/file")
    # What the guest has freed is its own until it gives it back.
    bench.hospes("mem-set", "memory", "300")
    has(300)
    given = host_mib(bench, "memory")
    expect(given[0] <= 300 and given[1] < full[1] - 30, f"the host has given {full} MiB before and {given} after 212 of 512 were given back")
    expect(claims() + given[0] <= 300 + 1, f"with {given} of 300 MiB used {claims()} are promised")
    bench.hospes("mem-set", "memory", "1000m")
    has(1000)
    expect(claims() + given[0] > 950, f"{claims()} MiB are promised to a guest that has 1000 and uses {given}")
    shell.run(fill.format(700, 700))
    expect(host_mib(bench, "memory")[0] > 700, "the guest fills 700 MiB and the host does not notice")
    shell.run("rm /big/file")
    bench.refused("memory_dynamic_max must be less than", "mem-set", "memory", "1025")
    bench.refused("memory_static_max must be greater", "mem-max", "memory", "999m")
    bench.refused("Domain-0 is the host itself", "mem-max", "Domain-0", "1g")
    bench.hospes("mem-max", "memory", "1024")
    expect(total_mib(shell) > 770 and int(bench.row("memory").split()[2]) == 1000, "mem-max alone has changed what the guest has")
    # A paused guest follows when it runs again.
    bench.hospes("pause", "memory")
    bench.hospes("mem-set", "memory", "400000k")
    expect(int(bench.row("memory").split()[2]) == 1000, "a paused guest has given memory back")
    bench.hospes("rename", "memory", "renamed")
    bench.hospes("rename", "renamed", "memory")
    bench.hospes("unpause", "memory")
    has(400000 >> 10)
    bench.hospes("reboot", "memory")
    shell.wait_for("HOSPES-GUEST ready", BOOT_S)
    shell.wait_for("guest# ", BOOT_S)
    has(400000 >> 10)
    expect(build()["target_memkb"] == 400000, f"after a reboot `list -l` shows {build()}")
    shell.off()


def memory_that_the_host_has_not_is_refused(bench):
    """Of a domain that has not begun to run, too."""
    total = int(re.search(r"MemTotal: +(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1)) >> 10
    line = vm.Spec(name="huge", memory_mb=256, settings=(f"maxmem={total}",)).argv("hospes")
    bench.hospes("create", "-p", *line[3:])
    claims = lambda: int(bench.hospes("info", "outstanding_claims"))  # noqa: E731
    before = claims()
    for command in ("mem-set", "mem-max"):
        bench.refused("the host has", command, "huge", f"{total}m")
    expect(claims() == before, f"{before} MiB were promised and {claims()} are after nothing was given")
    bench.hospes("mem-set", "huge", "512")
    expect(claims() == before + 256, f"{before} MiB were promised and {claims()} are after 256 more")
    expect(int(bench.row("huge").split()[2]) == 512, f"`list` shows {bench.row('huge')}")
    bench.hospes("destroy", "huge")


def guests_without_a_balloon_keep_to_their_memory(bench):
    """One that does not give back what its memory map has too much goes on until it touches more than it may have."""
    shell = bench.boot("stubborn", memory_mb=256, settings=("maxmem=1024", 'extra="console=hvc0 quiet initcall_blacklist=balloon_init"'))
    expect(total_mib(shell) > 800, "the guest has a balloon driver")
    expect(int(bench.row("stubborn").split()[2]) == 256, f"`list` shows {bench.row('stubborn')}")
    bench.hospes("mem-set", "stubborn", "512")
    shell.run("mkdir /big && mount -t tmpfs -o size=1g big /big && dd if=/dev/zero of=/big/file bs=1M count=300")
    bench.hospes("mem-set", "stubborn", "400")
    shell.run("ls /big")
    shell.send("dd if=/dev/zero of=/big/file bs=1M count=800\n")
    shell.wait(ANSWER_S)
    log = pathlib.Path(bench.run.environment()["HOSPES_LOG_DIR"], "stubborn.log").read_text()
    expect("it has touched more than the 512 MiB of memory" in log, f"the guest was not ended for that: {log}")


def keys_and_triggers_arrive(bench):
    shell = bench.boot("keys")
    bench.hospes("sysrq", "keys", "h")
    shell.until("dmesg | grep -q 'sysrq: HELP'")
    bench.hospes("trigger", "keys", "nmi")
    shell.until("dmesg | grep -q 'NMI received'")
    bench.refused("there is no vCPU 7", "trigger", "keys", "nmi", "7")
    bench.refused("no ACPI buttons", "trigger", "keys", "power")
    bench.hospes("sysrq", "keys", "b")
    shell.wait_for("HOSPES-GUEST ready", BOOT_S)
    bench.hospes("destroy", "keys")
    shell.wait(ANSWER_S)


def saved_guests_go_on(bench):
    """Programs, memory, disks and network interfaces go on where they were, with the virtual CPUs that were online."""
    file = bench.path("saved")
    disk = vm.Disk(blank(bench.path("disk.img"), 8, b"before"))
    guest = bench.boot("saved", vcpus=4, disks=(disk,), vifs=("mac=00:16:3e:00:00:07",))
    guest.run("echo 0 >/sys/devices/system/cpu/cpu2/online")
    guest.run("(i=0; while :; do i=$((i+1)); echo $i >/dev/shm/count; sleep 0.02; done) >/dev/null 2>&1 & mkdir -p /dev/shm")
    guest.run("dd if=/dev/urandom of=/dev/shm/random bs=1M count=40 2>/dev/null; sha256sum /dev/shm/random >/dev/shm/sum")
    count = "cat /dev/shm/count"

    def value(pattern, command):
        """What a command prints on a line of its own, without what the terminal shows besides."""
        return re.findall(rf"(?m)^{pattern}", guest.run(command))[-1]

    for way in (("save", "-c"), ("save",), ("save",)):
        counted = value(r"(\d+)$", count)
        before = float(value(r"(\d+\.\d+) ", "cat /proc/uptime"))
        bench.hospes(*way, "saved", file)
        if "-c" not in way:
            expect(bench.row("saved") is None, "a domain that was saved runs on")
            time.sleep(2)
            bench.hospes("restore", file)
            guest = Shell.again(bench, "saved")
        guest.until(f"test $({count}) -gt {counted}")
        guest.run("sha256sum -c /dev/shm/sum")
        expect(value(r"(\S+)$", "cat /sys/devices/system/cpu/online") == "0-1,3", "other CPUs are online than before")
        expect("00:16:3e:00:00:07" in guest.run("cat /sys/class/net/eth0/address"), "the interface has another address")
        expect("before" in guest.run("dd if=/dev/xvda bs=6 count=1 iflag=direct 2>/dev/null"), "the disk cannot be read")
        guest.run("echo -n after | dd of=/dev/xvda bs=512 seek=1 conv=notrunc 2>/dev/null; sync")
        passed = float(value(r"(\d+\.\d+) ", "cat /proc/uptime")) - before
        expect(0 <= passed < ANSWER_S, f"{passed} s have passed for the guest")
    # What was not to be used is there.
    guest.run("echo 1 >/sys/devices/system/cpu/cpu2/online")
    guest.expect_calm()
    bench.hospes("block-detach", "saved", "xvda")
    guest.send("poweroff -f\n")
    wait_until(lambda: bench.row("saved") is None, "a restored guest does not power off")
    with open(disk.path, "rb") as handle:
        expect(handle.read(517)[512:] == b"after", "what a restored guest wrote is not on its disk")


def guests_that_cannot_be_saved_go_on(bench):
    """A file that cannot be written, a command that is killed, a guest that is paused."""
    guest = bench.boot("kept", disks=(vm.Disk(blank(bench.path("disk.img"), 8)),))
    guest.run("dd if=/dev/urandom of=/dev/random-bytes bs=1M count=30 2>/dev/null")
    small = bench.path("small")
    os.mkdir(small)
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small], check=True)
        bench.stack.callback(subprocess.run, ["umount", "-l", small], check=False)
        bench.refused("No space left", "save", "kept", f"{small}/file")
        expect(not os.listdir(small), "half a file is left")
        guest.run("sync")
    # Into a pipe that nobody reads any more.
    fifo = bench.path("fifo")
    os.mkfifo(fifo)
    saving = subprocess.Popen(
        bench.command(vm.hospes_binary(), "save", "kept", fifo), env=bench.run.environment(), stderr=subprocess.DEVNULL,
    )
    with open(fifo, "rb") as reader:
        reader.read(1 << 20)
        saving.kill()
        saving.wait()
    guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; sleep 0.2")
    bench.hospes("pause", "kept")
    bench.refused("it is paused", "save", "kept", bench.path("file"))
    bench.hospes("unpause", "kept")
    bench.hospes("save", "-p", "kept", bench.path("file"))
    expect("p" in bench.row("kept").split()[4], "it is not paused")
    bench.hospes("unpause", "kept")
    guest.off()


def domains_outlive_the_host(bench):
    """What `domains stop --save` has saved goes on behind `domains start --restore`, and nothing is started beside it."""
    auto, save = bench.path("auto"), bench.path("save")
    os.mkdir(auto)
    disk = vm.Disk(blank(bench.path("disk.img"), 8, b"before"))
    guest = bench.boot("kept", disks=(disk,))
    guest.run("mkdir -p /dev/shm; echo of-the-first-boot >/dev/shm/mark")
    # One that is started anew would be there as well.
    for name in ("kept", "other"):
        line = vm.Spec(name=name, memory_mb=128, ramdisk="initramfs-devices.cpio", command_line="quiet").argv("hospes")
        pathlib.Path(auto, name).write_text("\n".join(line[4:]) + "\n")
    start = ("domains", "start", "--dir", auto, "--restore", save)
    stop = ("domains", "stop", "--timeout", "30", "--save", save)

    def goes_on():
        guest = Shell.again(bench, "kept")
        guest.run("grep -q of-the-first-boot /dev/shm/mark && dd if=/dev/xvda bs=6 count=1 iflag=direct 2>/dev/null | grep -q before")

    bench.hospes(*stop)
    expect(os.listdir(save) == ["kept"] and bench.row("kept") is None, f"{os.listdir(save)} is saved, `list` shows {bench.row('kept')}")
    bench.hospes(*start)
    expect(os.listdir(save) == [] and bench.row("other") is not None, f"{os.listdir(save)} is left, `list` shows {bench.row('other')}")
    goes_on()
    # A paused guest cannot suspend itself; it is shut down.
    bench.hospes("pause", "other")
    bench.refused("it is paused", *stop)
    expect(os.listdir(save) == ["kept"] and bench.row("other") is None, f"{os.listdir(save)} is saved, `list` shows {bench.row('other')}")
    # Without its disk it cannot be restored.
    os.rename(disk.path, bench.path("away.img"))
    bench.refused("domain kept is not started", *start)
    expect(os.listdir(save) == ["kept"] and bench.row("kept") is None, f"{os.listdir(save)} is left, `list` shows {bench.row('kept')}")
    expect(bench.row("other") is not None, "the other domain is not started")
    os.rename(bench.path("away.img"), disk.path)
    bench.hospes(*start)
    expect(os.listdir(save) == [], f"{os.listdir(save)} is left")
    goes_on()
    bench.hospes("domains", "stop", "--timeout", "30")


def crashed_domains_are_kept_beside_their_successors(bench):
    disk = blank(bench.path("disk.img"), 16)
    settings = ('on_crash="rename-restart"', f'disk=["{disk},raw,xvda,w"]')
    shell = bench.boot("twin", settings=settings)
    shell.until("[ -b /dev/xvda ]")
    shell.send("echo c >/proc/sysrq-trigger\n")
    wait_until(lambda: (bench.row("twin") or "").split()[1:2] == ["2"], "no new domain has come behind the one that crashed")
    kept = next(line.split() for line in bench.hospes("list").splitlines() if line.startswith("twin-2"))
    expect((kept[1], kept[4]) == ("1", "---sc-"), f"the old domain is listed as {kept}")
    states = {row[0]: row[1] for row in map(str.split, bench.hospes("top", "-b", "-i", "1").splitlines()[1:])}
    expect(states[kept[0][:10]] == "---c--", f"`top` shows {states}")
    wait_until(lambda: bench.states("block-list", "twin") == {"51712": "4"}, "the new domain does not get the disk")
    for name in ("twin", kept[0]):
        bench.hospes("destroy", name)
    wait_until(lambda: bench.hospes("list").count("twin") == 0, "a domain outlives its end")


def notes_of(core):
    """Names and descriptions of a core file's notes, by readelf(1)."""
    text = subprocess.run(["readelf", "--wide", "--notes", core], check=True, capture_output=True, text=True).stdout
    return [(line.split()[0], int(line.split()[1], 16)) for line in text.splitlines() if re.match(r"  (CORE|QEMU|VMCOREINFO) ", line)]


def cores_show_what_a_guest_had(bench):
    """A core file has the guest's memory and registers, of one that runs as of one that has crashed."""
    guest = bench.boot("studied", vcpus=2, settings=('on_crash="coredump-restart"',))
    # In memory it stands once in one piece: the shell's words have the two parts.
    guest.run("mark=found-in; mkdir -p /dev/shm; echo $mark-the-core >/dev/shm/mark")
    release = guest.run("uname -r").split()[-1]
    core = bench.path("core")
    bench.hospes("dump-core", "studied", core)
    guest.run("true")

    def check(path):
        sizes = dict(notes_of(path))
        expect([name for name, _ in notes_of(path)].count("CORE") == 2, f"it has the notes {notes_of(path)}")
        expect((sizes["CORE"], sizes["QEMU"]) == (336, 440) and sizes["VMCOREINFO"] > 1000, f"the notes are {notes_of(path)}")
        content = pathlib.Path(path).read_bytes()
        expect(b"found-in-the-core\n" in content, "what the guest has in memory is not in it")
        expect(f"OSRELEASE={release}\n".encode() in content[:65536], f"it does not say that it is of {release}")
        expect(len(content) >= 256 << 20 and os.stat(path).st_blocks * 512 < 128 << 20, f"it takes {os.stat(path).st_blocks * 512} of {len(content)} bytes")

    check(core)
    os.unlink(core)
    guest.send("echo c >/proc/sysrq-trigger\n")
    wait_until(lambda: (bench.row("studied") or "").split()[1:2] == ["2"], "no new domain has come behind the one that crashed")
    crashed = os.path.join(bench.run.environment()["HOSPES_DUMP_DIR"], "studied")
    check(crashed)
    # It says why itself, in the ring of messages that its memory holds.
    expect(b"sysrq: Trigger a crash" in pathlib.Path(crashed).read_bytes(), "the last message of the kernel is not in the core")
    bench.hospes("destroy", "studied")


def processes_asked_to_end_shut_their_guests_down(bench):
    shell = bench.boot("asked", settings=('on_poweroff="restart"',))
    domid = bench.hospes("domid", "asked").strip()
    directory = pathlib.Path(bench.run.environment()["HOSPES_RUN_DIR"]) / "domains" / domid
    shell.send("while :; do :; done &\n")
    wait_until(bench.run.address_spaces, "the guest's program has no process")
    # As systemd ends a session: all processes at the same time, but for the command that tells us of the end.
    every = [
        pid for pid in bench.run.processes()
        if {b"__domain", b"__machine", b"__store"} & set(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    ]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        for pid in bench.run.address_spaces() + every:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    shell.wait(ANSWER_S)
    wait_until(lambda: not directory.exists(), "the domain process left its directory")
    log = pathlib.Path(bench.run.environment()["HOSPES_LOG_DIR"], "asked.log").read_text()
    expect(f"Domain {domid} has shut down, reason code 0" in log, f"the guest was not asked: {log}")
    expect(bench.row("asked") is None, "the domain has come back")


def domains_are_seen_from_outside(bench):
    shell = bench.boot("seen", vcpus=2)
    shell.run("(i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done)")
    tables = bench.hospes("top", "-b", "-i", "2", "-d", "1")
    rows = [line.split() for line in tables.splitlines() if line.split()[:1] == ["seen"]]
    expect(len(rows) == 2, f"two tables of `top` show the domain {len(rows)} times:\n{tables}")
    expect(float(rows[-1][2]) > 0, f"`top` shows a domain that worked without time: {rows[-1]}")
    match = re.search(r"^seen +(\d+) +0:00:(\d\d)$", bench.hospes("uptime", "seen"), re.M)
    expect(match, f"`uptime` does not show the domain: {bench.hospes('uptime')}")
    expect("seen" in bench.hospes("vm-list"), "`vm-list` does not show the domain")
    vcpus = [line.split()[2] for line in bench.hospes("vcpu-list", "seen").splitlines()[1:]]
    expect(vcpus == ["0", "1"], f"`vcpu-list` shows the vCPUs {vcpus}")
    bench.hospes("debug-keys", "q")
    expect("memory_kib" in bench.hospes("dmesg"), "`debug-keys q` writes nothing into the log")
    shell.off()


# Where Xen's tools look is only seen with the run-time directory of the system: this one has a /run of its own.
PUBLIC = """
set -e
mount -t tmpfs tmpfs /run
unset HOSPES_RUN_DIR XENSTORED_PATH XENSTORED_RUNDIR
"$1" block-list 0 >/dev/null
xenstore-write /tool/public hello
xenstore-chmod /tool/public n0 r3
xenstore-exists /tool/public
xenstore-read /tool/public
xenstore-list /tool
xenstore-ls -fp /tool
(sleep 1; xenstore-rm /tool/public) &
xenstore-watch -n 2 /tool/public
rm -r /run/hospes
"""


def tools_find_the_store(bench):
    if os.geteuid() != 0:
        print("note tools_find_the_store: other users tell the tools where their store is")
        return
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", PUBLIC, "public", vm.hospes_binary()], env=bench.run.environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=ANSWER_S, check=False,
    )
    expect(done.returncode == 0, f"Xen's tools fail: {done.stdout}{done.stderr}")
    lines = done.stdout.splitlines()
    expect(lines[0] == "hello" and "public" in lines[1:4], f"the tools print {lines}")
    expect(any(re.match(r'/tool/public = "hello" +\(n0,r3\)', line) for line in lines), f"xenstore-ls -fp prints {lines}")
    expect(lines[-2:] == ["/tool/public"] * 2, f"xenstore-watch prints {lines[-2:]}")


TESTS = (
    disks_come_and_go, disks_change_their_size, disks_that_the_host_cuts_fail, disks_in_use_are_taken_by_force, media_are_changed, interfaces_come_and_go,
    writes_wait_for_a_full_host, full_directories_of_state_are_named, disks_of_paused_guests_stay, images_on_loop_devices_are_in_use, names_and_shares_change, configuration_is_that_of_the_next_start, processors_are_taken_and_given,
    memory_is_given_and_taken, memory_that_the_host_has_not_is_refused, guests_without_a_balloon_keep_to_their_memory,
    saved_guests_go_on, guests_that_cannot_be_saved_go_on, domains_outlive_the_host, keys_and_triggers_arrive, crashed_domains_are_kept_beside_their_successors, cores_show_what_a_guest_had, processes_asked_to_end_shut_their_guests_down,
    domains_are_seen_from_outside, tools_find_the_store,
)


def run(test):
    with contextlib.ExitStack() as stack:
        bench = Bench(stack)
        try:
            test(bench)
        except runner.ERRORS as error:
            raise vm.GuestError(f"{error}\n{bench.seen()}") from error


def main(doc, tests):
    wanted = {test.__name__: functools.partial(run, test) for test in tests}
    chosen = runner.select(runner.parser(doc).parse_args(), wanted)
    return runner.conclude([runner.passes(name, wanted[name]) for name in chosen])


if __name__ == "__main__":
    sys.exit(main(__doc__, TESTS))
