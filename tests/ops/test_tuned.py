"""Measurements decide which calls of ``feed_forward`` take Triton's own products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastattn
from fastattn import FusedEncoderLayer, dispatch, explain, feed_forward, tuned
from fastattn.pytorch import feed_forward as in_pytorch
from fastattn.tuned import ANCHOR, BUCKETS, CANDIDATE, LEAST_SPEEDUP, load
from tests.layers.pairs import HEADS, HIDDEN, WIDTH, tokens
from tests.ops.measurements import (
    GPU_NAME,
    NO_MEASUREMENTS,
    add,
    content_of,
    empty_table,
    make_entry,
    why_not_chosen,
    write_json,
)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple, Any]:
    return empty_table(monkeypatch)


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


# ----------------------------------------------------------------------------------------- files


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
