#!/usr/bin/env python3
"""`make run`: boots a full Debian from a disk of its own, with a network, in Hospes.

With a terminal: root's shell in the guest. Without one: a scripted visit, which looks at the machine from inside, writes to its
disk, fetches a file from this machine, and fails when anything that should be there is missing. What the guest writes to its
disk is there at the next `make run`.
"""

import hashlib
import os
import pathlib
import re
import shlex
import sys
import tempfile
import time

import debian
import vm

# What `yes hospes | head -c 8000000` gives, computed here by other means than in the guest.
PATTERN = (b"hospes\n" * (8_000_000 // 7 + 1))[:8_000_000]
FETCHED = os.urandom(300_000)

VISIT = {
    "kernel": "cat /proc/version; dmesg | grep -E 'Hypervisor detected|Booting kernel on'",
    "processor": "grep -m 4 -E '^(vendor_id|model name|cpu MHz|flags)' /proc/cpuinfo",
    "mitigations": "cd /sys/devices/system/cpu/vulnerabilities && grep . ./*",
    "memory": "grep -E '^(MemTotal|MemFree)' /proc/meminfo",
    "system": "systemctl --version | head -n 1; systemctl list-units --state=failed --no-legend --plain; "
    "echo failed units: $(systemctl list-units --state=failed --no-legend --plain | wc -l)",
    "disk": "df -h / | tail -n 1; yes hospes | head -c 8000000 >/var/tmp/pattern && sync && "
    "echo 3 >/proc/sys/vm/drop_caches && sha256sum /var/tmp/pattern; rm -f /var/tmp/pattern",
}
REQUIRED = {
    "the kernel's version": r"Linux version \d+\.\d+",
    "the kernel naming Xen as its hypervisor": r"Hypervisor detected: Xen HVM",
    "the kernel booting as a PVH guest": r"Booting kernel on Xen PVH",
    "a processor's model": r"model name\s*: \S",
    "a processor's feature flags": r"flags\s*: .*\bsse2\b",
    "the state of the mitigations": r"spectre_v2:\S",
    "the size of memory": r"MemTotal:\s+\d+ kB",
    "systemd": r"systemd \d+",
    "that no unit has failed": r"failed units: 0\b",
    "its root file system on a disk": r"/dev/xvda",
}


def environment():
    """This process's, with a run-time directory for users who have none."""
    chosen = dict(os.environ)
    if os.geteuid() != 0 and not any(chosen.get(known) for known in ("HOSPES_RUN_DIR", "XDG_RUNTIME_DIR")):
        # A login without a session manager: a directory of the user's own will do.
        chosen["HOSPES_RUN_DIR"] = os.path.expanduser("~/.local/state/hospes/run")
    return chosen


def in_user_shell(chosen, *words):
    """A command line as the user has to type it to reach a domain that was started with the environment `chosen`."""
    name = "HOSPES_RUN_DIR"
    line = shlex.join(words)
    return line if chosen.get(name) == os.environ.get(name) else f"{name}={shlex.quote(chosen[name])} {line}"


def shell():
    """Becomes the console of a new domain; returns only when the monitor cannot be started."""
    name = f"debian-{os.getpid()}"
    binary = vm.hospes_binary()
    chosen = environment()
    print(
        f"run: booting Debian as domain {name} with {debian.image('run', 'cfg')}\n"
        "run: in the guest, `poweroff` ends it; Ctrl-] leaves the console and lets it run on: "
        f"`{in_user_shell(chosen, binary, 'shutdown', name)}` ends it",
        file=sys.stderr,
    )
    try:
        os.execve(binary, [binary, "create", "-c", debian.image("run", "cfg"), f'name="{name}"'], chosen)
    except OSError as error:
        return f"{binary} cannot be started ({error.strerror}): build it with cargo build --release"


def may_ping():
    """Whether this user may send echo requests: a user-mode network sends those of its guests in the user's name."""
    if os.geteuid() == 0:
        return True
    try:
        first, last = map(int, pathlib.Path("/proc/sys/net/ipv4/ping_group_range").read_text().split())
    except (OSError, ValueError):
        return False
    return first <= os.getegid() <= last


def look_around(guest, directory):
    """The visit's report and what is wrong in it, as sentences."""
    shell_in_guest = debian.Shell(guest)
    print(f"run: root is logged in after {shell_in_guest.login:.2f} s", file=sys.stderr)
    report = ""
    for title, command in VISIT.items():
        report += f"== {title}\n{shell_in_guest.run(command)}"
    problems = [f"the guest did not show {what}" for what, pattern in REQUIRED.items() if not re.search(pattern, report)]
    expected = hashlib.sha256(PATTERN).hexdigest()
    if expected not in report:
        problems.append(f"the guest read back other bytes from its disk than it wrote: sha256 {expected} is missing")

    own, gateway = shell_in_guest.address()
    ping = f"ping -c 3 -i 0.2 {gateway} | tail -n 2; " if may_ping() else ""
    with debian.web_server(directory, gateway) as port:
        report += f"== network\naddress {own}, gateway {gateway}\n" + shell_in_guest.run(
            f"{ping}wget -q -O /tmp/fetched http://{gateway}:{port}/fetched && sha256sum /tmp/fetched"
        )
    if hashlib.sha256(FETCHED).hexdigest() not in report:
        problems.append("the file that the guest fetched by HTTP is not the one that was served")
    if ping and not re.search(r" 0% packet loss", report):
        problems.append("the guest's pings to its gateway were not all answered")
    return report, problems


def visit():
    print("run: no terminal here, so this is a scripted visit", file=sys.stderr)
    argv = [vm.hospes_binary(), "create", "-c", debian.image("run", "cfg"), 'name="debian-visit"']
    with vm.RunDirectory() as run, tempfile.TemporaryDirectory(prefix="hospes-visit-") as directory:
        (pathlib.Path(directory) / "fetched").write_bytes(FETCHED)
        with vm.Guest(argv, run.environment()) as guest:
            try:
                report, problems = look_around(guest, directory)
                guest.send("poweroff\n")
                status = guest.wait(debian.COMMAND_S)
                took = time.monotonic() - guest.started
            except vm.GuestError as error:
                return str(error)
            print(report, end="")
            print(f"whole visit {took:.2f} s")
            if status != 0:
                problems.append(f"the monitor's exit status was {status} instead of 0\n{guest.tail()}")
    if problems:
        return "; ".join(problems)
    print("run: everything that should be there is there")
    return None


def main():
    if not os.access(vm.hospes_binary(), os.X_OK):
        return f"{vm.hospes_binary()} is not there: build it with cargo build --release"
    if sys.stdin.isatty() and sys.stdout.isatty():
        return shell()
    return visit()


if __name__ == "__main__":
    failure = main()
    if failure:
        sys.exit(f"run: {failure}")
