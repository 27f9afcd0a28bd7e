"""The rows for disks, networks and the boot of a full Debian: fio, iperf3, ab and ping on the same image everywhere.

Natively fio works on the same file that is the guests' disk, and the network is a pair of virtual Ethernet interfaces between
two namespaces. Guests and their clients have a namespace of their own, so this machine's network is not touched. Programs are
the image's own on both sides. Hospes and native take turns; the peers come afterwards, one at a time.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

import debian
import netns
import rows
import suite
import systems
import vm
from results import say

DATA_BYTES = 1 << 30
MEMORY_MB = 1024
TIMEOUT_S = 180
TRIES, RETRY_S = 8, 0.5
TAP_HOST, TAP_GUEST = "10.77.0.1", "10.77.0.2"
# What a measurement may end with; the row is then without a figure.
FAILURES = (OSError, ValueError, KeyError, AttributeError, subprocess.SubprocessError, vm.GuestError)
NO_NETWORK = "network rows need root and ip(8)"
NGINX = """worker_processes 1; daemon off; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 512; }}
http {{ access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
server {{ listen 80; root {root}; }} }}
"""


def data_file():
    """The file that is every system's second disk: made once, every block of it written."""
    path = debian.IMAGES / "bench-data.img"
    if not path.exists() or path.stat().st_size != DATA_BYTES:
        block = os.urandom(8 << 20)
        with open(f"{path}.new", "wb") as handle:
            for _ in range(DATA_BYTES // len(block)):
                handle.write(block)
            os.fsync(handle.fileno())
        os.rename(f"{path}.new", path)
    return str(path)


def tree():
    """The image's files on this machine, for the programs that run natively; unpacked once for each image."""
    directory = debian.IMAGES / "test-root"
    mark = directory / ".image"
    key = (debian.IMAGES / "test.key").read_text()
    if not mark.exists() or mark.read_text() != key:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for part in ("usr", "var/www"):
            (directory / part).parent.mkdir(parents=True, exist_ok=True)
            command = ["debugfs", "-R", f"rdump /{part} {(directory / part).parent}", debian.image("test")]
            subprocess.run(command, check=True, capture_output=True)
        mark.write_text(key)
    return directory


def program(name):
    """The command line that runs one of the image's programs here, with the image's own libraries."""
    root = tree()
    loader = root / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    # Debian's fio has one library in a place of its own, which the loader looks for from the root only.
    libraries = ":".join(f"{root}/usr/lib/x86_64-linux-gnu{place}" for place in ("", "/ceph"))
    path = next(found for where in ("usr/bin", "usr/sbin") if (found := root / where / name).exists())
    return [str(loader), "--library-path", libraries, str(path)]


def output_of(argv):
    return subprocess.run(
        argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


def fio_arguments(row, path, seconds):
    _, kind, block, depth, _ = row
    return [
        "--name=row", f"--filename={path}", f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", "--ioengine=libaio", "--direct=1",
        "--time_based", f"--runtime={seconds}", "--ramp_time=300ms", "--randrepeat=0", "--norandommap", "--output-format=json",
        f"--size={DATA_BYTES}", "--allow_mounted_write=0",
    ]


def fio_value(row, output):
    """What the row counts, from fio's JSON."""
    job = json.loads(output[output.index("{") : output.rindex("}") + 1])["jobs"][0]
    side = job["write" if "write" in row[1] else "read"]
    if job["error"]:
        raise ValueError(f"fio ended with error {job['error']}")
    return side["bw_bytes"] / (1 << 20) if row[4] == "MiB/s" else side["iops"]


def gigabits(text):
    """What iperf3's receiver counted, from its JSON."""
    report = json.loads(text)
    if "error" in report:
        raise ValueError(report["error"])
    return report["end"]["sum_received"]["bits_per_second"] / 1e9


def network_value(row, seconds, clients, address):
    """One figure by a client in the namespace `clients`, from the servers at `address`, which run already."""
    iperf = [*program("iperf3"), "-c", address, "-t", str(seconds), "-J"]
    argv, value = {
        "iperf_to_guest": (iperf, gigabits),
        "iperf_from_guest": ([*iperf, "-R"], gigabits),
        "ab": (
            ["ab", "-q", "-c", "16", "-t", str(seconds), "-n", "10000000", f"http://{address}/page"],
            lambda text: float(re.search(r"Requests per second:\s+([\d.]+)", text).group(1)),
        ),
        "ping": (
            ["ping", "-q", "-c", "50", "-i", "0.02", address],
            lambda text: float(re.search(r"= [\d.]+/([\d.]+)/", text).group(1)),
        ),
    }[row]
    tries = TRIES if row.startswith("iperf") else 1
    while True:
        tries -= 1
        try:
            return value(output_of(clients.command(*argv)))
        except (subprocess.CalledProcessError, ValueError):
            # Between two tests iperf3's server closes its socket and opens it again; on a slow guest that takes a while.
            if not tries:
                raise
            time.sleep(RETRY_S)


class Native:
    """This machine itself. Servers start with it where network rows are wanted."""

    variant = systems.NATIVE

    def __init__(self, plan, stack):
        self.plan, self.path, self.clients = plan, data_file(), None
        if not wants(plan, rows.NETWORK) or not netns.possible():
            return
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hospes-nginx-"))
        servers = stack.enter_context(netns.Namespace("servers"))
        self.clients = stack.enter_context(netns.Namespace("clients"))
        netns.join(self.clients, f"{TAP_HOST}/24", servers, f"{TAP_GUEST}/24")
        configuration = pathlib.Path(directory) / "nginx.conf"
        configuration.write_text(NGINX.format(root=tree() / "var/www/html"))
        for argv in ([*program("iperf3"), "-s"], [*program("nginx"), "-p", directory, "-c", str(configuration)]):
            process = subprocess.Popen(
                servers.command(*argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        time.sleep(1)

    def fio(self, row):
        return fio_value(row, output_of([*program("fio"), *fio_arguments(row, self.path, self.plan.fio)]))

    def network(self, row):
        return network_value(row, self.plan.network, self.clients, TAP_GUEST)


class Machine:
    """A Debian that has booted under a monitor to root's shell after `login` seconds. The servers in it start where they are wanted."""

    DISK = {"hospes": "/dev/xvdb", "tcg": "/dev/vdb"}

    def __init__(self, plan, stack, variant, whole=True):
        """`whole` is with the servers, as the network rows need them."""
        self.plan, self.variant, self.clients = plan, variant, None
        run = stack.enter_context(vm.RunDirectory())
        root = os.path.join(run.path, "root.img")
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", debian.image("test"), root], check=True)
        disks = [vm.Disk(root), vm.Disk(data_file(), vdev="xvdb")]
        spec = debian.spec(
            disks, system=variant.system, memory_mb=MEMORY_MB, name="bench", tcg_cpu=variant.cpu or "max", settings=plan.settings()
        )
        if netns.possible() and wants(plan, rows.NETWORK):
            self.clients = stack.enter_context(netns.Namespace("bench"))
            if variant.system == "tcg":
                spec.tap = "tap0"
                self.clients.tap(spec.tap, f"{TAP_HOST}/24")
            else:
                spec.vifs = ("",)
        argv = spec.argv(variant.system)
        argv = self.clients.command(*argv) if self.clients else argv
        self.shell = debian.Shell(stack.enter_context(vm.Guest(argv, run.environment())))
        self.login = self.shell.login
        self.address = self._serve() if whole and self.clients else None

    def _serve(self):
        """Starts the servers; the guest's address."""
        if self.variant.system == "tcg":
            self.shell.run(
                "dev=$(ls /sys/class/net | grep -v lo | head -n 1); systemctl stop systemd-networkd.socket systemd-networkd; "
                f"ip address add {TAP_GUEST}/24 dev $dev; ip link set $dev up"
            )
            address = TAP_GUEST
        else:
            address, _ = self.shell.address()
        self.shell.run("iperf3 -s -D; sed -i 's/worker_processes auto/worker_processes 1/' /etc/nginx/nginx.conf; systemctl start nginx")
        return address

    def fio(self, row):
        path = self.DISK[self.variant.system]
        return fio_value(row, self.shell.run(f"fio {' '.join(fio_arguments(row, path, self.plan.fio))}", TIMEOUT_S))

    def network(self, row):
        return network_value(row, self.plan.network, self.clients, self.address)


def wants(plan, names):
    return any(row in plan.rows for row in names)


def measure(plan, results, guests):
    if not wants(plan, rows.DEVICES):
        return
    results.missing("native", ["boot_to_login"], "this machine does not boot for a benchmark")
    results.missing("uml", rows.DEVICES, "User-Mode Linux is measured without disks and network")
    if not netns.possible() and wants(plan, rows.NETWORK):
        for system in rows.SYSTEMS:
            results.missing(system, rows.NETWORK, NO_NETWORK)
    able = [variant for variant in guests if variant.system in debian.ROOT_DEVICE]
    sessions = wants(plan, rows.DEVICES[1:])
    if sessions:
        for variant in able or [systems.NATIVE]:
            session(plan, results, variant)
    if "boot_to_login" in plan.rows:
        logins(plan, results, able, range(1 if sessions else 0, plan.logins))


def session(plan, results, variant):
    """One boot, and in it the rows that are wanted; in turn with native where it is Hospes, or alone where it is native."""
    with contextlib.ExitStack() as stack:
        sides = []
        try:
            if "native" in plan.systems and variant.system in ("hospes", "native"):
                sides.append(Native(plan, stack))
            if variant.system != "native":
                say(f"{variant}: booting Debian")
                sides.append(machine := Machine(plan, stack, variant))
                results.add(variant, "boot_to_login", 0, machine.login)
        except (OSError, subprocess.SubprocessError, vm.GuestError) as error:
            results.note(f"{variant}: Debian: {error}")
            results.missing(variant.system, rows.DEVICES, "Debian did not come up")
        for row in rows.FIO:
            if row[0] in plan.rows:
                alternate(plan, results, sides, row[0], lambda side, row=row: side.fio(row))
        for row in rows.NETWORK:
            if row in plan.rows and netns.possible():
                alternate(plan, results, sides, row, lambda side, row=row: side.network(row))


def alternate(plan, results, sides, row, value):
    """The figures of one row, side by side; a side that fails at it is left out of the rest of the row."""
    left = list(sides)
    peers = all(side.variant.system == "tcg" for side in sides)
    for number in range(plan.peer_samples if peers else plan.slow_pairs):
        for side in reversed(left) if number % 2 else list(left):
            try:
                results.add(side.variant, row, number, value(side))
            except FAILURES as error:
                detail = getattr(error, "stderr", None) or getattr(error, "stdout", None) or error
                results.failed(side.variant, row, number, "its measurement failed", str(detail)[-400:])
                left = [other for other in left if other is not side]
    results.save()
    say(suite.progress(results, row))


def logins(plan, results, able, numbers):
    """Boots for the time that they take; the sessions were the first ones."""
    for number in numbers:
        for variant in able:
            with contextlib.ExitStack() as stack:
                try:
                    results.add(variant, "boot_to_login", number, Machine(plan, stack, variant, whole=False).login)
                except (OSError, subprocess.SubprocessError, vm.GuestError) as error:
                    results.failed(variant, "boot_to_login", number, "Debian did not come up", error)
        results.save()
        say(f"login {number + 1} of {plan.logins}: {suite.progress(results, 'boot_to_login')}")
