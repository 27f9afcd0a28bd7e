"""Medians of ratios, and how far they can be trusted.

A ratio is formed of two figures that were measured one after the other, so what slows the machine down for a while slows both. The
interval is that of the median by the binomial distribution: no assumption about how the ratios are distributed. Of n of them,
sorted, it goes from the k-th smallest to the k-th largest, with the largest k whose coverage is still 95 %; for 9 pairs that is the second
of either end, and 96.1 %. Below 6 pairs no choice covers 95 %: then it is the whole range, with the coverage that this has.
"""

import dataclasses
import math
import statistics

COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median with its interval; `coverage` is the chance that the true median lies inside."""

    median: float
    low: float
    high: float
    pairs: int
    coverage: float

    def as_json(self):
        rounded = {key: float(f"{value:.6g}") for key, value in dataclasses.asdict(self).items()}
        return {**rounded, "pairs": self.pairs}


def coverage(count, rank):
    """The chance that the median of a distribution lies between the `rank`-th smallest and largest of `count` samples."""
    outside = sum(math.comb(count, below) for below in range(rank)) / 2**count
    return 1 - 2 * outside


def estimate(values):
    """The Estimate of the median; None without a value."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return None
    rank = max((k for k in range(1, count // 2 + 1) if coverage(count, k) >= COVERAGE), default=1)
    return Estimate(
        statistics.median(ordered), ordered[rank - 1], ordered[count - rank], count, max(0.0, coverage(count, rank))
    )


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))
