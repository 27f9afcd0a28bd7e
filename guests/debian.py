"""Debian guests with a disk of their own: how they are started, and commands in them over the console.

The images are those of `guests/debian.sh`. A test gets a disk that lies over an image and takes what the guest writes.
"""

import contextlib
import http.server
import re
import subprocess
import threading

import vm

IMAGES = vm.GUESTS / "debian"
LOGIN_S = 300
COMMAND_S = 120
# What the console shows when root is logged in.
PROMPT = r"root@[a-z0-9-]+:~# "
ROOT_DEVICE = {"hospes": "/dev/xvda", "tcg": "/dev/vda"}


def image(name, extension="img"):
    """A file of an image; SystemExit with a sentence where it has not been made."""
    path = IMAGES / f"{name}.{extension}"
    if not path.exists():
        raise SystemExit(f"{path} is not there: make it with guests/debian.sh {name}")
    return str(path)


def overlay(path, name="test"):
    """A qcow2 image at `path` over an image; returns its path."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image(name), "-F", "raw", str(path)], check=True, stdin=subprocess.DEVNULL
    )
    return str(path)


def spec(disks, system="hospes", image_name="test", **more):
    """A vm.Spec that boots Debian from the first of `disks`."""
    more.setdefault("memory_mb", 512)
    line = f"root={ROOT_DEVICE[system]} ro quiet {more.pop('command_line', '')}".strip()
    image(image_name)
    return vm.Spec(
        kernel=f"debian/{image_name}.vmlinuz", ramdisk=f"debian/{image_name}.initrd", command_line=line, disks=tuple(disks), **more
    )


class Shell:
    """A shell of root in a guest: commands with their output and status, one after the other."""

    def __init__(self, guest, timeout=LOGIN_S):
        self.guest = guest
        self.number = 0
        self.login = guest.arrival(guest.wait_for(PROMPT, timeout).start())
        # A shell that does not edit lines, on a terminal that does not echo: the output is the command's alone.
        guest.send("exec sh\n")
        guest.wait_for("# ", COMMAND_S)
        guest.send("stty -echo; PS1=; PS2=; echo quiet''now\n")
        guest.wait_for("quietnow\n", COMMAND_S)

    def again(self, guest, number):
        """The same shell on another console of its domain, that of a restored one. `number` is above those of all commands so far."""
        shell = object.__new__(Shell)
        shell.guest, shell.number, shell.login = guest, number, self.login
        return shell

    def send(self, command):
        """Starts a command; `result` waits for it."""
        self.number += 1
        self.guest.send(f"{{ {command}\n}} 2>&1; echo \"<@$?@{self.number}@>\"\n")

    def result(self, timeout=COMMAND_S):
        """(status, output) of the command that was sent last."""
        match = self.guest.wait_for(rf"(?s)(.*?)<@(\d+)@{self.number}@>\n", timeout)
        return int(match.group(2)), match.group(1)

    def status(self, command, timeout=COMMAND_S):
        self.send(command)
        return self.result(timeout)

    def run(self, command, timeout=COMMAND_S):
        """The output of a command that has to succeed; GuestError with it otherwise."""
        status, output = self.status(command, timeout)
        if status != 0:
            raise vm.GuestError(f"in the guest `{command}` ended with status {status}:\n{output[-2000:]}")
        return output

    def address(self, timeout=60):
        """The guest's IPv4 address and that of its gateway, once it has them."""
        script = (
            f"for i in $(seq {timeout * 2}); do ip -4 route show default | grep -q . && break; sleep 0.5; done; "
            "ip -4 -o addr show scope global; ip -4 route show default"
        )
        output = self.run(script, timeout + COMMAND_S)
        own = re.search(r"inet (\d+\.\d+\.\d+\.\d+)/", output)
        gateway = re.search(r"default via (\d+\.\d+\.\d+\.\d+)", output)
        if not own or not gateway:
            raise vm.GuestError(f"the guest has no address {timeout} s after it was asked:\n{output}\n{self.guest.tail()}")
        return own.group(1), gateway.group(1)

    def power_off(self, timeout=COMMAND_S):
        """The monitor's exit status once the guest has powered itself off."""
        self.guest.send("poweroff\n")
        return self.guest.wait(timeout)


@contextlib.contextmanager
def web_server(directory, gateway):
    """Serves a directory by HTTP to guests whose gateway is `gateway`; gives the port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, directory=str(directory), **more)

        def log_message(self, *_):
            pass

    try:
        server = http.server.ThreadingHTTPServer((gateway, 0), Quiet)
    except OSError:
        # The gateway of a user-mode network is no address of this machine: it stands for this machine's loopback.
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
