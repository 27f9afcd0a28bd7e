"""The results as text: for the terminal, and as the page of a dated result."""

import rows
import stats

LINE = "{:<30} {:<14} {:>11} {:>11} {:>11} {:>11} {:>21} {:>5} {:>7} {:>7}  {}"


def number(value):
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def interval(found):
    return f"{found['median']:.3f} [{found['low']:.2f}, {found['high']:.2f}]" if found else "-"


def pairs(found):
    return str(found["pairs"]) if found else "-"


def times(found):
    return f"{found['median']:.2f}" if found else "-"


def verdict(bar, row):
    """How a row stands to a bar: a short text; None where there is no figure to hold against it."""
    if bar.against in ("least", "most"):
        value = row["hospes"]
        if value is None:
            return None
        good = value >= bar.factor if bar.against == "least" else value < bar.factor
        return f"{'>=' if bar.against == 'least' else '<'} {bar.factor:g}: {'met' if good else 'MISSED'}"
    found = row.get(f"vs_{bar.against}")
    if not found:
        return None
    word = "met" if found["median"] >= bar.factor else "met by interval" if found["high"] >= bar.factor else "MISSED"
    return f"{bar.factor:g} x {bar.against}: {word}"


def failures(row):
    """A short text for each variant that has no figure of some of the row's rounds."""
    for variant, numbers in row["failed"].items():
        yield f"{variant} FAILED in round{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def verdicts(row):
    """What the row's last column says."""
    held = (verdict(bar, row) for bar in rows.BARS if bar.row == row["name"])
    return "; ".join((*failures(row), *filter(None, held)))


def means(found):
    """(what, bar, number of rows that have a figure, number of rows, geometric mean of the ratios to native) for each bar of this kind."""
    by_name = {row["name"]: row["vs_native"] for row in found}
    for what, names, least in rows.MEANS:
        ratios = [by_name[name]["median"] for name in names if by_name.get(name)]
        if ratios:
            yield what, least, len(ratios), len(names), stats.geometric_mean(ratios)


def mean_lines(found):
    for what, least, have, wanted, mean in means(found):
        word = "met" if mean >= least else "MISSED"
        some = "" if have == wanted else f" ({have} of {wanted} measured)"
        yield f"geometric mean of the {what}{some}: {mean:.3f} of native, {1 / mean:.2f} times slower; bar {least:.3g}: {word}"


def text(found):
    """The lines of the table."""
    yield LINE.format("row", "unit", "native", "tcg", "uml", "hospes", "of native", "pairs", "x tcg", "x uml", "bars")
    for row in found:
        values = [number(row[system]) for system in rows.SYSTEMS]
        against = interval(row["vs_native"]), pairs(row["vs_native"]), times(row["vs_tcg"]), times(row["vs_uml"])
        yield LINE.format(row["name"], row["unit"], *values, *against, verdicts(row)).rstrip()
    yield "of native, x tcg, x uml: how many times as fast Hospes is, for times and sizes as well; in brackets the interval of the median"
    yield from mean_lines(found)


def missing(found):
    """A line for each reason why figures are missing."""
    reasons = {}
    for row in found:
        for system, reason in row["reasons"].items():
            reasons.setdefault((system, reason), []).append(row["name"])
    for (system, reason), names in reasons.items():
        yield f"no figure: {system}: {reason}: {', '.join(names) if len(names) < 12 else f'{len(names)} rows'}"
