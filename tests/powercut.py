#!/usr/bin/env python3
"""Cuts the power under a guest that writes, again and again, and looks whether everything it had synced is there.

    tests/powercut.py [--cuts N] [--format raw|qcow2|overlay] [--kill] [--seed N]

Each guest mounts the ext4 file system that the one before it left behind, compares every file that had been synced, and writes and
syncs new ones until the power goes, at a write that the seed decides. $HOSPES has to be a monitor with the feature `power-cut`,
whose disks then lose any part of what was not flushed. With --kill the process of the domain is killed instead, at any time.
The last line is "N cuts, N failed"; the exit status is 0 when nothing failed.
"""

import argparse
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import vm  # noqa: E402

DISK_MB = 48
RUN_S = 180


def run(*command):
    """Runs a tool of the host; its output is shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise vm.GuestError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def make_disk(directory, kind):
    """A disk with an empty file system."""
    raw = directory / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-E", "nodiscard", str(raw), f"{DISK_MB}M")
    if kind == "raw":
        return vm.Disk(str(raw))
    disk = directory / "disk.qcow2"
    if kind == "overlay":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(disk))
    else:
        run("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))
    return vm.Disk(str(disk), format="qcow2")


def check_image(disk):
    """The tables of a qcow2 image: clusters that nobody uses are all that a cut may leave behind."""
    if disk.format != "qcow2":
        return
    done = subprocess.run(["qemu-img", "check", disk.path], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise vm.GuestError(f"the image is damaged:\n{done.stdout}{done.stderr}")


def one_life(bench, disk, number, earlier, writes, kill):
    """A guest from its boot to the cut. Returns how many files it had synced."""
    environment = bench.environment()
    if not kill:
        environment["HOSPES_POWER_CUT"] = f"{number}:{writes}"
    spec = vm.Spec(
        ramdisk="initramfs-disk.cpio", command_line=f"quiet hospes.do=records hospes.earlier={earlier}",
        memory_mb=192, name=f"cut{number}", disks=(disk,),
    )
    with vm.Guest(spec.argv("hospes"), environment) as guest:
        if kill:
            # Boot and mount included, now and then.
            wanted = f"records: synced {writes % 120 + 1}\n" if writes % 5 else "HOSPES-GUEST ready"
            guest.wait_for(wanted, RUN_S)
            for pid in bench.processes():
                if b"__domain" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        guest.wait(RUN_S)
        said = guest.console
    wrong = re.findall(r"records: (?:file|the file system).*", said)
    if wrong:
        raise vm.GuestError("after the last cut: " + "; ".join(wrong[:5]) + f"\n{said[-1500:]}")
    check_image(disk)
    synced = [int(found) for found in re.findall(r"^records: synced (\d+)$", said, re.M)]
    checked = re.search(r"^records: (\d+) checked$", said, re.M)
    return (max(synced, default=0) if checked else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50, help="how often the power goes (50)")
    parser.add_argument("--format", choices=("raw", "qcow2", "overlay"), action="append", help="of the disk; all, one after the other, if not given")
    parser.add_argument("--kill", action="store_true", help="kill the domain's process instead")
    parser.add_argument("--seed", type=int, default=1, help="decides where the cuts are (1)")
    chosen = parser.parse_args()
    kinds = chosen.format or ["raw", "qcow2", "overlay"]
    chance = random.Random(chosen.seed)
    failed = cuts = 0
    with vm.RunDirectory() as bench, tempfile.TemporaryDirectory(prefix="hospes-cut-") as directory:
        disks = {kind: None for kind in kinds}
        # The next guest of a disk knows the run whose files are on it, and how many were synced.
        state = {kind: (0, 0) for kind in kinds}
        for number in range(chosen.cuts):
            kind = kinds[number % len(kinds)]
            if disks[kind] is None:
                home = pathlib.Path(directory) / f"{kind}-{number}"
                home.mkdir()
                disks[kind] = make_disk(home, kind)
                state[kind] = (0, 0)
            earlier, count = state[kind]
            # Some cuts meet the repair of the file system itself.
            writes = chance.choice((chance.randint(1, 25), chance.randint(26, 120), chance.randint(121, 500)))
            cuts += 1
            try:
                synced = one_life(bench, disks[kind], number, f"{earlier}:{count}", writes, chosen.kill)
            except vm.GuestError as error:
                failed += 1
                print(f"FAILED  cut {number} of {kind}: {error}", flush=True)
                disks[kind] = None
                continue
            if synced is None:
                print(f"ok      cut {number} of {kind}: before the {count} files of run {earlier} were checked", flush=True)
                continue
            print(f"ok      cut {number} of {kind}: {count} files of run {earlier} were there, {synced} new ones", flush=True)
            state[kind] = (earlier + 1, synced)
    print(f"{cuts} cuts, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
