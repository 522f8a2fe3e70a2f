"""Results files, the tables made of them and the plot."""

from __future__ import annotations

import json
import math
import os
from itertools import count, groupby
from pathlib import Path
from textwrap import fill

import matplotlib
from rich.console import Console
from rich.table import Table

from .environment import ROOT, device_slug
from .suite import FORMAT, VERSION

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {"stock compiled": "#9aa0a6", "fastattn": "#1a73e8", "fastattn compiled": "#0b3d91"}
FIGURES = (
    *("median ms", "p20-p80", "tokens/s", "speedup over stock", "over stock compiled"),
    *("peak MB", "saved MB"),
)


class ResultsError(ValueError):
    """A results file that cannot be used."""


def load(path: Path) -> dict:
    """A results file's content; `ResultsError` where it is unreadable or not one of ours."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not a results file: not JSON ({error})") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ResultsError(f'{path} is not a results file: it lacks "format": "{FORMAT}"')
    if results.get("version") != VERSION:
        raise ResultsError(
            f"{path} has version {results.get('version')}, this program reads version {VERSION}"
        )
    missing = {"environment", "method", "cases", "rows"} - results.keys()
    if missing:
        raise ResultsError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    return results


def save(results: dict, folder: Path | None = None) -> tuple[Path, Path]:
    """Writes `<date>-<commit>.json` and `.png` to the folder (`benchmarks/results/<device>`).

    Each is written beside its place and renamed; an existing result gets a neighbour, `-2` and up.
    """
    environment = results["environment"]
    folder = RESULTS / device_slug(environment) if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{environment['date'][:10]}-{environment['commit'] or 'no-commit'}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    paths = next(
        pair
        for pair in ((folder / f"{name}.json", folder / f"{name}.png") for name in names)
        if not any(path.exists() for path in pair)
    )
    parts = [path.with_name(f".{os.getpid()}-{path.name}") for path in paths]
    try:
        parts[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(results, parts[1])
        for part, path in zip(parts, paths, strict=True):
            part.rename(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return paths


def _by_mode(results: dict) -> list[tuple[str, str, dict[str, dict]]]:
    """`(case, mode, {provider: row})` in the order of the run."""
    groups = groupby(results["rows"], key=lambda row: (row["case"], row["mode"]))
    return [(*key, {row["provider"]: row for row in rows}) for key, rows in groups]


def _speedup(row: dict, peer: str) -> str:
    ratio = row.get("speedup_over", {}).get(peer)
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _match(row: dict) -> str:
    """The verdict and the worst error of outputs and of gradients over stock eager's."""
    if row["match"] is None:
        return ""
    worst = [row["match"][kind] for kind in ("output", "gradient")]
    multiples = "/".join(f"{v['error'] / (v['eager_error'] or math.inf):.1f}" for v in worst)
    return f"{'ok' if row['match']['ok'] else 'MISMATCH'} {multiples}"


def withheld(results: dict) -> list[str]:
    """What is not reported and why, one line for all the modes that share a reason."""
    modes: dict[str, list[str]] = {}
    for row in results["rows"]:
        if row["status"] != "ok":
            line = f"{row['case']}, {row['provider']}: {row['status'].upper()}, {row['reason']}"
            modes.setdefault(line, []).append(row["mode"])
    return [f"{line} ({', '.join(names)})" for line, names in modes.items()]


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


def print_tables(results: dict, console: Console) -> None:
    """One table per size, then what was withheld."""
    for case in results["cases"]:
        table = Table(title=f"{case['name']}, {case['dtype']}, dropout {case['dropout']}")
        for heading in ("mode", "provider"):
            table.add_column(heading, no_wrap=True)
        for heading in FIGURES:
            table.add_column(heading, justify="right")
        table.add_column("match, x eager")
        for name, mode, rows in _by_mode(results):
            if name != case["name"]:
                continue
            for provider, row in rows.items():
                timed = row["status"] == "ok"
                table.add_row(
                    mode,
                    provider,
                    f"{row['median_ms']:.2f}" if timed else row["status"].upper(),
                    f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}" if timed else "",
                    f"{row['tokens_per_s']:,.0f}" if timed else "",
                    _speedup(row, "stock"),
                    _speedup(row, "stock compiled"),
                    _megabytes(row["peak_bytes"]),
                    _megabytes(row["saved_bytes"]),
                    _match(row),
                )
                mode = ""
            table.add_section()
        console.print(table)
    for line in withheld(results):
        console.print(f"withheld: {line}", markup=False, highlight=False)


def markdown(results: dict, source: str) -> str:
    """The README's table: each provider's time and what fastattn gains, like with like."""
    lines = [
        f"{headline(results)}.",
        f"Medians of {results['method']['rounds']} interleaved rounds in ms; speedups are medians "
        f"of per-round ratios with 95 % bootstrap intervals. From `{source}`.",
        "",
        "| size | mode | stock | stock compiled | fastattn | fastattn compiled | speedup, eager "
        "| speedup, compiled | peak MB, stock → fastattn | saved MB, stock → fastattn |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case, mode, rows in _by_mode(results):
        stock, fused = rows["stock"], rows["fastattn"]
        times = [
            f"{rows[name]['median_ms']:.2f}" if rows[name]["status"] == "ok" else "withheld"
            for name in ("stock", "stock compiled", "fastattn", "fastattn compiled")
        ]
        memory = [
            " → ".join(_megabytes(row[key]) for row in (stock, fused)) if fused[key] else ""
            for key in ("peak_bytes", "saved_bytes")
        ]
        speedups = [
            _speedup(fused, "stock"),
            _speedup(rows["fastattn compiled"], "stock compiled"),
        ]
        lines.append(f"| {' | '.join([case, mode, *times, *speedups, *memory])} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Bars of speedup over stock eager, a panel per size, a group per mode, interval whiskers."""
    cases = [case["name"] for case in results["cases"]]
    groups = _by_mode(results)
    modes = list(dict.fromkeys(mode for _, mode, _ in groups))
    figure, axes = pyplot.subplots(
        1,
        len(cases),
        figsize=(5 * len(cases), 4.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes[0], cases, strict=True):
        rows = {mode: rows for name, mode, rows in groups if name == case}
        for index, (provider, colour) in enumerate(COLOURS.items()):
            for position, mode in enumerate(modes):
                row = rows[mode].get(provider, {})
                ratio = row.get("speedup_over", {}).get("stock")
                x = position + 0.27 * (index - 1)
                if ratio is None:
                    axis.text(x, 0.02, "withheld", rotation=90, ha="center", fontsize=7)
                    continue
                whisker = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
                axis.bar(x, ratio["median"], 0.25, yerr=whisker, color=colour, capsize=2)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(modes)), [mode.replace("+", "+\n") for mode in modes], fontsize=8)
        axis.set_xlim(-0.6, len(modes) - 0.4)
        axis.set_xlabel("mode")
        axis.set_title(case)
    axes[0][0].set_ylabel("speedup over stock eager")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=len(COLOURS))
    figure.suptitle(fill(headline(results), 75 * len(cases)), fontsize=9)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
