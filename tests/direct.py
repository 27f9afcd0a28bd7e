"""Boot tests of direct execution: guest user code that runs natively, in processes of its own.

Part of tests/boot.py, which runs them.
"""

import difflib
import functools
import os
import pathlib
import re
import signal
import subprocess
import time

import dmesg
import vm
from runner import expect

BOOT_S = 120
END_S = 60
# Something that computes for ever in user space.
BUSY = "while :; do :; done &"


def settings(direct):
    return (f"engine_direct={direct}",)


def wait_for(condition, sentence):
    """The first true value of `condition`; Failure when none comes."""
    deadline = time.monotonic() + END_S
    while not (value := condition()):
        expect(time.monotonic() < deadline, sentence)
        time.sleep(0.1)
    return value


def shell(bench, **spec):
    return bench.boot(command_line="quiet hospes.do=shell", **spec)


def is_gone(pid):
    """Whether no process has this id, or only what is left of one until somebody asks how it ended."""
    try:
        return "\nState:\tZ" in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# ---- what is in an address-space process ----------------------------------------------------------------------------


# What kernel_ranges reads, as commands of the guest.
SHOW_KERNEL = r"cat /proc/iomem; grep -E ' (__bss_start|__(start_bss_decrypted_unused|end_bss_decrypted))$' /proc/kallsyms"


def kernel_ranges(text):
    """Physical ranges of the guest's kernel: (name, first byte, last byte). What the kernel has given to its page allocator is left out."""
    rows = re.findall(r"([0-9a-f]+)-([0-9a-f]+) : (Kernel (?:code|rodata|data|bss))", text)
    ranges = {name: (int(first, 16), int(last, 16)) for first, last, name in rows}
    symbols = {name: int(address, 16) for address, name in re.findall(r"^([0-9a-f]{16}) \w (__\w+)\r?$", text, re.M)}
    if len(symbols) == 3:
        # Room for data shared with a hypervisor under memory encryption; without that most of it becomes ordinary memory.
        low, high = ranges.pop("Kernel bss")
        freed, end = (symbols[name] - symbols["__bss_start"] + low for name in ("__start_bss_decrypted_unused", "__end_bss_decrypted"))
        ranges |= {"Kernel bss": (low, freed - 1), "Kernel bss behind it": (end, high)}
    return [(name, first, last) for name, (first, last) in ranges.items() if first <= last]


def maps_only_user_memory(maps, guest_inode, kernel):
    """Holds lines of /proc/PID/maps against what may be there; returns the number of mappings of guest memory."""
    guest = 0
    for line in maps:
        span, rights, offset, _device, inode, *name = line.split(maxsplit=5)
        name = name[0] if name else ""
        start, end = (int(word, 16) for word in span.split("-"))
        if name == "[vsyscall]" or name.startswith("/memfd:hospes-direct-area"):
            # The table of calls and the page behind it are written; none of ours is both written and executed.
            expect("w" not in rights or "x" not in rights and end - start == 17 * 4096, f"the process can write {line!r}")
            continue
        expect(name.startswith("/memfd:hospes-guest") and inode == guest_inode, f"the process has something else mapped: {line!r}")
        expect(end <= 0x7FFF_FFFF_F000, f"the process has something mapped above the user's half: {line!r}")
        # Below 3 GiB a place in the memory file is a physical address of the guest.
        first = int(offset, 16)
        last = first + end - start - 1
        for part, low, high in kernel:
            overlaps = first <= high and low <= last
            # The zero page and the pages of the vDSO are the kernel's, and every program may read them.
            allowed = part != "Kernel code" and "w" not in rights
            expect(not overlaps or allowed, f"the process has {part} of the guest's kernel mapped: {line!r}")
        guest += 1
    return guest


def looks_contained(pid, guest_inode, kernel):
    """Whether the process has guest memory, and then nothing that it should not have."""
    process = pathlib.Path(f"/proc/{pid}")
    maps = (process / "maps").read_text().splitlines()
    if not any("/memfd:hospes-guest" in line for line in maps):
        # It is being made, and still has the program that makes it empty.
        return False
    guest = maps_only_user_memory(maps, guest_inode, kernel)
    files = {os.readlink(entry).split(" ")[0] for entry in (process / "fd").iterdir()}
    expect(files == {"/memfd:hospes-direct-area", "/memfd:hospes-guest"}, f"the process holds other files: {sorted(files)}")
    status = (process / "status").read_text()
    for wanted in ("Seccomp:\t2", "NoNewPrivs:\t1", "Threads:\t1"):
        expect(wanted in status, f"the process's status has no {wanted!r}")
    expect((process / "environ").read_bytes() == b"", "the process has an environment")
    return guest > 0


def is_contained(bench):
    """From outside, while a program computes natively."""
    with shell(bench, name="contained", settings=settings(1)) as guest:
        guest.wait_for("guest# ", BOOT_S)
        guest.send(f"{SHOW_KERNEL}; {BUSY}\necho looked-$((6 * 7))\n")
        guest.wait_for("looked-42", END_S)
        kernel = kernel_ranges(guest.console)
        parts = {name for name, _, _ in kernel}
        expect({"Kernel code", "Kernel bss"} <= parts, f"the guest's /proc/iomem does not tell where its kernel is: {guest.tail()}")
        pids = wait_for(bench.run.address_spaces, "a program that computes gets no process of its own")
        domain = int(re.search(r"\nPPid:\s+(\d+)", pathlib.Path(f"/proc/{pids[0]}/status").read_text()).group(1))
        memory = [
            os.stat(entry).st_ino for entry in pathlib.Path(f"/proc/{domain}/fd").iterdir()
            if os.readlink(entry).startswith("/memfd:hospes-guest")
        ]
        expect(len(memory) == 1, f"the domain has {len(memory)} files of guest memory")
        wait_for(
            lambda: sum(looks_contained(pid, str(memory[0]), kernel) for pid in bench.run.address_spaces()),
            "no process has anything of the guest mapped",
        )
        guest.send("poweroff -f\n")
        expect(guest.wait(END_S) == 0, f"the guest does not power off\n{guest.tail()}")


# ---- how they end ---------------------------------------------------------------------------------------------------


def end(bench, guest, way):
    if way == "poweroff":
        guest.send("poweroff -f\n")
    elif way == "destroy":
        done = bench.run.hospes("destroy", "native")
        expect(done.returncode == 0, f"`hospes destroy native` failed: {done.stderr}")
    else:
        for pid in bench.run.processes():
            if b"__domain" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
    guest.wait(END_S)


def leaves_no_process(bench, way):
    with shell(bench, name="native", vcpus=2, settings=settings(1)) as guest:
        guest.wait_for("guest# ", BOOT_S)
        guest.send(f"{BUSY} {BUSY} {BUSY}\n")
        pids = wait_for(
            lambda: (found := bench.run.address_spaces()) and len(found) >= 3 and found, "busy programs get no processes"
        )
        end(bench, guest, way)
    wait_for(lambda: all(map(is_gone, pids)), f"after {way} these are left: {[pid for pid in pids if not is_gone(pid)]}")


def ends_when_a_process_is_killed(bench):
    """What the guest's code had in registers is lost: the domain must not go on with something else."""
    with shell(bench, name="native", settings=settings(1)) as guest:
        guest.wait_for("guest# ", BOOT_S)
        # Without a system call, so that it is nearly always found running.
        guest.send("while :; do :; done\n")
        wait_for(bench.run.address_spaces, "a program that computes gets no process of its own")
        # One that is killed while it waits for its turn has nothing to lose, and is replaced.
        deadline = time.monotonic() + END_S
        while guest.process.poll() is None:
            expect(time.monotonic() < deadline, f"the domain goes on without the process that executed its code\n{guest.tail()}")
            for pid in bench.run.address_spaces():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        log = "".join(path.read_text(errors="replace") for path in pathlib.Path(bench.run.path).rglob("native.log"))
        expect("it has been killed" in log, f"the domain's log does not say why it ended: {log[-500:]}")
        expect("panicked" not in log, f"the monitor panicked: {log[-1000:]}")


# ---- the kernel changes its own code --------------------------------------------------------------------------------

# Programs whose result is known, while jump labels, trace points, function tracing and probes go on and off.
PATCHING = r"""
mount -t tracefs none /sys/kernel/tracing && cd /sys/kernel/tracing
compute() {
    while [ ! -e /tmp/stop ]; do
        [ "$(yes hospes | head -c 2000000 | sha256sum)" = "$1" ] && echo right >>/tmp/right || echo wrong >>/tmp/wrong
    done
    echo stopped >>/tmp/stopped
}
want=$(yes hospes | head -c 2000000 | sha256sum)
compute "$want" & compute "$want" & compute "$want" &
echo 'vfs_*' >set_ftrace_filter
for round in 1 2 3 4 5 6 7 8; do
    # Some trace points complain without these statistics.
    echo 1 >/proc/sys/kernel/sched_schedstats
    for event in sched syscalls kmem; do echo 1 >events/$event/enable; done
    echo function >current_tracer
    echo "p:probe$round vfs_read" >>kprobe_events && echo 1 >events/kprobes/enable
    sleep 0.3
    echo 0 >events/kprobes/enable; echo >kprobe_events
    echo nop >current_tracer
    for event in sched syscalls kmem; do echo 0 >events/$event/enable; done
    echo 0 >/proc/sys/kernel/sched_schedstats
done
touch /tmp/stop
while [ "$(grep -c . /tmp/stopped 2>/dev/null)" != 3 ]; do sleep 0.2; done
echo "probes hit: $(grep -c probe1 kprobe_profile 2>/dev/null) trace: $(grep -c . trace)"
echo "right $(grep -c . /tmp/right) wrong $(cat /tmp/wrong 2>/dev/null | grep -c .) rounds $round"
"""


def patches_kernel_text(bench, vcpus, direct):
    with shell(bench, name="patched", vcpus=vcpus, settings=settings(direct)) as guest:
        guest.wait_for("guest# ", BOOT_S)
        guest.send("cat >/tmp/patch <<'END'" + PATCHING + "END\nsh /tmp/patch\n")
        match = guest.wait_for(r"\nright (\d+) wrong (\d+) rounds (\d+)\n", 3 * END_S)
        right, wrong, rounds = map(int, match.groups())
        expect((wrong, rounds) == (0, 8) and right > 3, f"{right} right and {wrong} wrong results in {rounds} rounds\n{guest.tail()}")
        expect("can't create" not in guest.console, f"the kernel cannot do all of it:\n{guest.tail()}")
        guest.send("dmesg -r; echo log-$((6 * 7))\n")
        guest.wait_for("log-42", END_S)
        said = dmesg.complaints(guest.console)
        expect(not said, "the kernel complains:\n" + "\n".join(said))
        guest.send("poweroff -f\n")
        expect(guest.wait(END_S) == 0, f"the guest does not power off\n{guest.tail()}")


# ---- a program that tries what programs do not do -------------------------------------------------------------------


@functools.cache
def native_tricks():
    done = subprocess.run(
        [str(vm.GUESTS / "tricks")], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=END_S, check=False
    )
    expect(done.stdout.endswith("tricks: end\n"), f"natively the tricks end with status {done.returncode}: {done.stdout[-500:]}")
    return done.stdout.splitlines()


def tricks_in_guest(bench, vcpus, direct):
    """What the program prints in a guest, and how long address-space processes ran meanwhile, in seconds."""
    with shell(bench, name="tricks", vcpus=vcpus, ramdisk="initramfs-tricks.cpio", settings=settings(direct)) as guest:
        guest.wait_for("guest# ", BOOT_S)
        guest.send("tricks guest >/tmp/tricks; echo done-$((6 * 7)); cat /tmp/tricks; echo printed-$((6 * 7))\n")
        native_s = 0
        deadline = time.monotonic() + 2 * END_S
        while not re.search(r"\ndone-42\n", guest.console):
            expect(time.monotonic() < deadline, f"the tricks do not come to an end\n{guest.tail()}")
            for pid in bench.run.address_spaces():
                try:
                    native_s = max(native_s, int(pathlib.Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9)
                except OSError:
                    continue
            time.sleep(0.1)
        guest.wait_for("printed-42", END_S)
        guest.send("poweroff -f\n")
        expect(guest.wait(END_S) == 0, f"the guest does not power off\n{guest.tail()}")
    before, _, after = guest.console.partition("\ndone-42\n")
    text = after.partition("printed-42")[0]
    expect(text.endswith("tricks: end\n"), f"the tricks end too early: {before[-300:]}\n{text[-300:]}")
    return text.splitlines(), native_s


# The translator reports these at the address they lead to: to check each indirect jump costs more than the difference is worth.
JUMPS = re.compile(r"ret_wild|jump_(8000+|ffff7f+):")


def differences(left, right, names):
    lines = difflib.unified_diff(left, right, *names, lineterm="", n=0)
    return "\n".join(line[:300] for line in list(lines)[:30])


def does_tricks_as_a_processor_does(bench, vcpus):
    """With and without direct execution, held against this machine and against each other."""
    translated, _ = tricks_in_guest(bench, vcpus, 0)
    direct, native_s = tricks_in_guest(bench, vcpus, 1)
    expect(native_s > 0.3, f"of the tricks only {native_s:.2f} s were executed natively")
    here = native_tricks()
    here, translated, direct = ([line for line in lines if not JUMPS.match(line)] for lines in (here, translated, direct))
    for name, lines in (("translated", translated), ("direct", direct)):
        common = [line for line in lines if not line.startswith("~")]
        expect(common == here, f"in the guest the tricks come out differently:\n{differences(here, common, ('here', name))}")
    expect(direct == translated, differences(translated, direct, ("translated", "direct")))
    expect("~stepped_hypercall: -1" in direct, "user code makes hypercalls as the kernel does")


def tests():
    """(name, works under QEMU too, function of the bench), as in tests/boot.py."""
    part = functools.partial
    yield "direct_is_contained", False, is_contained
    for way in ("poweroff", "destroy", "kill"):
        yield f"direct_leaves_no_process_after_{way}", False, part(leaves_no_process, way=way)
    yield "direct_ends_when_a_process_is_killed", False, ends_when_a_process_is_killed
    for vcpus in (1, 2):
        yield f"direct_does_tricks_as_a_processor_does_with_{vcpus}_vcpus", False, part(does_tricks_as_a_processor_does, vcpus=vcpus)
        for direct in (0, 1):
            name = f"direct_{direct}_patches_kernel_text_with_{vcpus}_vcpus"
            yield name, False, part(patches_kernel_text, vcpus=vcpus, direct=direct)
