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


class Images(Scripts):
    """guests/debian.sh"""

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

    def test_repository_that_could_not_be_fetched_is_fetched_again(self):
        (self.guests / "apt").mkdir(parents=True)
        (self.guests / "apt/updated").touch()
        self.tool("apt-cache", "echo 'hello | 2.10-3 | http://deb.debian.org/debian bookworm/main amd64 Packages'")
        self.tool("dpkg-scanpackages", "cat hello.deb 2>/dev/null; exit 0")
        self.tool("apt-get", "exit 100")
        self.assertIn("could not be fetched", self.run_here("guests/debian.sh", "test", status=1))
        packages = self.images / "repository/Packages"
        self.assertFalse(packages.exists())
        # As left behind by a download that failed unnoticed.
        packages.touch()
        self.tool("apt-get", "echo Package: hello >hello.deb")
        self.run_here("guests/debian.sh", "test")
        self.assertEqual(packages.read_text(), "Package: hello\n")


class Install(Scripts):
    """make install, make uninstall"""

    OF_EVERYONE = {
        "bin/hospes", "share/man/man1/hospes.1", "share/man/man5/hospes.cfg.5", "share/bash-completion/completions/hospes",
        "share/zsh/site-functions/_hospes", "share/fish/vendor_completions.d/hospes.fish",
    }
    OF_XL = {
        "bin/xl", "sbin/xl", "sbin/xentop", "share/man/man1/xl.1", "share/bash-completion/completions/xl", "share/fish/vendor_completions.d/xl.fish",
    }
    UNIT = "lib/systemd/system/hospes-domains.service"

    def setUp(self):
        super().setUp()
        self.binary = pathlib.Path(self.tool("hospes", 'echo "made by $*"', self.home / "built/release"))
        self.environment["CARGO_TARGET_DIR"] = str(self.home / "built")
        self.tool("cargo")
        self.tool("systemctl")
        self.user(1000)
        self.stage = self.home / "stage"

    def user(self, number):
        self.tool("id", f"echo {number}")

    def make(self, *words, status=0):
        return self.run_here("make", "--no-print-directory", *words, status=status)

    def tree(self, below="."):
        """The files under the place where things are put."""
        top = self.stage / below
        return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}

    def test_package_has_everything_and_is_removed_again(self):
        self.make("install", f"DESTDIR={self.stage}", "XL=1")
        self.assertEqual(self.tree("usr/local"), self.OF_EVERYONE | self.OF_XL | {self.UNIT})
        for directory in ("etc/hospes/auto", "etc/xen/auto"):
            self.assertTrue((self.stage / directory).is_dir())
        for link in ("xl", "xentop"):
            self.assertEqual((self.stage / "usr/local/sbin" / link).resolve(), self.stage / "usr/local/bin/hospes")
        page = self.stage / "usr/local/share/man/man5/hospes.cfg.5"
        self.assertEqual((page.read_text(), page.stat().st_mode & 0o777), ("made by manual hospes.cfg.5\n", 0o644))
        (self.stage / "etc/hospes/auto/web.cfg").write_text("memory = 512\n")
        self.make("uninstall", f"DESTDIR={self.stage}")
        self.assertEqual(self.tree(), {"etc/hospes/auto/web.cfg"})
        self.assertFalse((self.stage / "etc/xen").exists())

    def test_what_others_have_put_beside_it_stays(self):
        self.make("install", f"DESTDIR={self.stage}", "XL=1")
        for link in ("bin/xl", "sbin/xl"):
            (self.stage / "usr/local" / link).unlink()
            (self.stage / "usr/local" / link).symlink_to("../lib/xen/bin/xl")
        (self.stage / "etc/xen/auto/web").write_text("memory = 512\n")
        self.make("uninstall", f"DESTDIR={self.stage}")
        self.assertEqual(self.tree(), {"etc/xen/auto/web", "usr/local/bin/xl", "usr/local/sbin/xl"})

    def test_directories_of_xen_stay_where_xl_is_not_ours(self):
        (self.stage / "etc/xen/auto").mkdir(parents=True)
        self.make("install", f"DESTDIR={self.stage}")
        self.make("uninstall", f"DESTDIR={self.stage}")
        self.assertTrue((self.stage / "etc/xen/auto").is_dir())

    def test_names_of_directories_may_have_spaces(self):
        stage, prefix = self.stage / "a place", self.stage / "my own"
        self.make("install", f"DESTDIR={stage}", "XL=1")
        self.assertEqual(self.tree("a place/usr/local"), self.OF_EVERYONE | self.OF_XL | {self.UNIT})
        self.assertTrue((stage / "etc/xen/auto").is_dir())
        self.make("uninstall", f"DESTDIR={stage}")
        self.make("install", f"PREFIX={prefix}", "XL=1")
        self.assertEqual(self.tree("my own"), self.OF_EVERYONE | self.OF_XL)
        self.make("uninstall", f"PREFIX={prefix}")
        self.assertEqual(self.tree(), set())
        # Not every shell replaces it.
        self.make("install", "PREFIX=~/stage")
        self.assertEqual(self.tree(), self.OF_EVERYONE)

    def test_unit_survives_a_domain_that_is_killed_for_lack_of_memory(self):
        self.make("install", f"DESTDIR={self.stage}", "PREFIX=/usr")
        unit = self.stage / self.UNIT
        self.assertIn("\nOOMPolicy=continue\n", unit.read_text())
        self.assertIn("\nExecStart=-/usr/bin/hospes domains start\n", unit.read_text())

    def test_nothing_is_built_as_root(self):
        self.make("install", f"DESTDIR={self.stage}")
        self.assertNotIn("cargo", self.called())
        self.binary.unlink()
        self.assertIn("make build", self.make("install", f"DESTDIR={self.stage}", status=2))
        self.assertNotIn("cargo", self.called())

    def test_user_needs_no_root(self):
        self.assertIn("not root", self.make("install", f"PREFIX={self.stage}"))
        self.assertEqual(self.tree(), self.OF_EVERYONE)
        self.make("install", f"PREFIX={self.stage}", "XL=1")
        self.assertEqual(self.tree(), self.OF_EVERYONE | self.OF_XL)

    def test_program_that_fails_ends_the_installation(self):
        self.tool("hospes", "exit 3", self.binary.parent)
        self.make("install", f"DESTDIR={self.stage}", status=2)

    def test_unit_is_disabled_before_it_goes(self):
        self.user(0)
        unit = self.stage / self.UNIT
        unit.parent.mkdir(parents=True)
        unit.touch()
        self.make("uninstall", f"PREFIX={self.stage}")
        self.assertIn("systemctl disable hospes-domains.service\n", self.called())
        self.assertEqual(self.tree(), set())

    def test_package_is_removed_without_touching_units_of_this_machine(self):
        self.make("install", f"DESTDIR={self.stage}")
        self.make("uninstall", f"DESTDIR={self.stage}")
        self.assertNotIn("systemctl", self.called())


class Packages(Scripts):
    """guests/install.sh: what it does where packages are missing"""

    def setUp(self):
        super().setUp()
        self.tool("sudo", "exit 1")
        self.tool("id", "echo 0")
        self.tool("rustc", "echo rustc 99.0.0")
        self.tool("cargo")
        self.tool("dpkg-query", "exit 1")
        self.tool("apt-get")

    def test_user_without_root_is_told_what_to_install(self):
        self.tool("id", "echo 1000")
        said = self.run_here("guests/install.sh", "run", status=1)
        self.assertRegex(said, "mmdebstrap.*Install them as root")

    def test_one_dead_source_does_not_matter(self):
        updated = self.home / "updated"
        self.tool("apt-get", f'case $1 in update) touch "{updated}"; exit 100 ;; esac; [ -e "{updated}" ]')
        self.run_here("guests/install.sh", "run")
        self.assertRegex(self.called(), "(?s)apt-get update\n.*apt-get install .*mmdebstrap")

    def test_installed_rust_that_is_too_old_is_upgraded(self):
        new = self.home / "new"
        self.tool("rustc", f'[ -e "{new}" ] && echo rustc 99.0.0 || echo rustc 1.63.0')
        self.tool("dpkg-query", 'case "$*" in *" rustc"|*" cargo") exit 1 ;; esac; echo install ok installed')
        self.tool("apt-get", f'case "$*" in install*rustc-web*) touch "{new}" ;; esac')
        self.run_here("guests/install.sh", "build")
        self.assertTrue(new.exists())

    def mirror(self, listed, sources, label="Debian", suffix="debian"):
        """The mirror that guests are made from where apt knows `listed`, and `sources` are in its configuration."""
        self.tool("apt-get", f'case "$*" in *"Label: {label}") printf "%s\\n" {listed} ;; *) exit 1 ;; esac')
        self.tool("cat", f"printf '%s\\n' '{sources}'; exit 1")
        script = f'. guests/lib.sh; host_uri {label} {suffix} http://default/{suffix}'
        return self.run_here("sh", "-euc", script, str(ROOT / "guests/lib.sh")).strip()

    def test_mirror_is_that_of_debian(self):
        docker = "deb [signed-by=/k] https://download.docker.com/linux/debian bookworm stable"
        self.assertEqual(self.mirror("mirror+file:/m https://mirror.example/debian/", docker), "https://mirror.example/debian")
        self.assertEqual(
            self.mirror("http://mirror.example/debian-security/", docker, "Debian-Security", "debian-security"),
            "http://mirror.example/debian-security",
        )

    def test_mirror_without_lists_is_that_of_the_sources(self):
        docker = "deb https://download.docker.com/linux/debian bookworm stable"
        sources = f"{docker}\n#URIs: http://old.debian.org/debian\nURIs:\thttps://ftp.de.debian.org/debian/\nSuites: bookworm"
        self.assertEqual(self.mirror("''", sources), "https://ftp.de.debian.org/debian")
        self.assertEqual(self.mirror("''", docker), "http://default/debian")
        # A state of the archive at one time, whose lists are out of date.
        self.assertEqual(self.mirror("https://snapshot.debian.org/archive/debian/20250520T000000Z/", docker), "http://default/debian")


class Targets(Scripts):
    """What targets, and programs that are started without them, run in."""

    def test_programs_find_tools_of_the_administrator(self):
        self.environment["PYTHONPATH"] = str(ROOT / "guests")
        said = self.run_here(sys.executable, "-B", "-c", "import os, vm; print(os.environ['PATH'])")
        self.assertIn("/usr/sbin", said.strip().split(":"))

    def test_targets_find_tools_of_the_administrator(self):
        makefile = self.home / "Makefile"
        makefile.write_text('include Makefile\nshow: ; @echo "$$PATH"\n')
        said = self.run_here("make", "--no-print-directory", "-f", str(makefile), "show")
        self.assertIn("/usr/sbin", said.strip().split(":"))

    def test_targets_follow_one_another(self):
        makefile = self.home / "Makefile"
        makefile.write_text("include Makefile\nboth: slow fast\nslow: ; @sleep 0.3; echo slow\nfast: ; @echo fast\n")
        said = self.run_here("make", "--no-print-directory", "-j4", "-f", str(makefile), "both")
        self.assertEqual(said, "slow\nfast\n")


if __name__ == "__main__":
    unittest.main()
