"""What was measured, and the files that it is kept in.

target/bench/results.json is a list of rows {name, unit, better, native, tcg, uml, hospes, ...}: medians, null where a system has no
figure. `vs_native`, `vs_tcg`, `vs_uml` and `vs_direct_off` say how many times as fast Hospes is: {median, low, high, pairs, coverage}
(stats.py).
`reasons` says why a figure is null, `failed` which rounds of a variant gave none, `measured` when the row was, `run` the date
of the run that did it.
target/bench/run.json is about the run: its date, mitigations, notes; `runs` are all those that rows are from: date, command, machine.
"""

import datetime
import json
import os
import pathlib
import re
import platform
import statistics
import sys
import time

import rows
import stats
import vm

DIRECTORY = vm.ROOT / "target" / "bench"
# What a machine does by itself.
BUSY_SHARE = 0.05


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def ratio(row, value, base):
    """How many times as good `value` is as `base`."""
    return value / base if rows.ROWS[row][1] == rows.HIGHER else base / value


def machine():
    """What the figures depend on outside of this program."""
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"processor": model, "cpus": len(os.sched_getaffinity(0)), "kernel": platform.release()}


def busy_share(seconds):
    """The share of this machine's CPU time that is used, by whatever runs on it or beside it on its host (stat in proc(5))."""

    def counts():
        fields = [int(word) for word in pathlib.Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = counts()
    time.sleep(seconds)
    total_now, idle_now = counts()
    return 1 - (idle_now - idle) / max(1, total_now - total)


# How the note of a round without a figure names its row.
NO_FIGURE = re.compile(r": no figure in round \d+ of (\w+): ")


class Results:
    def __init__(self, plan):
        self.plan = plan
        self.samples = {}
        self.reasons = {}
        # {(variant, row): rounds without a figure, counted from 0}
        self.failures = {}
        self.notes = []
        self.mitigations = {}
        self.measured = {}
        self.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.kept, self.kept_runs, self.kept_notes = self._earlier() if plan.keep else ({}, [], [])

    def _earlier(self):
        """The rows of the last run, by name, the runs that they are from, and its notes."""
        try:
            kept = {row["name"]: row for row in json.loads((DIRECTORY / "results.json").read_text())}
            run = json.loads((DIRECTORY / "run.json").read_text())
            found = kept, run["runs"], run["notes"]
            self.mitigations = run["mitigations"]
        except FileNotFoundError:
            return {}, [], []
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"bench: what {DIRECTORY} holds of earlier runs cannot be read ({error}): remove it, or leave KEEP out"
            ) from None
        return found

    def add(self, variant, row, number, value):
        """The figure of one variant in round `number`."""
        self.samples.setdefault((variant, row), {})[number] = value
        self.measured[row] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

    def note_company(self, when):
        """Says so where this machine is not ours alone, while nothing of the benchmark runs."""
        share = busy_share(2)
        if share > BUSY_SHARE:
            self.note(f"{when} this run something else used {share:.0%} of this machine's CPUs: its figures are not to be trusted")

    def note(self, text):
        say(text)
        self.notes.append(text)

    def _holds(self, note):
        """Whether a note of an earlier run is about something that this run has not measured anew."""
        about = NO_FIGURE.search(note)
        return not about or about.group(1) not in self.measured

    def missing(self, system, names, reason):
        """Says why a system has no figure in some rows."""
        for name in names:
            self.reasons.setdefault((system, name), reason)

    def failed(self, variant, row, number, reason, detail=None):
        """A variant gave no figure in round `number`. Its other rounds count, so it has to be said that they are not all."""
        self.failures.setdefault((variant, row), []).append(number)
        self.note(f"{variant}: no figure in round {number + 1} of {row}: {reason}" + (f": {detail}" if detail else ""))
        self.missing(variant.system, [row], reason)

    def shortcomings(self, left_out=()):
        """Sentences about what Hospes did not do of what this run wanted of it, but for some rows."""
        if "hospes" not in self.plan.systems:
            return []
        nothing = [row for row in self.plan.rows if row not in left_out and self.value("hospes", row) is None]
        sometimes = {row: None for variant, row in self.failures if variant.monitor == "hospes" and row not in nothing}
        found = [(nothing, "Hospes has no result for"), (sometimes, "Hospes failed in some rounds of")]
        return [f"{what} {', '.join(names)}" for names, what in found if names]

    def best(self, system, row):
        """The samples of a system, by round; for one with several variants those of the better one."""
        if system == "native" and row.endswith(rows.LEVEL_SUFFIX):
            system = "level"
        row = row.removesuffix(rows.LEVEL_SUFFIX)
        found = [samples for (variant, name), samples in self.samples.items() if name == row and variant.system == system]
        pick = max if rows.ROWS[row][1] == rows.HIGHER else min
        return pick(found, key=lambda samples: statistics.median(samples.values()), default={})

    def value(self, system, row):
        samples = self.best(system, row)
        return statistics.median(samples.values()) if samples else None

    def against(self, other, row):
        """The stats.Estimate of how many times as good Hospes is as another system; None where one has no figure.

        Against native it is formed of the rounds that have both. A peer has figures of a few rounds only, the first ones, in which
        Hospes may still be cold: all of Hospes' rounds are held against the peer's median.
        """
        ours, theirs = self.best("hospes", row), self.best(other, row)
        if other in ("tcg", "uml") and theirs:
            theirs = dict.fromkeys(ours, statistics.median(theirs.values()))
        both = [number for number in ours.keys() & theirs if ours[number] and theirs[number]]
        return stats.estimate([ratio(row, ours[number], theirs[number]) for number in both])

    def _row(self, name):
        unit, better = rows.ROWS[name]
        row = {"name": name, "unit": unit, "better": better}
        row |= {system: self.value(system, name) for system in rows.SYSTEMS}
        for other in ("native", "tcg", "uml", "direct_off"):
            found = self.against(other, name)
            row[f"vs_{other}"] = found.as_json() if found else None
        reasons = {system: self._reason(system, name) for system in rows.SYSTEMS if row[system] is None}
        measured = self.measured.get(rows.measured_as(name))
        return row | {"reasons": reasons, "failed": self._failed(name), "direct": self.plan.direct, "measured": measured, "run": self.date}

    def _reason(self, system, name):
        if system not in self.plan.systems:
            return "not chosen"
        if system == "native" and name.endswith(rows.LEVEL_SUFFIX):
            system = "level"
        return self.reasons.get((system, rows.measured_as(name)), "not measured")

    def _failed(self, name):
        """{variant: rounds without a figure, counted from 1} of those variants of a row that have figures of other rounds."""
        row = rows.measured_as(name)
        elsewhere = "native" if name.endswith(rows.LEVEL_SUFFIX) else "level"
        return {
            str(variant): [number + 1 for number in numbers]
            for (variant, failed), numbers in self.failures.items()
            if failed == row and variant.system != elsewhere and (variant, row) in self.samples
        }

    def rows(self):
        """All rows in their order: those that were measured now, else those kept."""
        found = []
        for name in rows.ROWS:
            now = name in self.plan.rows
            if name in self.kept and not (now and rows.measured_as(name) in self.measured):
                found.append(self.kept[name])
            elif now:
                found.append(self._row(name))
        return found

    def run(self):
        wanted = {row["run"] for row in self.rows()}
        this = {"date": self.date, "command": self.plan.command, **machine()}
        return {
            "date": self.date, "runs": [run for run in (*self.kept_runs, this) if run["date"] in wanted], "mitigations": self.mitigations,
            "notes": list(dict.fromkeys([*filter(self._holds, self.kept_notes), *self.notes])),
        }

    def save(self):
        """Writes both files, each in one step, so that an interrupted run leaves whole ones."""
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.json", self.rows()), ("run.json", self.run())):
            new = DIRECTORY / f"{name}.new"
            new.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(new, DIRECTORY / name)
