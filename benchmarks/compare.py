"""Two results of one machine: what of fastattn's got better or worse.

Two runs happen at different times and the machine drifts between them, so times are shown but not
judged. Judged is every row of ours that both files have:

- **Speed.** The speedup over the op's baseline, compiled the same way as the row (the eager
  baseline where there is no such twin in both files). It is taken round by round, within one file,
  where both were timed side by side: what slows the machine slows both and cancels. The change is
  the new median speedup over the old one, with a 95 % percentile-bootstrap interval that resamples
  the rounds of the two files independently (seeded). A regression is an interval that lies wholly
  below 1 - margin, an improvement one wholly above 1 + margin. The margin stands for what differs
  between two runs of the same code and is the same in all rounds of a run, which no interval sees.
  Any other interval says "same", or nothing where it is wider than the margin on both sides
  together, or where a file has fewer than six rounds: 95 % is then out of reach for a median.
- **Counts.** They have no noise: any more saved bytes or launches are a regression, any fewer an
  improvement. Peak bytes may grow or shrink by the margin.
- **Status.** What was ok and is now a mismatch or failed is a regression, the reverse an
  improvement.

One regression makes the row a regression. A baseline that became faster, say with a new torch,
lowers our speedup too: the header names the software that changed. Rows in only one file are listed
and not judged, since a run may be filtered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import report
from .cases import COMPILED, SEED
from .ops import OPS

RESAMPLES = 4000
LEAST_ROUNDS = 6  # all on one side of the median: 2 in 2**6, 3 %; five would be 6 %
COUNTS = ("saved_bytes", "launches")
WRONG = ("mismatch", "failed")
SOFTWARE = (
    *("torch", "triton", "cuda", "gpu", "liger_kernel", "python", "fastattn", "commit", "dirty"),
    *("dropout_contract", "extension"),
)
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One row of ours in both files, and what is said about it.

    Attributes:
        old, new: the rows.
        baseline: the provider that the speedups are over; None without one.
        old_speedup, new_speedup: medians over the rounds; None where they cannot be had.
        ratio: new speedup / old speedup as "median", "low" and "high"; None where not judged.
        worse, better: the findings, in words.
        unjudged: why speed was not judged; None where it was.
    """

    old: dict
    new: dict
    baseline: str | None = None
    old_speedup: float | None = None
    new_speedup: float | None = None
    ratio: dict | None = None
    worse: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    unjudged: str | None = None

    @property
    def verdict(self) -> str:
        if self.worse:
            return "regression"
        if self.better:
            return "improvement"
        return "no verdict" if self.unjudged else "same"

    @property
    def reasons(self) -> tuple[str, ...]:
        return (*self.worse, *self.better, *((self.unjudged,) if self.unjudged else ()))


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` found out; `changes` are in the order of the new file."""

    old: dict
    new: dict
    margin: float
    changes: list[Change]
    only_old: list[dict]
    only_new: list[dict]

    def with_verdict(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def regressions(self) -> list[Change]:
        return self.with_verdict("regression")


def compare(old: dict, new: dict, margin: float = 0.05) -> Comparison:
    """Judges every row of ours that both results have, by the rules above.

    Args:
        old, new: results as `report.load` returns them.
        margin: the relative loss of speedup, or growth of peak memory, that is still none.

    Raises:
        report.ResultsError: the results are of different hardware, or have no row of ours in
            common.
    """
    _refuse_other_hardware(old["environment"], new["environment"])
    old_rows, new_rows = ({_key(row): row for row in results["rows"]} for results in (old, new))
    changes = [
        _change(key, old_rows, new_rows, margin)
        for key in new_rows
        if key in old_rows and _is_ours(key[-1])
    ]
    if not changes:
        raise report.ResultsError(
            "the two results have no row of fastattn in common (op, size, mode, launches and "
            f"provider): the old one has {_contents(old)}, the new one {_contents(new)}"
        )
    return Comparison(
        old,
        new,
        margin,
        changes,
        only_old=[row for key, row in old_rows.items() if key not in new_rows],
        only_new=[row for key, row in new_rows.items() if key not in old_rows],
    )


def _refuse_other_hardware(old: dict, new: dict) -> None:
    names = ["device", "device_name", *(["threads"] if new.get("device") == "cpu" else [])]
    for name in names:
        if old.get(name) != new.get(name):
            raise report.ResultsError(
                "times of different hardware cannot be compared: "
                f"{name} is {old.get(name)!r} in the old result, {new.get(name)!r} in the new one"
            )


def _key(row: dict) -> Key:
    return row["op"], row["case"], row["mode"], row["launch"], row["provider"]


def _is_ours(provider: str) -> bool:
    return provider.startswith("fastattn")


def _contents(results: dict) -> str:
    ops = dict.fromkeys(row["op"] for row in results["rows"])
    return f"{len(results['rows'])} rows ({', '.join(ops) or 'no op'})"


def _change(
    key: Key, old_rows: dict[Key, dict], new_rows: dict[Key, dict], margin: float
) -> Change:
    old, new = old_rows[key], new_rows[key]
    if old["status"] != "ok" or new["status"] != "ok":
        return _status_change(old, new)
    worse, better = _count_changes(old, new, margin)
    baseline = _baseline(key, old_rows, new_rows)
    if baseline is None:
        why = "no baseline in both files"
        return Change(old, new, worse=worse, better=better, unjudged=why)
    before, after = (
        np.divide(rows[(*key[:-1], baseline)]["samples_ms"], rows[key]["samples_ms"])
        for rows in (old_rows, new_rows)
    )
    ratio = unjudged = None
    if min(len(before), len(after)) < LEAST_ROUNDS:
        unjudged = f"fewer than {LEAST_ROUNDS} rounds"
    else:
        ratio = change_of_median(before, after)
        if ratio["high"] < 1 - margin:
            worse = ("slower", *worse)
        elif ratio["low"] > 1 + margin:
            better = ("faster", *better)
        elif ratio["high"] - ratio["low"] > 2 * margin:
            unjudged = "too noisy"
    medians = (float(np.median(speedups)) for speedups in (before, after))
    return Change(old, new, baseline, *medians, ratio, worse, better, unjudged)


def _status_change(old: dict, new: dict) -> Change:
    """Of rows that are not both ok."""
    was, now = old["status"], new["status"]
    if was == "ok" and now in WRONG:
        return Change(old, new, worse=(f"was ok, now {now}: {new['reason']}",))
    if was in WRONG and now == "ok":
        return Change(old, new, better=(f"was {was}, now ok",))
    return Change(old, new, unjudged=f"was {was}, now {now}: {new['reason'] or old['reason']}")


def _count_changes(old: dict, new: dict, margin: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What got worse and what got better."""
    worse, better = [], []
    for name, tolerance in (*((name, 0.0) for name in COUNTS), ("peak_bytes", margin)):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            continue
        finding = f"{name} {before:,} → {after:,}"
        if after > before * (1 + tolerance):
            worse.append(finding)
        elif after < before * (1 - tolerance):
            better.append(finding)
    return tuple(worse), tuple(better)


def _baseline(key: Key, old_rows: dict[Key, dict], new_rows: dict[Key, dict]) -> str | None:
    """The op's baseline, compiled as our provider is, else eager; it is ok in both files."""
    *group, provider = key
    if key[0] not in OPS:
        return None
    eager = OPS[key[0]].baseline.name
    twins = [f"{eager} {suffix}" for suffix in COMPILED if provider.endswith(f" {suffix}")]
    for name in (*twins, eager):
        rows = [rows.get((*group, name)) for rows in (old_rows, new_rows)]
        if all(row is not None and row["status"] == "ok" for row in rows):
            return name
    return None


def change_of_median(before: np.ndarray, after: np.ndarray) -> dict:
    """Median of `after` / median of `before`, with its 95 % percentile-bootstrap interval."""
    generator = np.random.default_rng(SEED)
    draws = [
        np.median(generator.choice(values, size=(RESAMPLES, len(values))), axis=1)
        for values in (before, after)
    ]
    low, high = np.percentile(draws[1] / draws[0], [2.5, 97.5])
    median = np.median(after) / np.median(before)
    return {"median": float(median), "low": float(low), "high": float(high)}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The two headers, a table per op, what only one file has, and the count of the verdicts."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    for line in _header(comparison):
        say(line)
    for op, changes in groupby(comparison.changes, key=lambda change: change.new["op"]):
        console.print(_table(op, changes))
    for where, rows in (("old", comparison.only_old), ("new", comparison.only_new)):
        for line in _listed(rows):
            say(f"only in the {where} result, not judged: {line}")
    regressions, improvements, unjudged = (
        len(comparison.with_verdict(name)) for name in ("regression", "improvement", "no verdict")
    )
    judged = _counted(len(comparison.changes) - unjudged, "comparison")
    beside = f", {_counted(unjudged, 'row')} without verdict" if unjudged else ""
    found = f"{_counted(regressions, 'regression')}, {_counted(improvements, 'improvement')}"
    say(f"{found} in {judged}{beside}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _software(environment: dict) -> dict:
    """What may differ on one machine, with the members of a dictionary as entries of their own."""
    flat = {}
    for name in SOFTWARE:
        value = environment.get(name)
        members = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name} {member}".strip(): content for member, content in members.items()}
    return flat


def _header(comparison: Comparison) -> Iterator[str]:
    old, new = comparison.old, comparison.new
    for name, results in (("old", old), ("new", new)):
        yield f"{name}: {report.headline(results)}, {results['method']['rounds']} rounds"
    before, after = (_software(results["environment"]) for results in (old, new))
    differences = [
        f"{name.replace('_', ' ')} {before.get(name)} → {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    yield f"between them: {', '.join(differences) or 'the same software and commit'}"
    drift = _drift(old, new)
    if drift is not None:
        yield f"the peers took {drift:.2f} times as long as before (median of their rows)"
    yield (
        "change: new speedup over the baseline / old, with its 95 % interval; a verdict needs the "
        f"whole interval beyond 1 ± {comparison.margin:g}"
    )


def _drift(old: dict, new: dict) -> float | None:
    """How much longer the rows took that are not ours."""
    before = {_key(row): row["median_ms"] for row in _timed_peers(old)}
    ratios = [
        row["median_ms"] / before[_key(row)] for row in _timed_peers(new) if _key(row) in before
    ]
    return float(np.median(ratios)) if ratios else None


def _timed_peers(results: dict) -> Iterator[dict]:
    for row in results["rows"]:
        if row["status"] == "ok" and not _is_ours(row["provider"]):
            yield row


def _table(op: str, changes: Iterable[Change]) -> Table:
    table = Table(title=op)
    for heading in ("case", "mode", "launch", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("old ms", "new ms (x old)", "old speedup", "new speedup", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    previous = ""
    for change in changes:
        case = change.new["case"]
        if previous and case != previous:
            table.add_section()
        table.add_row("" if case == previous else escape(case), *map(escape, _cells(change)))
        previous = case
    return table


def _cells(change: Change) -> list[str]:
    old, new = (row.get("median_ms") for row in (change.old, change.new))
    times = "" if new is None else f"{new:.4g}"
    if old is not None and new is not None:
        times += f" ({new / old:.2f})"
    over = f" over {change.baseline}"
    return [
        *(change.new[name] for name in ("mode", "launch", "provider")),
        change.old["status"] if old is None else f"{old:.4g}",
        times or change.new["status"],
        "" if change.old_speedup is None else f"{change.old_speedup:.2f}",
        "" if change.new_speedup is None else f"{change.new_speedup:.2f}{over}",
        ""
        if change.ratio is None
        else "{median:.3f} [{low:.3f}, {high:.3f}]".format(**change.ratio),
        ": ".join(filter(None, [change.verdict, "; ".join(change.reasons)])),
    ]


def _listed(rows: Iterable[dict]) -> Iterator[str]:
    """Rows in short: a line per op."""
    for op, of_op in groupby(rows, key=lambda row: row["op"]):
        of_op = list(of_op)
        names = (
            f"{plural}: {_some(row[name] for row in of_op)}"
            for name, plural in (("case", "sizes"), ("mode", "modes"), ("provider", "providers"))
        )
        yield f"{op}, {_counted(len(of_op), 'row')} ({'; '.join(names)})"


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(dict.fromkeys(names))
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
