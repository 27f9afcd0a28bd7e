"""python3 -m unittest discover -s tests: what the shell scripts and the Makefile do to a user's files and machine.

The programs that they would start are stand-ins that note how they were called, so nothing is fetched, installed or booted.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "guests"))

ENDINGS = ("img", "vmlinuz", "initrd", "cfg")


class Scripts(unittest.TestCase):
    """A directory `home` with stand-ins in `tools`, which are found first."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory(prefix="hospes-scripts-")
        self.addCleanup(holder.cleanup)
        self.home = pathlib.Path(holder.name)
        self.tools = self.home / "tools"
        self.tools.mkdir()
        self.guests = self.home / "guests"
        self.calls = self.home / "calls"
        self.environment = {
            "PATH": f"{self.tools}:/usr/bin:/bin", "HOME": str(self.home), "HOSPES_GUESTS": str(self.guests), "CALLS": str(self.calls),
            "LC_ALL": "C",
        }

    def tool(self, name, script="", directory=None):
        """A program that notes its name and arguments, then does what `script` says; its path."""
        path = (directory or self.tools) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n{script}\n')
        path.chmod(0o755)
        return str(path)

    def called(self):
        return self.calls.read_text() if self.calls.exists() else ""

    def run_here(self, *argv, status=0):
        """Standard output and error of a command in the repository, which has to end with `status`."""
        done = subprocess.run(
            argv, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout


class RunImage(Scripts):
    """guests/debian.sh run"""

    # Makes what `hospes image debian ... FILE` makes.
    MAKE = """for last; do :; done
base=${last%.img}
for ending in img vmlinuz initrd; do echo new >"$base.$ending"; done
printf 'kernel = "%s"\\nramdisk = "%s"\\ndisk = [ "format=raw, target=%s" ]\\n' "$base.vmlinuz" "$base.initrd" "$last" >"$base.cfg"
"""

    def setUp(self):
        super().setUp()
        self.environment["HOSPES"] = self.tool("hospes", self.MAKE)
        self.images = self.guests / "debian"

    def make(self, status=0):
        return self.run_here("guests/debian.sh", "run", status=status)

    def test_image_of_an_older_recipe_is_kept(self):
        self.make()
        (self.images / "run.img").write_text("the user's")
        (self.images / "run.key").write_text("another\n")
        self.calls.unlink()
        self.assertIn("older recipe", self.make())
        self.assertEqual(self.called(), "")
        self.assertEqual((self.images / "run.img").read_text(), "the user's")

    def test_image_of_this_recipe_is_kept_without_a_word(self):
        self.make()
        self.calls.unlink()
        self.assertEqual(self.make(), "")
        self.assertEqual(self.called(), "")

    def test_removed_image_is_made_anew(self):
        self.make()
        (self.images / "run.img").unlink()
        self.make()
        self.assertEqual(self.called().count("image debian"), 2)
        self.assertTrue(all((self.images / f"run.{ending}").exists() for ending in ENDINGS))

    def test_image_without_its_kernel_is_kept(self):
        self.make()
        (self.images / "run.vmlinuz").unlink()
        self.calls.unlink()
        self.assertIn("move run.img away", self.make(status=1))
        self.assertEqual(self.called(), "")

    def test_moved_directory_boots_its_own_files(self):
        self.make()
        self.calls.unlink()
        # From the second place to the third, the characters that mean something are in the configuration as well.
        for name in ('a & "b"|c\\d#,e', "plain"):
            moved = self.home / name
            self.guests = self.guests.rename(moved)
            self.environment["HOSPES_GUESTS"] = str(moved)
            self.make()
            self.assertEqual(self.called(), "")
            written = str(moved / "debian").replace("\\", "\\\\").replace('"', '\\"')
            self.assertEqual(
                (moved / "debian/run.cfg").read_text(),
                f'kernel = "{written}/run.vmlinuz"\nramdisk = "{written}/run.initrd"\n'
                f'disk = [ "format=raw, target={written}/run.img" ]\n',
            )


if __name__ == "__main__":
    unittest.main()
