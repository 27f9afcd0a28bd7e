"""The rows for disks, networks and the boot of a full Debian: fio, iperf3, ab and ping on the same image everywhere.

Natively fio works on the same file that is the guests' disk, and the network is a pair of virtual Ethernet interfaces between
two namespaces. Guests and their clients have a namespace of their own, so this machine's network is not touched. Programs are
the image's own on both sides.
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
import vm

DATA_BYTES = 1 << 30
MEMORY_MB = 1024
# (row, fio's --rw, block size, depth, what is counted)
FIO = (
    ("fio_seq_read", "read", "1M", 4, "MiB/s"),
    ("fio_seq_write", "write", "1M", 4, "MiB/s"),
    ("fio_rand_read_qd1", "randread", "4k", 1, "IOPS"),
    ("fio_rand_write_qd1", "randwrite", "4k", 1, "IOPS"),
    ("fio_rand_read_qd32", "randread", "4k", 32, "IOPS"),
    ("fio_rand_write_qd32", "randwrite", "4k", 32, "IOPS"),
)
NETWORK = ("iperf_to_guest", "iperf_from_guest", "ab", "ping")
ROWS = ("boot_to_login", *(row[0] for row in FIO), *NETWORK)
TIMEOUT_S = 180
TAP_HOST, TAP_GUEST = "10.77.0.1", "10.77.0.2"
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
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    path = next(found for where in ("usr/bin", "usr/sbin") if (found := root / where / name).exists())
    return [str(loader), "--library-path", libraries, str(path)]


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


def measure_fio(plan, add, note, run, path):
    """`run(arguments)` gives fio's output."""
    for row in FIO:
        if row[0] in plan.rows:
            try:
                add(row[0], fio_value(row, run(fio_arguments(row, path, plan.fio_s))))
            except (ValueError, KeyError, subprocess.SubprocessError, vm.GuestError) as error:
                note(f"{row[0]}: {error}")


def output_of(argv):
    return subprocess.run(
        argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


def gigabits(text):
    """What iperf3's receiver counted, from its JSON."""
    report = json.loads(text)
    if "error" in report:
        raise ValueError(report["error"])
    return report["end"]["sum_received"]["bits_per_second"] / 1e9


def measure_network(plan, add, note, clients, address):
    """Clients in the namespace `clients` against the servers at `address`, which run already."""
    seconds = str(plan.network_s)
    measurements = {
        "iperf_to_guest": (
            [*program("iperf3"), "-c", address, "-t", seconds, "-J"],
            gigabits,
        ),
        "iperf_from_guest": (
            [*program("iperf3"), "-c", address, "-t", seconds, "-J", "-R"],
            gigabits,
        ),
        "ab": (
            ["ab", "-q", "-c", "16", "-t", seconds, "-n", "10000000", f"http://{address}/page"],
            lambda text: float(re.search(r"Requests per second:\s+([\d.]+)", text).group(1)),
        ),
        "ping": (
            ["ping", "-q", "-c", "50", "-i", "0.02", address],
            lambda text: float(re.search(r"= [\d.]+/([\d.]+)/", text).group(1)),
        ),
    }
    for row in NETWORK:
        if row in plan.rows:
            argv, value = measurements[row]
            try:
                add(row, value(output_of(clients.command(*argv))))
            except (AttributeError, ValueError, KeyError, subprocess.SubprocessError) as error:
                note(f"{row}: {getattr(error, 'stderr', None) or error}")


def wants(plan, rows):
    return any(row in plan.rows for row in rows)


def native(plan, add, note):
    """This machine itself. It has no boot."""
    path = data_file()
    measure_fio(plan, add, note, lambda arguments: output_of([*program("fio"), *arguments]), path)
    if not wants(plan, NETWORK):
        return
    if not netns.possible():
        note("native: network rows need root and ip(8): left out")
        return
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hospes-nginx-"))
        servers = stack.enter_context(netns.Namespace("servers"))
        clients = stack.enter_context(netns.Namespace("clients"))
        netns.join(clients, f"{TAP_HOST}/24", servers, f"{TAP_GUEST}/24")
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
        measure_network(plan, add, note, clients, TAP_GUEST)


def in_guest(plan, add, note, system, cpu, shell, space):
    measure_fio(
        plan, add, note, lambda arguments: shell.run(f"fio {' '.join(arguments)}", TIMEOUT_S),
        {"hospes": "/dev/xvdb", "tcg": "/dev/vdb"}[system],
    )
    if not space or not wants(plan, NETWORK):
        return
    if system == "tcg":
        shell.run(
            "dev=$(ls /sys/class/net | grep -v lo | head -n 1); systemctl stop systemd-networkd.socket systemd-networkd; "
            f"ip address add {TAP_GUEST}/24 dev $dev; ip link set $dev up"
        )
        address = TAP_GUEST
    else:
        address, _ = shell.address()
    shell.run("iperf3 -s -D; sed -i 's/worker_processes auto/worker_processes 1/' /etc/nginx/nginx.conf; systemctl start nginx")
    measure_network(plan, add, note, space, address)


def guest(plan, add, note, variant):
    """One boot of Debian under a monitor, and in it the rows that are wanted."""
    system, cpu = variant
    if system not in debian.ROOT_DEVICE:
        return
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(vm.RunDirectory())
        root = os.path.join(run.path, "root.img")
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", debian.image("test"), root], check=True)
        disks = [vm.Disk(root), vm.Disk(data_file(), vdev="xvdb")]
        spec = debian.spec(disks, system=system, memory_mb=MEMORY_MB, name="bench", tcg_cpu=cpu)
        space = None
        if wants(plan, NETWORK) and netns.possible():
            space = stack.enter_context(netns.Namespace("bench"))
            if system == "tcg":
                spec.tap = "tap0"
                space.tap(spec.tap, f"{TAP_HOST}/24")
            else:
                spec.vifs = ("",)
        elif wants(plan, NETWORK):
            note(f"{system}: network rows need root and ip(8): left out")
        argv = spec.argv(system)
        argv = space.command(*argv) if space else argv
        machine = stack.enter_context(vm.Guest(argv, run.environment()))
        try:
            shell = debian.Shell(machine)
            if "boot_to_login" in plan.rows:
                add("boot_to_login", shell.login)
            in_guest(plan, add, note, system, cpu, shell, space)
        except vm.GuestError as error:
            note(f"{system}: Debian: {error}")
