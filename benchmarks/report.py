"""Results files, and the tables made of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .environment import ROOT, device_slug
from .suite import FORMAT, VERSION

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = (
    *("median ms", "p20-p80", "tokens/s", "TFLOP/s", "GB/s", "% of copy", "% of floor"),
    *("peak MB", "saved MB", "launches", "speedup of fastattn"),
)


class ResultsError(ValueError):
    """A results file that cannot be used."""


def load(path: Path) -> dict:
    """A results file of the suite; `ResultsError` where it is unreadable or not one."""
    results = read(path, FORMAT, VERSION)
    fault = _fault(results)
    if fault is not None:
        raise ResultsError(f"{path} is incomplete: {fault}")
    return results


def read(path: Path, format_name: str, version: int) -> dict:
    """A JSON file of that format and version; `ResultsError` where it is none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not a results file: not JSON ({error})") from error
    if not isinstance(results, dict) or results.get("format") != format_name:
        raise ResultsError(f'{path} is not a results file: it lacks "format": "{format_name}"')
    if results.get("version") != version:
        raise ResultsError(
            f"{path} has version {results.get('version')!r}, this program reads version {version}"
        )
    return results


#: What must be there, and of which types; figures must also be finite.
PARTS = {"environment": dict, "method": dict, "ceilings": dict, "cases": list, "rows": list}
MEMBERS = {
    "environment": ("device", "path", "device_name", "threads", "torch", "fastattn", "date"),
    "method": ("rounds",),
    "ceilings": ("copy_bytes_per_s", "matmul_flops_per_s", "matmul"),
}
CASE = {"op": str, "name": str, "dropout": float, "tokens": int, "cost": dict}
ROW = {"op": str, "case": str, "mode": str, "launch": str, "provider": str, "status": str}
FIGURES_OF_A_ROW = ("median_ms", "p20_ms", "p80_ms", "tokens_per_s", "tflops", "floor_share")


def _fault(results: dict) -> str | None:
    """What a results file lacks; None where it has all that is read of it."""
    missing = sorted(PARTS.keys() - results.keys())
    if missing:
        return f"it lacks {', '.join(missing)}"
    for part, kind in PARTS.items():
        if not isinstance(results[part], kind):
            return f"{part} is no {kind.__name__}"
    for part, names in MEMBERS.items():
        if not _has(names, results[part]):
            return f"{part} lacks one of {', '.join(names)}"
    if not isinstance(results["environment"].get("extension"), dict):
        return "environment lacks the extension"
    for case in results["cases"]:
        if not _fits(case, CASE):
            return f"a case lacks one of {', '.join(CASE)}"
    known = {(case["op"], case["name"]) for case in results["cases"]}
    for number, row in enumerate(results["rows"]):
        if not _fits(row, ROW):
            return f"row {number} lacks one of {', '.join(ROW)}"
        if (row["op"], row["case"]) not in known:
            return f"row {number} is of a case that is not listed: {row['op']} {row['case']}"
        if row["status"] == "ok" and not _is_timed(row):
            return f"row {number} has no times, or such as cannot be"
    return None


def _has(names: Iterable[str], members: dict) -> bool:
    return all(name in members for name in names)


def _fits(item: object, kinds: dict[str, type]) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(name), (kind, int) if kind is float else kind)
        for name, kind in kinds.items()
    )


def _is_positive(figure: object) -> bool:
    return isinstance(figure, (int, float)) and 0 < figure < math.inf


def _is_timed(row: dict) -> bool:
    samples, speedup = row.get("samples_ms"), row.get("fastattn_speedup", {})
    return (
        isinstance(samples, list)
        and len(samples) > 0
        and all(map(_is_positive, [*samples, *(row.get(name) for name in FIGURES_OF_A_ROW)]))
        and isinstance(speedup, dict)
        and (not speedup or all(_is_positive(speedup.get(n)) for n in ("median", "low", "high")))
    )


def new_path(environment: dict, folder: Path | None = None, kind: str = "") -> Path:
    """Where a new result goes: `<folder>/<date>-<commit><kind>.json`, or a neighbour `-2` and up.

    The folder, by default `benchmarks/results/<device>`, is made.
    """
    folder = RESULTS / device_slug(environment) if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{environment['date'][:10]}-{environment['commit'] or 'no-commit'}{kind}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(folder / f"{name}.json" for name in names if not (folder / f"{name}.json").exists())


def save(results: dict, path: Path) -> None:
    """Write a results file beside its place, then rename it: it is never there half written."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        part.write_text(_json(results), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _json(results: dict) -> str:
    """JSON with a line for every case and row."""
    members = []
    for name, value in results.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        members.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(members) + "\n}\n"


def faults(results: dict) -> list[dict]:
    """Rows that are wrong through us: fastattn, or the baseline that it is held against.

    A compiled provider that fails is none, since a compiler may be missing; one that computes
    something else is.
    """
    return [
        row
        for row in results["rows"]
        if row["status"] == "mismatch"
        and row["provider"].startswith("fastattn")
        or row["status"] == "failed"
        and row["provider"] in ("fastattn", "stock", "sdpa", "eager")
    ]


def by_case(results: dict, ops: Iterable[str] | None = None) -> Iterator[tuple[dict, list[dict]]]:
    """`(case, its rows)` in the order of the run."""
    cases = {(case["op"], case["name"]): case for case in results["cases"]}
    for key, rows in groupby(results["rows"], key=lambda row: (row["op"], row["case"])):
        if ops is None or key[0] in ops:
            yield cases[key], list(rows)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _interval(ratio: dict) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _match(row: dict) -> str:
    """The verdict and the worst error of outputs and of gradients over the eager baseline's."""
    if row.get("match") is None:
        return ""
    worst = [row["match"][kind] for kind in ("output", "gradient")]
    multiples = "/".join(f"{v['error'] / (v['eager_error'] or math.inf):.1f}" for v in worst)
    return f"{'ok' if row['match']['ok'] else 'MISMATCH'} {multiples}"


def withheld(rows: Iterable[dict]) -> list[str]:
    """What is not reported and why, one line for all the modes that share a reason."""
    modes: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            line = f"{row['op']} {row['case']}, {row['provider']}: "
            line += f"{row['status'].upper()}, {row['reason']}"
            modes.setdefault(line, []).append(row["mode"])
    return [f"{line} ({', '.join(dict.fromkeys(names))})" for line, names in modes.items()]


def headline(results: dict) -> str:
    """The hardware, the software and the code that was measured."""
    e = results["environment"]
    commit = "no commit" if e["commit"] is None else f"commit {e['commit']}"
    extension = "with" if e["extension"]["available"] else "without"
    return (
        f"{e['path']}: {e['device_name']}, {e['threads']} CPU threads, torch {e['torch']}, "
        f"fastattn {e['fastattn']} ({commit}{', modified' if e['dirty'] else ''}) {extension} its "
        f"C++ extension, {e['date'][:10]}"
    )


def ceilings(results: dict) -> str:
    """What the machine reached: the measure of the shares."""
    c = results["ceilings"]
    return (
        f"ceilings measured in this run: copy {c['copy_bytes_per_s'] / 1e9:,.0f} GB/s, matrix "
        f"product {c['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s ({c['matmul']})"
    )


def _dropout(case: dict, rows: list[dict]) -> str:
    """The probability with which every provider that was looked at really drops."""
    measured = {
        row["provider"]: row["dropout_measured"] for row in rows if "dropout_measured" in row
    }
    each = ", ".join(f"{provider} {p:.4f}" for provider, p in measured.items())
    return f"dropout asked for {case['dropout']:g}, measured: {each}" if each else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _cells(row: dict) -> list[str]:
    if row["status"] != "ok":
        return [row["status"].upper(), *[""] * (len(FIGURES) - 1)]
    speedup, launches = row.get("fastattn_speedup"), row.get("launches")
    return [
        _milliseconds(row["median_ms"]),
        f"{_milliseconds(row['p20_ms'])}-{_milliseconds(row['p80_ms'])}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tflops']:.2f}",
        f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else "",
        _percent(row.get("copy_share")),
        _percent(row["floor_share"]),
        _megabytes(row.get("peak_bytes")),
        _megabytes(row.get("saved_bytes")),
        "" if launches is None else str(launches),
        _interval(speedup) if speedup else "",
    ]


def print_tables(results: dict, console: Console) -> None:
    """One table per op and size, then what was withheld."""
    for case, rows in by_case(results):
        on_gpu = results["environment"]["device"] == "cuda"
        table = Table(
            title=f"{case['op']}, {case['name']}, dropout {case['dropout']}",
            caption=_dropout(case, rows),
        )
        for heading in ("mode", "provider"):
            table.add_column(heading, no_wrap=True)
        for heading in FIGURES:
            table.add_column(heading, justify="right")
        table.add_column("match, x eager")
        for (mode, launch), group in groupby(rows, key=lambda row: (row["mode"], row["launch"])):
            label = f"{mode}, {launch}" if on_gpu else mode
            for row in group:
                if row["status"] != "skipped":
                    table.add_row(label, row["provider"], *_cells(row), _match(row))
                    label = ""
            table.add_section()
        console.print(table)
    for line in withheld(results["rows"]):
        console.print(f"withheld: {line}", markup=False, highlight=False)
    for line in results["not_run"]:
        console.print(f"not run, the time was up: {line}", markup=False, highlight=False)


def _time_cell(row: dict) -> str:
    if row["status"] != "ok":
        return "withheld"
    speedup = row.get("fastattn_speedup")
    return _milliseconds(row["median_ms"]) + (f" ({_interval(speedup)})" if speedup else "")


def _memory_cell(baseline: dict, ours: dict, key: str) -> str:
    if baseline.get(key) is None or ours.get(key) is None:
        return ""
    return f"{_megabytes(baseline[key])} → {_megabytes(ours[key])}"


def _markdown_table(op: str, cases: list[tuple[dict, list[dict]]], excerpt: Excerpt) -> list[str]:
    rows = [row for _, rows in cases for row in rows]
    absent = "skipped"
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["status"] != absent))
    if not providers:
        return [f"**`{op}`**", "", "Nothing of it could run."]
    launches = len({row["launch"] for row in rows}) > 1
    lead = ["size", "mode", *(["launches"] if launches else [])]
    tail = [f"{kind} MB, {providers[0]} → fastattn" for kind in ("peak", "saved")]
    head = [
        f"| {' | '.join([*lead, *providers, *tail])} |",
        f"|{'---|' * len(lead)}{'--:|' * (len(providers) + len(tail))}",
    ]
    lines = []
    for case, of_case in cases:
        for (mode, launch), group in groupby(of_case, key=lambda row: (row["mode"], row["launch"])):
            if excerpt.mode not in (None, mode):
                continue
            by_provider = {row["provider"]: row for row in group}
            times = [
                _time_cell(by_provider[name]) if name in by_provider else "" for name in providers
            ]
            baseline, ours = by_provider[providers[0]], by_provider.get("fastattn", {})
            memory = [_memory_cell(baseline, ours, f"{kind}_bytes") for kind in ("peak", "saved")]
            cells = [case["name"], mode, *([launch] if launches else []), *times, *memory]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        raise ResultsError(f"no row of {op} is of mode={excerpt.mode}")
    return [f"**`{op}`**", "", *head, *lines[: excerpt.rows]]


class Excerpt(NamedTuple):
    """What of the results a document shows."""

    ops: list[str] | None = None  # None: all
    mode: str | None = None  # None: all
    rows: int | None = None  # of every table, at most; None: all

    @classmethod
    def asked_for(cls, opening: str) -> Excerpt:
        """As an opening comment says: ops by name, `mode=training-step`, `rows=3`."""
        words = opening.removeprefix("<!-- results:start").removesuffix("-->").split()
        options = dict(word.split("=") for word in words if "=" in word)
        return cls(
            [word for word in words if "=" not in word] or None,
            options["mode"].replace("-", " ") if "mode" in options else None,
            int(options["rows"]) if "rows" in options else None,
        )


ALL = Excerpt()


def markdown(results: dict, source: str, excerpt: Excerpt = ALL) -> str:
    """A table per op for the documents: times, and fastattn's speedup over each peer."""
    lines = [
        f"{headline(results)}.",
        f"Medians of {results['method']['rounds']} interleaved rounds in ms; in parentheses how "
        "many times as fast fastattn is, run the same way: the median of per-round ratios with its "
        f"95 % bootstrap interval. From `{source}`.",
    ]
    for op, cases in groupby(by_case(results, excerpt.ops), key=lambda pair: pair[0]["op"]):
        lines += ["", *_markdown_table(op, list(cases), excerpt)]
    return "\n".join(lines)


def write_into(document: Path, results: dict, source: str) -> None:
    """Put the table between the two comments that mark it in a document.

    The first of them may ask for an :class:`Excerpt`.
    """
    put(document, "results", lambda start: markdown(results, source, Excerpt.asked_for(start)))


def put(document: Path, name: str, table: Callable[[str], str]) -> None:
    """Put a table, made for the opening comment, between `<!-- name:start -->` and its end."""
    text = document.read_text(encoding="utf-8")
    start = text.find(f"<!-- {name}:start")
    end = text.find(f"<!-- {name}:end -->")
    if not 0 <= start < end:
        raise ResultsError(f"{document} has no place for results: <!-- {name}:start --> ... end")
    opening = text[start : text.index("-->", start) + 3]
    document.write_text(
        f"{text[:start]}{opening}\n{table(opening)}\n{text[end:]}", encoding="utf-8"
    )
