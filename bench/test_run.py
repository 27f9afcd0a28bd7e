"""python3 -m unittest discover -s bench: a machine that lacks something gives fewer figures, not a traceback."""

import contextlib
import unittest
from unittest import mock

import run  # the first: it knows where the guests' modules are

import devices
import plan
import results
import rows
import suite
import systems


def lacks(program):
    return FileNotFoundError(2, "No such file or directory", program)


@mock.patch("devices.say", mock.Mock())
@mock.patch("suite.progress", mock.Mock())
class Missing(unittest.TestCase):
    def setUp(self):
        self.results = mock.Mock()
        self.plan = plan.Plan({"ROWS": "all"})

    def notes(self):
        calls = (*self.results.note.call_args_list, *self.results.failed.call_args_list)
        return [str(call.args[-1]) for call in calls]

    def test_network_rows_without_root_are_no_failure(self):
        made = results.Results(plan.Plan({"ROWS": "ping,dhrystone"}))
        for possible, wanted in ((False, "dhrystone"), (True, "ping, dhrystone")):
            with mock.patch("netns.possible", return_value=possible):
                lacking = "".join(made.shortcomings(run.left_out()))
            self.assertEqual({*lacking.removeprefix("Hospes has no result for ").split(", ")}, {*wanted.split(", ")})

    def test_worker_that_cannot_be_started_is_a_note(self):
        with mock.patch("systems.worker", side_effect=lacks("unshare")), contextlib.ExitStack() as stack:
            self.assertEqual(suite.start(self.plan, self.results, [systems.HOSPES], stack, level=False), {})
        self.assertEqual(len(self.notes()), 2)
        self.assertIn("unshare", self.notes()[0])

    def test_worker_that_has_ended_is_a_note(self):
        workers = {systems.HOSPES: mock.Mock(**{"measure.side_effect": BrokenPipeError(32, "Broken pipe")})}
        suite.one(self.results, workers, systems.HOSPES, "dhrystone", 0, 1)
        self.assertEqual(workers, {})
        self.assertIn("Broken pipe", self.notes()[0])

    def test_debian_without_its_tools_is_a_note(self):
        with mock.patch("devices.Native", side_effect=lacks("debugfs")), mock.patch("devices.Machine", side_effect=lacks("cp")):
            devices.session(self.plan, self.results, systems.HOSPES)
            devices.logins(self.plan, self.results, [systems.HOSPES], [0])
        self.assertEqual(len(self.notes()), 2)
        self.assertIn("debugfs", self.notes()[0])

    def test_program_that_is_not_there_leaves_its_row_empty(self):
        side = mock.Mock(variant=systems.NATIVE)
        devices.alternate(self.plan, self.results, [side], rows.FIO[0][0], mock.Mock(side_effect=lacks("fio")))
        self.assertEqual(len(self.notes()), 1)
        self.assertIn("fio", self.notes()[0])
