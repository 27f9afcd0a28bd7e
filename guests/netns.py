"""Network namespaces for tests and measurements: what goes on in them does not touch this machine's network.

Making one takes root and ip(8); `possible` says whether both are here.
"""

import os
import shutil
import subprocess


def possible():
    return os.geteuid() == 0 and shutil.which("ip") is not None


def run(*argv, check=True):
    return subprocess.run(argv, check=check, stdin=subprocess.DEVNULL, capture_output=True, text=True)


class Namespace:
    """A namespace of its own, with its loopback up; everything in it goes when it is closed."""

    def __init__(self, purpose):
        self.name = f"hospes-{purpose}-{os.getpid()}"

    def __enter__(self):
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        run("ip", "netns", "del", self.name, check=False)

    def command(self, *argv):
        """The same command, in this namespace."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv, check=True):
        return run(*self.command(*argv), check=check)

    def ip(self, *arguments):
        run("ip", "-n", self.name, *arguments)

    def tap(self, name, address):
        """A tap with an address, for a monitor in this namespace."""
        self.ip("tuntap", "add", "dev", name, "mode", "tap")
        self.ip("address", "add", address, "dev", name)
        self.ip("link", "set", name, "up")


def join(one, one_address, other, other_address):
    """A pair of virtual Ethernet interfaces between two namespaces."""
    run("ip", "link", "add", "veth0", "netns", one.name, "type", "veth", "peer", "name", "veth0", "netns", other.name)
    for side, address in ((one, one_address), (other, other_address)):
        side.ip("address", "add", address, "dev", "veth0")
        side.ip("link", "set", "veth0", "up")
