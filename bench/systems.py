"""The systems that are compared, and the worker that waits in each of them to be told a row.

Natively the worker runs in a chroot with mounts of its own, in guests it is what the first process starts; both talk through the
same lines (worker.sh). A second native worker is limited to the guest's CPUID level by what OpenSSL and the C library offer for that.
"""

import contextlib
import dataclasses
import os
import pathlib
import subprocess

import rows
import vm

TCG_CPUS = ("max", "qemu64")
BOOT_TIMEOUT_S = 180
ROW_TIMEOUT_S = 300
MEMORY_MB = 1024
CLOCK_TOLERANCE = 0.02
# x86-64-v3 for programs that look for more: names of the C library's hwcaps, and the bits of CPUID leaf 7 (EBX low, ECX high):
# AVX512F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ.
LEVEL_EBX = 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31
LEVEL_ECX = 1 << 1 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14
LEVEL = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD",
    "OPENSSL_ia32cap": f":~{LEVEL_ECX << 32 | LEVEL_EBX:#x}",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """`system` is one of rows.SYSTEMS, "level" for native limited to the guest's CPUID level, or "direct_off" for Hospes without direct
    execution where it is measured with it, too. `cpu` matters to QEMU."""

    system: str
    cpu: str = ""

    def __str__(self):
        return f"{self.system} -cpu {self.cpu}" if self.cpu else self.system

    @property
    def monitor(self):
        """The monitor's name in vm.py."""
        return "hospes" if self.system == "direct_off" else self.system

    def spec(self, plan, direct=None, **more):
        """A vm.Spec for this variant."""
        settings = ("engine_direct=0",) if self.system == "direct_off" else plan.settings(direct)
        return vm.Spec(tcg_cpu=self.cpu or "max", settings=settings, **more)


NATIVE, LEVELLED, HOSPES, UML = Variant("native"), Variant("level"), Variant("hospes"), Variant("uml")
DIRECT_OFF = Variant("direct_off")
TCG = tuple(Variant("tcg", cpu) for cpu in TCG_CPUS)


def guests(plan, results):
    """The chosen ways of running a guest that can start here; says why of the others."""
    needed = {"tcg": "qemu-system-x86_64", "uml": str(vm.GUESTS / "linux-uml"), "hospes": vm.hospes_binary()}
    found = []
    for variant in (HOSPES, *TCG, UML):
        if variant.system not in plan.systems:
            continue
        program = needed[variant.system]
        if subprocess.run(["sh", "-c", f"command -v '{program}'"], capture_output=True, check=False).returncode == 0:
            found.append(variant)
        else:
            results.note(f"{variant}: {program} is not there: left out")
            results.missing(variant.system, rows.ROWS, f"{os.path.basename(program)} is not there")
    return found


class Worker:
    """A worker that is ready. `measure` tells it a row; `check_clock` compares its clock with this machine's over all rows."""

    def __init__(self, variant, guest, note):
        self.variant, self.guest, self.note = variant, guest, note
        self.number = 0
        self.first = self.last = None
        guest.wait_for("WORKER ready\n", BOOT_TIMEOUT_S)

    def start(self, box_ms, *words):
        self.number += 1
        self.guest.send(f"{self.number} {box_ms} {' '.join(words)}\n")

    def finish(self, timeout=ROW_TIMEOUT_S):
        """{row: value} of what was started; GuestError when the worker does not answer."""
        n = self.number
        answer = self.guest.wait_for(rf"(?s)CLOCK {n} ([\d.]+)\n(.*?)DONE {n} ([\d.]+)\n", timeout)
        self.first = self.first or (float(answer.group(1)), self.guest.arrival(answer.start()))
        self.last = float(answer.group(3)), self.guest.arrival(answer.end() - 1)
        found = {}
        for line in answer.group(2).splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "ROW":
                found[words[1]] = float(words[2])
            elif words and words[0] == "WRONG":
                self.note(f"{self.variant}: a program found its own result wrong: {' '.join(words[1:])}")
        return found

    def measure(self, box_ms, *words, timeout=ROW_TIMEOUT_S):
        self.start(box_ms, *words)
        return self.finish(timeout)

    def check_clock(self):
        """A guest whose clock runs slow would look fast: its seconds have to be ours."""
        if self.first:
            counted, passed = (self.last[i] - self.first[i] for i in (0, 1))
            if abs(counted - passed) > max(0.2, CLOCK_TOLERANCE * passed):
                self.note(f"{self.variant}: its clock counted {counted:.2f} s while {passed:.2f} s passed here")


def _native_argv():
    script = (
        'mount -t tmpfs tmpfs "$0/tmp" && mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && '
        'cd / && exec chroot "$0" /bench/worker.sh'
    )
    # Mounts of our own in a name space of our own; without root that needs a user name space as well.
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    return [*unshare, "sh", "-c", script, str(vm.GUESTS / "bench-root")]


@contextlib.contextmanager
def worker(plan, results, variant, ramdisk="initramfs-bench.cpio", memory_mb=MEMORY_MB, vcpus=1, name="bench", direct=None):
    """A Worker, and the processes of its system where those are asked for by `worker.run.processes()`."""
    with vm.RunDirectory() as run, contextlib.ExitStack() as stack:
        if variant.system in ("native", "level"):
            limits = LEVEL if variant.system == "level" else {}
            guest = stack.enter_context(vm.Guest(_native_argv(), dict(run.environment(), **limits)))
        else:
            spec = variant.spec(plan, direct, ramdisk=ramdisk, memory_mb=memory_mb, vcpus=vcpus, name=name, command_line="quiet")
            guest = stack.enter_context(vm.Guest(spec.argv(variant.monitor), run.environment()))
        made = Worker(variant, guest, results.note)
        made.run = run
        keep_mitigations(results, variant, guest)
        yield made
        made.check_clock()


def keep_mitigations(results, variant, guest):
    if variant.system == "native":
        path = pathlib.Path("/sys/devices/system/cpu/vulnerabilities")
        found = [f"{entry.name}:{entry.read_text().strip()}" for entry in sorted(path.glob("*"))]
    elif variant.system == "level":
        return
    else:
        found = sorted(vm.between(guest.console, "mitigations").splitlines())
    results.mitigations[variant.system] = found
