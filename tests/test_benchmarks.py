"""The benchmark suite: what it counts, what it refuses and what it writes. No timing is judged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import measure, report, suite
from benchmarks.__main__ import main
from benchmarks.accuracy import AccuracyCheck
from benchmarks.cases import CASES, FUSED, MODES, PROVIDERS, STOCK, Case, Provider

TINY = Case(16, 2, 32, sequence=8, batch=2)
EAGER = (STOCK, FUSED)


class WrongGradient(nn.TransformerEncoderLayer):
    """Right outputs, but the gradient of the input is 1 % too large."""

    def forward(self, src, *args, **kwargs):
        doubled = src * 1.01
        return super().forward(doubled + (src - doubled).detach(), *args, **kwargs)


class WrongOutput(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + 1e-4


class NotANumber(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * torch.nan


class OutOfOrder(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        raise RuntimeError("no kernel for this device\nand a long tail")


@pytest.fixture(scope="module")
def results() -> dict:
    return suite.run("cpu", cases=[TINY], rounds=3, providers=EAGER)


@pytest.fixture
def tiny_default(monkeypatch):
    """The command's own cases, cut down to a tiny one and to eager providers."""
    monkeypatch.setitem(CASES, "cpu", (TINY,))
    monkeypatch.setattr("benchmarks.__main__.PROVIDERS", EAGER)


def test_every_provider_has_a_row_in_every_mode(results):
    rows = [(row["case"], row["mode"], row["provider"]) for row in results["rows"]]
    assert rows == [("d16 S8 B2", mode.name, p.name) for mode in MODES for p in EAGER]


def test_rows_carry_every_column(results):
    for row in results["rows"]:
        assert row["status"] == "ok", row["reason"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert len(row["samples_ms"]) == 3 and row["repetitions"] >= 1
        assert row["tokens_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
        assert row["peak_bytes"] >= TINY.tokens * TINY.d_model * 4  # at least the output
        assert (row["saved_bytes"] is None) == (row["mode"] == "eval forward")
        (rival,) = {p.name for p in EAGER} - {row["provider"]}
        ratio = row["speedup_over"][rival]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]


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
    suite.run("cpu", [TINY], 2, EAGER, on_step=steps.append)
    assert len(steps) == suite.count_steps([TINY], 2, EAGER)


def test_saved_bytes_of_a_hand_counted_case():
    weight = torch.randn(5, 7, requires_grad=True)
    src = torch.randn(3, 5, requires_grad=True)

    def forward():
        hidden = src @ weight  # saves src (60 bytes) and the weight, a parameter
        return hidden.exp().view(21) * hidden.sigmoid().view(21)  # two results of 84, each twice

    assert measure.saved_bytes(forward, [weight]) == 60 + 2 * 84
    assert measure.saved_bytes(forward, []) == 60 + 2 * 84 + 140


def test_peak_bytes_of_known_allocations():
    def call():
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(250_000)
        return second, third

    assert measure.peak_bytes(call, "cpu") == 6_000_000
    assert measure.peak_bytes(lambda: None, "cpu") == 0


def test_peak_bytes_does_not_count_what_was_there_before():
    held = torch.empty(1_000_000)
    assert measure.peak_bytes(lambda: torch.empty_like(held).copy_(held), "cpu") == 4_000_000


def test_peak_bytes_of_a_backward_counts_what_autograd_keeps():
    src = torch.randn(250_000, requires_grad=True)

    def call():
        src.exp().exp().sum().backward()  # two results and then two gradients, 1 MB each
        src.grad = None

    assert 3_000_000 < measure.peak_bytes(call, "cpu") <= 4_000_100


def test_interval_of_equal_ratios_is_a_point():
    ratio = measure.median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_interval_covers_the_true_median_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        ours = np.ones(41)
        interval = measure.median_ratio(generator.normal(1.3, 0.1, 41), ours, resamples=500)
        covered += interval["low"] <= 1.3 <= interval["high"]
    assert 0.90 <= covered / 300 <= 0.99


def test_interval_is_repeatable():
    peer, ours = np.random.default_rng(2).random((2, 20)) + 1
    assert measure.median_ratio(peer, ours) == measure.median_ratio(peer, ours)


@pytest.mark.parametrize(
    ("layer_class", "kind", "tensor"),
    [
        (WrongOutput, "output", "output"),
        (WrongGradient, "gradient", "gradient of src"),
        (NotANumber, "output", "output"),
    ],
)
def test_a_wrong_layer_is_a_mismatch(layer_class, kind, tensor):
    check = AccuracyCheck(TINY, "cpu")
    assert check.check(STOCK)["ok"]
    match = check.check(Provider("wrong", layer_class))
    assert not match["ok"]
    assert match[kind]["tensor"].endswith(tensor)
    assert not match[kind]["error"] <= match[kind]["limit"]


def test_limits_follow_the_stock_layer_in_the_same_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        check = AccuracyCheck(replace(TINY, dtype=dtype), "cpu")
        for verdict in (check.check(STOCK)[kind] for kind in ("output", "gradient")):
            assert 0 < verdict["error"] == verdict["eager_error"]
            factor = 2 if verdict["tensor"].endswith("output") else 3
            assert verdict["limit"] >= factor * verdict["eager_error"]


def test_wrong_and_failing_providers_are_withheld_and_the_run_goes_on(capsys):
    broken = (Provider("wrong", WrongOutput), Provider("failing", OutOfOrder))
    results = suite.run("cpu", [TINY], 2, (STOCK, *broken, FUSED), MODES[1:2])
    rows = {row["provider"]: row for row in results["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "stock": "ok",
        "wrong": "mismatch",
        "failing": "failed",
        "fastattn": "ok",
    }
    assert "median_ms" not in rows["wrong"] and "median_ms" not in rows["failing"]
    assert rows["failing"]["reason"] == "RuntimeError: no kernel for this device"
    assert rows["fastattn"]["speedup_over"].keys() == {"stock"}
    report.print_tables(results, report.Console(width=168))
    printed = capsys.readouterr().out
    assert "MISMATCH" in printed and "output: error 1.0" in printed
    assert "no kernel for this device" in printed


def test_a_compiled_provider_that_compiles_nothing_is_withheld(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer: layer)
    results = suite.run("cpu", [TINY], 2, PROVIDERS, MODES[:1])
    assert [row["status"] for row in results["rows"]] == ["ok", "failed", "ok", "failed"]
    assert "captured no graph" in results["rows"][1]["reason"]
    assert "withheld" in report.markdown(results, "file.json")


def test_a_lost_device_ends_the_run(monkeypatch, tmp_path, capsys, tiny_default):
    class Lost(nn.TransformerEncoderLayer):
        def forward(self, *args, **kwargs):
            raise torch.AcceleratorError("the device fell off the bus")

    monkeypatch.setattr("benchmarks.__main__.PROVIDERS", (STOCK, Provider("fastattn", Lost)))
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_results_are_left_alone(tmp_path, results):
    first = report.save(results, tmp_path)
    before = [path.read_bytes() for path in first]
    second = report.save(results | {"rows": results["rows"][:2]}, tmp_path)
    assert [path.name for path in second] == [f"{p.stem}-2{p.suffix}" for p in first]
    assert [path.read_bytes() for path in first] == before
    assert sorted(tmp_path.iterdir()) == sorted([*first, *second])


def test_a_failing_plot_leaves_nothing_behind(tmp_path, results):
    with pytest.raises(KeyError):
        report.save(results | {"rows": [{"case": TINY.name}]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_prints_tables_and_writes_results(tmp_path, capsys, tiny_default):
    assert main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "CPU path" in printed and "training step" in printed
    json_path, png_path = sorted(tmp_path.iterdir())
    assert report.load(json_path)["method"]["rounds"] == 2
    png = png_path.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_table_prints_markdown_from_a_results_file(tmp_path, capsys, results):
    complete = json.loads(json.dumps(results))
    for row in results["rows"]:
        withheld = {"status": "failed", "reason": "no compiler"}
        complete["rows"].append(row | withheld | {"provider": f"{row['provider']} compiled"})
    complete["rows"].sort(key=lambda row: row["mode"])
    json_path, _ = report.save(complete, tmp_path)
    assert main(["table", str(json_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CPU path: ") and json_path.name in lines[1]
    assert len(lines) == 5 + len(MODES)
    assert {line.count("|") for line in lines[3:]} == {11}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe\x00", "not a results file"),
        (b"{", "not a results file"),
        (b"[1]", "not a results file"),
        (b'{"benchmarks": []}', "not a results file"),
        (b'{"format": "fastattn-benchmark", "version": 99}', "version 99"),
        (b'{"format": "fastattn-benchmark", "version": 1, "rows": []}', "lacks cases"),
    ],
)
def test_table_refuses_foreign_files(tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["table", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unusable_folder_is_refused_before_the_run(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["--device", "cpu", "--out", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--rounds 0", "--device tpu", "table", "plots"])
def test_wrong_arguments_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert "usage" in capsys.readouterr().err
