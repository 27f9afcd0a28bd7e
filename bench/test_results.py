"""python3 -m unittest discover -s bench"""

import json
import pathlib
import sys
import tempfile
import unittest

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import page  # noqa: E402
import plan  # noqa: E402
import results  # noqa: E402
import suite  # noqa: E402
import systems  # noqa: E402
import table  # noqa: E402
import vm  # noqa: E402


class Stub:
    """A worker with one figure a round, in rounds counted from 0; `silent` ones give none, and in round `last` its guest ends."""

    def __init__(self, silent=(), last=None):
        self.silent, self.last, self.round = silent, last, -1

    def measure(self, _box_ms, row):
        self.round += 1
        if self.round == self.last:
            raise vm.GuestError("the guest has ended")
        return {} if self.round in self.silent else {row: 100.0}


def measured(row, wanted, **stubs):
    """The Results of nine rounds of `row`."""
    variants = {"native": systems.NATIVE, "level": systems.LEVELLED, "hospes": systems.HOSPES, "tcg": systems.TCG[0]}
    chosen = plan.Plan({"BENCH": "quick", "ROWS": wanted, "SYSTEMS": "native,hospes,tcg"})
    found = results.Results(chosen)
    suite.measure_row(chosen, found, {variants[name]: stub for name, stub in stubs.items()}, row)
    return found


class Pages(unittest.TestCase):
    ENVIRONMENT = {"BENCH": "quick", "ROWS": "dhrystone", "SYSTEMS": "native,hospes", "DIRECT": "both", "HOME": "/"}

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.addCleanup(setattr, results, "DIRECTORY", results.DIRECTORY)
        results.DIRECTORY = pathlib.Path(directory.name)

    def run_of(self, row, date, **more):
        """One run as it is kept, and the page that is made of it."""
        found = results.Results(plan.Plan({**self.ENVIRONMENT, "ROWS": row, **more}))
        found.date = date
        for variant in (systems.NATIVE, systems.HOSPES):
            found.add(variant, row, 0, 100.0)
        found.save()
        kept = [json.loads((results.DIRECTORY / name).read_text()) for name in ("results.json", "run.json")]
        return kept[1], "\n".join(page.page(*kept))

    def test_a_page_says_the_whole_command(self):
        run, text = self.run_of("dhrystone", "2026-01-01 10:00:00 UTC")
        command = "BENCH=quick ROWS=dhrystone SYSTEMS=native,hospes DIRECT=both make bench"
        self.assertEqual([one["command"] for one in run["runs"]], [command])
        self.assertIn(f"* `{command}`, 2026-01-01, 1 row, on ", text)

    def test_rows_that_were_kept_are_of_their_own_run(self):
        self.run_of("dhrystone", "2026-01-01 10:00:00 UTC")
        run, text = self.run_of("whetstone", "2026-01-02 10:00:00 UTC", BENCH="", KEEP="1")
        self.assertEqual([one["date"][:10] for one in run["runs"]], ["2026-01-01", "2026-01-02"])
        self.assertIn("* `BENCH=quick ROWS=dhrystone SYSTEMS", text)
        self.assertIn("* `ROWS=whetstone SYSTEMS=native,hospes DIRECT=both KEEP=1 make bench`, 2026-01-02, 1 row,", text)
        # Nothing of the first is left.
        run, _ = self.run_of("dhrystone", "2026-01-03 10:00:00 UTC", KEEP="1")
        self.assertEqual([one["date"][:10] for one in run["runs"]], ["2026-01-02", "2026-01-03"])

    def test_notes_about_rows_that_are_measured_again_are_not_kept(self):
        def note(row):
            return f"hospes: no figure in round 2 of {row}: its programs gave none"

        first = results.Results(plan.Plan(self.ENVIRONMENT))
        first.notes = [note("dhrystone"), note("whetstone"), "the host was busy"]
        first.save()
        run, _ = self.run_of("dhrystone", "2026-01-02 10:00:00 UTC", KEEP="1")
        self.assertEqual(run["notes"], [note("whetstone"), "the host was busy"])


class Failures(unittest.TestCase):
    def setUp(self):
        self.addCleanup(setattr, results, "say", results.say)
        results.say = lambda text: None

    def test_nine_rounds_with_figures_are_complete(self):
        found = measured("dhrystone", "dhrystone", native=Stub(), hospes=Stub())
        self.assertEqual((found.shortcomings(), found.notes), ([], []))
        self.assertNotIn("FAILED", "\n".join(table.text(found.rows())))

    def test_one_silent_round_is_said_and_fails_the_run(self):
        found = measured("dhrystone", "dhrystone", native=Stub(), hospes=Stub(silent=[3]))
        [row] = found.rows()
        self.assertEqual((row["hospes"], row["vs_native"]["pairs"], row["failed"]), (100, 8, {"hospes": [4]}))
        self.assertIn("hospes: no figure in round 4 of dhrystone: its programs gave none", found.notes)
        self.assertEqual(found.shortcomings(), ["Hospes failed in some rounds of dhrystone"])
        line = next(line for line in table.text([row]) if line.startswith("dhrystone"))
        self.assertIn("hospes FAILED in round 4", line)
        self.assertIn(" 8 ", line)

    def test_a_guest_that_ends_in_the_last_round_is_said_and_fails_the_run(self):
        found = measured("dhrystone", "dhrystone", native=Stub(), hospes=Stub(last=8))
        self.assertEqual(found.rows()[0]["failed"], {"hospes": [9]})
        self.assertEqual(found.shortcomings(), ["Hospes failed in some rounds of dhrystone"])

    def test_a_row_without_any_figure_is_missing(self):
        found = measured("dhrystone", "dhrystone", native=Stub(), hospes=Stub(silent=range(9)))
        self.assertEqual(found.rows()[0]["reasons"]["hospes"], "its programs gave none")
        self.assertEqual(found.shortcomings(), ["Hospes has no result for dhrystone"])

    def test_a_peer_that_fails_is_said_and_does_not_fail_the_run(self):
        found = measured("dhrystone", "dhrystone", native=Stub(), hospes=Stub(), tcg=Stub(silent=[0]))
        self.assertEqual(found.rows()[0]["failed"], {"tcg -cpu max": [1]})
        self.assertEqual(found.shortcomings(), [])

    def test_failures_at_the_level_are_those_of_its_row(self):
        wanted = "dhrystone,dhrystone_native_level"
        found = measured("dhrystone", wanted, native=Stub(silent=[0]), level=Stub(silent=[1]), hospes=Stub())
        self.assertEqual([row["failed"] for row in found.rows()], [{"native": [1]}, {"level": [2]}])
        found = measured("dhrystone", wanted, native=Stub(), level=Stub(silent=range(9)), hospes=Stub())
        self.assertEqual(found.rows()[1]["reasons"]["native"], "its programs gave none")


if __name__ == "__main__":
    unittest.main()
