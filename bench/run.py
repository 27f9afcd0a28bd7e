#!/usr/bin/env python3
"""The benchmark: the same programs on this machine, in QEMU TCG, in User-Mode Linux and in Hospes, in turn in one run.

    bench/run.py        BENCH=quick for shorter boxes, ROWS=a,b and SYSTEMS=native,tcg,uml,hospes to select rows and systems,
                        DIRECT=0|1|both for Hospes' direct execution, KEEP=1 to keep the rows of the last run that are not measured

Writes target/bench/results.json and run.json (results.py) after each row, prints the table and what stands in it against the
bars (rows.py). An interrupted run prints and keeps what it has. docs/bench.md describes the rows.
"""

import os
import pathlib
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import devices  # noqa: E402
import netns  # noqa: E402
import rows  # noqa: E402
import suite  # noqa: E402
import systems  # noqa: E402
import table  # noqa: E402
import vcpus  # noqa: E402
from plan import Plan  # noqa: E402
from results import DIRECTORY, Results, say  # noqa: E402

PHASES = (suite.boots, suite.measure, vcpus.measure, devices.measure)


def report(results):
    found = results.rows()
    print("\n".join((*table.text(found), *table.missing(found))))
    for system, lines in results.mitigations.items():
        print(f"mitigations, {system}: " + "; ".join(lines or ["none shown"]))
    for note in results.notes:
        print(f"note: {note}")


def left_out():
    """Rows of which nobody has a figure here: those of the network without root."""
    return () if netns.possible() else rows.NETWORK


def main():
    plan = Plan(os.environ)
    started = time.monotonic()
    results = Results(plan)
    interrupted = False
    try:
        results.note_company("before")
        guests = systems.guests(plan, results)
        for phase in PHASES:
            phase(plan, results, guests)
        results.note_company("after")
    except (KeyboardInterrupt, SystemExit) as reason:
        if isinstance(reason, SystemExit) and isinstance(reason.code, str):
            raise
        interrupted = True
        results.note("interrupted: rows without a figure were not measured")
    results.save()
    report(results)
    say(f"{time.monotonic() - started:.0f} s; {DIRECTORY / 'results.json'}")
    if interrupted:
        return 130
    shortcomings = results.shortcomings(left_out())
    for sentence in shortcomings:
        say(sentence)
    return 1 if shortcomings else 0


if __name__ == "__main__":
    sys.exit(main())
