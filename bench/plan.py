"""What a run measures, and for how long: from the environment."""

import rows

# Hospes with direct execution, and once more without, side by side.
BOTH = "both"
# What a run may be told. The command that repeats it is made of these.
VARIABLES = ("BENCH", "ROWS", "SYSTEMS", "DIRECT", "KEEP")


class Plan:
    """Times are in seconds unless the name says otherwise.

    `pairs` is how often Hospes is measured beside native, `slow_pairs` the same for rows that take seconds, `peer_samples` how often a
    peer at most; a peer that is slow at a row stops earlier, once the row has taken it `peer_budget`.
    """

    def __init__(self, environment):
        self.command = " ".join((*(f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)), "make bench"))
        self.quick = quick = environment.get("BENCH") == "quick"
        self.box_ms = 200 if quick else 500
        self.pairs = 9 if quick else 12
        self.peer_samples = 3 if quick else 5
        self.peer_budget = 3 if quick else 15
        self.boots = 5 if quick else 9
        self.logins = 1 if quick else 3
        self.slow_pairs = 9
        self.copies_box_ms = 500 if quick else 1000
        self.fair_box_ms = 3_000 if quick else 10_000
        self.idle = 5 if quick else 10
        self.fio = 1 if quick else 2
        self.network = 1 if quick else 2
        self.direct = self._direct(environment.get("DIRECT"))
        self.keep = environment.get("KEEP") == "1"
        self.systems = self._chosen(environment.get("SYSTEMS"), rows.SYSTEMS, "system")
        unasked = "first" if quick else "all"
        self.rows = self._chosen(environment.get("ROWS") or unasked, tuple(rows.ROWS), "row", rows.GROUPS)

    @staticmethod
    def _chosen(text, known, what, groups=None):
        groups = groups or {}
        words = [name for name in (text or "").split(",") if name] or known
        names = [name for word in words for name in groups.get(word, [word])]
        for name in names:
            if name not in known:
                raise SystemExit(f"bench: no {what} is called {name!r}: choose from {', '.join((*groups, *known))}")
        return [name for name in known if name in names]

    @staticmethod
    def _direct(text):
        if text not in (None, "", "0", "1", BOTH):
            raise SystemExit(f"bench: DIRECT={text} means nothing: say 0, 1 or both, or leave it out for what Hospes does by default")
        return text or None

    def measures(self, row):
        """Whether `row` is wanted, or one whose figures come from its measurement."""
        return any(rows.measured_as(name) == row for name in self.rows)

    def wants_level(self, row):
        return row + rows.LEVEL_SUFFIX in self.rows

    def settings(self, direct=None):
        """Lines of a Hospes configuration; `direct` is for a row that has a wish of its own where the user has none."""
        chosen = direct if self.direct is None else "1" if self.direct == BOTH else self.direct
        return () if chosen is None else (f"engine_direct={chosen}",)
