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
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, report, suite
from benchmarks.gpu_check import Benchmark, GpuTests, Step
from benchmarks.ops import OPS
from tests import ROOT

FIGURE = {"status": "ok", "reason": None, "floor_share": 0.5}

# Without the words by which gpu_check finds files with tests for a GPU: this is none.
PLANTED = """
import os
import signal

import pytest

mark = pytest.mark


@mark.gpu
def test_right():
    pass


@mark.gpu
def test_wrong():
    assert 1 + 1 == 3, "one and one"


@mark.gpu
@pytest.mark.skip(reason="not today")
def test_absent():
    pass


@mark.gpu
def test_last():
    INTERRUPTED and os.kill(os.getpid(), signal.SIGINT)


def test_of_no_gpu():
    pass
"""


def python(code: str, name: str = "planted", share: float = 1) -> Step:
    return Step(name, [sys.executable, "-c", code], share)


def planted_tests(folder: Path, interrupted: bool = False) -> Path:
    path = folder / "test_planted.py"
    path.write_text(PLANTED.replace("INTERRUPTED", str(interrupted)))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


# -------------------------------------------------------------------------------------- rehearsal


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
        code = gpu_check.check(out, "cpu", ["layer_norm"], 300, few, "python -m this")
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


# ------------------------------------------------------------------------------------------ steps


def test_a_step_that_hangs_is_killed_with_what_it_started(tmp_path: Path, log: Path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # The child keeps the pipe open for as long as it lives; both go on after SIGINT.
    hangs = python(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('asked to stop', flush=True))\n"
        f"pipe = os.open({str(pipe)!r}, os.O_WRONLY)\n"
        "if os.fork() == 0: print('the child is there', flush=True)\n"
        "time.sleep(600)\n"
    )
    after = python("print('done')")
    gpu_check.run([hangs, after], log, time.monotonic() + 12)
    assert (hangs.status, after.status) == ("killed", "ok")
    assert hangs.reason.startswith("after ") and hangs.failed
    assert "the child is there\n" in log.read_text()
    assert "asked to stop\n" in log.read_text()
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            assert os.read(reader, 1) == b""  # the end: nobody has it open
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the killed step lives on")
    os.close(reader)


def test_tests_before_an_interruption_are_kept(tmp_path: Path, log: Path) -> None:
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={junit}"]
    step = GpuTests("stops", [*command, str(planted_tests(tmp_path, True))], 1, junit=junit)
    gpu_check.run_step(step, log, 60)
    assert (step.status, step.reason) == ("failed", "1 passed, 2 failed, 1 skipped")
    assert {test["test"]: test["outcome"] for test in step.tests} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_absent": "skipped",
        "unnamed": "failed",
    }
    assert "KeyboardInterrupt" in log.read_text()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; print('x'); os.kill(os.getpid(), 11)", "Segmentation fault; the last line: x"),
        ("import sys; sys.exit('a reason\\n')", "a reason"),
        ("import sys; sys.exit(1)", "it printed nothing"),
    ],
)
def test_why_a_step_failed(code: str, reason: str, log: Path) -> None:
    log.write_text("the last line of the step before\n")
    step = python(code)
    gpu_check.run_step(step, log, 30)
    assert (step.status, step.reason) == ("failed", reason)


def test_no_step_begins_after_the_deadline(log: Path) -> None:
    step = python("print('here')")
    gpu_check.run([step], log, time.monotonic())
    assert (step.status, step.reason, step.failed) == ("not run", "the time was up", True)
    assert not log.exists()


def test_time_is_shared_and_what_is_left_goes_to_the_next(log: Path, monkeypatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu_check, "run_step", lambda step, log, limit: limits.append(limit))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: 1000.0)
    gpu_check.run([python("", share=1), python("", share=3), python("", share=2)], log, 1060.0)
    assert [limit + gpu_check.GRACE for limit in limits] == [10, 36, 60]


def test_a_file_without_such_tests_is_a_fault(tmp_path: Path, log: Path) -> None:
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "nothing", f"--junitxml={junit}"]
    step = GpuTests("none", [*command, str(planted_tests(tmp_path))], 1, junit=junit)
    gpu_check.run_step(step, log, 30)
    assert step.failed and "5 deselected" in step.reason


def test_a_benchmark_begins_no_size_late_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    step = Benchmark("attention", ["run"], 1, folder=tmp_path)
    assert step.command_within(100) == ["run", "--time-limit", "60"]
    assert step.results() is None
    (tmp_path / ".12-half.json").write_text("{")  # what a kill leaves of an unfinished write
    assert step.results() is None


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
    code = gpu_check.check(out, "cpu", ["layer_norm"], 300)
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


# ------------------------------------------------------------------------------------------- plan


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
        "python, (step,) = gpu_check.installed(Path('log'), time.monotonic() + 200)\n"
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


# ---------------------------------------------------------------------------------------- summary


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


# ---------------------------------------------------------------------------------------- command


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
