"""The summary of `make gpu-check`: short enough for a screen, and whole."""

from __future__ import annotations

from pathlib import Path

from benchmarks import gpu_check, suite
from benchmarks.gpu_check import Step
from benchmarks.ops import OPS

FIGURE = {"status": "ok", "reason": None, "floor_share": 0.5}


def test_the_verdict_counts_sizes_that_were_not_reached() -> None:
    def verdict(step: Step, not_run: list[str] | None) -> str:
        results = None if not_run is None else {"not_run": not_run}
        return gpu_check.verdict_on([step], results, 9.6, Path("summary.txt"))

    step = Step("a step", [], 1, status="ok")
    end = " in 10 s, see summary.txt"
    whole = f"gpu-check found no fault{end}"
    assert [verdict(step, None), verdict(step, [])] == [whole, whole]
    part = "gpu-check found no fault in what ran; {} not reached;" + end
    assert verdict(step, ["attention large"]) == part.format("1 size was")
    assert verdict(step, ["attention large", "attention small"]) == part.format("2 sizes were")
    step.fail("wrong")
    assert verdict(step, []) == f"gpu-check FAILED{end}: a step"
    assert verdict(step, ["x"]) == f"gpu-check FAILED; 1 size was not reached;{end}: a step"


def test_a_step_that_failed_twice_says_both() -> None:
    step = Step("a step", [], 1, status="killed", reason="after 9 s")
    step.fail("fastattn failed")
    assert (step.status, step.reason) == ("killed", "fastattn failed; after 9 s")


def row(provider: str, launch: str, mode: str = "forward+backward", **figures) -> dict:
    return {"provider": provider, "launch": launch, "mode": mode, **FIGURE, **figures}


def test_replayed_graphs_are_summarised_where_there_are_any() -> None:
    eager, graph = (row("sdpa", launch) for launch in ("eager", "graph"))
    backward = row("sdpa", "graph", "backward")
    assert gpu_check.summarised([eager, graph, backward]) == {"sdpa": graph}
    assert gpu_check.summarised([eager, backward]) == {"sdpa": eager}


def test_a_table_names_peers_briefly_and_says_what_is_wrong() -> None:
    def peer(median: float) -> dict:
        return {"fastattn_speedup": {"median": median}}

    rows = [
        row("sdpa", "graph", **peer(1.234)),
        row("sdpa compiled", "graph", **peer(10)),
        row("flex, no dropout", "graph", status="failed"),
        row("hand-written", "graph", status="mismatch"),
        row("liger", "graph", status="skipped"),
        row("fastattn", "graph", floor_share=0.456),
        row("fastattn compiled", "graph"),
    ]
    assert gpu_check.table("attention", {"a case": gpu_check.summarised(rows)}) == [
        "attention   sdpa  compiled  flex, no  hand-written  floor",
        "a case      1.23     10.00     fails         wrong    46%",
    ]


def test_every_table_of_the_quick_set_fits() -> None:
    """With every provider of a CUDA machine and the largest of speedups."""
    lines, speedup = [], {"fastattn_speedup": {"median": 123.45}}
    for op, cases in gpu_check.quick_cases("cuda", None).items():
        providers = suite.chosen(OPS[op], None, quick=True)
        rows = gpu_check.summarised([row(p.name, "graph", **speedup) for p in providers])
        lines += gpu_check.table(op, {case.name: rows for case in cases})
    assert max(map(len, lines)) <= gpu_check.COLUMNS
    assert len(lines) < gpu_check.LINES - 10


def test_a_long_summary_is_cut() -> None:
    rows, wrong, tables = (
        [f"{kind} {i} {'x' * 200}" for i in range(15)] for kind in ("row", "!", "table")
    )
    lines = gpu_check.shortened(rows, wrong, tables, "verdict")
    assert len(lines) == 40 and max(map(len, lines)) == 110
    assert lines[-1] == "verdict"
    assert lines[15:24] == [line[:110] for line in wrong[:8]] + ["! and 7 more in the summary"]
    assert lines[24:39] == [line[:110] for line in tables]


def test_results_of_ops_are_merged() -> None:
    def part(op: str, rate: int) -> dict:
        return {
            "environment": {"command": op},
            "method": {"rounds": 7},
            "ceilings": {"rate": rate},
            "cases": [{"op": op, "name": "small"}],
            "rows": [{"op": op}],
            "not_run": [],
        }

    planned = [(op, "small") for op in ("attention", "layer_norm", "feed_forward")]
    parts = {"attention": part("attention", 1), "layer_norm": part("layer_norm", 2)}
    results = gpu_check.merged(parts, [*planned, ("attention", "large")], "gpu-check")
    assert results["environment"] == {"command": "gpu-check"}
    assert results["method"]["rounds"] == 7
    assert results["method"]["ceilings_by_op"] == {
        "attention": {"rate": 1},
        "layer_norm": {"rate": 2},
    }
    assert results["ceilings"] == {"rate": 1}
    assert [case["op"] for case in results["cases"]] == ["attention", "layer_norm"]
    assert [row["op"] for row in results["rows"]] == ["attention", "layer_norm"]
    assert results["not_run"] == ["feed_forward small", "attention large"]
