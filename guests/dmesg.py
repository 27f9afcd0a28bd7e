"""Holds a guest's kernel log against the committed lists of what it must not say."""

import re

import vm

FORBIDDEN = vm.ROOT / "tests" / "dmesg-forbidden.txt"
ALLOWED = vm.ROOT / "tests" / "dmesg-allowed.txt"


class ListError(Exception):
    """A pattern list has a line that cannot be used."""


def _lines(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line


def _compiled(path, number, pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ListError(f"{path.name}:{number}: {pattern!r} is not a regular expression: {error}") from None


def forbidden_patterns(path=FORBIDDEN):
    return [_compiled(path, number, line.rstrip()) for number, line in _lines(path)]


def allowed_patterns(path=ALLOWED):
    """The allowed expressions; each entry has to give its reason."""
    patterns = []
    for number, line in _lines(path):
        pattern, separator, reason = line.partition("  # ")
        if not separator or not reason.strip():
            raise ListError(f"{path.name}:{number}: an allowed line needs its reason after two spaces and '# '")
        patterns.append(_compiled(path, number, pattern.rstrip()))
    return patterns


def complaints(log):
    """The lines of `log` (from `dmesg -r`) that are forbidden and not allowed."""
    forbidden, allowed = forbidden_patterns(), allowed_patterns()
    return [
        line
        for line in log.splitlines()
        if any(p.search(line) for p in forbidden) and not any(p.search(line) for p in allowed)
    ]
