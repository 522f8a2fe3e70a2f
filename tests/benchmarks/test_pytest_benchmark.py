"""`pytest benchmarks/`, the suite under pytest-benchmark, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.ops import OPS
from tests import ROOT, helpers

#: Plugins of pytest that a pytest inside of another one must not have.
NOT_INSIDE = ("cacheprovider", "faulthandler", "xdist")

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


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """`collect(*options)` returns pytest's exit code and what it collects, in this process."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)

    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.names = [item.nodeid for item in session.items]

    def collect(*options: str) -> tuple[int, list[str]]:
        found = Collected()
        found.names = []
        plugins = [word for name in NOT_INSIDE for word in ("-p", f"no:{name}")]
        return pytest.main([*plugins, "--collect-only", "-q", *options], [found]), found.names

    return collect


def outcomes(printed: str) -> dict[str, int]:
    """How many tests passed and so on, from the last line."""
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", printed.splitlines()[-1])
    return {kind: int(count) for count, kind in counts}


@pytest.fixture(scope="module")
def layer_norm(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict]:
    """What a run of some providers prints, and what it saves."""
    folder = tmp_path_factory.mktemp("layer_norm")
    (folder / "plant.py").write_text(PLANT)
    done = run_pytest(
        *("benchmarks", "--device", "cpu", "-p", "plant"),
        *("-k", "[layer_norm and (-eager- or -fastattn- or -wrong- or -absent-)"),
        *("--benchmark-max-time=0.05", "--benchmark-min-rounds=2"),
        f"--benchmark-json={folder / 'saved.json'}",
        path=folder,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done, json.loads((folder / "saved.json").read_text())


def test_right_ones_pass_wrong_ones_fail_and_absent_ones_are_skipped(layer_norm) -> None:
    printed = layer_norm[0].stdout
    modes = len(OPS["layer_norm"].modes)
    assert outcomes(printed) == {"passed": 2 * modes, "failed": modes, "skipped": modes}
    assert re.search(r"FAILED .*-wrong-forward\] - .*output: error 1\.0\de-03, limit", printed)
    assert "it has no kernel for this" in printed


def test_times_are_saved_by_op_case_and_mode(layer_norm) -> None:
    saved = layer_norm[1]
    assert saved["machine_info"]["fastattn"]["device"] == "cpu"
    name = next(case.name for case in OPS["layer_norm"].cases["cpu"] if case.quick)
    expected = {f"layer_norm {name} {mode.name}" for mode in OPS["layer_norm"].modes}
    for provider in ("eager", "fastattn"):
        found = [x for x in saved["benchmarks"] if f"-{provider}-" in x["name"]]
        groups = {x["group"]: x["stats"]["median"] for x in found}
        assert set(groups) == expected and len(found) == len(expected)
        assert all(seconds > 0 for seconds in groups.values())


def test_all_cases_are_there_when_asked_for(collect) -> None:
    _, quick = collect("benchmarks", "--device", "cpu")
    _, everything = collect("benchmarks", "--device", "cpu", "--all-cases")
    assert set(quick) < set(everything)
    assert not any("[encoder_stack-" in name for name in quick)
    stack = OPS["encoder_stack"]
    cases = len(stack.cases["cpu"])
    found = sum("[encoder_stack-" in name for name in everything)
    assert found == cases * len(stack.providers) * len(stack.modes)
    assert not any(re.search(r"[^\w.+\-\[\]]", name.partition("::")[2]) for name in everything)


def test_pytest_alone_leaves_benchmarks_out(collect) -> None:
    code, names = collect("--ignore-glob=tests/[a-oq-z]*")
    assert code == 0
    assert names and all(name.startswith("tests/packaging/") for name in names)


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(collect, capsys, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    assert collect("benchmarks", "--device", device) == (4, [])
    assert "--device" in capsys.readouterr().err
