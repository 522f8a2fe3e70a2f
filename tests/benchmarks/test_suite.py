"""benchmarks.suite: a row for everything, and what is wrong is withheld. No timing is judged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import measure, report, suite
from benchmarks.cases import MODES, CannotRun
from benchmarks.ops import OPS
from tests.benchmarks.tiny_layer import (
    EAGER,
    FUSED,
    LAYER,
    TINY,
    Lost,
    OutOfOrder,
    WrongOutput,
    op_with,
    provider_of,
)


def test_every_provider_has_a_row_in_every_mode(results):
    rows = [(row["case"], row["mode"], row["provider"]) for row in results["rows"]]
    assert rows == [("d16 h2 S8 B2 fp32", mode.name, name) for mode in MODES for name in EAGER]
    assert {row["launch"] for row in results["rows"]} == {"eager"}


def test_rows_carry_every_column(results):
    for row in results["rows"]:
        assert row["status"] == "ok", row["reason"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert len(row["samples_ms"]) == 3 and row["repetitions"] >= 1
        assert row["tokens_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
        assert row["peak_bytes"] >= TINY.rows * TINY.d_model * 4  # at least the output
        assert ("saved_bytes" in row) == (row["mode"] != "eval forward")
        assert row["launches"] is None  # there are none on a CPU
        passes = next(mode.passes for mode in MODES if mode.name == row["mode"])
        flops = sum(LAYER.cost(TINY)[name].flops for name in passes)
        assert row["tflops"] == pytest.approx(flops / row["median_ms"] / 1e9)
        assert row["floor_share"] == pytest.approx(flops / 1e11 / row["median_ms"] * 1e3)
        if row["provider"] == "stock":
            ratio = row["fastattn_speedup"]
            assert ratio["provider"] == "fastattn"
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
        else:
            assert "fastattn_speedup" not in row


def test_speedups_are_medians_of_per_round_ratios(results):
    rows = {(row["mode"], row["provider"]): row for row in results["rows"]}
    for mode in MODES:
        stock, ours = rows[mode.name, "stock"], rows[mode.name, "fastattn"]
        ratios = np.array(stock["samples_ms"]) / np.array(ours["samples_ms"])
        assert stock["fastattn_speedup"]["median"] == pytest.approx(np.median(ratios), rel=0.01)


def test_results_carry_the_environment(results):
    environment = results["environment"]
    assert environment["path"] == "CPU path"
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert isinstance(environment["extension"]["available"], bool)
    assert results["format"] == "fastattn-benchmark" and results["method"]["rounds"] == 3
    assert report.headline(results).startswith("CPU path: ")


def test_steps_are_counted_for_the_progress_bar():
    steps = []
    plan = [(LAYER, TINY), (OPS["layer_norm"], TINY)]
    suite.run("cpu", plan, 2, ("fastattn",), ("forward",), on_step=steps.append)
    assert len(steps) == suite.count_steps("cpu", plan, 2, ("fastattn",), ("forward",))


def test_time_limit_leaves_out_cases_and_says_which(monkeypatch):
    plan = [(OPS["layer_norm"], replace(TINY, batch=batch)) for batch in (1, 2, 3)]
    clock = iter([0.0, 5.0, 50.0])
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = suite.run("cpu", plan, 1, ("fastattn",), ("forward",), seconds=10)
    assert [case["name"] for case in found["cases"]] == [case.name for _, case in plan[:2]]
    assert found["not_run"] == [f"layer_norm {plan[2][1].name}"]


def test_wrong_and_failing_providers_are_withheld_and_the_run_goes_on(capsys):
    skipped = replace(FUSED, name="absent", why_not=lambda case, device: "not installed")
    op = op_with(
        provider_of("wrong", WrongOutput), provider_of("failing", OutOfOrder), skipped, FUSED
    )
    results = suite.run("cpu", [(op, TINY)], 2, modes=("forward",))
    rows = {row["provider"]: row for row in results["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "stock": "ok",
        "wrong": "mismatch",
        "failing": "failed",
        "absent": "skipped",
        "fastattn": "ok",
    }
    assert "median_ms" not in rows["wrong"] and "median_ms" not in rows["failing"]
    assert rows["failing"]["reason"] == "RuntimeError: no kernel for this device"
    assert "fastattn_speedup" in rows["stock"] and "fastattn_speedup" not in rows["wrong"]
    report.print_tables(results, report.Console(width=200))
    printed = capsys.readouterr().out
    assert "MISMATCH" in printed and "output: error 1.0" in printed
    assert "no kernel for this device" in printed and "not installed" in printed
    assert report.faults(results) == []  # they are peers


def test_a_baseline_that_fails_withholds_the_case_and_the_run_goes_on():
    op = replace(LAYER, providers=(provider_of("stock", OutOfOrder), FUSED))
    plan = [(op, TINY), (OPS["layer_norm"], TINY)]
    results = suite.run("cpu", plan, 1, ("fastattn",), ("forward",))
    assert [row["status"] for row in results["rows"]] == ["failed", "failed", "ok", "ok"]


def test_a_compiled_provider_that_compiles_nothing_is_withheld(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    providers = ("stock compiled", "fastattn", "fastattn compiled")
    results = suite.run("cpu", [(LAYER, TINY)], 2, providers, ("eval forward",))
    assert [row["status"] for row in results["rows"]] == ["ok", "failed", "ok", "failed"]
    assert "captured no graph" in results["rows"][1]["reason"]
    assert "withheld" in report.markdown(results, "file.json")


def test_a_failure_that_leaves_the_device_alive_is_that_of_a_provider(monkeypatch):
    monkeypatch.setattr(measure, "device_is_lost", lambda: False)
    op = op_with(provider_of("peer", Lost), FUSED)
    results = suite.run("cpu", [(op, TINY)], 1, modes=("forward",))
    assert [row["status"] for row in results["rows"]] == ["ok", "failed", "ok"]


def test_compiled_graphs_are_of_the_case_s_own_shape():
    """The check has fewer sequences, which would otherwise make the timed graph a dynamic one."""
    op, dynamic = OPS["layer_norm"], []

    def compiler(graph, inputs):
        dynamic.append(any(isinstance(i, torch.SymInt) for i in inputs))
        return graph.forward

    @torch._dynamo.config.patch(**suite.DYNAMO)
    def check_and_run():
        torch._dynamo.reset()
        for case in (replace(TINY, batch=1), replace(TINY, batch=4), replace(TINY, batch=7)):
            module = torch.compile(op.baseline.module(case), backend=compiler)
            module(*op.tensors(case, "cpu"))

    check_and_run()
    assert dynamic == [False] * 3


def test_a_provider_that_finds_out_late_that_it_cannot_run_is_skipped():
    class Refuses(nn.TransformerEncoderLayer):
        def forward(self, *args, **kwargs):
            raise CannotRun("no such kernel")

    op = op_with(provider_of("peer", Refuses), FUSED)
    results = suite.run("cpu", [(op, TINY)], 1, modes=("forward",))
    assert [row["status"] for row in results["rows"]] == ["ok", "skipped", "ok"]
    assert results["rows"][1]["reason"] == "no such kernel"


def test_what_cannot_be_captured_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setitem(suite.LAUNCHES, "cpu", ("eager", "graph"))
    monkeypatch.setattr(measure, "captured", lambda call: call)
    op = replace(OPS["encoder_stack"], providers=OPS["encoder_stack"].providers[:1])
    case = replace(TINY, padding=0.5, layers=2)
    results = suite.run("cpu", [(op, case)], 1, modes=("eval forward", "forward"))
    assert [(row["mode"], row["launch"], row["status"]) for row in results["rows"]] == [
        ("eval forward", "eager", "ok"),
        ("eval forward", "graph", "skipped"),
        ("forward", "eager", "ok"),
        ("forward", "graph", "ok"),
    ]
    assert "on the host" in results["rows"][1]["reason"]
