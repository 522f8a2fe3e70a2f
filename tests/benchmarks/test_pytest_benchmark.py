"""`pytest benchmarks/`, the suite under pytest-benchmark, in processes of its own on the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import MODES
from benchmarks.ops import OPS
from tests import ROOT, helpers

PLANT = """
from dataclasses import replace

from benchmarks.cases import Provider
from benchmarks.ops import OPS
from benchmarks.ops.layer_norm import LayerNorm


class Wrong(LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1e-3


def why_not(case, device):
    return "it has no kernel for this"


op = OPS["layer_norm"]
planted = Provider("wrong", Wrong), Provider("absent", LayerNorm, why_not=why_not)
OPS["layer_norm"] = replace(op, providers=(*op.providers, *planted))
"""


def run_pytest(*options: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfs", *options]
    environment = helpers.environment(PYTHONPATH=str(path), COLUMNS="200")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def outcomes(printed: str) -> dict[str, int]:
    """How many tests passed and so on, from the last line."""
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", printed.splitlines()[-1])
    return {kind: int(count) for count, kind in counts}


def test_right_ones_pass_wrong_ones_fail_and_absent_ones_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "plant.py").write_text(PLANT)
    eager = "[layer_norm and (-eager- or -fastattn- or -wrong- or -absent-)"
    done = run_pytest(
        *("benchmarks", "--device", "cpu", "-p", "plant", "-k", eager, "--benchmark-disable"),
        path=tmp_path,
    )
    modes = len(MODES) - 1  # a layer norm alone has no training step
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes(done.stdout) == {"passed": 2 * modes, "failed": modes, "skipped": modes}
    assert re.search(r"FAILED .*-wrong-forward\] - .*output: error 1\.0\de-03, limit", done.stdout)
    assert "it has no kernel for this" in done.stdout


def test_times_are_saved_by_op_case_and_mode(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    done = run_pytest(
        *("benchmarks", "--device", "cpu", f"--benchmark-json={saved}"),
        *("--benchmark-max-time=0.05", "--benchmark-min-rounds=2"),
        *("-k", "[layer_norm and -fastattn- and (-backward] or +backward])"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(saved.read_text())
    assert content["machine_info"]["fastattn"]["device"] == "cpu"
    groups = {found["group"]: found["stats"]["median"] for found in content["benchmarks"]}
    name = next(case.name for case in OPS["layer_norm"].cases["cpu"] if case.quick)
    assert set(groups) == {f"layer_norm {name} {mode}" for mode in ("backward", "forward+backward")}
    assert all(seconds > 0 for seconds in groups.values())


def test_all_cases_are_there_when_asked_for() -> None:
    listed = {
        options: run_pytest("benchmarks", "--device", "cpu", "--collect-only", "-q", *options)
        for options in ((), ("--all-cases",))
    }
    quick, everything = (
        {line for line in done.stdout.splitlines() if "::" in line} for done in listed.values()
    )
    assert quick < everything
    assert not any("[encoder_stack-" in line for line in quick)
    stack = OPS["encoder_stack"]
    cases = len(stack.cases["cpu"])
    found = sum("[encoder_stack-" in line for line in everything)
    assert found == cases * len(stack.providers) * len(stack.modes)
    assert not any(re.search(r"[^\w.+\-\[\]]", line.partition("::")[2]) for line in everything)


def test_pytest_alone_leaves_benchmarks_out() -> None:
    done = run_pytest("--collect-only", "-q", "--ignore-glob=tests/test_[a-ac-z]*")
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names and not [name for name in names if name.startswith("benchmarks/")]


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    done = run_pytest("benchmarks", "--device", device, "--collect-only")
    assert done.returncode == 4
    assert "--device" in done.stderr
