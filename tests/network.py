#!/usr/bin/env python3
"""Plugs guests into networks and has them talk to the host, to each other and to an outside of the test's own.

    tests/network.py [--list] [WORD...]

Only tests whose name contains one of the WORDs run, all without any. Everything happens in a network namespace that is made for
the run, so neither the machine's network nor anything beyond the machine is touched; that needs root. The last line is
"N passed, N failed"; the exit status is 0 when nothing failed.
"""

import contextlib
import functools
import http.server
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest.mock
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import runner  # noqa: E402
import vm  # noqa: E402
from runner import ANSWER_S, Failure, expect, wait_until  # noqa: E402

BOOT_S = 120
INSIDE = "HOSPES_TEST_NETWORK"
OUTSIDE = "203.0.113"
DHCP = "udhcpc -i eth0 -n -q -t 20"


def host(command, check=True):
    """What a command of the host prints."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    expect(done.returncode == 0 or not check, f"`{command}` failed: {done.stdout}{done.stderr}")
    return done.stdout


class Shell(vm.Guest):
    """A guest with a shell on its console."""

    def __init__(self, run, name, vif="''", **more):
        settings = (f"vif=[{vif}]",) if vif is not None else ()
        spec = vm.Spec(
            ramdisk="initramfs-net.cpio", command_line="quiet", name=name, memory_mb=256,
            settings=settings + tuple(more.pop("settings", ())), **more,
        )
        super().__init__(spec.argv("hospes"), run.environment())
        self.name = name
        self.count = 0
        try:
            self.wait_for("guest# ", BOOT_S)
        except vm.GuestError:
            self.process.kill()
            raise

    def run(self, command, check=True):
        """What a command prints in the guest."""
        self.count += 1
        start = self.position
        # The terminal shows the command too: the mark is put together only where it runs.
        self.send(f"{command}; echo \"mark\"{self.count}-$?\n")
        match = self.wait_for(rf"mark{self.count}-(\d+)", ANSWER_S)
        output = self.console[start : match.start()].partition("\n")[2]
        expect(not check or match.group(1) == "0", f"`{command}` in {self.name} failed:\n{output}")
        return output

    def dhcp(self):
        """Has the guest ask for an address; returns it."""
        output = self.run(DHCP)
        return output.split("lease of ")[1].split()[0]

    def off(self):
        self.send("poweroff -f\n")
        expect(self.wait(ANSWER_S) == 0, f"{self.name} does not power off:\n{self.tail()}")


def expect_clean(run):
    """Nothing that was made for guests is left on the host."""
    left = [line for line in host("ip -o link").splitlines() if "vif" in line or "hospes" in line]
    expect(not left, "interfaces are left:\n" + "\n".join(left))
    expect("hospes" not in host("nft list tables"), "a table of nftables is left")
    pid = pathlib.Path(run.path, "run/net/dnsmasq.pid")
    expect(not pid.exists(), "dnsmasq is left")


@contextlib.contextmanager
def web(address, text):
    """An HTTP server of the host; yields the list of those who asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.client_address[0])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    server = Server((address, 8080), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def fetch(address, port=80):
    with urllib.request.urlopen(f"http://{address}:{port}/", timeout=ANSWER_S) as answer:
        return answer.read().decode()


@contextlib.contextmanager
def outside():
    """Another machine behind the host's default route, which it is; yields what comes before a command that is to run there."""
    machine = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    try:
        deadline = time.monotonic() + ANSWER_S
        while os.readlink(f"/proc/{machine.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            expect(time.monotonic() < deadline, "there is no outside")
            time.sleep(0.1)
        there = f"nsenter -n -t {machine.pid} "
        host("ip link add out0 type veth peer name out1")
        host(f"ip link set out1 netns {machine.pid} && ip address add {OUTSIDE}.1/24 dev out0 && ip link set out0 up")
        host(there + f"sh -c 'ip address add {OUTSIDE}.2/24 dev out1 && ip link set out1 up && ip link set lo up'")
        host(f"ip route add default via {OUTSIDE}.2 dev out0")
        yield there
    finally:
        machine.kill()
        machine.wait()
        host("ip link del out0", check=False)


LISTENER = """
import socket
server = socket.create_server(("0.0.0.0", 8080))
print("ready", flush=True)
connection, (address, _) = server.accept()
print(address, connection.makefile().readline(), end="")
"""


def gateway():
    return host("ip -4 -o address show hospes0").split()[3].split("/")[0]


def serve_page(guest, text):
    guest.run(f"mkdir -p /www && echo {text} >/www/index.html && httpd -h /www")


# ---- the NAT network ------------------------------------------------------------------------------------------------


def guests_find_host_and_each_other(run):
    with Shell(run, "first") as first, Shell(run, "second") as second:
        ips = [first.dhcp(), second.dhcp()]
        expect(ips[0] != ips[1], f"both guests got {ips[0]}")
        with web(gateway(), "of-the-host") as asked:
            expect("of-the-host" in first.run("wget -q -O - http://host.hospes:8080/"), "the host's page is another")
        expect(asked == [ips[0]], f"the host was asked by {asked}")
        serve_page(first, "of-the-first")
        expect("of-the-first" in second.run("wget -q -O - http://first/"), "the first guest's page is another")
        expect("of-the-first" in fetch(ips[0]), "the host sees another page")
        first.run("ping -c 2 second.hospes")
        # Larger than a page of memory, in both directions.
        second.run("ping -c 2 -s 20000 first")
        # An address of the network's prefix, by router advertisement.
        deadline = time.monotonic() + ANSWER_S
        while "inet6 fd" not in second.run("ip -6 address show dev eth0"):
            expect(time.monotonic() < deadline, "no IPv6 address comes")
            time.sleep(1)
        address = host("ip -6 -o address show hospes0 scope global").split()[3].split("/")[0]
        second.run(f"ping6 -c 2 {address}")
        first.off()
        expect("hospes0" in host("ip -o link"), "the network went with its first user")
        second.off()
    expect_clean(run)


def carries_much_and_unharmed(run):
    with Shell(run, "much") as guest:
        ip = guest.dhcp()
        guest.run("mkdir -p /www && dd if=/dev/urandom of=/www/data bs=1M count=40 2>/dev/null && httpd -h /www")
        # Segments that are cut by the receiver, and by the kernel because the interface may not leave it to anybody.
        for features in ("", "ethtool -K vif1.0 tso off gso off gro off tx off 2>/dev/null"):
            host(features, check=False)
            with urllib.request.urlopen(f"http://{ip}/data", timeout=ANSWER_S) as answer:
                data = answer.read()
            expect(len(data) == 40 << 20, f"{len(data)} bytes came")
            server = socket.create_server((gateway(), 9000))
            guest.send("nc " + gateway() + " 9000 </dev/null >/tmp/data\n")
            connection, _ = server.accept()
            connection.sendall(data)
            connection.close()
            server.close()
            guest.run("cmp /tmp/data /www/data")
        guest.off()
    expect_clean(run)


def top_shows_what_guests_send_and_receive(run):
    def row():
        heading, *rows = run.hospes("top", "-b", "-i", "1").stdout.splitlines()
        columns = [row.split() for row in rows if row.split()[0] == "busy"]
        return dict(zip(heading.split(), columns[0]))

    def host_kib():
        """What the host's interface has sent and received."""
        lines = dict(line.split(":") for line in pathlib.Path("/proc/net/dev").read_text().splitlines()[2:])
        counters = next(counters.split() for name, counters in lines.items() if name.strip().startswith("vif"))
        return {"NETTX(k)": int(counters[8]) >> 10, "NETRX(k)": int(counters[0]) >> 10}

    with Shell(run, "busy", vcpus=2) as guest:
        guest.dhcp()
        for sends, size in ((True, 8 << 20), (False, 4 << 20)):
            before = row()
            with socket.create_server((gateway(), 9000)) as server:
                guest.send(f"head -c {size} /dev/zero | nc {gateway()} 9000\n" if sends else f"nc {gateway()} 9000 </dev/null >/dev/null\n")
                connection, _ = server.accept()
            with connection:
                if sends:
                    while connection.recv(1 << 20):
                        pass
                else:
                    connection.sendall(bytes(size))
            guest.run("true")
            after = row()
            grown = {column: int(after[column]) - int(before[column]) for column in ("NETTX(k)", "NETRX(k)")}
            # What the guest sends the host's interface receives.
            much, little = ("NETRX(k)", "NETTX(k)")[::1 if sends else -1]
            # Headers count, and what acknowledges it goes the other way.
            expect(size >> 10 <= grown[much] < size >> 9 and grown[little] < size >> 13, f"`top` counts {grown} of {size >> 10} KiB, {sends=}")
            counted = host_kib()
            expect(abs(counted[much] - int(after[much])) < counted[much] >> 4, f"`top` shows {after}, and the host has counted {counted}")
        expect((after["NETS"], after["VBDS"]) == ("1", "0"), f"`top` shows other devices: {after}")
        guest.off()
    expect_clean(run)


def rate_is_what_one_flow_gets(run):
    """A flow keeps to one queue, so it must get the whole rate; more queues must not get more."""
    megabits, size = 20, 8 << 20
    for vcpus in (1, 2):
        with Shell(run, f"rate{vcpus}", f"'rate={megabits}Mb/s'", vcpus=vcpus) as guest:
            guest.dhcp()
            with socket.create_server((gateway(), 9000)) as server:
                guest.send(f"head -c {size} /dev/zero | nc {gateway()} 9000\n")
                connection, _ = server.accept()
            with connection:
                start, count = time.monotonic(), 0
                while data := connection.recv(1 << 20):
                    count += len(data)
                took = time.monotonic() - start
            expect(count == size, f"{count} bytes came")
            came = size * 8 / 1e6 / took
            # The headers are missing here; the first burst and a host that is slow to look are on top.
            expect(0.88 * megabits < came < 1.15 * megabits, f"{came:.1f} Mb/s come with {vcpus} vCPUs")
            guest.off()
    expect_clean(run)


def outside_is_reached_but_does_not_reach(run):
    with outside() as there, Shell(run, "inside") as guest:
        ip = guest.dhcp()
        serve_page(guest, "secret")
        guest.run(f"ping -c 2 {OUTSIDE}.2")
        listener = subprocess.Popen(
            [*there.split(), sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True,
        )
        expect(listener.stdout.readline() == "ready\n", "nobody listens outside")
        guest.run(f"echo from-the-guest | nc {OUTSIDE}.2 8080")
        said = listener.communicate(timeout=ANSWER_S)[0]
        expect(said == f"{OUTSIDE}.1 from-the-guest\n", f"outside came: {said}")
        host(there + f"ip route add {ip}/32 via {OUTSIDE}.1")
        reached = host(there + f"busybox wget -q -T 3 -O - http://{ip}/ 2>&1", check=False)
        expect("secret" not in reached, "the guest is reached from outside")
        guest.off()
    expect_clean(run)


def guest_speaks_for_itself_only(run):
    with Shell(run, "liar") as guest:
        # Each of the addresses may be the guest's own, by its MAC address.
        own = guest.dhcp()
        network = gateway().rpartition(".")[0]
        other = f"{network}.250" if own != f"{network}.250" else f"{network}.251"
        guest.run(f"ping -c 1 {gateway()}")
        guest.run(f"ip address add {other}/24 dev eth0")
        wrong = guest.run(f"ping -c 2 -w 4 -I {other} {gateway()}", check=False)
        expect("100% packet loss" in wrong, f"another address is believed:\n{wrong}")
        guest.run(f"ip address del {other}/24 dev eth0")
        # The host answers whoever has these addresses; the network's prefix is the guest's to use.
        prefix = host("ip -6 -o address show hospes0 scope global").split()[3].partition("::")[0]
        host("ip -6 route add fd99::/64 dev hospes0")
        for address, passes in ((f"{prefix}::99", True), ("fd99::99", False)):
            # Its address is looked for on the network for a second before it is used.
            guest.run(f"ip -6 address add {address}/64 dev eth0; sleep 3")
            said = guest.run(f"ping6 -c 2 -w 4 -I {address} {prefix}::1", check=False)
            expect(("100% packet loss" not in said) == passes, f"{address} is believed, or is not:\n{said}")
        guest.run("ip link set eth0 down; ip link set eth0 address 00:16:3e:00:00:99; ip link set eth0 up")
        wrong = guest.run(f"ping -c 2 -w 4 {gateway()}", check=False)
        expect("100% packet loss" in wrong, f"another MAC address is believed:\n{wrong}")
        guest.off()


def kill(run, *subcommands):
    """Kills the processes of a run that were started with one of these hidden subcommands."""
    for pid in run.processes():
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(subcommand.encode() in words for subcommand in subcommands):
            os.kill(pid, signal.SIGKILL)


def wait_clean(run):
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            return expect_clean(run)
        except Failure:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def killed_leave_nothing_for_good(run):
    with Shell(run, "killed") as guest, Shell(run, "living") as other:
        first = guest.dhcp()
        own = other.dhcp()
        pid = next(pid for pid in run.processes() if b"killed\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() and
                   b"__domain\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(pid, signal.SIGKILL)
        guest.wait(ANSWER_S)
        # Whoever lives on keeps the network.
        time.sleep(1)
        host(f"ping -q -c 2 -i 0.2 {own}")
        kill(run, "__domain")
        other.wait(ANSWER_S)
    # No other domain comes.
    wait_clean(run)
    # Neither process is left that could clean up: the next one that is started does.
    with Shell(run, "together") as guest:
        guest.dhcp()
        kill(run, "__domain", "__store")
        guest.wait(ANSWER_S)
    run.hospes("block-list", "0")
    wait_clean(run)
    with Shell(run, "next") as guest:
        expect(guest.dhcp() != first, "the next guest has the address of the killed one")
        guest.off()
    expect_clean(run)


def reboot_keeps_the_address(run):
    with Shell(run, "again", "'ip=10.107.0.77'") as guest:
        first = guest.dhcp()
        expect(first == "10.107.0.77", f"the guest has {first} and not the address of `ip`")
        for address, sentence in (("10.107.0.77", "is in use"), ("10.9.0.1", "10.107.0.2 to 10.107.0.254")):
            done = run.hospes("network-attach", "again", f"ip={address}")
            expect(done.returncode == 1 and sentence in done.stderr, f"network-attach with {address}: {done.stderr}")
        guest.send("reboot -f\n")
        guest.wait_for("HOSPES-GUEST ready", BOOT_S)
        guest.wait_for("guest# ", BOOT_S)
        expect(guest.dhcp() == first, "the address is another after a reboot")
        guest.off()
    expect_clean(run)


def driver_starts_over(run):
    with Shell(run, "driver", vcpus=2) as guest:
        first = guest.dhcp()
        for _ in range(3):
            guest.run("cd /sys/bus/xen/drivers/vif && echo vif-0 >unbind && echo vif-0 >bind; cd /")
            deadline = time.monotonic() + ANSWER_S
            while "eth0" not in guest.run("ip link"):
                expect(time.monotonic() < deadline, "the interface does not come back")
            expect(guest.dhcp() == first, "the address is another after the driver started over")
            guest.run(f"ping -c 1 {gateway()}")
        guest.off()
    expect_clean(run)


# ---- other networks -------------------------------------------------------------------------------------------------


def bridge_is_used_as_it_is(run):
    host("ip link add br7 type bridge && ip address add 192.168.77.1/24 dev br7 && ip link set br7 up")
    with Shell(run, "bridged", "'bridge=br7,mac=00:16:3e:01:02:03,vifname=wire7'") as guest:
        expect("br7" in host("ip -o link show wire7"), "the interface is not on the bridge")
        guest.run("ip address add 192.168.77.2/24 dev eth0 && ip link set eth0 up")
        expect("00:16:3e:01:02:03" in guest.run("ip link show eth0"), "the MAC address is another")
        guest.run("ping -c 2 192.168.77.1")
        guest.off()
    expect("br7" in host("ip -o link"), "the bridge went with the guest")
    host("ip link del br7")
    expect_clean(run)


def bridge_of_xen_needs_no_script(run):
    # Where Xen is not installed; no word of a bridge means Xen's.
    expect(not os.path.exists("/etc/xen/scripts/vif-bridge"), "Xen's scripts are installed here")
    for bridge, keys in (("br7", "script=/etc/xen/scripts/vif-bridge,bridge=br7"), ("xenbr0", "script=vif-bridge")):
        missing = run.hospes("create", "/dev/null", 'name="missing"', f'kernel="{vm.GUESTS}/vmlinuz-cloud"', "memory=256", f"vif=['{keys}']")
        expect(missing.returncode == 3 and f"no bridge {bridge}" in missing.stderr, f"a missing bridge: {missing.stderr}")
        host(f"ip link add {bridge} type bridge && ip link set {bridge} up")
        with Shell(run, "bridged", f"'{keys},vifname=wire7'") as guest:
            expect(bridge in host("ip -o link show wire7"), f"the interface is not on {bridge}")
            guest.off()
        host(f"ip link del {bridge}")
    expect_clean(run)


def script_is_called_as_xen_calls_it(run):
    log, script = os.path.join(run.path, "log"), os.path.join(run.path, "vif-test")
    with open(script, "w", encoding="utf-8") as handle:
        # Its nodes and the interface are there both times, and what it leaves running keeps nobody waiting.
        handle.write(f'#!/bin/sh\necho "$1 $2 $vif $XENBUS_PATH $XENBUS_TYPE '
                     f'$(xenstore-read $XENBUS_PATH/ip) '
                     f'$(ip -o link show $vif | cut -d: -f2)" >>{log}\n'
                     f'[ $1 = online ] && {{ ip address add 192.168.78.1/24 dev $vif; sleep {ANSWER_S} & }}\nexit 0\n')
    os.chmod(script, 0o755)
    with Shell(run, "scripted", f"'script={script},ip=192.168.78.2'") as guest:
        guest.run("ip address add 192.168.78.2/24 dev eth0 && ip link set eth0 up && ping -c 2 192.168.78.1")
        guest.off()
    lines = pathlib.Path(log).read_text(encoding="utf-8").splitlines()
    path = "backend/vif/1/0 vif 192.168.78.2  vif1.0"
    expect(lines == [f"{what} type_if=vif vif1.0 {path}" for what in ("online", "offline")], f"the script saw {lines}")
    broken = run.hospes("create", "/dev/null", 'name="broken"', f'kernel="{vm.GUESTS}/vmlinuz-cloud"', "memory=256",
                        "vif=['script=/nonexistent']")
    expect(broken.returncode != 0 and "/nonexistent" in broken.stderr, f"a missing script is no error: {broken.stderr}")
    expect_clean(run)


def script_finds_what_the_operator_said(run):
    log, script = os.path.join(run.path, "log"), os.path.join(run.path, "vif-test")
    names, mac = ("frontend-id", "handle", "type", "mac", "bridge", "script", "vifname"), "00:16:3e:00:00:07"
    with open(script, "w", encoding="utf-8") as handle:
        handle.write(f'#!/bin/sh\n'
                     f'said=$1; for name in {" ".join(names)}; do said="$said $(xenstore-read $XENBUS_PATH/$name || echo -)"; done\n'
                     f'echo "$said" >>{log}\nxenstore-write $XENBUS_PATH/hotplug-status connected\n')
    os.chmod(script, 0o755)
    spec = f"script={script},bridge=br7,mac={mac}"

    def nodes(domid):
        environment = dict(os.environ, XENSTORED_PATH=f"{run.path}/run/xenstored/socket")
        listed = subprocess.run(["xenstore-ls", f"/local/domain/0/backend/vif/{domid}"], env=environment, capture_output=True, text=True, check=False)
        return listed.stdout

    def done(*command):
        said = run.hospes(*command)
        expect(said.returncode == 0, f"{command[0]} failed: {said.stderr}")

    with Shell(run, "scripted", f"'{spec}'") as guest:
        for domid in ("1", "2"):
            expect('hotplug-status = "connected"' in nodes(domid) and 'state = "' in nodes(domid), f"the nodes are {nodes(domid)}")
            done("network-detach", "scripted", "0")
            expect("bridge" not in nodes(domid), f"after network-detach there is {nodes(domid)}")
            done("network-attach", "scripted", spec)
            if domid == "1":
                guest.send("reboot -f\n")
                guest.wait_for("HOSPES-GUEST ready", BOOT_S)
                guest.wait_for("guest# ", BOOT_S)
        guest.off()
    lines = pathlib.Path(log).read_text(encoding="utf-8").splitlines()
    expected = [f"{what} {domid} 0 vif {mac} br7 {script} -" for domid in "12" for what in ("online", "offline") * 2]
    expect(lines == expected, f"the script saw {lines}")
    expect_clean(run)


def script_makes_ready_before_the_guest_sees_it(run):
    log, script, refuse = (pathlib.Path(run.path, name) for name in ("log", "vif-test", "refuse"))
    # Time enough for a guest that sees the interface to connect to it.
    script.write_text(f'#!/bin/sh\n[ $1 = offline ] || sleep 2\n'
                      f'echo "$1 $(ip -o link show $vif | cut -d: -f2) $(xenstore-read /local/domain/1/device/vif/0/state || echo unseen)" >>{log}\n'
                      f'[ $1 = offline ] || ! [ -e {refuse} ]\n', encoding="utf-8")
    script.chmod(0o755)
    with Shell(run, "late", None) as guest:
        done = run.hospes("network-attach", "late", f"script={script}")
        expect(done.returncode == 0, f"network-attach failed: {done.stderr}")
        wait_until(lambda: "eth0" in guest.run("ip link"), "the guest has no interface")
        done = run.hospes("network-detach", "late", "0")
        expect(done.returncode == 0, f"network-detach failed: {done.stderr}")
        refuse.touch()
        done = run.hospes("network-attach", "late", f"script={script}")
        expect(done.returncode == 1 and f"{script} failed" in done.stderr, f"network-attach with a script that fails: {done.stderr}")
        expect("eth0" not in guest.run("ip link"), "the guest has the interface whose script failed")
        guest.off()
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    expect([line[:2] for line in lines] == [["online", "vif1.0"], ["offline", "vif1.0"]] * 2, f"the script saw {lines}")
    expect([line[2] for line in lines if line[0] == "online"] == ["unseen"] * 2, f"the guest had the interface before the script had run: {lines}")
    expect_clean(run)


def script_that_hangs_ends_with_its_domain(run):
    script, started = os.path.join(run.path, "vif-hangs"), pathlib.Path(run.path, "started")
    for when, why in (("online", "its domain was destroyed"), ("offline", "its domain was destroyed and it did not end soon")):
        started.unlink(missing_ok=True)
        with open(script, "w", encoding="utf-8") as handle:
            handle.write(f"#!/bin/sh\n[ $1 = {when} ] || exit 0\nsleep 1000 &\necho $! >{started}\nwait\n")
        os.chmod(script, 0o755)
        command = [vm.hospes_binary(), "create", "-q", "-p", "/dev/null", 'name="hangs"', f'kernel="{vm.GUESTS}/vmlinuz-cloud"', "memory=256",
                   f"vif=['script={script}']"]
        with subprocess.Popen(command, env=run.environment(), stderr=subprocess.PIPE, text=True) as creating:
            if when == "offline":
                expect(creating.wait(ANSWER_S) == 0, "the domain cannot be made")
            else:
                wait_until(started.exists, "the script does not run")
            done = run.hospes("destroy", "hangs")
            expect(done.returncode == 0, f"destroy failed: {done.stderr}")
            said = creating.communicate(timeout=ANSWER_S)[1]
        log = pathlib.Path(run.path, "state/hangs.log").read_text(encoding="utf-8")
        expect(f"{script} failed: it was killed, for {why}" in log, f"the log does not tell of the script: {log}")
        expect(when == "offline" or f"{script} failed: it was killed" in said, f"create does not tell of the script: {said}")
        wait_until(lambda: is_over(int(started.read_text(encoding="ascii"))), "what the script started lives on")
    expect_clean(run)


def script_ends_with_a_killed_process(run):
    script, started = os.path.join(run.path, "vif-hangs"), pathlib.Path(run.path, "started")
    with open(script, "w", encoding="utf-8") as handle:
        handle.write(f"#!/bin/sh\nsleep 1000 &\necho $! >{started}\nwait\n")
    os.chmod(script, 0o755)
    command = [vm.hospes_binary(), "create", "-q", "/dev/null", 'name="hangs"', f'kernel="{vm.GUESTS}/vmlinuz-cloud"', "memory=256",
               f"vif=['script={script}']"]
    with subprocess.Popen(command, env=run.environment(), stderr=subprocess.PIPE, text=True) as creating:
        wait_until(lambda: started.exists() and started.read_text(encoding="ascii").strip(), "the script does not run")
        # No other command comes.
        kill(run, "__domain")
        creating.communicate(timeout=ANSWER_S)
    wait_until(lambda: is_over(int(started.read_text(encoding="ascii"))), "what the script started lives on")
    wait_clean(run)


def is_over(pid):
    """Whether a process has ended, even where nobody has asked for its status."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


PASST = """#!/bin/sh
[ -e {refuse} ] && echo no way >&2 && exit 1
exec {passt} "$@"
"""


def user_mode_needs_no_interface(run):
    # A passt that does not start where this file is.
    refuse = pathlib.Path(run.path) / "refuse"
    program = pathlib.Path(run.path) / "passt"
    program.write_text(PASST.format(refuse=refuse, passt=shutil.which("passt")))
    program.chmod(0o755)
    path = {"PATH": f"{run.path}:{os.environ['PATH']}"}
    with outside(), web("127.0.0.1", "of-the-loop-back" * 10000), unittest.mock.patch.dict(os.environ, path):
        with Shell(run, "user", "'type=user'") as guest:
            expect("vif" not in host("ip -o link"), "there is an interface")
            expect(guest.dhcp() == f"{OUTSIDE}.1", "the guest has another address than the host")
            # To passt the address of the host's router means the host itself.
            said = guest.run(f"wget -q -O - http://{OUTSIDE}.2:8080/")
            expect(said.count("of-the-loop-back") == 10000, "the host's page is another")
            # A network whose process is killed is replaced; as long as there is none, the user is told.
            refuse.touch()
            domain = json.loads(next((pathlib.Path(run.path) / "run" / "domains").glob("*/domain.json")).read_text())["pid"]
            host(f"pkill -KILL -P {domain} passt")
            deadline = time.monotonic() + ANSWER_S
            while "user: vif 0: its wire broke" not in run.hospes("network-list", "user").stderr:
                expect(time.monotonic() < deadline, "network-list does not tell that the network is gone")
                time.sleep(0.1)
            listed = run.hospes("list").stderr
            expect("user: vif 0: its wire broke and no new one is to be had" in listed, f"`list` does not tell: {listed}")
            refuse.unlink()
            while run.hospes("network-list", "user").stderr:
                expect(time.monotonic() < deadline, "the network does not come back")
                time.sleep(0.1)
            expect(guest.dhcp() == f"{OUTSIDE}.1", "the guest has another address than the host")
            said = guest.run(f"wget -q -O - http://{OUTSIDE}.2:8080/")
            expect(said.count("of-the-loop-back") == 10000, "the host's page is another")
            guest.off()


def comes_and_goes_while_the_guest_runs(run):
    with Shell(run, "plug", None, vcpus=2) as guest:
        expect("eth0" not in guest.run("ip link"), "there is an interface")
        for _ in range(2):
            done = run.hospes("network-attach", "plug", "mac=00:16:3e:00:00:07")
            expect(done.returncode == 0, f"network-attach failed: {done.stderr}")
            deadline = time.monotonic() + ANSWER_S
            while "eth0" not in guest.run("ip link"):
                expect(time.monotonic() < deadline, "the guest has no interface")
            guest.dhcp()
            guest.run(f"ping -c 2 {gateway()}")
            done = run.hospes("network-detach", "plug", "0")
            expect(done.returncode == 0, f"network-detach failed: {done.stderr}")
            deadline = time.monotonic() + ANSWER_S
            while "eth0" in guest.run("ip link"):
                expect(time.monotonic() < deadline, "the guest has an interface still")
            expect_clean(run)
        guest.off()


TESTS = (
    guests_find_host_and_each_other, carries_much_and_unharmed, top_shows_what_guests_send_and_receive, rate_is_what_one_flow_gets,
    outside_is_reached_but_does_not_reach, guest_speaks_for_itself_only, killed_leave_nothing_for_good, reboot_keeps_the_address, bridge_is_used_as_it_is,
    bridge_of_xen_needs_no_script, script_is_called_as_xen_calls_it, script_finds_what_the_operator_said, script_makes_ready_before_the_guest_sees_it,
    script_that_hangs_ends_with_its_domain, script_ends_with_a_killed_process, user_mode_needs_no_interface,
    driver_starts_over, comes_and_goes_while_the_guest_runs,
)


def run(test):
    try:
        with vm.RunDirectory() as directory:
            test(directory)
    except runner.ERRORS:
        # What a failed test leaves must not make the next one fail.
        host("for l in $(ip -o link | grep -oE 'hospes[0-9]+|br7|xenbr0|out0'); do ip link del $l; done; nft flush ruleset",
             check=False)
        raise


def main():
    wanted = {test.__name__: functools.partial(run, test) for test in TESTS}
    chosen = runner.select(runner.parser(__doc__).parse_args(), wanted)
    if os.geteuid() != 0:
        print(f"tests/network.py makes networks, which needs root: {len(chosen)} skipped")
        return 0
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])
    host("ip link set lo up")
    return runner.conclude([runner.passes(name, wanted[name]) for name in chosen])


if __name__ == "__main__":
    sys.exit(main())
