"""Where a test's domains run: directories and, where one can be made, a network namespace of their own."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import netns  # noqa: E402
import vm  # noqa: E402


class Place:
    """Stands until `stack` is closed; `purpose` names the namespace, `space` is None without one."""

    def __init__(self, stack, purpose):
        self.stack = stack
        self.run = stack.enter_context(vm.RunDirectory())
        self.space = stack.enter_context(netns.Namespace(purpose)) if netns.possible() else None

    def path(self, name):
        return os.path.join(self.run.path, name)

    def command(self, *argv):
        return self.space.command(*argv) if self.space else list(argv)
