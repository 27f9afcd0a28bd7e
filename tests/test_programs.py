"""python3 -m unittest discover -s tests: what `make run` and the soak conclude and say, without a guest."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "guests"))


def program(path):
    """A program of this repository as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Soak(unittest.TestCase):
    def expected(self, printed, skip=()):
        """What the soak expects of a guest where the tasks have printed this on the machine itself."""
        done = subprocess.CompletedProcess([], 0, stdout=printed, stderr="")
        with mock.patch("subprocess.run", return_value=done):
            return program("soak/run.py").expected_results(skip)

    def test_task_that_fails_here_ends_the_soak(self):
        with self.assertRaisesRegex(SystemExit, "debugger"):
            self.expected("RESULT luajit 0a1b-0\nRESULT debugger 2c3d-127\nRESULT large 2c3d-10\n")

    def test_task_that_is_skipped_may_fail_here(self):
        self.assertEqual(self.expected("RESULT luajit 0a1b-0\nRESULT debugger 2c3d-127\n", ["debugger"]), {"luajit": "0a1b-0"})


class Hint(unittest.TestCase):
    """How a domain of `make run` that runs on is ended."""

    def hint(self, user, **environment):
        """The command line that a user is told, whose shell has this environment."""
        with mock.patch("os.geteuid", return_value=user), mock.patch.dict("os.environ", HOME="/h", HOSPES="/b/hospes", **environment):
            for name in {"HOSPES_RUN_DIR", "XDG_RUNTIME_DIR"} - environment.keys():
                os.environ.pop(name, None)
            run = program("guests/run.py")
            with mock.patch("os.execve", side_effect=OSError), mock.patch("debian.image", return_value="run.cfg"):
                said = io.StringIO()
                with contextlib.redirect_stderr(said):
                    run.shell()
        return re.search("lets it run on: `(.*)` ends it", said.getvalue()).group(1)

    def test_run_directory_of_this_domain_alone_is_named(self):
        self.assertRegex(self.hint(1000), "^HOSPES_RUN_DIR=/h/.local/state/hospes/run /b/hospes shutdown debian-")

    def test_run_directory_of_the_shell_is_not_named(self):
        self.assertRegex(self.hint(0), "^/b/hospes shutdown debian-")
        self.assertRegex(self.hint(1000, XDG_RUNTIME_DIR="/r"), "^/b/hospes shutdown debian-")
        self.assertRegex(self.hint(1000, HOSPES_RUN_DIR="/r"), "^/b/hospes shutdown debian-")


if __name__ == "__main__":
    unittest.main()
