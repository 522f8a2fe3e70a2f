"""benchmarks.report: results files lose nothing, are refused when spoilt, and become tables."""

from __future__ import annotations

import json
import math

import pytest

import benchmarks.__main__ as command
from benchmarks import report
from benchmarks.cases import MODES
from tests.benchmarks.tiny_layer import EAGER


def test_faults_are_ours_or_the_baselines(results):
    wrong = [row | {"status": "mismatch"} for row in results["rows"]]
    assert {r["provider"] for r in report.faults(results | {"rows": wrong})} == {"fastattn"}
    failed = [row | {"status": "failed"} for row in results["rows"]]
    assert {r["provider"] for r in report.faults(results | {"rows": failed})} == set(EAGER)
    compiled = [row | {"provider": "fastattn compiled"} for row in failed]
    assert report.faults(results | {"rows": compiled}) == []  # a compiler may be missing


def test_results_have_a_line_for_every_row_and_lose_nothing(tmp_path, results):
    path = tmp_path / "results.json"
    report.save(results, path)
    assert report.load(path) == json.loads(json.dumps(results))
    lines = path.read_text().splitlines()
    assert sum('"median_ms"' in line for line in lines) == len(results["rows"])


def test_existing_results_are_left_alone(tmp_path, results):
    first = report.new_path(results["environment"], tmp_path)
    report.save(results, first)
    before = first.read_bytes()
    second = report.new_path(results["environment"], tmp_path)
    report.save(results | {"rows": results["rows"][:2]}, second)
    assert second.name == f"{first.stem}-2.json"
    assert first.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, results):
    with pytest.raises(TypeError):
        report.save(results | {"rows": [object()]}, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_document_may_show_an_excerpt(results):
    asked = "<!-- results:start encoder_layer layer_norm mode=training-step rows=1 -->"
    excerpt = report.Excerpt.asked_for(asked)
    assert excerpt == (["encoder_layer", "layer_norm"], "training step", 1)
    whole = report.markdown(results, "file.json").splitlines()
    shown = report.markdown(results, "file.json", excerpt).splitlines()
    (row,) = (line for line in shown if "| training step |" in line)
    assert row in whole and [line for line in whole if line in shown] == shown
    assert len(whole) == len(shown) + len(MODES) - 1
    assert report.Excerpt.asked_for("<!-- results:start -->") == (None, None, None)


@pytest.mark.parametrize("subcommand", ["table", "plot", "compare"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe\x00", "not a results file"),
        (b"{", "not a results file"),
        (b"[1]", "not a results file"),
        (b'{"benchmarks": []}', "not a results file"),
        (b'{"format": "fastattn-benchmark", "version": 99}', "version 99"),
        (b'{"format": "fastattn-benchmark", "version": "2"}', "version '2'"),
        (b'{"format": "fastattn-benchmark", "version": 2, "rows": []}', "lacks cases"),
    ],
)
def test_foreign_files_are_refused(tmp_path, capsys, subcommand, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    files = [str(path)] * (2 if subcommand == "compare" else 1)
    assert command.main([subcommand, *files]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def without(item: dict, name: str) -> dict:
    return {key: value for key, value in item.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r | {"rows": ["text"]}, "row 0 lacks"),
        (lambda r: r | {"rows": [without(r["rows"][0], "status")]}, "row 0 lacks"),
        (lambda r: r | {"rows": [without(r["rows"][0], "median_ms")]}, "row 0 has no times"),
        (lambda r: r | {"rows": [r["rows"][0] | {"samples_ms": [0.0]}]}, "row 0 has no times"),
        (lambda r: r | {"rows": [r["rows"][0] | {"median_ms": math.nan}]}, "row 0 has no times"),
        (lambda r: r | {"rows": [r["rows"][0] | {"fastattn_speedup": 2}]}, "row 0 has no times"),
        (lambda r: r | {"cases": []}, "row 0 is of a case that is not listed"),
        (lambda r: r | {"cases": [1]}, "a case lacks"),
        (lambda r: r | {"environment": None}, "environment is no dict"),
        (lambda r: r | {"environment": {}}, "environment lacks"),
        (lambda r: r | {"method": {}}, "method lacks"),
        (lambda r: r | {"ceilings": {}}, "ceilings lacks"),
    ],
)
def test_edited_files_are_refused(tmp_path, results, edit, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(edit(results)))
    with pytest.raises(report.ResultsError, match=message):
        report.load(path)


def test_a_table_of_an_op_that_cannot_run_says_so(results):
    skipped = [row | {"status": "skipped", "reason": "no device"} for row in results["rows"]]
    assert "Nothing of it could run" in report.markdown(results | {"rows": skipped}, "file.json")
