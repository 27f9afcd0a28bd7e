"""python3 -m unittest discover -s tests: what `make run` and the soak conclude and say, without a guest."""

import importlib.util
import pathlib
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


if __name__ == "__main__":
    unittest.main()
