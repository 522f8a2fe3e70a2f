"""``tune`` measures calls of ``feed_forward``, and writes down what it found."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import dispatch, tuned, tuning
from fastattn.tuned import ANCHOR, CANDIDATE, load
from fastattn.tuning import tune
from tests.ops.measurements import (
    CPU,
    NO_MEASUREMENTS,
    content_of,
    empty_table,
    make_entry,
    why_not_chosen,
    write_json,
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple, Any]:
    return empty_table(monkeypatch)


# ------------------------------------------------------------------------------------- measuring


def test_tune_is_public() -> None:
    """Reasons tell users to call it."""
    assert fastattn.tune is tune and "tune" in fastattn.__all__


RATIOS = (1.0, 1.5, 1.2, 1.1, 1.3, 0.9, 1.4)  # median 1.2


class Timer:
    """Stands for the GPU: writes down what is timed, and gives the times of ``ratios``."""

    def __init__(self, ratios: tuple[float, ...] = RATIOS) -> None:
        self.ratios = ratios
        self.timed: list[str] = []
        self.calls: list[tuple] = []

    def call(self, *arguments: Any) -> str:
        self.calls.append(arguments)
        return arguments[0]

    def milliseconds(self, backend: str) -> float:
        number = self.timed.count(backend) % len(self.ratios)
        self.timed.append(backend)
        return 2.0 * (self.ratios[number] if backend == ANCHOR else 1.0)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    pytest.importorskip("triton")  # its version is written down
    timer = Timer()
    monkeypatch.setattr(tuning, "_call", timer.call)
    monkeypatch.setattr(tuning, "_milliseconds", timer.milliseconds)
    monkeypatch.setattr(dispatch, "why_not", lambda *_, **__: None)
    return timer


tune_here = partial(tune, 64, 256, (4096,), device="cpu")


def test_tune_gives_the_median_of_the_rounds(timer: Timer) -> None:
    (entry,) = tune_here()
    assert entry.key == ("cpu", "bfloat16", "relu", 64, 256, 4096)
    assert entry.speedup == 1.2 and entry.rounds == RATIOS
    assert len(RATIOS) == tuning.ROUNDS
    measured = entry.measured
    assert measured["gpu"] == "cpu" and measured["torch"] == torch.__version__
    assert measured["tokens"] == "4096" and measured["dropout_p"] == "0.1"
    assert measured["fastattn"] == fastattn.__version__ and measured["triton"]
    assert len(measured["date"].split("-")) == 3


def test_tune_interleaves_and_each_goes_first_in_turn(timer: Timer) -> None:
    tune_here()
    rounds = [timer.timed[i : i + 2] for i in range(0, len(timer.timed), 2)]
    first, second = [ANCHOR, CANDIDATE], [CANDIDATE, ANCHOR]
    assert rounds == [first, second, first, second, first, second, first]


def test_tune_times_the_call_that_was_asked_for(timer: Timer) -> None:
    options = {"activation": "gelu", "dtype": torch.float16, "dropout_p": 0.25}
    entries = tune(32, 96, iter([5, 40000]), **options, device="cpu")
    assert [entry.tokens for entry in entries] == [1024, 65536]
    assert [entry.measured["tokens"] for entry in entries] == ["5", "40000"]
    assert {entry.key[:5] for entry in entries} == {("cpu", "float16", "gelu", 32, 96)}
    expected = {
        (backend, 32, 96, size, "gelu", torch.float16, 0.25, CPU)
        for backend in (ANCHOR, CANDIDATE)
        for size in (5, 40000)
    }
    assert set(timer.calls) == expected and len(timer.calls) == 4


def test_this_process_chooses_by_what_was_tuned(timer: Timer) -> None:
    tune_here()
    assert why_not_chosen() is None
    timer.ratios = tuple(ratio / 2 for ratio in RATIOS)
    tune_here()
    assert why_not_chosen() == f"measured at 0.6 times the speed of {ANCHOR} on cpu"
    assert "no measurement" in why_not_chosen(activation="gelu")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_is_timed_is_forward_and_backward(activation: str) -> None:
    call = tuning._call("pytorch", 8, 24, 5, activation, torch.bfloat16, 0.1, CPU)
    first, second = call(), call()
    assert [tuple(x.shape) for x in first] == [(5, 8), (24, 8), (24,), (8, 24)]
    for a, b in zip(first, second, strict=True):
        assert a.dtype == torch.bfloat16 and a.isfinite().all() and a.any() and torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_model": 64.0}, "d_model"),
        ({"dim_feedforward": "x"}, "dim_feedforward"),
        ({"dim_feedforward": -8}, "dim_feedforward"),
        ({"tokens": ()}, "tokens"),
        ({"tokens": (0,)}, "tokens"),
        ({"tokens": (4096, None)}, "tokens"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(table, timer: Timer, changes, name: str) -> None:
    arguments = {"d_model": 64, "dim_feedforward": 256, "tokens": (64,), **changes}
    with pytest.raises(ValueError, match=rf"^{name} must"):
        tune(**arguments, device="cpu")
    assert timer.timed == [] and table == {}


def test_tune_says_why_it_cannot_measure(table, monkeypatch) -> None:
    with pytest.raises(RuntimeError, match=f"device='cpu' cannot run {CANDIDATE}: runs on cuda"):
        tune_here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    dispatch._why_not_triton.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="device='cuda'.*torch sees no CUDA device"):
            tune(64, 256)
    finally:
        dispatch._why_not_triton.cache_clear()
    assert table == {}


def test_tune_says_which_dtype_it_cannot_measure(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: None)
    with pytest.raises(RuntimeError, match=f"cannot run {CANDIDATE}.*fp16 and bf16, not float32"):
        tune(64, 256, dtype=torch.float32)


def test_tune_needs_both_ways(monkeypatch, timer: Timer) -> None:
    def why_not(op: str, backend: str, device: torch.device, **facts: Any) -> str | None:
        assert op == "feed_forward" and facts["dtypes"] == (torch.bfloat16,)
        return "a reason" if backend == ANCHOR else None

    monkeypatch.setattr(dispatch, "why_not", why_not)
    with pytest.raises(RuntimeError, match=f"cannot run {ANCHOR}: a reason"):
        tune_here()
    assert timer.timed == []


# --------------------------------------------------------------------------------------- writing


def test_a_written_file_can_be_loaded(table, timer: Timer, tmp_path) -> None:
    path = tmp_path / "tuned.json"
    entries = tune(64, 256, (64, 4096), device="cpu", write=path)
    table.clear()
    assert sorted(load(path), key=lambda entry: entry.key) == entries
    assert why_not_chosen() is None
    assert list(tmp_path.iterdir()) == [path]


def test_writing_adds_to_a_file_and_replaces_the_same_call(timer: Timer, tmp_path) -> None:
    path = tmp_path / "tuned.json"
    other, older = make_entry(architecture="sm_90"), make_entry(speedup=9.0)
    write_json(path, content_of(other, older))
    (entry,) = tune_here(write=str(path))
    assert older.key == entry.key
    assert sorted(load(path), key=lambda e: e.key) == [entry, other]


def test_other_measurements_of_a_file_are_not_taken(table, timer: Timer, tmp_path) -> None:
    """Adding to a file is not loading it."""
    path = tmp_path / "tuned.json"
    write_json(path, content_of(make_entry(activation="gelu")))
    (entry,) = tune_here(write=path)
    assert list(table) == [entry.key]


def test_a_file_stays_whole_where_writing_fails(timer: Timer, tmp_path, monkeypatch) -> None:
    path = tmp_path / "tuned.json"
    write_json(path, content_of(make_entry(activation="gelu")))
    before = path.read_bytes()

    def fail(source: str, target: Path) -> None:
        assert target == path and path.read_bytes() == before
        assert len(json.loads(Path(source).read_text())["entries"]) == 2
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(tuned.os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            tune_here(write=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(timer: Timer, tmp_path) -> None:
    with pytest.raises(ValueError, match="write must be in a folder that exists.*nosuch"):
        tune_here(write=tmp_path / "nosuch" / "tuned.json")
    assert timer.timed == []


@pytest.mark.parametrize("case", NO_MEASUREMENTS)
def test_a_file_of_something_else_is_left_alone(table, timer, tmp_path, case: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(NO_MEASUREMENTS[case], "utf-8")
    with pytest.raises(ValueError, match=r"other\.json holds no measurements"):
        tune_here(write=path)
    assert timer.timed == [] and table == {}
    assert path.read_text("utf-8") == NO_MEASUREMENTS[case]
    assert list(tmp_path.iterdir()) == [path]
