"""What all test programs share that run guests: expectations, the command line, a line of output for each test."""

import argparse
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import dmesg  # noqa: E402
import vm  # noqa: E402


# How long what is waited for may take, and how often it is looked at.
ANSWER_S, LOOK_S = 60, 0.1


class Failure(Exception):
    """A test's expectation was not met; the sentence says which."""


# What ends a test as failed; anything else is a mistake in the test and ends the program.
ERRORS = (Failure, vm.GuestError, dmesg.ListError, OSError, IndexError, subprocess.SubprocessError)


def expect(condition, sentence):
    if not condition:
        raise Failure(sentence)


def wait_until(condition, sentence):
    """Looks again and again whether a condition holds; the sentence says what has not come about."""
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        expect(time.monotonic() < deadline, sentence)
        time.sleep(LOOK_S)


def parser(doc):
    """A command line with `--list` and words that select tests; `doc` is the program's."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--list", action="store_true", help="print the names and do nothing")
    found.add_argument("words", nargs="*", metavar="WORD", help="run the tests whose name contains one of them; all without any")
    return found


def select(options, names):
    """The names that the command line chooses; with `--list` they are printed and the program ends."""
    chosen = [name for name in names if not options.words or any(word in name for word in options.words)]
    if options.list:
        print("\n".join(chosen))
        sys.exit(0)
    return chosen


def passes(name, test):
    """Runs `test` and prints how it went; whether it passed."""
    started = time.monotonic()
    try:
        test()
    except ERRORS as error:
        print(f"FAIL {name} ({time.monotonic() - started:.1f} s)\n  " + str(error).replace("\n", "\n  "), flush=True)
        return False
    print(f"ok   {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return True


def conclude(results):
    """Prints the last line; the exit status."""
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1
