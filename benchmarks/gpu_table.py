"""The closing table of a GPU report, from its records (records.py): at most 100 lines and 12,000 characters.

python benchmarks/gpu_table.py FOLDER/results.jsonl
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from records import Record, parsed

LINES, CHARACTERS = 100, 12_000
WIDTH = 144
NAME, CELL = 23, 24  # widths of the columns of times
COPY = "floor: copy"


def table(records: list[Record]) -> str:
    """All sections; fewer of the failures and errors, where there are too many for it."""
    for most in (15, 8, 4, 2, 1):
        lines = [line for section in SECTIONS for line in shown(section, records, most)]
        text = "\n".join(line[:WIDTH].rstrip() for line in lines)
        if len(lines) <= LINES and len(text) <= CHARACTERS:
            break
    return "\n".join(text.splitlines()[:LINES])[:CHARACTERS]


Section = Callable[[list[Record], int], Iterator[str]]


def shown(section: Section, records: list[Record], most: int) -> list[str]:
    """A section's lines. A record of another form must not cost the rest of the table."""
    try:
        return [part for line in section(records, most) for part in line.split("\n")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{section.__name__}: cannot be shown, {type(error).__name__}: {error}; see results.jsonl"]


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["record"] == kind]


def capped(lines: list[str], most: int) -> list[str]:
    rest = len(lines) - most
    return lines if rest <= 0 else [*lines[:most], f"  ... and {rest} more, in results.jsonl"]


def machine(records: list[Record], most: int) -> Iterator[str]:
    for about in of_kind(records, "machine"):
        facts = {key: value for key, value in about.items() if key not in ("record", "stage", "name")}
        if "memory" in facts:
            facts["memory"] = f"{facts['memory'] / 2**30:.0f} GiB"
        yield about["name"]
        yield ", ".join(f"{key} {value}" for key, value in facts.items())


def stages(records: list[Record], most: int) -> Iterator[str]:
    by_stage: dict[str, list[Record]] = defaultdict(list)
    for outcome in of_kind(records, "outcome"):
        by_stage[outcome["stage"]].append(outcome)
    yield f"{'stage':20}{'seconds':>8}  commands"
    for name, all_of_it in by_stage.items():
        counts = Counter(outcome["status"] for outcome in all_of_it)
        seconds = max(outcome["seconds"] for outcome in all_of_it)
        yield f"{name:20}{seconds:8.1f}  {', '.join(f'{n} {status}' for status, n in counts.items())}"
        # Commands that end in the same words, because there is no GPU or no tool, share a line.
        bad: dict[str, list[str]] = defaultdict(list)
        for outcome in all_of_it:
            if outcome["status"] != "passed" or name == "sanitizer":
                bad[f"{outcome['status']}: {outcome['why']}"].append(outcome["command"])
        yield from capped([f"  {why[: WIDTH - 20]} ({', '.join(commands)})" for why, commands in bad.items()], most)


def outcomes(records: list[Record]) -> list[str]:
    """What to print when a stage has ended."""
    return [line for section in SECTIONS[1:] for line in shown(section, records, 15)]


def smoke(records: list[Record], most: int) -> Iterator[str]:
    results = [record for record in of_kind(records, "smoke") if record["stage"] == "smoke"]
    if not results:
        return
    verbs = list(dict.fromkeys(record["verb"] for record in results))
    shapes = list(dict.fromkeys(record["shape"] for record in results))
    yield f"\ncorrectness against float64, worst share of the bound (1.00: at it) of {', '.join(shapes)}"
    yield f"{'':18}" + "".join(f"{verb:>12}" for verb in verbs)
    for (backend, dtype), rows in grouped(results, "backend", "dtype").items():
        yield f"{backend + ' ' + dtype:18}" + "".join(f"{worst(rows, verb, len(shapes)):>12}" for verb in verbs)
    problems = [r for r in results if "error" in r or not r["share"] <= 1 or not r["same"]]
    yield from capped([f"  {' '.join(r[k] for k in ABOUT)}: {problem(r)}" for r in problems], most)


ABOUT = ("backend", "dtype", "shape", "verb")


def worst(rows: list[Record], verb: str, shapes: int) -> str:
    of_verb = [record for record in rows if record["verb"] == verb]
    if any("error" in record for record in of_verb):
        return "error"
    shares = [record["share"] for record in of_verb]
    if not shares:
        return "-"
    share = next((share for share in shares if share != share), max(shares))
    marks = ("!" if any(not record["same"] for record in of_verb) else "") + ("?" if len(of_verb) < shapes else "")
    return f"{share:.2f}{marks}"


def problem(record: Record) -> str:
    if "error" in record:
        return str(record["error"])
    return f"{record['share']:.3g} of the bound" if not record["share"] <= 1 else "a second run gave other bits"


def times(records: list[Record], most: int) -> Iterator[str]:
    yield from _times(of_kind(records, "time"), most)


def linear(records: list[Record], most: int) -> Iterator[str]:
    yield from _times(of_kind(records, "linear"), most)


def _times(results: list[Record], most: int) -> Iterator[str]:
    for (dtype,), rows in grouped(results, "dtype").items():
        shapes = list(dict.fromkeys(record["shape"] for record in rows))
        yield f"\n{dtype}: ms, GB/s, share of the copy's GB/s in the same process, peak extra memory in logits"
        yield f"{'':{NAME}}" + "".join(f"{shape:>{CELL}}" for shape in shapes)
        for (run, contender), cells in grouped(rows, "run", "contender").items():
            by_shape = {record["shape"]: record for record in cells}
            name = f"{contender} ({run})" if contender == COPY else contender
            yield f"{name:{NAME}.{NAME}}" + "".join(f"{cell(by_shape.get(shape)):>{CELL}}" for shape in shapes)
        small = shapes[-1]
        host = [
            f"{r['contender']} {r['host'] * 1e6:.0f}"
            for r in rows
            if r["shape"] == small and "host" in r and r["contender"] != COPY
        ]
        yield textwrap.fill(f"us until the call returns, {small}: {', '.join(host)}", WIDTH, subsequent_indent="  ")
    problems = [r for r in results if r.get("error", "out of memory") != "out of memory"]
    yield from capped([f"  {r['contender']} {r['dtype']} {r['shape']}: {r['error']}" for r in problems], most)


def cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if "error" in record:
        return "no memory" if record["error"] == "out of memory" else "error"
    of_copy = f"{record['of_copy']:.0%}" if record["of_copy"] else "-"
    milliseconds = record["median"] * 1e3
    time = f"{milliseconds:.{4 if milliseconds < 1 else 3}f}"
    return f"{time} {record['bytes_per_second'] / 1e9:4.0f} {of_copy:>5} {record['peak_of_logits']:5.2f}"


def tests(records: list[Record], most: int) -> Iterator[str]:
    results = of_kind(records, "test")
    if not results:
        return
    counts = Counter(record["outcome"] for record in results)
    yield f"\ntests marked gpu: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}"
    bad = grouped([record for record in results if record["outcome"] == "failed"], "why")
    for (why,), rows in list(bad.items())[:most]:
        names = ", ".join(record["test"].removeprefix("tests/") for record in rows)
        yield f"  {len(rows)} x {why[:70]}: {names}"
    if len(bad) > most:
        yield f"  ... and {len(bad) - most} other reasons, in results.jsonl"
    skipped = Counter(record["why"] for record in results if record["outcome"] == "skipped")
    yield from capped(
        [f"  skipped {n}: {why.removeprefix('Skipped: ')}" for why, n in skipped.most_common()], min(most, 4)
    )


def counters(records: list[Record], most: int) -> Iterator[str]:
    results = of_kind(records, "counters")
    if not results:
        return
    yield f"\ncounters of {results[0]['shape']} {results[0]['dtype']}; stalls: warps for each issued instruction"
    yield f"{'':34}{'ms':>8}{'GB/s':>7}{'DRAM':>6}{'issue':>7}{'warps':>7}{'regs':>6}  stalls"
    for r in results:
        stalls = ", ".join(f"{name} {value:.1f}" for name, value in list(r["stalls"].items())[:3])
        name = f"{r['backend']} {r['verb']}: {r['kernel']}"
        yield (
            f"{name:34.34}{metric(r, 'nanoseconds', 1e-6, '.3f'):>8}{metric(r, 'dram_bytes_per_second', 1e-9):>7}"
            f"{metric(r, 'dram_percent'):>5}%{metric(r, 'issue_percent'):>6}%{metric(r, 'occupancy_percent'):>6}%"
            f"{metric(r, 'registers'):>6}  {stalls}"
        )


def metric(record: Record, key: str, factor: float = 1.0, form: str = ".0f") -> str:
    return format(record[key] * factor, form) if key in record else "-"


def grouped(records: list[Record], *keys: str) -> dict[tuple[str, ...], list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return groups


SECTIONS: tuple[Section, ...] = (machine, stages, smoke, times, tests, counters, linear)

if __name__ == "__main__":
    found = (parsed(line) for line in Path(sys.argv[1]).read_text().splitlines())
    print(table([record for record in found if record is not None]))
