#!/usr/bin/env python3
"""`make run`: boots Debian's cloud kernel in Hospes with 512 MB.

With a terminal: a shell in the guest. Without one: a scripted visit, which prints what the machine looks like from
inside and fails when anything that should be there is missing.
"""

import hashlib
import os
import re
import sys
import time

import vm

BOOT_TIMEOUT_S = 120
# What `yes hospes | head -c 8000000` gives, computed here by other means than in the guest.
PATTERN = (b"hospes\n" * (8_000_000 // 7 + 1))[:8_000_000]

REQUIRED = {
    "the kernel's version": r"Linux version \d+\.\d+",
    "the kernel naming Xen as its hypervisor": r"Hypervisor detected: Xen HVM",
    "the kernel booting as a PVH guest": r"Booting kernel on Xen PVH",
    "a processor's model": r"model name\s*: \S",
    "a processor's feature flags": r"flags\s*: .*\bsse2\b",
    "the state of the mitigations": r"spectre_v2:\S",
    "the size of memory": r"MemTotal:\s+\d+ kB",
    "the time since boot": r"boot to first process: \d",
}


def shell():
    """Becomes the console of a new domain; returns only when the monitor cannot be started."""
    name = f"run-{os.getpid()}"
    spec = vm.Spec(command_line="quiet hospes.do=shell", name=name)
    environment = dict(os.environ)
    if os.geteuid() != 0 and not any(environment.get(known) for known in ("HOSPES_RUN_DIR", "XDG_RUNTIME_DIR")):
        # A login without a session manager: a directory of the user's own will do.
        environment["HOSPES_RUN_DIR"] = os.path.expanduser("~/.local/state/hospes/run")
    argv = spec.argv("hospes")
    print(
        f"run: booting a Debian kernel as domain {name}\n"
        f"run: in the guest, `poweroff -f` ends it; Ctrl-] leaves the console and lets it run on: `{argv[0]} destroy {name}` ends it",
        file=sys.stderr,
    )
    try:
        os.execve(argv[0], argv, environment)
    except OSError as error:
        return f"{argv[0]} cannot be started ({error.strerror}): build it with cargo build --release"


def check(text):
    """What is missing or wrong in the visit's report, as sentences."""
    report = vm.between(text, "visit")
    problems = [f"the guest did not show {what}" for what, pattern in REQUIRED.items() if not re.search(pattern, report)]
    memory = re.search(r"MemTotal:\s+(\d+) kB", report)
    if memory and not 400_000 < int(memory.group(1)) <= 512 * 1024:
        problems.append(f"the guest was given 512 MB and sees {memory.group(1)} kB")
    expected = hashlib.sha256(PATTERN).hexdigest()
    computed = re.search(r"sha256 ([0-9a-f]{64})", report)
    if not computed:
        problems.append("the guest did not show a sha256")
    elif computed.group(1) != expected:
        problems.append(f"the guest computed sha256 {computed.group(1)}, this machine {expected}")
    return problems


def visit(system):
    print("run: no terminal here, so this is a scripted visit", file=sys.stderr)
    spec = vm.Spec(command_line="hospes.do=visit", name="hospes-visit")
    with vm.RunDirectory() as run, vm.Guest(spec.argv(system), run.environment()) as guest:
        try:
            guest.wait_for("Linux version", BOOT_TIMEOUT_S)
            print("run: the kernel is starting", file=sys.stderr)
            ready = guest.wait_for("HOSPES-GUEST ready", BOOT_TIMEOUT_S)
            boot = guest.arrival(ready.start())
            print("run: the first process is running", file=sys.stderr)
            status = guest.wait(BOOT_TIMEOUT_S)
            took = time.monotonic() - guest.started
            banner = re.search(r".*Linux version.*", guest.console).group(0)
            report = vm.between(guest.console, "visit")
            problems = check(guest.console)
        except vm.GuestError as error:
            return str(error)
    print(banner)
    print(report, end="")
    print(f"first process of the guest after {boot:.2f} s, whole visit {took:.2f} s")
    if status != 0:
        problems.append(f"the monitor's exit status was {status} instead of 0\n{guest.tail()}")
    if problems:
        return "; ".join(problems)
    print("run: everything that should be there is there")
    return None


def main(arguments):
    system = "tcg" if arguments == ["--system", "tcg"] else "hospes"
    if system == "hospes" and not os.access(vm.hospes_binary(), os.X_OK):
        return f"{vm.hospes_binary()} is not there: build it with cargo build --release"
    if system == "hospes" and sys.stdin.isatty() and sys.stdout.isatty():
        return shell()
    return visit(system)


if __name__ == "__main__":
    failure = main(sys.argv[1:])
    if failure:
        sys.exit(f"run: {failure}")
