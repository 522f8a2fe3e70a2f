"""The steps of `make gpu-check`: each ends, in time, and says what came of it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Benchmark, GpuTests
from tests.benchmarks.planted_steps import planted_tests, python

#: Seconds that no step here needs, however busy the machine is.
LIMIT = 1800.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_a_step_that_hangs_is_killed_with_what_it_started(tmp_path: Path, log: Path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # The child keeps the pipe open for as long as it lives; both go on after SIGINT.
    hangs = python(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('asked to stop', flush=True))\n"
        f"pipe = os.open({str(pipe)!r}, os.O_WRONLY)\n"
        "if os.fork() == 0: print('the child is there', flush=True)\n"
        "for _ in range(600): time.sleep(1)\n"
    )
    wait, limits, said = subprocess.Popen.wait, [], iter(["the child is there", "asked to stop"])

    def until_it_has_said(process: subprocess.Popen, limit: float | None = None) -> int:
        """In place of the seconds of a limit."""
        text = next(said, None) if limit is not None else None
        if text is None:
            return wait(process)
        limits.append(limit)
        while process.poll() is None and f"{text}\n" not in log.read_text():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, limit)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_has_said)
    gpu_check.run_step(hangs, log, 7.0)
    assert limits == [7.0, gpu_check.GRACE]
    assert (hangs.status, hangs.failed) == ("killed", True)
    assert hangs.reason.startswith("after 7 s; the last line: ")
    assert "the child is there\n" in log.read_text()
    assert "asked to stop\n" in log.read_text()
    readable, _, _ = select.select([reader], [], [], 60)
    assert readable and os.read(reader, 1) == b"", "the child of the killed step lives on"
    os.close(reader)
    after = python("print('done')")
    gpu_check.run_step(after, log, LIMIT)
    assert after.status == "ok"


def test_tests_before_an_interruption_are_kept(tmp_path: Path, log: Path) -> None:
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={junit}"]
    step = GpuTests("stops", [*command, str(planted_tests(tmp_path, True))], 1, junit=junit)
    gpu_check.run_step(step, log, LIMIT)
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
    gpu_check.run_step(step, log, LIMIT)
    assert (step.status, step.reason) == ("failed", reason)


def test_no_step_begins_after_the_deadline(log: Path) -> None:
    step = python("print('here')")
    gpu_check.run([step], log, time.monotonic())
    assert (step.status, step.reason, step.failed) == ("not run", "the time was up", True)
    assert not log.exists()


def test_time_is_shared_and_what_is_left_goes_to_the_next(log: Path, monkeypatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu_check, "run_step", lambda step, log, limit: limits.append(limit))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    gpu_check.run([python("", share=1), python("", share=3), python("", share=2)], log, 1060.0)
    assert [limit + gpu_check.GRACE for limit in limits] == [10, 36, 60]


def test_a_file_without_such_tests_is_a_fault(tmp_path: Path, log: Path) -> None:
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "nothing", f"--junitxml={junit}"]
    step = GpuTests("none", [*command, str(planted_tests(tmp_path))], 1, junit=junit)
    gpu_check.run_step(step, log, LIMIT)
    assert step.failed and "5 deselected" in step.reason


def test_a_benchmark_begins_no_size_late_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    step = Benchmark("attention", ["run"], 1, folder=tmp_path)
    assert step.command_within(100) == ["run", "--time-limit", "60"]
    assert step.results() is None
    (tmp_path / ".12-half.json").write_text("{")  # what a kill leaves of an unfinished write
    assert step.results() is None
