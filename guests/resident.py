"""How much memory the processes of a monitor hold beside the guest's own.

Every page counts once: by its proportional share (Pss in /proc/PID/smaps, proc(5)). Left out are the mappings of the guest's
memory, which are known by their names: Hospes and QEMU use a memfd, User-Mode Linux a deleted file.
"""

import ctypes
import pathlib
import re

GUEST_MEMORY = re.compile(r"/memfd:(hospes-guest|memory-backend-memfd) |/vm_file-|/dev/shm/#\d+ \(deleted\)")
HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def overhead_kb(smaps):
    """Sum of Pss in kB over the mappings in the text of a smaps file that are not the guest's memory."""
    total, counts = 0, True
    for line in smaps.splitlines():
        header = HEADER.match(line)
        if header:
            counts = not GUEST_MEMORY.search(header.group(1))
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1])
    return total


def same_memory(one, other):
    """Whether two processes share one address space (kcmp(2), KCMP_VM); False where the kernel will not say."""
    kcmp, kcmp_vm = 312, 1
    return ctypes.CDLL(None).syscall(kcmp, one, other, kcmp_vm, 0, 0) == 0


def family(pids):
    """The processes and all that descend from them; a process that empties its own memory can be told by its parent alone."""
    children = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
        except OSError:
            continue
    found = list(pids)
    for pid in found:
        found.extend(child for child in children.get(pid, ()) if child not in found)
    return found


def overhead_mb(pids):
    """The same in MB (10^6 bytes) over several processes; an address space counts once, a process that has ended nothing."""
    total, seen = 0, []
    for pid in pids:
        if any(same_memory(pid, other) for other in seen):
            continue
        seen.append(pid)
        try:
            with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as handle:
                total += overhead_kb(handle.read())
        except OSError:
            continue
    return total * 1024 / 1e6
