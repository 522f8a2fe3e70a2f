"""python -m benchmarks: what it runs, writes, prints and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import report
from benchmarks.accuracy import AccuracyCheck
from benchmarks.cases import MODES
from tests.benchmarks.tiny_layer import FUSED, TINY, Lost, provider_of


def test_a_lost_device_ends_the_run_and_keeps_what_was_measured(
    monkeypatch, tmp_path, capsys, tiny_default
):
    tiny_default(provider_of("fastattn", Lost))
    run = ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    assert command.main(run) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    tiny_default(FUSED, cases=(TINY, replace(TINY, batch=3)))
    check = AccuracyCheck.check

    def lost_later(self, provider):
        if self.case.batch == 3:
            raise torch.AcceleratorError("the device fell off the bus")
        return check(self, provider)

    monkeypatch.setattr(AccuracyCheck, "check", lost_later)
    assert command.main(run) == 1
    (kept,) = tmp_path.iterdir()
    assert "fell off the bus" in (error := capsys.readouterr().err) and str(kept) in error
    assert [case["name"] for case in report.load(kept)["cases"]] == [TINY.name]


def test_command_prints_tables_and_writes_results(tmp_path, capsys, tiny_default):
    assert command.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "CPU path" in printed and "training step" in printed and "ceilings" in printed
    (json_path,) = tmp_path.glob("*.json")
    assert report.load(json_path)["method"]["rounds"] == 2
    plots = [path for path in tmp_path.iterdir() if path != json_path]
    assert {path.name for path in plots} >= {f"{json_path.stem}-speedup.png"}
    for png in plots:
        assert png.read_bytes().startswith(b"\x89PNG") and str(png) in printed


def test_list_shows_what_would_run(capsys):
    assert (
        command.main(["list", "--device", "cuda", "--only", "attention", "--case", "p0.125"]) == 0
    )
    printed = capsys.readouterr().out
    assert "attention d1024 h16 S512 B32 bf16 p0.125" in printed and "p0.1 " not in printed
    assert "sdpa cudnn" in printed and "graph" in printed
    assert command.main(["list", "--device", "cpu", "--quick", "--only", "layer_norm"]) == 0
    printed = capsys.readouterr().out
    assert "liger: skipped, Liger's kernels run on CUDA only" in printed
    assert "max-autotune" not in printed


def test_filters_cut_the_run_down(tmp_path, tiny_default):
    tiny_default(FUSED, cases=(TINY, replace(TINY, batch=3)))
    filters = "--case B3 --mode forward,backward --provider fastattn --rounds 1".split()
    assert command.main(["--device", "cpu", "--out", str(tmp_path), *filters]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = report.load(path)["rows"]
    assert {row["case"] for row in rows} == {"d16 h2 S8 B3 fp32"}
    assert [row["mode"] for row in rows] == ["forward"] * 2 + ["backward"] * 2


def test_table_prints_markdown_and_writes_it_into_documents(tmp_path, capsys, results):
    path = tmp_path / "2026-01-01-abcdef0.json"
    report.save(results, path)
    assert command.main(["table", str(path)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("CPU path: ") and path.name in lines[1]
    assert lines[3] == "**`encoder_layer`**" and len(lines) == 7 + len(MODES)
    assert {line.count("|") for line in lines[5:]} == {7}

    document = tmp_path / "page.md"
    document.write_text("before\n<!-- results:start encoder_layer -->\nold\n<!-- results:end -->\n")
    assert command.main(["table", str(path), "--write", str(document)]) == 0
    assert document.read_text() == (
        f"before\n<!-- results:start encoder_layer -->\n{printed}<!-- results:end -->\n"
    )
    document.write_text("no place")
    assert command.main(["table", str(path), "--write", str(document)]) == 2
    assert document.read_text() == "no place"


def test_compare_exits_with_one_on_a_regression(tmp_path, capsys, results):
    def with_ours_at(milliseconds: float) -> Path:
        copy = json.loads(json.dumps(results))
        for row in copy["rows"]:
            time = milliseconds if row["provider"] == "fastattn" else 2.0
            row |= {
                "samples_ms": [(0.99 + 0.01 * (i % 3)) * time for i in range(7)],
                "median_ms": time,
            }
        path = tmp_path / f"{milliseconds}.json"
        report.save(copy, path)
        return path

    old, new = str(with_ours_at(1.0)), str(with_ours_at(1.5))
    assert command.main(["compare", old, old]) == command.main(["compare", new, old]) == 0
    assert command.main(["compare", old, new]) == 1
    assert "regression" in capsys.readouterr().out
    assert command.main(["compare", old, new, "--margin", "0.9"]) == 0


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unusable_folder_is_refused_before_the_run(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert command.main(["--device", "cpu", "--out", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_filters_that_leave_nothing_are_refused(capsys):
    assert command.main(["--device", "cpu", "--case", "no such size"]) == 2
    assert "no size is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "--rounds 0",
        "--device tpu",
        "--only atention",
        "--mode sideways",
        "--provider nobody",
        "--time-limit 0",
        "table",
        "compare one.json",
        "compare a b --margin 1.5",
        "plots",
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments.split())
    assert exit.value.code == 2
    assert "usage" in capsys.readouterr().err
