#!/usr/bin/env python3
"""Cuts the power under guests that write, again and again, and looks whether everything they had synced is there.

    tests/powercut.py [--cuts N] [--format raw|qcow2|overlay]... [--kill] [--seed N] [--jobs N]

Each guest has a disk of each format. It mounts the ext4 file systems that the one before it left behind, compares every file that
had been synced, and writes and syncs new ones until the power goes, at a write that the seed decides. $HOSPES has to be a monitor
with the feature `power-cut`, whose disks then lose any part of what was not flushed. With --kill the process of the domain is killed
instead, at any time. The last line is "N cuts, N failed"; the exit status is 0 when nothing failed.
"""

import argparse
import concurrent.futures
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import vm  # noqa: E402

FORMATS = ("raw", "qcow2", "overlay")
DISK_MB = 48
RUN_S = 180


def run(*command):
    """Runs a tool of the host; its output is shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise vm.GuestError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def make_disk(directory, kind, vdev):
    """A disk with an empty file system."""
    raw = directory / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-E", "nodiscard", str(raw), f"{DISK_MB}M")
    if kind == "raw":
        return vm.Disk(str(raw), vdev=vdev)
    disk = directory / "disk.qcow2"
    if kind == "overlay":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(disk))
    else:
        run("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))
    return vm.Disk(str(disk), format="qcow2", vdev=vdev)


def check_image(disk):
    """The tables of a qcow2 image: clusters that nobody uses are all that a cut may leave behind."""
    if disk.format != "qcow2":
        return
    # Who was killed may have it for a moment longer.
    deadline = time.monotonic() + RUN_S
    while True:
        done = subprocess.run(["qemu-img", "check", disk.path], capture_output=True, text=True, check=False)
        if "Is another process using the image" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if done.returncode not in (0, 3):
        raise vm.GuestError(f"the image is damaged:\n{done.stdout}{done.stderr}")


def one_life(bench, disks, name, seed, earlier, writes, kill):
    """A guest from its boot to the cut. Returns how many files it had synced on each disk, None where it had not come so far."""
    environment = bench.environment()
    if not kill:
        environment["HOSPES_POWER_CUT"] = f"{seed}:{writes}"
    runs = ",".join(f"{run}:{count}" for run, count in earlier)
    spec = vm.Spec(
        ramdisk="initramfs-disk.cpio", command_line=f"quiet hospes.do=records hospes.earlier={runs}",
        memory_mb=192, name=name, disks=tuple(disks),
    )
    with vm.Guest(spec.argv("hospes"), environment) as guest:
        if kill:
            # Boot and mount included, now and then.
            wanted = rf"records: xvd.: synced {writes % 120 + 1}\n" if writes % 5 else "HOSPES-GUEST ready"
            guest.wait_for(wanted, RUN_S)
            for pid in bench.processes():
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                # With the machine process dies the guest alone, with the domain process both.
                if (b"__domain", b"__machine")[writes % 2] in words and name.encode() in words:
                    os.kill(pid, signal.SIGKILL)
        guest.wait(RUN_S)
        said = guest.console
    wrong = re.findall(r"records: xvd.: (?:file|the file system).*", said)
    if wrong:
        raise vm.GuestError("after the last cut: " + "; ".join(wrong[:5]) + f"\n{said[-1500:]}")
    if "HOSPES-GUEST ready" not in said:
        raise vm.GuestError(f"the guest did not come up\n{guest.tail()}")
    for disk in disks:
        check_image(disk)
    return [last_synced(said, disk.vdev) for disk in disks]


def last_synced(said, vdev):
    """The number of the last file that a guest said was synced, None where it had not compared the earlier ones."""
    if not re.search(rf"^records: {vdev}: \d+ checked$", said, re.M):
        return None
    return max((int(found) for found in re.findall(rf"^records: {vdev}: synced (\d+)$", said, re.M)), default=0)


class Chain:
    """Disks that live through one cut after the other."""

    def __init__(self, bench, directory, number, chosen):
        self.bench = bench
        self.directory = directory
        self.number = number
        self.chosen = chosen
        self.chance = random.Random(chosen.seed + number)
        self.cuts = self.failed = 0
        self.disks = None

    def renew(self):
        home = self.directory / f"{self.number}-{self.cuts}"
        self.disks = []
        for kind, letter in zip(self.chosen.format, "abc"):
            (home / kind).mkdir(parents=True)
            self.disks.append(make_disk(home / kind, kind, f"xvd{letter}"))
        # Of each disk, the run whose files are on it and how many were synced.
        self.earlier = [(0, 0)] * len(self.disks)

    def cut(self):
        """One more; disks that had a fault are replaced."""
        if self.disks is None:
            self.renew()
        # Some cuts meet the repair of the file system itself.
        writes = self.chance.choice((self.chance.randint(1, 25), self.chance.randint(26, 120), self.chance.randint(121, 500)))
        name = f"cut{self.number}x{self.cuts}"
        seed = self.chance.getrandbits(32)
        self.cuts += 1
        try:
            synced = one_life(self.bench, self.disks, name, seed, self.earlier, writes, self.chosen.kill)
        except vm.GuestError as error:
            self.failed += 1
            self.disks = None
            print(f"FAILED  {name}: {error}", flush=True)
            return
        words = []
        for index, (kind, new) in enumerate(zip(self.chosen.format, synced)):
            run, count = self.earlier[index]
            words.append(f"{kind} had {count} files, {new} new ones" if new is not None else f"{kind} not looked at")
            # Without a new file nobody knows whether the directory for them is there.
            if new:
                self.earlier[index] = (run + 1, new)
        print(f"ok      {name}: {'; '.join(words)}", flush=True)

    def work(self, left):
        """Cuts for as long as `left`, an iterator that all chains take from, has something."""
        for _ in left:
            self.cut()


class Shared:
    """An iterator that threads may share."""

    def __init__(self, count):
        self.left = count
        self.lock = threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            if self.left == 0:
                raise StopIteration
            self.left -= 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50, help="how often the power goes (50)")
    parser.add_argument("--format", choices=FORMATS, action="append", help="of a disk of each guest; one of each if not given")
    parser.add_argument("--kill", action="store_true", help="kill the domain's process instead")
    parser.add_argument("--seed", type=int, default=1, help="decides where the cuts are (1)")
    parser.add_argument("--jobs", type=int, default=2, help="guests at once (2)")
    chosen = parser.parse_args()
    chosen.format = list(dict.fromkeys(chosen.format or FORMATS))
    with vm.RunDirectory() as bench, tempfile.TemporaryDirectory(prefix="hospes-cut-") as directory:
        chains = [Chain(bench, pathlib.Path(directory), number, chosen) for number in range(chosen.jobs)]
        left = Shared(chosen.cuts)
        with concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
            for done in [pool.submit(chain.work, left) for chain in chains]:
                done.result()
    cuts, failed = sum(chain.cuts for chain in chains), sum(chain.failed for chain in chains)
    print(f"{cuts} cuts, {failed} failed")
    return 1 if failed or cuts < chosen.cuts else 0


if __name__ == "__main__":
    sys.exit(main())
