"""Measurements decide which calls of ``feed_forward`` take Triton's own products."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastattn
from fastattn import FusedEncoderLayer, dispatch, explain, feed_forward, tuned, tuning
from fastattn.pytorch import feed_forward as in_pytorch
from fastattn.tuned import ANCHOR, BUCKETS, CANDIDATE, LEAST_SPEEDUP, Entry, load
from fastattn.tuning import tune
from tests.layers.pairs import HEADS, HIDDEN, WIDTH, tokens

CPU = torch.device("cpu")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")
GPU_NAME = "Some GPU"


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple, Any]:
    """An empty table, in the place of the one that this process has."""
    empty: dict[tuple, Any] = {}
    monkeypatch.setattr(tuned, "_table", empty)
    return empty


def make_entry(**changes: Any) -> Entry:
    fields = {
        "architecture": "cpu",
        "dtype": "bfloat16",
        "activation": "relu",
        "d_model": 64,
        "d_ff": 256,
        "tokens": 4096,
        "speedup": 1.25,
        "rounds": (1.25, 1.0, 1.5),
        "measured": {"gpu": GPU_NAME},
    }
    return Entry(**{**fields, **changes})


def add(**changes: Any) -> None:
    """To what this process has measured."""
    tuned.take([make_entry(**changes)])


def why_not_chosen(**changes: Any) -> str | None:
    """Of a call that the measurement of ``make_entry`` is about."""
    facts = {
        "device": CPU,
        "dtypes": (torch.bfloat16,),
        "activation": "relu",
        "tokens": 4096,
        "widths": (64, 256, 64),
        "column_offset": 0,
    }
    return tuned.why_not_chosen(**{**facts, **changes})


# -------------------------------------------------------------------------------- what is chosen


def test_the_shipped_measurements_are_valid(table) -> None:
    entries = load(tuned._SHIPPED)
    assert len(table) == len(entries)  # no call is measured twice
    for entry in entries:
        assert entry.architecture.startswith("sm_") and entry.dtype in ("bfloat16", "float16")
        assert entry.activation in ACTIVATIONS and entry.tokens in BUCKETS
        assert entry.d_model > 0 and entry.d_ff > 0
        assert entry.speedup == pytest.approx(statistics.median(entry.rounds), abs=1e-3)
        assert {"gpu", "torch", "triton", "fastattn", "date"} <= entry.measured.keys()


def test_nothing_is_chosen_without_a_measurement() -> None:
    assert why_not_chosen() == "no measurement names it (fastattn.tune makes one)"


def test_tune_is_public() -> None:
    """Reasons tell users to call it."""
    assert fastattn.tune is tune and "tune" in fastattn.__all__


@pytest.mark.parametrize("speedup", [LEAST_SPEEDUP, 1.25])
def test_a_call_measured_as_faster_is_chosen(speedup: float) -> None:
    add(speedup=speedup)
    assert why_not_chosen() is None


@pytest.mark.parametrize(
    ("speedup", "figure"), [(1.0199, "1.0199"), (1.0, "1.0"), (0.804, "0.804")]
)
def test_a_call_measured_as_slower_is_refused_with_the_figure(speedup, figure) -> None:
    add(speedup=speedup)
    expected = f"measured at {figure} times the speed of {ANCHOR} on {GPU_NAME}"
    assert why_not_chosen() == expected
    add(speedup=speedup, measured={})
    assert why_not_chosen() == expected.replace(GPU_NAME, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtypes": (torch.float16,)},
        {"activation": "gelu"},
        {"widths": (128, 256, 128)},
        {"widths": (64, 128, 64)},
        {"device": torch.device("meta")},
    ],
    ids=str,
)
def test_a_measurement_is_of_one_kind_of_call(changes: dict[str, Any]) -> None:
    add()
    assert why_not_chosen(**changes) == "no measurement is of this call (fastattn.tune makes one)"


@pytest.mark.parametrize("widths", [(64, 256, 24), (64, 256), ()], ids=str)
def test_a_measurement_is_of_blocks_as_wide_behind_as_before(widths) -> None:
    add()
    assert why_not_chosen(widths=widths) == "no measurement is of a block with these widths"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 1)], ids=str)
def test_a_measurement_is_of_one_architecture(monkeypatch, capability) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    add(architecture="sm_90")
    reason = why_not_chosen(device=torch.device("cuda", 1))
    assert (reason is None) == (capability == (9, 0))
    add(architecture="sm_{}{}".format(*capability))
    assert why_not_chosen(device=torch.device("cuda", 1)) is None


def test_every_gpu_is_asked_for_its_own_architecture(monkeypatch) -> None:
    capabilities = [(8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    add(architecture="sm_90")
    chosen = [why_not_chosen(device=torch.device("cuda", index)) is None for index in (0, 1)]
    assert chosen == [False, True]


@pytest.mark.parametrize("number", range(len(BUCKETS)))
def test_a_measurement_is_of_a_bucket_of_tokens(number: int) -> None:
    least = BUCKETS[number - 1] + 1 if number else 1
    most = BUCKETS[number]
    add(tokens=most)
    assert why_not_chosen(tokens=least) is None and why_not_chosen(tokens=most) is None
    if number:
        assert "no measurement" in why_not_chosen(tokens=least - 1)
    if most != BUCKETS[-1]:
        assert "no measurement" in why_not_chosen(tokens=most + 1)


# --------------------------------------------------------------------- what dispatch does with it


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A candidate on the CPU, which runs what ``pytorch`` does, and the directions it ran.

    ``triton`` depends on the call, as it does on a GPU.
    """
    ran: list[str] = []

    def recorded(direction: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(direction)
            return getattr(in_pytorch, f"feed_forward_{direction}")(*arguments)

        return run

    directions = {f"feed_forward_{name}": recorded(name) for name in ("forward", "backward")}
    plain = {op: {"pytorch": entries["pytorch"]} for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", plain)
    for backend in (CANDIDATE, ANCHOR):
        monkeypatch.setitem(dispatch._DEVICES, backend, "cpu")
    monkeypatch.setattr(dispatch, "_always", {})
    dispatch.register(
        "feed_forward",
        CANDIDATE,
        SimpleNamespace(**directions),
        lambda activation="", **_: "not silu" if activation == "silu" else None,
        only_by_name=tuned.why_not_chosen,
    )
    dispatch.register("feed_forward", ANCHOR, in_pytorch, lambda **_: None)
    return ran


FACTS = {"dtypes": (torch.float32,), "tokens": 10, "widths": (WIDTH, HIDDEN, WIDTH)}
MEASURED = {"dtype": "float32", "d_model": WIDTH, "d_ff": HIDDEN, "tokens": BUCKETS[0]}


def select(backend: str | None = None, **changes: Any) -> str:
    facts = {"activation": "relu", **FACTS, **changes}
    return dispatch.choose("feed_forward", torch.empty(1), backend, **facts)


def test_dispatch_takes_it_where_a_measurement_says_so(backends) -> None:
    assert select() == ANCHOR
    add(**MEASURED)
    assert select() == CANDIDATE
    assert select(tokens=BUCKETS[0] + 1) == ANCHOR
    assert select(widths=(WIDTH, HIDDEN, 1)) == ANCHOR
    add(**MEASURED, speedup=0.5)
    assert select() == ANCHOR


def test_dispatch_does_not_take_what_cannot_run(backends) -> None:
    add(**MEASURED, activation="silu")
    assert select(activation="silu") == ANCHOR
    with pytest.raises(RuntimeError, match=f"{CANDIDATE}.*not silu"):
        select(CANDIDATE, activation="silu")


def test_asked_for_by_name_it_needs_no_measurement(backends) -> None:
    assert select(CANDIDATE) == CANDIDATE
    assert CANDIDATE in fastattn.available_backends("feed_forward", "cpu")
    with fastattn.use_backend(feed_forward=CANDIDATE):
        assert select() == CANDIDATE
    add(**MEASURED)
    assert select("pytorch") == "pytorch"


def test_a_call_runs_what_was_chosen(backends) -> None:
    inputs = [torch.randn(2, 5, WIDTH), torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN)]
    inputs += [torch.randn(WIDTH, HIDDEN)]
    inputs = [x.requires_grad_() for x in inputs]
    feed_forward(*inputs)
    assert backends == []
    add(**MEASURED)
    feed_forward(*inputs).sum().backward()
    assert backends == ["forward", "backward"]
    feed_forward(*inputs, activation="gelu").sum().backward()
    assert backends == ["forward", "backward"]


def test_explain_says_why_it_is_taken_or_not(backends) -> None:
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)

    def choice() -> dispatch.Choice:
        found = explain(layer, tokens(2, 5, dtype=torch.float32))
        return next(choice for choice in found if choice.part == "feed_forward")

    unmeasured, missing = choice(), "no measurement names it (fastattn.tune makes one)"
    assert unmeasured.taken == ANCHOR and unmeasured.why_not == {CANDIDATE: missing}
    add(**MEASURED, speedup=0.8)
    slower, figure = choice(), f"measured at 0.8 times the speed of {ANCHOR} on {GPU_NAME}"
    assert slower.taken == ANCHOR and slower.why_not == {CANDIDATE: figure}
    add(**MEASURED)
    faster = choice()
    assert faster.taken == CANDIDATE and faster.why_not == {}
    with fastattn.use_backend("pytorch"):
        asked = choice()
    assert asked.taken == "pytorch" and asked.why_not[CANDIDATE] == "pytorch was asked for"


def test_a_compiled_call_of_any_length_runs_what_was_chosen(backends) -> None:
    add(**MEASURED)
    weights = torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN), torch.randn(WIDTH, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, ran in ((7, ["forward"]), (BUCKETS[0], ["forward"]), (BUCKETS[0] + 1, [])):
        backends.clear()
        x = torch.randn(length, WIDTH)
        torch.testing.assert_close(compiled(x, *weights), feed_forward(x, *weights))
        assert backends == 2 * ran


# ----------------------------------------------------------------------------------------- files


def content_of(*entries: Entry) -> dict[str, Any]:
    return {"format": "fastattn-tuning 1", "entries": [asdict(entry) for entry in entries]}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def test_load_takes_what_a_file_says(table, tmp_path) -> None:
    entries = [make_entry(), make_entry(activation="gelu", speedup=0.5)]
    add(activation="silu")
    add(speedup=0.7)
    write_json(tmp_path / "tuned.json", content_of(*entries))
    for path in (tmp_path / "tuned.json", str(tmp_path / "tuned.json")):
        assert load(path) == entries
    assert table.keys() == {e.key for e in (make_entry(activation="silu"), *entries)}
    assert why_not_chosen() is None and why_not_chosen(activation="silu") is None
    assert "0.5 times" in why_not_chosen(activation="gelu")


def without(name: str) -> dict[str, Any]:
    """A file whose second measurement lacks a field."""
    content = content_of(make_entry(), make_entry(activation="gelu"))
    del content["entries"][1][name]
    return content


def with_extra() -> dict[str, Any]:
    content = content_of(make_entry(), make_entry(activation="gelu"))
    content["entries"][1]["colour"] = "red"
    return content


NO_MEASUREMENTS = {
    "empty": "",
    "truncated": json.dumps(content_of(make_entry()))[:-20],
    "a list": "[]",
    "a number": "1",
    "no format": json.dumps({"entries": []}),
    "another format": json.dumps({**content_of(), "format": "fastattn-tuning 2"}),
    "no entries": json.dumps({"format": "fastattn-tuning 1"}),
    "entries of another kind": json.dumps({**content_of(), "entries": [1]}),
    "a missing field": json.dumps(without("speedup")),
    "no rounds": json.dumps(without("rounds")),
    "an extra field": json.dumps(with_extra()),
}


@pytest.mark.parametrize("case", NO_MEASUREMENTS)
def test_load_names_a_file_that_holds_no_measurements(table, tmp_path, case: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(NO_MEASUREMENTS[case], "utf-8")
    with pytest.raises(ValueError, match=r"other\.json holds no measurements of fastattn\.tune"):
        load(path)
    assert table == {}


def test_load_of_bytes_that_are_no_text(tmp_path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"other\.json holds no measurements"):
        load(path)


def test_load_of_a_file_that_is_not_there(table, tmp_path) -> None:
    with pytest.raises(OSError, match=r"nosuch\.json"):
        load(tmp_path / "nosuch.json")
    assert table == {}


# ------------------------------------------------------------------------------------- measuring


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


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": [1]},
        {"speedup": "fast"},
        {"rounds": 3},
        {"measured": "H200"},
        {"tokens": None},
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused_whole(table, tmp_path, changes) -> None:
    path = tmp_path / "wrong.json"
    content = content_of(make_entry(activation="gelu"), make_entry())
    content["entries"][1] |= changes
    write_json(path, content)
    with pytest.raises(ValueError, match=r"wrong\.json holds no measurements"):
        load(path)
    assert table == {}


def test_a_measured_backend_is_asked_about_before_one_that_takes_all(monkeypatch) -> None:
    """A callable reason depends on the call, whatever comes after it takes every call."""
    registry = {op: dict(entries) for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.setattr(dispatch, "_always", {})
    monkeypatch.setitem(dispatch._DEVICES, "triton_gemm", "cpu")

    def only_by_name(device: torch.device, good: bool = False, **facts: object) -> str | None:
        return None if good else "not measured"

    registry["feed_forward"] = {"pytorch": registry["feed_forward"]["pytorch"]}
    dispatch.register("feed_forward", "triton_gemm", in_pytorch, only_by_name=only_by_name)
    x = torch.empty(1)
    assert dispatch.choose("feed_forward", x) == "pytorch"
    assert dispatch.choose("feed_forward", x, good=True) == "triton_gemm"
