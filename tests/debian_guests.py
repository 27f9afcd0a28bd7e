#!/usr/bin/env python3
"""Full Debian guests with disks and networks in Hospes.

    tests/debian_guests.py [--list] [--jobs N] [WORD...]

Only tests whose name contains one of the WORDs run, all without any; N (2) of them at a time, each in a process of its own, but for those that need
the machine for themselves, which come last. As root every test has a network namespace of its own, so
this machine's network is not touched; otherwise guests have user-mode networks, and tests that need more are left out with a
note. The last line is "N passed, N failed"; the exit status is 0 when nothing failed.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import debian  # noqa: E402
import dmesg  # noqa: E402
import runner  # noqa: E402
import vm  # noqa: E402
from place import Place  # noqa: E402
from runner import Failure, expect  # noqa: E402

MANY = 10
MANY_MEMORY_MB = 256
IDLE_S = 20
# As long may guests take that have just been busy.
SETTLE_S = 180
IDLE_SHARE_MAX = 0.05
END_S = 120
FIO = "fio --name=v --ioengine=libaio --direct=1 --verify_fatal=1 --verify_state_save=0 --output-format=terse"


class Bench(Place):
    """What every test gets: a place, and the commands of the monitor in it."""

    def __init__(self, stack):
        super().__init__(stack, "test")

    def here(self, *argv, check=True, timeout=60):
        """Runs a command on the guests' network, as this machine."""
        done = subprocess.run(
            self.command(*argv), env=self.run.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=timeout, check=False,
        )
        expect(done.returncode == 0 or not check, f"`{' '.join(argv)}` failed: {done.stderr.strip()} {done.stdout.strip()[-500:]}")
        return done.stdout

    def reaches(self, address):
        """Waits until a guest answers on the network."""
        self.here("sh", "-c", "for i in $(seq 50); do ping -c 1 -W 1 $0 >/dev/null 2>&1 && exit; sleep 0.1; done; exit 1", address)

    def hospes(self, *arguments, check=True):
        return self.here(vm.hospes_binary(), *arguments, check=check)

    def system(self, name="system"):
        """A fresh disk with Debian."""
        return vm.Disk(debian.overlay(self.path(f"{name}.qcow2")), format="qcow2")

    def start(self, disks, **more):
        more.setdefault("vifs", ("",))
        spec = debian.spec(disks, **more)
        return self.stack.enter_context(vm.Guest(self.command(*spec.argv("hospes")), self.run.environment()))

    def boot(self, disks, **more):
        return debian.Shell(self.start(disks, **more))

    def process(self, subcommand, name=None):
        """The id of a process of this run, by its hidden subcommand and, for domains, the domain's name."""
        for pid in self.run.processes():
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if subcommand.encode() in words and (name is None or name.encode() in words):
                return pid
        raise Failure(f"there is no process {subcommand}")

    def block_device(self, path, sector):
        """A block device of this machine with sectors of so many bytes, on a file; None where none can be made."""
        command = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", str(sector), path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None
        device = done.stdout.strip()
        self.stack.callback(subprocess.run, ["losetup", "--detach", device], check=False)
        return device

    def server(self, directory, gateway):
        """A web server for guests; it has to be a process in their namespace."""
        script = f"import http.server,sys; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000, bind={gateway!r})"
        process = subprocess.Popen(
            self.command(sys.executable, "-c", script), cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return f"http://{gateway}:8000"


def blank(path, megabytes, fmt="raw", content=b""):
    """An empty image that begins with `content`."""
    if fmt == "raw":
        with open(path, "wb") as handle:
            handle.write(content)
            handle.truncate(megabytes << 20)
    else:
        subprocess.run(["qemu-img", "create", "-q", "-f", fmt, path, f"{megabytes}M"], check=True)
    return path


# ---- one guest ------------------------------------------------------------------------------------------------------


def reaches_multi_user(bench):
    shell = bench.boot([bench.system()], name="whole")
    state = shell.status("systemctl is-system-running --wait")[1].strip()
    failed = shell.run("systemctl list-units --state=failed --no-legend --plain")
    expect(state == "running" and not failed, f"systemd is {state!r}; failed units:\n{failed}")
    schedulers = shell.run("cat /sys/block/xvd*/queue/scheduler")
    expect("[none]" in schedulers, f"the disk has an I/O scheduler: {schedulers}")
    shell.address()
    said = dmesg.complaints(shell.run("dmesg -r"))
    expect(not said, "the kernel says what it must not say:\n" + "\n".join(said))
    expect(shell.power_off() == 0, f"the guest does not power off\n{shell.guest.tail()}")


def installs_a_package(bench):
    repository = debian.IMAGES / "repository"
    shell = bench.boot([bench.system()], name="apt")
    _, gateway = shell.address()
    url = bench.server(repository, gateway)
    shell.run(f"rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] {url}/ ./' >/etc/apt/sources.list")
    shell.run("apt-get -q update && apt-get -q -y install hello", 300)
    expect("Hello" in shell.run("hello"), "the installed package does not greet")
    # A shutdown asked for from outside, with the network up.
    bench.hospes("shutdown", "apt")
    expect(shell.guest.wait(END_S) == 0, f"the guest does not follow `shutdown`\n{shell.guest.tail()}")


def verifies_what_it_wrote(bench):
    """fio reads back what it wrote, in requests of every size, on every kind of disk."""
    disks = [
        bench.system(),
        vm.Disk(blank(bench.path("raw.img"), 128), vdev="xvdb"),
        vm.Disk(blank(bench.path("cow.qcow2"), 128, "qcow2"), format="qcow2", vdev="xvdc"),
    ]
    device = bench.block_device(blank(bench.path("device.img"), 128), 4096)
    if device:
        disks.append(vm.Disk(device, vdev="xvdd"))
    else:
        print("note verifies_what_it_wrote: no loop device can be made: left out a disk with sectors of 4096 bytes")
    # More than one queue.
    shell = bench.boot(disks, name="verify", vifs=(), vcpus=2)
    for disk, sector in zip(disks[1:], (512, 512, 4096)):
        verify_disk(shell, disk.vdev, sector)
    said = dmesg.complaints(shell.run("dmesg -r"))
    expect(not said, "the kernel complains of its disks:\n" + "\n".join(said))
    expect(shell.power_off() == 0, f"the guest does not power off\n{shell.guest.tail()}")
    check = subprocess.run(["qemu-img", "check", bench.path("cow.qcow2")], capture_output=True, text=True, check=False)
    expect(check.returncode == 0, f"qemu-img check finds fault with the image that the guest wrote: {check.stdout}{check.stderr}")


def goes_on_from_files(bench):
    """A server at work on its disk and its network is saved and restored several times."""
    file = bench.path("saved")

    def move(_):
        bench.hospes("save", "moved", file)
        bench.hospes("restore", file)

    goes_on_after(bench, move)


def goes_on_elsewhere(bench):
    """The same server is migrated several times, and comes back from the first of two attempts each time."""
    receive = f"{vm.hospes_binary()} migrate-receive"

    def migrate(command):
        return bench.here(vm.hospes_binary(), "migrate", "-s", "", "moved", command, check=False)

    def move(address):
        # The other side has the disks and the network when its answer is lost.
        migrate(f"{receive} | (sed -u /ready/Q; kill -9 $$)")
        expect("moved " in bench.hospes("list"), "it does not go on after a migration that failed")
        bench.reaches(address)
        before = bench.hospes("domid", "moved")
        migrate(receive)
        expect(bench.hospes("domid", "moved") != before, "it has not been migrated")

    goes_on_after(bench, move)


def goes_on_after(bench, move):
    shell = bench.boot([bench.system(), vm.Disk(blank(bench.path("raw.img"), 256), vdev="xvdb")], name="moved", vcpus=2)
    address, _ = shell.address()
    verify = f"{FIO} --filename=/dev/xvdb --verify=crc32c --rw=randrw --bs=4k --iodepth=32 --size=128M --loops=1000 --time_based --runtime=40"
    shell.run(f"systemd-run --quiet --unit=verify {verify}")
    for count in range(3):
        time.sleep(2)
        expect(shell.run("systemctl is-active verify").strip() == "active", "fio is over too soon")
        move(address)
        shell = shell.again(bench.stack.enter_context(
            vm.Guest(bench.command(vm.hospes_binary(), "console", "moved"), bench.run.environment())
        ), 1000 * (count + 1))
        bench.reaches(address)
    state = shell.run("for i in $(seq 100); do systemctl is-active -q verify || break; sleep 0.5; done; systemctl show -P Result verify", 120)
    expect(state.strip() == "success", f"fio finds faults afterwards: {shell.run('journalctl --no-pager -u verify | tail -n 20')}")
    said = dmesg.complaints(shell.run("dmesg -r"))
    failed = shell.run("systemctl list-units --state=failed --no-legend --plain")
    expect(not said and not failed, "afterwards the kernel says what it must not say, or units fail:\n" + "\n".join([*said, failed]))
    shell.send("systemctl poweroff")
    deadline = time.monotonic() + END_S
    while "moved" in bench.hospes("list"):
        expect(time.monotonic() < deadline, "a restored guest does not power off")
        time.sleep(0.2)


def verify_disk(shell, device, sector):
    limits = shell.run(f"cd /sys/block/{device}; cat queue/logical_block_size queue/max_segments queue/max_sectors_kb; ls mq | wc -l").split()
    # 256 segments is what the image's initial root file system asks for; Debian's front end would use 32, and 11 without indirect descriptors.
    expect(limits == [str(sector), "256", "1024", "2"], f"{device}: sector, segments, kB in a request and queues are {limits}")
    whole = f"{FIO} --filename=/dev/{device} --verify=crc32c"
    shell.run(f"{whole} --rw=randrw --bs=4k --iodepth=16 --size=32M --rwmixread=30", 300)
    shell.run(f"{whole} --rw=write --bs=1M --iodepth=4 --size=128M", 300)
    shell.run(f"{whole} --rw=randwrite --bs={sector} --iodepth=8 --size={sector * 4096}", 300)
    shell.run(f"{whole} --rw=write --bsrange={sector}-64k --iodepth=8 --size=32M", 300)
    # Blocks that are given back before they are written.
    shell.run(f"{whole} --rw=randtrimwrite --bs=64k --iodepth=4 --size=32M", 300)
    # What is discarded reads as zeros, what lies beside it is untouched.
    shell.run(f"yes a | head -c 33554432 >/dev/{device}; sync; blkdiscard -o 4194304 -l 8388608 /dev/{device}; sync")
    zeros = shell.run(f"dd if=/dev/{device} bs=4M skip=1 count=2 iflag=direct status=none | tr -d '\\000' | wc -c")
    expect(zeros.strip() == "0", f"/dev/{device}: {zeros.strip()} bytes of a discarded range are not zero")
    beside = shell.run(f"dd if=/dev/{device} bs=4M skip=3 count=5 iflag=direct status=none | sha256sum")
    expected = hashlib.sha256((b"a\n" * (5 << 21))).hexdigest()
    expect(expected in beside, f"/dev/{device}: a discard changed what lies beside it")


def has_several_disks(bench):
    disks = [
        bench.system(),
        vm.Disk(blank(bench.path("ro.img"), 16, content=b"read only\n"), vdev="xvdb", read_only=True),
        vm.Disk(blank(bench.path("cd.iso"), 8, content=b"a cdrom\n"), vdev="xvdc", read_only=True, cdrom=True),
        vm.Disk(blank(bench.path("cow.qcow2"), 64, "qcow2"), format="qcow2", vdev="xvdd"),
    ]
    shell = bench.boot(disks, name="several", vifs=())
    sizes = dict(re.findall(r"(xvd\w) (\d+)", shell.run("for d in /sys/block/xvd*; do echo ${d##*/} $(cat $d/size); done")))
    for device, megabytes in (("xvdb", 16), ("xvdc", 8), ("xvdd", 64)):
        expect(sizes.get(device) == str(megabytes * 2048), f"{device} has {sizes.get(device)} sectors instead of {megabytes} MiB")
    expect("read only" in shell.run("head -n 1 /dev/xvdb"), "xvdb holds something else than its image")
    expect("a cdrom" in shell.run("head -n 1 /dev/xvdc"), "xvdc holds something else than its image")
    flags = shell.run("cat /sys/block/xvdb/ro /sys/block/xvdc/ro /sys/block/xvdd/ro").split()
    expect(flags == ["1", "1", "0"], f"read-only flags of xvdb, xvdc and xvdd are {flags}")
    expect(shell.status("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct status=none")[0] != 0, "a read-only disk was written")
    shell.run("mke2fs -q /dev/xvdd && mount /dev/xvdd /mnt && cp /bin/bash /mnt && umount /mnt && e2fsck -fn /dev/xvdd")
    expect(shell.power_off() == 0, f"the guest does not power off\n{shell.guest.tail()}")


def takes_and_gives_devices(bench):
    shell = bench.boot([bench.system()], name="plug")
    wait = "for i in $(seq 100); do [ {} -e {} ] && exit 0; sleep 0.1; done; exit 1"
    megabytes = 32
    extra = blank(bench.path("extra.img"), megabytes)
    for _ in range(2):
        bench.hospes("block-attach", "plug", f"format=raw,vdev=xvdf,access=rw,target={extra}")
        shell.run(f"( {wait.format('', '/dev/xvdf')} )")
        expect("xvdf" in bench.hospes("block-list", "plug") or "51792" in bench.hospes("block-list", "plug"), "block-list has no xvdf")
        shell.run("dd if=/dev/urandom of=/dev/xvdf bs=1M count=8 oflag=direct status=none")
        megabytes *= 2
        bench.hospes("block-resize", "plug", "xvdf", f"{megabytes}M")
        shell.run(f"( for i in $(seq 100); do [ $(cat /sys/block/xvdf/size) = {megabytes * 2048} ] && exit 0; sleep 0.1; done; exit 1 )")
        bench.hospes("block-detach", "plug", "xvdf")
        shell.run(f"( {wait.format('!', '/dev/xvdf')} )")
    bench.hospes("network-attach", "plug", "mac=00:16:3e:11:22:33")
    shell.run("( for i in $(seq 100); do grep -q 00:16:3e:11:22:33 /sys/class/net/*/address && exit 0; sleep 0.1; done; exit 1 )")
    expect("00:16:3e:11:22:33" in bench.hospes("network-list", "plug"), "network-list does not show the new interface")
    bench.hospes("network-detach", "plug", "00:16:3e:11:22:33")
    shell.run("( for i in $(seq 100); do grep -q 00:16:3e:11:22:33 /sys/class/net/*/address || exit 0; sleep 0.1; done; exit 1 )")
    said = dmesg.complaints(shell.run("dmesg -r"))
    expect(not said, "the kernel complains:\n" + "\n".join(said))
    expect(shell.power_off() == 0, f"the guest does not power off\n{shell.guest.tail()}")


# ---- killed in the middle --------------------------------------------------------------------------------------------

# Numbers that are on the disk, with fsync, before they are printed.
WRITER = (
    "import os\nf = os.open('/var/numbers', os.O_CREAT | os.O_WRONLY | os.O_APPEND)\nn = 0\nwhile True:\n"
    "    os.write(f, b'%d\\n' % n)\n    os.fsync(f)\n    print('durable %d' % n, flush=True)\n    n += 1\n"
)


def keeps_what_was_durable(bench):
    """A process of the domain is killed while the guest writes: what fsync promised is there after the next boot."""
    for subcommand in ("__domain", "__machine"):
        is_durable(bench, bench.system(subcommand), subcommand)


def is_durable(bench, disk, subcommand):
    shell = bench.boot([disk], name="cut", vifs=())
    shell.run(f"cat >/root/writer.py <<'END'\n{WRITER}END\nsync")
    shell.guest.send("fio --name=noise --rw=randwrite --bs=4k --size=64M --directory=/var/tmp --time_based --runtime=600 >/dev/null 2>&1 &\n")
    shell.guest.send("python3 /root/writer.py\n")
    shell.guest.wait_for("durable 200\n", END_S)
    os.kill(bench.process(subcommand), signal.SIGKILL)
    status = shell.guest.wait(END_S)
    expect((status == 0) == (subcommand == "__machine"), f"{subcommand} was killed and `create -c` ends with {status}")
    promised = max(int(number) for number in re.findall(r"durable (\d+)\n", shell.guest.console))
    shell = bench.boot([disk], name="cut", vifs=())
    found = [int(line) for line in shell.run("cat /var/numbers").splitlines() if line.isdigit()]
    expect(found[: promised + 1] == list(range(promised + 1)), f"{promised} was durable, after the cut there is {found[-1:]}")
    shell.run("fio --name=v --rw=randwrite --bs=4k --size=8M --directory=/var/tmp --verify=crc32c >/dev/null && grep -q '^/dev/xvda / ext4 rw' /proc/mounts")
    expect(shell.power_off() == 0, f"the guest does not power off\n{shell.guest.tail()}")


def survives_the_store(bench):
    """The store is killed while the guest uses its disk and network: neither notices, and commands work on."""
    shell = bench.boot([bench.system()], name="storeless")
    own, _ = shell.address()
    shell.send(f"{FIO} --directory=/var/tmp --rw=randrw --bs=4k --iodepth=8 --size=32M --verify=crc32c --time_based --runtime=6 >/dev/null")
    for _ in range(3):
        time.sleep(1)
        os.kill(bench.process("__store"), signal.SIGKILL)
        if bench.space:
            bench.here("ping", "-q", "-c", "3", "-i", "0.2", own)
        expect("storeless" in bench.hospes("list"), "`list` does not show the domain after the store was killed")
    status, output = shell.result(END_S)
    expect(status == 0, f"the guest's disk failed while the store was killed:\n{output}")
    said = dmesg.complaints(shell.run("dmesg -r"))
    expect(not said, "the kernel complains:\n" + "\n".join(said))
    bench.hospes("shutdown", "storeless")
    expect(shell.guest.wait(END_S) == 0, f"the guest does not follow `shutdown` after the store was killed\n{shell.guest.tail()}")


# ---- ten at once ------------------------------------------------------------------------------------------------------


def cpu_seconds(pids):
    """The processor time that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def fetch(bench, address, text):
    script = f"import urllib.request; print(urllib.request.urlopen('http://{address}/who', timeout=20).read().decode())"
    expect(text in bench.here(sys.executable, "-c", script), f"http://{address}/who is not {text}")


def many_live_together(bench):
    if not bench.space:
        print("note many_live_together: guests of a user-mode network do not reach each other: left out without root")
        return
    names = [f"many{number}" for number in range(MANY)]
    guests = [bench.start([bench.system(name)], name=name, memory_mb=MANY_MEMORY_MB) for name in names]
    shells = [debian.Shell(guest, 900) for guest in guests]
    addresses = [shell.address()[0] for shell in shells]
    expect(len(set(addresses)) == MANY, f"{MANY} guests have the addresses {addresses}")
    for name, shell in zip(names, shells):
        shell.run(f"echo {name} >/var/www/html/who; systemctl start nginx")
    for name, address in zip(names, addresses):
        bench.here("ping", "-q", "-c", "2", "-i", "0.2", address)
        fetch(bench, address, name)
    every = " ".join(addresses)
    for shell in shells:
        shell.send(f"for a in {every}; do ping -q -c 1 -W 20 $a >/dev/null && wget -q -T 20 -O - http://$a/who; done")
    for shell in shells:
        seen = shell.result(300)[1].split()
        expect(seen == names, f"a guest among {MANY} sees {seen}")
    # What a boot leaves to be done, and what the visits did, takes a while.
    pids, deadline, share = bench.run.processes(), time.monotonic() + SETTLE_S, 1.0
    while share >= IDLE_SHARE_MAX and time.monotonic() < deadline:
        before, began = cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_S)
        share = (cpu_seconds(pids) - before) / (time.monotonic() - began)
        print(f"     {MANY} idle guests use {share * 100:.1f} % of one processor")
    expect(share < IDLE_SHARE_MAX, f"{MANY} idle guests use {share * 100:.1f} % of one processor, more than {IDLE_SHARE_MAX * 100:.0f} %")
    bench.hospes("shutdown", "-a")
    for guest in guests:
        expect(guest.wait(300) == 0, f"a guest among {MANY} does not follow `shutdown -a`\n{guest.tail()}")


# The longest first, so that none is left alone at the end.
TESTS = (
    verifies_what_it_wrote, goes_on_from_files, goes_on_elsewhere, keeps_what_was_durable, survives_the_store, takes_and_gives_devices, installs_a_package, reaches_multi_user,
    has_several_disks, many_live_together,
)
# What idle guests use is measured.
ALONE = (many_live_together,)


def run(test):
    with contextlib.ExitStack() as stack:
        test(Bench(stack))


def run_in_process(test):
    """One test in a process of its own, whose output is shown when it has ended."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", test.__name__], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )
    print(done.stdout, end="", flush=True)
    return done.returncode == 0


def main():
    parser = runner.parser(__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = {test.__name__: test for test in TESTS}
    chosen = [wanted[name] for name in runner.select(options, wanted)]
    if options.child:
        named = [test for test in chosen if test.__name__ in options.words]
        return 0 if all([runner.passes(test.__name__, functools.partial(run, test)) for test in named]) else 1
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run_in_process, [test for test in chosen if test not in ALONE]))
    return runner.conclude(results + [run_in_process(test) for test in chosen if test in ALONE])


if __name__ == "__main__":
    sys.exit(main())
