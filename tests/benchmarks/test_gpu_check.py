"""`make gpu-check`, rehearsed on the CPU: what is written, what is said, and what goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, report
from benchmarks.gpu_check import Benchmark, Step
from benchmarks.ops import OPS
from tests import ROOT
from tests.benchmarks.planted_steps import planted_tests, python


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[str]]:
    """Exit code, folder and printed lines of a check with a failing step and a failing test."""
    out = tmp_path_factory.mktemp("out")
    (out / "log.txt").write_text("of an earlier check")
    tests = planted_tests(tmp_path_factory.mktemp("tests"))
    fails = python("import sys; print('no such kernel'); sys.exit(3)", "fails")
    few = ["--rounds", "2", "--provider", "fastattn", "--mode", "forward+backward"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(gpu_check, "build_steps", lambda python, device: [fails])
        patch.setattr(gpu_check, "gpu_test_files", lambda ops: [tests])
        patch.setattr(gpu_check, "PLOTTING", SECONDS / 2)
        code = gpu_check.check(out, "cpu", ["layer_norm"], SECONDS, few, "python -m this")
    return code, out, printed.getvalue().splitlines()


def test_a_failing_step_is_recorded_and_the_rest_goes_on(rehearsal) -> None:
    code, _, printed = rehearsal
    assert code == 1
    rows = printed[printed.index("") + 1 :]
    assert [row.split()[0] for row in rows[:4]] == ["failed", "failed", "ok", "ok"]
    assert rows[0].endswith("s  fails  no such kernel")
    assert rows[1].endswith("test_planted.py  2 passed, 1 failed, 1 skipped")
    assert rows[2].endswith("s  layer_norm")
    assert rows[3].endswith("s  plots")
    assert rows[-1].startswith("gpu-check FAILED in ")
    assert "summary-2.txt: fails, " in rows[-1]
    assert [row for row in rows if row.startswith("!")] == [row for row in rows if "one and" in row]


def test_the_table_is_short_and_has_the_figures(rehearsal) -> None:
    _, out, printed = rehearsal
    rows = printed[printed.index("") + 1 :]
    assert len(rows) <= 40 and max(map(len, rows)) <= 110
    (results,) = (report.load(path) for path in out.glob("[0-9]*.json"))
    eager, ours = results["rows"]
    heads, cells = (row.split() for row in rows[-3:-1])
    assert heads == ["layer_norm", "eager", "floor"]
    name = " ".join(cells[:-2])
    assert name == eager["case"]
    assert cells[-2] == f"{eager['fastattn_speedup']['median']:.2f}"
    assert cells[-1] == f"{ours['floor_share']:.0%}"


def test_everything_is_in_the_folder(rehearsal) -> None:
    _, out, printed = rehearsal
    names = sorted(path.name for path in out.iterdir())
    assert (out / "log.txt").read_text() == "of an earlier check"
    others = set(names) - {"log.txt", "log-2.txt", "tests-2.json", "summary-2.txt"}
    assert sum(name.endswith(".json") for name in others) == 1
    assert all(name.endswith((".json", ".png")) for name in others)
    assert len(names) - 1 <= 8
    log = (out / "log-2.txt").read_text()
    assert log.count("\n=== ") == 4
    assert "no such kernel" in log and "one and one" in log
    summary = (out / "summary-2.txt").read_text().splitlines()
    assert [line[:110] for line in summary] == printed[printed.index("") + 1 :]


def test_the_outcome_of_every_test_is_kept(rehearsal) -> None:
    (file,) = json.loads((rehearsal[1] / "tests-2.json").read_text())
    assert file["file"].endswith("test_planted.py") and file["status"] == "failed"
    found = {test["test"]: (test["outcome"], test["reason"]) for test in file["tests"]}
    assert found == {
        "test_right": ("passed", None),
        "test_wrong": ("failed", "AssertionError: one and one"),
        "test_absent": ("skipped", "not today"),
        "test_last": ("passed", None),
    }


def test_the_results_are_those_of_a_run(rehearsal) -> None:
    (results,) = (report.load(path) for path in rehearsal[1].glob("[0-9]*.json"))
    assert results["environment"]["command"] == "python -m this"
    assert results["method"]["ceilings_by_op"] == {"layer_norm": results["ceilings"]}
    assert [case["op"] for case in results["cases"]] == ["layer_norm"]
    assert [row["provider"] for row in results["rows"]] == ["eager", "fastattn"]
    assert results["not_run"] == []


#: What a check may take, far more than it does however busy the machine is.
SECONDS = 7200.0


# ----------------------------------------------------------------------------------- what is wrong


@pytest.fixture
def results(rehearsal) -> dict:
    """Those of the rehearsal: eager and fastattn, without a fault."""
    (path,) = rehearsal[1].glob("[0-9]*.json")
    return json.loads(path.read_text())


def planted_check(out: Path, content: str, patch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Exit code and summary of a check whose only benchmark writes `content`, without tests."""

    def benchmarks(python: str, device: str, cases: dict, scratch: Path, options) -> list[Step]:
        code = f"open({str(scratch / 'results.json')!r}, 'w').write({content!r})"
        return [Benchmark("layer_norm", [sys.executable, "-c", code], 1, folder=scratch)]

    patch.setattr(gpu_check, "build_steps", lambda python, device: [])
    patch.setattr(gpu_check, "gpu_test_files", lambda ops: [])
    patch.setattr(gpu_check, "quick_benchmarks", benchmarks)
    patch.setattr(gpu_check, "installed", lambda log, deadline: (sys.executable, []))
    code = gpu_check.check(out, "cpu", ["layer_norm"], SECONDS)
    assert json.loads((out / "tests.json").read_text()) == []
    return code, (out / "summary.txt").read_text().splitlines()


def no_plots(out: Path, results: dict, python: str, log: Path) -> Step:
    return Step("plots", [], 1, status="ok", reason="")


def test_without_the_report_there_is_a_summary(results: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr("benchmarks.report")
    monkeypatch.setitem(sys.modules, "benchmarks.report", None)  # as if it lacked its imports
    code, lines = planted_check(tmp_path, json.dumps(results), monkeypatch)
    assert code == 1
    assert lines[0].startswith("failed ") and "  layer_norm  ModuleNotFoundError: " in lines[0]
    assert lines[-1].startswith("gpu-check FAILED in ") and lines[-1].endswith(": layer_norm")


def test_an_unusable_results_file_is_a_failed_step(tmp_path: Path, monkeypatch) -> None:
    code, lines = planted_check(tmp_path, "{}", monkeypatch)
    assert code == 1
    assert "  layer_norm  ResultsError: " in lines[0] and "is not a results file" in lines[0]


@pytest.mark.parametrize(
    ("function", "step"),
    [("merged", "results"), ("write_results", "plots"), ("wrong", "faults"), ("tables", "tables")],
)
def test_what_fails_at_the_end_is_a_failed_step(
    function: str, step: str, results: dict, tmp_path: Path, monkeypatch
) -> None:
    def fails(*arguments) -> None:
        raise ImportError("No module named 'planted'\nand more")

    monkeypatch.setattr(gpu_check, "write_results", no_plots)
    monkeypatch.setattr(gpu_check, function, fails)
    code, lines = planted_check(tmp_path, json.dumps(results), monkeypatch)
    assert code == 1
    (failed,) = (line for line in lines if line.startswith("failed "))
    assert failed.endswith(f"  {step}  ImportError: No module named 'planted'")
    assert lines[-1].endswith(f"summary.txt: {step}")


@pytest.mark.parametrize(
    ("provider", "status", "at_fault"),
    [
        ("fastattn compiled", "failed", True),
        ("fastattn compiled", "mismatch", True),
        ("fastattn, no dropout", "failed", True),
        ("fastattn compiled", "skipped", False),
        ("eager compiled", "failed", False),
    ],
)
def test_a_wrong_row_of_fastattn_is_a_fault(
    provider: str, status: str, at_fault: bool, results: dict, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(gpu_check, "write_results", no_plots)
    changed = {"provider": provider, "status": status, "reason": "planted"}
    results["rows"].append({**results["rows"][-1], **changed})
    code, lines = planted_check(tmp_path, json.dumps(results), monkeypatch)
    assert code == at_fault
    assert lines[0].endswith(f"  layer_norm  {provider} {status}") == at_fault
    assert ("found no fault in " not in lines[-1]) == at_fault


# -------------------------------------------------------------------------------------------- plan


def test_ops_and_files_of_tests() -> None:
    def names(ops: list[str] | None) -> set[str]:
        return {f"{path.parent.name}/{path.name}" for path in gpu_check.gpu_test_files(ops)}

    assert set(gpu_check.OP_NAMES) == set(OPS)
    assert names(["encoder_layer"]) == {"gpu/test_layer.py"}
    chosen = names(["bias_activation_dropout", "encoder_layer"])
    assert chosen >= {"gpu/test_layer.py", "ops/bias_activation_dropout_checks.py"}
    assert not any("attention" in name for name in chosen)
    assert chosen < names(None)


def test_every_chosen_file_has_tests_for_a_gpu(tmp_path: Path) -> None:
    steps = gpu_check.gpu_tests(sys.executable, ["bias_activation_dropout"], tmp_path)
    assert len(steps) >= 2
    for step in steps:
        command = [*step.command, "--collect-only"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout  # pytest exits with 5 where it collects none


def test_only_cuts_benchmarks() -> None:
    assert list(gpu_check.quick_cases("cuda", ["attention"])) == ["attention"]
    assert set(gpu_check.quick_cases("cuda", None)) == set(OPS)
    assert "encoder_stack" not in gpu_check.quick_cases("cpu", None)  # none of it is quick there


def test_an_uninstalled_checkout_gets_an_environment(tmp_path: Path) -> None:
    """It finds the kernels and all packages of this Python, into which nothing is installed."""
    checkout = tmp_path / "checkout"
    for folder in ("fastattn", "kernels", "csrc", "benchmarks"):
        ignore = shutil.ignore_patterns("*.so", "_build_status.txt", "__pycache__", "results")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from benchmarks import gpu_check\n"
        "assert not gpu_check.finds_kernels()\n"
        "python, (step,) = gpu_check.installed(Path('log'), time.monotonic() + 7200)\n"
        "assert step.status == 'ok', Path('log').read_text()\n"
        "print(python)\n"
    )
    paths = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}

    def run(command: list[str], cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=paths, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    inner = run([sys.executable, "-c", code], checkout)
    where = "import torch, fastattn.kernels; print(torch.__file__, fastattn.kernels.__file__)"
    found = run([inner, "-c", where], tmp_path)
    assert found == f"{torch.__file__} {checkout / 'kernels' / 'triton' / '__init__.py'}"
    again = "from benchmarks import gpu_check; print(gpu_check.finds_kernels())"
    assert run([inner, "-c", again], checkout) == "True"
    assert run([sys.executable, "-c", again], checkout) == "False"


# ----------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--only", "attention,norm"], "must be of attention, .*layer_norm, but got norm"),
        (["out", "--minutes", "0.5"], "must be at least 1, but got 0.5"),
        (["out", "--device", "tpu"], "invalid choice: 'tpu'"),
        ([], "required: out"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert gpu_check.main([str(path), "--device", "cpu"]) == 2
    assert f"out must be a folder, but {path} is a file" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file/out", "/proc/fastattn"])
def test_an_out_that_cannot_be_made_is_refused(out: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    path = tmp_path / out
    assert gpu_check.main([str(path), "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out must be a folder that can be written to, but got ")
    assert str(path) in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys) -> None:
    assert gpu_check.main([str(tmp_path / "out")]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_asks_for_a_folder() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run(
        ["make", "gpu-check"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "make gpu-check OUT=folder" in done.stderr
