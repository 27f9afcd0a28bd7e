#!/usr/bin/env python3
"""Makes the page of the last dated result, docs/bench-result.md, and its plot, docs/bench.svg, from target/bench."""

import json
import math
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "guests"))

import rows  # noqa: E402
import table  # noqa: E402
import vm  # noqa: E402

DIRECT = {None: "as by default", "0": "off", "1": "on", "both": "on, and off beside it"}
LOW, HIGH = 0.01, 3.0
LEFT, WIDTH, ROW, TOP = 190, 560, 17, 54
COLOURS = {"tcg": "#c0392b", "uml": "#8e8e8e", "hospes": "#1f5fa8"}
NAMES = {"tcg": "QEMU TCG", "uml": "User-Mode Linux", "hospes": "Hospes"}


def place(ratio):
    """Where a ratio to native lies on the logarithmic axis; what does not fit is shown at its end."""
    part = math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return round(LEFT + WIDTH * part, 1)


def text(x, y, content, **attributes):
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x}" y="{y}"{more}>{content}</text>'


def axis(bottom):
    for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2):
        x = place(tick)
        colour = "#222" if tick == 1 else "#ddd"
        yield f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{bottom}" stroke="{colour}"/>'
        yield text(x, TOP - 12, f"{tick:g}", text_anchor="middle", fill="#555")


def marks(row, y):
    """The systems of one row: dots, and for Hospes a line over the interval."""
    base, higher = row["native"], row["better"] == rows.HIGHER
    for system in ("tcg", "uml"):
        if row[system]:
            ratio = row[system] / base if higher else base / row[system]
            yield f'<circle cx="{place(ratio)}" cy="{y}" r="3.2" fill="{COLOURS[system]}"/>'
    found = row["vs_native"]
    yield (
        f'<line x1="{place(found["low"])}" y1="{y}" x2="{place(found["high"])}" y2="{y}" stroke="{COLOURS["hospes"]}" '
        'stroke-width="3" stroke-opacity="0.4"/>'
    )
    x = place(found["median"])
    yield f'<rect x="{x - 3.5}" y="{y - 3.5}" width="7" height="7" fill="{COLOURS["hospes"]}"/>'


def plot(found, date):
    """The plot as SVG: one line for each row that has a figure of native and of Hospes."""
    shown = [row for row in found if row["native"] and row["vs_native"]]
    bottom = TOP + ROW * len(shown)
    height = bottom + 30
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        'font-family="sans-serif" font-size="11">'
    )
    yield f'<rect width="{LEFT + WIDTH + 20}" height="{height}" fill="#fff"/>'
    yield text(LEFT, 18, f"Speed against native (1), logarithmic; {date}", font_size=13)
    yield from axis(bottom)
    for number, row in enumerate(shown):
        y = TOP + ROW * number + 6
        yield text(LEFT - 8, y + 4, row["name"], text_anchor="end")
        yield from marks(row, y)
    for number, system in enumerate(COLOURS):
        x = LEFT + 150 * number
        yield f'<rect x="{x}" y="{bottom + 10}" width="9" height="9" fill="{COLOURS[system]}"/>'
        yield text(x + 14, bottom + 18, NAMES[system])
    yield "</svg>"


def page(found, run):
    """The page in Markdown."""
    yield "# A result of the benchmark"
    yield ""
    yield f"{len(found)} of {len(rows.ROWS)} rows, measured by"
    yield ""
    for one in run["runs"]:
        its = [row for row in found if row["run"] == one["date"]]
        directs = sorted({DIRECT[row["direct"]] for row in its})
        yield (
            f"* `{one['command']}`, {one['date'][:10]}, {len(its)} row{'s' * (len(its) > 1)}, on {one['processor']}, {one['cpus']} CPUs, "
            f"Linux {one['kernel']}; direct execution {', '.join(directs)}"
        )
    yield ""
    yield "[bench.md](bench.md) says what the rows and columns are. Made by `make bench-page`."
    yield ""
    yield "![How fast guests are, this machine being 1](bench.svg)"
    yield ""
    yield "| row | unit | native | tcg | uml | hospes | of native | pairs | x tcg | x uml | bars |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    for row in found:
        cells = [
            row["name"], row["unit"], *(table.number(row[system]) for system in rows.SYSTEMS), table.interval(row["vs_native"]),
            table.pairs(row["vs_native"]), table.times(row["vs_tcg"]), table.times(row["vs_uml"]), table.verdicts(row),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for line in (*table.mean_lines(found), *table.missing(found), *(f"note: {note.splitlines()[0]}" for note in run["notes"])):
        yield f"* {line}"
    yield ""
    yield "Mitigations of processor flaws, as each kernel says:"
    yield ""
    for system, lines in run["mitigations"].items():
        used = [line for line in lines if line.partition(":")[2] != "Not affected"]
        yield f"* {system}: {'; '.join(used) or 'none shown'}"


def main():
    directory = vm.ROOT / "target" / "bench"
    try:
        found = json.loads((directory / "results.json").read_text())
        run = json.loads((directory / "run.json").read_text())
        made = {"bench-result.md": [*page(found, run)], "bench.svg": [*plot(found, run["date"])]}
    except FileNotFoundError as error:
        raise SystemExit(f"bench: {error.filename} is not there: run make bench first") from None
    except (ValueError, KeyError) as error:
        raise SystemExit(f"bench: what {directory} holds cannot be read ({error}): run make bench first") from None
    for name, lines in made.items():
        (vm.ROOT / "docs" / name).write_text("\n".join(lines) + "\n")
    print("docs/bench-result.md and docs/bench.svg are made")


if __name__ == "__main__":
    main()
