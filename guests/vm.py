"""Starts guests and talks to their consoles: the part that `make run`, the boot tests, the benchmark and the soak share.

A guest runs under `hospes` or under a peer: `tcg` (QEMU without acceleration) gets the same kernel, initial root file system,
memory and processors, only the name of the console differs; `uml` (User-Mode Linux) is a kernel of its own.
"""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
GUESTS = pathlib.Path(os.environ.get("HOSPES_GUESTS", ROOT / "target" / "guests"))
# The PATH of ordinary users does not lead to chroot, mke2fs, losetup and debugfs.
os.environ["PATH"] = ":".join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
CONSOLE = {"hospes": "hvc0", "tcg": "ttyS0"}


class GuestError(Exception):
    """A guest did not do what was waited for; the sentence says what, and the console's last lines follow."""


def hospes_binary():
    """The monitor: $HOSPES, else the release build of this tree."""
    chosen = os.environ.get("HOSPES")
    if chosen:
        return chosen
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str((ROOT / target) / "release" / "hospes")


@dataclasses.dataclass
class Disk:
    """A disk of a guest, by its name in a Xen guest; QEMU's virtio disks are vda, vdb... in the order of the list."""

    path: str
    format: str = "raw"
    vdev: str = "xvda"
    read_only: bool = False
    cdrom: bool = False

    def xl(self):
        """As in xl-disk-configuration(5)."""
        access = "ro" if self.read_only else "rw"
        kind = ",devtype=cdrom" if self.cdrom else ""
        return f"format={self.format},vdev={self.vdev},access={access}{kind},target={self.path}"

    def qemu(self, number):
        read_only = "on" if self.read_only else "off"
        return [
            "-drive", f"file={self.path},format={self.format},if=none,id=disk{number},read-only={read_only},cache=none,aio=native",
            "-device", f"virtio-blk-pci,drive=disk{number}",
        ]


@dataclasses.dataclass
class Spec:
    """What is to be booted. `settings` are further lines of a Hospes configuration, without meaning to QEMU.

    `vifs` are network interfaces as in xl-network-configuration(5). For QEMU `tap` is the name of a tap that exists.
    """

    kernel: str = "vmlinuz-cloud"
    ramdisk: str = "initramfs-busybox.cpio"
    command_line: str = ""
    memory_mb: int = 512
    vcpus: int = 1
    name: str = "guest"
    settings: tuple = ()
    tcg_cpu: str = "max"
    disks: tuple = ()
    vifs: tuple = ()
    tap: str = ""

    def paths(self):
        return str(GUESTS / self.kernel), str(GUESTS / self.ramdisk)

    def argv(self, system):
        kernel, ramdisk = self.paths()
        if system == "uml":
            return [
                str(GUESTS / "linux-uml"), f"mem={self.memory_mb}M", f"initrd={ramdisk}", "con=null", "con0=fd:0,fd:1",
                "ssl=null", *self.command_line.split(),
            ]
        extra = f"console={CONSOLE[system]} {self.command_line}".strip()
        if system == "hospes":
            return [
                hospes_binary(), "create", "-c", "/dev/null", 'type="pvh"', f'name="{self.name}"', f'kernel="{kernel}"',
                f'ramdisk="{ramdisk}"', f"memory={self.memory_mb}", f"vcpus={self.vcpus}", f'extra="{extra}"',
                *self._devices(), *self.settings,
            ]
        network = ["-netdev", f"tap,id=net,ifname={self.tap},script=no,downscript=no", "-device", "virtio-net-pci,netdev=net"]
        return [
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", self.tcg_cpu, "-m", str(self.memory_mb), "-smp",
            str(self.vcpus), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
            "-kernel", kernel, "-initrd", ramdisk, "-append", extra,
            # Guest memory under a name of its own, so that it can be told from the monitor's.
            "-machine", "memory-backend=ram", "-object", f"memory-backend-memfd,id=ram,share=on,size={self.memory_mb}M",
            *(word for number, disk in enumerate(self.disks) for word in disk.qemu(number)),
            *(network if self.tap else ()),
        ]

    def _devices(self):
        """The lines of a Hospes configuration for disks and network; none where there are none."""
        lines = {"disk": [disk.xl() for disk in self.disks], "vif": self.vifs}
        return [f"{key}=[{', '.join(map(quoted, values))}]" for key, values in lines.items() if values]


def quoted(text):
    """A text of the configuration grammar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


class RunDirectory:
    """A run-time directory for one test run, so that it neither sees nor disturbs the user's own domains."""

    def __init__(self):
        # Ended from outside we still want to clean up: SIGTERM becomes an exception.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.holder = tempfile.TemporaryDirectory(prefix="hospes-run-")
        self.path = self.holder.name

    def environment(self):
        state = os.path.join(self.path, "state")
        return dict(os.environ, HOSPES_RUN_DIR=os.path.join(self.path, "run"), HOSPES_LOG_DIR=state, XDG_STATE_HOME=state, HOSPES_DUMP_DIR=os.path.join(self.path, "dump"))

    def hospes(self, *arguments, timeout=60):
        """Runs one command of the monitor to its end."""
        return subprocess.run(
            [hospes_binary(), *arguments], env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=timeout, check=False,
        )

    def processes(self):
        """The ids of all processes that were started for this run, detached ones too: they carry its environment."""
        mark = f"HOSPES_RUN_DIR={self.path}/".encode()
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def address_spaces(self):
        """The ids of the processes in which user code of this run's guests is executed natively. They carry no environment."""
        parents = set(self.processes())
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or not os.readlink(entry / "exe").startswith("/memfd:hospes-direct"):
                    continue
                status = (entry / "status").read_text()
                if int(re.search(r"^PPid:\s+(\d+)", status, re.M).group(1)) in parents:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # One that is being killed may still start another, or make a file.
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self.holder.cleanup()


class Guest:
    """One running guest. Its console is collected by a thread; `wait_for` looks at what has come since the last find."""

    def __init__(self, argv, environment=None):
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,
        )
        self.changed = threading.Condition()
        self.console = ""
        self.errors = ""
        self.chunks = []
        self.position = 0
        self.open_streams = 2
        for stream, sink in ((self.process.stdout, self._console), (self.process.stderr, self._error)):
            threading.Thread(target=self._collect, args=(stream, sink), daemon=True).start()

    def _console(self, text, when):
        self.chunks.append((when, len(self.console)))
        self.console += text

    def _error(self, text, _when):
        self.errors += text

    def _collect(self, stream, sink):
        while data := os.read(stream.fileno(), 65536):
            when = time.monotonic()
            with self.changed:
                sink(data.decode("utf-8", "replace").replace("\r", ""), when)
                self.changed.notify_all()
        with self.changed:
            self.open_streams -= 1
            self.changed.notify_all()

    def tail(self, lines=15):
        text = "\n".join(self.console.splitlines()[-lines:])
        return f"{text}\n{self.errors[-2000:]}".strip()

    def wait_for(self, pattern, timeout):
        """The match of `pattern` in new console output; GuestError when it does not come in `timeout` seconds."""
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                match = compiled.search(self.console, self.position)
                if match:
                    self.position = match.end()
                    return match
                left = deadline - time.monotonic()
                if self.open_streams == 0:
                    raise GuestError(f"the guest ended without {pattern!r}; its last lines:\n{self.tail()}")
                if left <= 0:
                    raise GuestError(f"no {pattern!r} within {timeout:.0f} s; the last lines:\n{self.tail()}")
                self.changed.wait(left)

    def arrival(self, offset):
        """When the console byte at `offset` arrived, in seconds since the start of the monitor."""
        with self.changed:
            times = [when for when, begin in self.chunks if begin <= offset]
        return times[-1] - self.started

    def send(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, timeout):
        """The monitor's exit status; GuestError when it has not ended in `timeout` seconds."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not end within {timeout:.0f} s; the last lines:\n{self.tail()}") from None
        with self.changed:
            self.changed.wait_for(lambda: self.open_streams == 0, 5)
        return status

    def kill(self):
        """Ends the monitor's process group, whatever state it is in."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def between(text, name):
    """The console lines between HOSPES-BEGIN and HOSPES-END of `name`; GuestError when they are not there."""
    match = re.search(rf"^HOSPES-BEGIN {name}\n(.*?)^HOSPES-END {name}$", text, re.M | re.S)
    if not match:
        raise GuestError(f"the guest printed no complete block {name!r}; its last lines:\n" + text[-1500:])
    return match.group(1)
