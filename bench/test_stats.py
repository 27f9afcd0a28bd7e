"""python3 -m unittest discover -s bench"""

import unittest

import plan
import rows
import stats


class Intervals(unittest.TestCase):
    def test_nine_pairs_leave_out_one_of_either_end(self):
        found = stats.estimate([9, 1, 5, 3, 7, 2, 8, 4, 6])
        self.assertEqual((found.median, found.low, found.high, found.pairs), (5, 2, 8, 9))
        self.assertAlmostEqual(found.coverage, 0.9609375)

    def test_few_pairs_give_the_whole_range(self):
        found = stats.estimate([3, 1, 2])
        self.assertEqual((found.median, found.low, found.high), (2, 1, 3))
        self.assertAlmostEqual(found.coverage, 0.75)

    def test_one_value_covers_nothing(self):
        self.assertEqual(stats.estimate([4]).coverage, 0)
        self.assertIsNone(stats.estimate([]))

    def test_more_samples_narrow_the_interval(self):
        self.assertEqual((stats.estimate(range(25)).low, stats.estimate(range(25)).high), (7, 17))


class Tables(unittest.TestCase):
    def test_groups_hold_rows(self):
        for names in rows.GROUPS.values():
            self.assertLessEqual(set(names), set(rows.ROWS))

    def test_a_quick_run_measures_the_first_rows_unless_told(self):
        self.assertEqual(set(plan.Plan({"BENCH": "quick"}).rows), set(rows.GROUPS["first"]))
        self.assertEqual(plan.Plan({"BENCH": "quick", "ROWS": "all"}).rows, list(rows.ROWS))
        self.assertEqual(plan.Plan({"BENCH": "quick", "ROWS": "ping"}).rows, ["ping"])
        self.assertEqual(plan.Plan({}).rows, list(rows.ROWS))

    def test_every_bar_has_its_row(self):
        for bar in rows.BARS:
            self.assertIn(bar.row, rows.ROWS)
            self.assertIn(bar.against, (*rows.SYSTEMS, "direct_off", "least", "most"))

    def test_no_bar_is_there_twice(self):
        keys = [(bar.row, bar.against) for bar in rows.BARS]
        self.assertEqual(len(keys), len(set(keys)))

    def test_derived_rows_have_a_measured_one(self):
        for row in rows.ROWS:
            self.assertIn(rows.measured_as(row), rows.ROWS)


if __name__ == "__main__":
    unittest.main()
