"""The Triton attention kernels: launches, the memory they read and write, and their tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastattn import FusedEncoderLayer, attention, attention_packed, dispatch, explain, use_backend
from fastattn.arguments import AttentionArguments
from fastattn.kernels import attention as kernels
from fastattn.kernels import attention_configs
from tests import helpers
from tests.kernels.interpreted.attention_tiles_and_launches import Launched, names
from tests.kernels.interpreted.sanitizer import Sanitizer
from tests.ops.attention_inputs import (
    INF,
    QKV_LAYOUTS,
    P,
    make_inputs,
    seed_tensor,
    sequence_first,
)
from tests.ops.test_attention import op_samples

pytestmark = pytest.mark.usefixtures("by_the_attention_kernels")


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written(
    dtype: torch.dtype,
    whole: bool,
    tiles: Callable[..., None],
    sanitizer: Sanitizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no query or no key counts."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)  # no sum follows a kernel
    tiles(16, 64, whole)
    qkv = torch.randn(3, 37, 3, 2, 24, dtype=dtype)
    grad_out = torch.randn(3, 37, 2, 24, dtype=dtype)
    masks = {"key_padding_mask": torch.randn(3, 37), "attn_mask": torch.randn(1, 2, 37, 37)}
    lengths = {"query_lengths": [37, 0, 20], "key_lengths": [0, 37, 11]}
    lengths = {name: torch.tensor(x, dtype=torch.int32) for name, x in lengths.items()}
    arguments = AttentionArguments(
        **masks, **lengths, scale=0.2, dropout_p=P, seed=seed_tensor(), backend="triton"
    )
    ops = torch.ops.fastattn
    out, statistics = ops.attention_packed_fwd(qkv, *arguments)
    wanted = (not whole, not whole)
    results = ops.attention_packed_bwd(grad_out, qkv, out, statistics, *wanted, *arguments)
    sanitizer.assert_written(out, statistics, *(x for x in results if x.numel()))


FAR = {  # batch and length, and the strides of sequences and rows
    "sequences": (3, 20, 2**30, 48),
    "rows": (1, 520, 2**32, 2**22),
    "rows of one tile": (1, 66, 2**32, 2**25),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", FAR)
def test_offsets_beyond_two_to_the_31st_element(
    case: str, masked: bool, tiles: Callable[..., None]
) -> None:
    """Gigabytes of address space, of which only the pages of the rows are ever touched."""
    tiles(128, 128)
    batch, length, *strides = FAR[case]

    def far(x: Tensor) -> Tensor:
        inner = torch.empty(x.shape[2:]).stride()
        return torch.empty_strided(x.shape, (*strides, *inner), dtype=x.dtype).copy_(x)

    def far_mask(x: Tensor) -> Tensor:
        places = list(x.stride())
        places[-2 if batch == 1 else 0] = strides[batch == 1]
        return torch.empty_strided(x.shape, places, dtype=x.dtype).copy_(x)

    qkv = torch.randn(batch, length, 3, 1, 16).half()
    grad_out = torch.randn(batch, length, 1, 16).half()
    padding = torch.rand(batch, length) < 0.3
    mask = torch.rand(batch, 1, length, length) < 0.3

    def run(place: Callable[[Tensor], Tensor], place_mask: Callable[[Tensor], Tensor]) -> tuple:
        arguments = AttentionArguments(scale=0.25, dropout_p=P, seed=seed_tensor())
        if masked:
            masks = {"key_padding_mask": padding, "attn_mask": mask}
            arguments = arguments._replace(**{name: place_mask(x) for name, x in masks.items()})
        tensors = place(qkv).unbind(2)
        out, gradients = place(torch.full_like(grad_out, INF)), place(torch.full_like(qkv, INF))
        statistics = torch.empty(1, batch, 1, length)
        kernels.attention_forward(*tensors, arguments, out, statistics)
        kernels.attention_backward(
            place(grad_out),
            *tensors,
            out,
            statistics,
            arguments,
            (False, False),
            gradients.unbind(2),
        )
        return out, statistics, gradients

    near = run(lambda x: x.clone(), lambda x: x)
    for found, expected in zip(run(far, far_mask), near, strict=True):
        assert torch.equal(found, expected)
        assert found.isfinite().all()


def test_rows_of_a_mask_far_apart() -> None:
    """Some columns of a mask with 2^26, though those of query, key and value are near."""
    inputs = make_inputs(1, 33, 21)
    mask = torch.rand(33, 21) < 0.3
    far = torch.empty_strided(mask.shape, (2**26, 1), dtype=torch.bool).copy_(mask)
    ours = partial(attention, dropout_p=P, seed=seed_tensor())
    found, expected = (helpers.results_of(ours, {**inputs, "attn_mask": x}) for x in (far, mask))
    helpers.assert_same(found, expected)


# --------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_launches(
    whole: bool, is_float: bool, tiles: Callable[..., None], launches: list[Launched]
) -> None:
    tiles(32, 64, whole)
    masks = {"key_padding_mask": torch.randn(2, 40), "attn_mask": torch.randn(33, 40)}
    if not is_float:
        masks = {name: mask > 1 for name, mask in masks.items()}
    ours = partial(attention, dropout_p=P, seed=seed_tensor())
    helpers.results_of(ours, {**make_inputs(2, 33, 40), **masks})
    if is_float:  # whose gradients need what the kernel of queries writes
        backward = ["query_gradient", "key_gradient", "mask_gradient", "mask_gradient"]
    else:
        backward = ["key_gradient"] if whole else ["query_gradient", "key_gradient"]
    assert names(launches) == ["forward", *backward]
    launches.clear()
    attention(**make_inputs(2, 33, 40))
    assert names(launches) == ["forward"]


@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_one_tensor_is_read_and_its_gradient_written_in_place(
    layout: str, launches: list[Launched]
) -> None:
    qkv = QKV_LAYOUTS[layout](torch.randn(2, 33, 3, 2, 8)).requires_grad_()
    out = attention_packed(qkv, dropout_p=P, seed=seed_tensor())
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    query, key, value = qkv.unbind(2)
    for _, arguments in launches:
        for name, x in (("Q", query), ("K", key), ("V", value)):
            assert arguments[name].data_ptr() == x.data_ptr()
            assert arguments[name].stride() == x.stride()
    dq, dk, dv = gradient.unbind(2)
    (of_queries,) = (x for name, x in launches if name == "query_gradient")
    (of_keys,) = (x for name, x in launches if name == "key_gradient")
    assert of_queries["dQ"].data_ptr() == dq.data_ptr()
    assert of_keys["dK"].data_ptr() == dk.data_ptr()
    assert of_keys["dV"].data_ptr() == dv.data_ptr()


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_matrix_of_scores_is_in_memory(
    is_causal: bool, whole: bool, tiles: Callable[..., None]
) -> None:
    """Not even one of bools."""
    tiles(128, 256, whole)
    qkv = torch.randn(1, 256, 3, 1, 8, dtype=torch.float16, requires_grad=True)
    grad_out = torch.randn(1, 256, 1, 8).half()
    options = {"dropout_p": P, "seed": seed_tensor(), "is_causal": is_causal}
    padding, mask = torch.rand(1, 256) < 0.3, torch.randn(1, 1, 256)

    def run() -> None:
        out = attention_packed(qkv, key_padding_mask=padding, attn_mask=mask, **options)
        torch.autograd.grad(out, qkv, grad_out)

    assert qkv.nbytes <= largest_allocation(run) < 256 * 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_saved_for_backward(dtype: torch.dtype) -> None:
    """Inputs, output, seed, and of a softmax one number, or two in fp32 and with a float mask."""
    query, key, value = (torch.randn(2, 48, 4, 8, dtype=dtype, requires_grad=True) for _ in "qkv")
    qkv = torch.randn(2, 48, 3, 4, 8, dtype=dtype, requires_grad=True)
    mask, seed = torch.rand(2, 48) < 0.3, seed_tensor()
    out, statistics = 2 * 48 * 4 * 8 * dtype.itemsize, 2 * 48 * 4 * 4
    if dtype == torch.float32:
        statistics *= 2
    saved = helpers.saved_bytes(lambda: attention(query, key, value, dropout_p=0.1, seed=seed))
    assert saved == 3 * out + out + statistics + 8
    saved = helpers.saved_bytes(
        lambda: attention_packed(qkv, key_padding_mask=mask, dropout_p=0.1, seed=seed)
    )
    assert saved == 3 * out + out + statistics + 8 + 2 * 48
    assert helpers.saved_bytes(lambda: attention_packed(qkv)) == 3 * out + out + statistics
    mask, statistics = torch.randn(48, 48), 2 * 2 * 48 * 4 * 4
    saved = helpers.saved_bytes(lambda: attention_packed(qkv, attn_mask=mask))
    assert saved == 3 * out + out + statistics + mask.nbytes


def test_saved_tensors_are_those_of_the_caller() -> None:
    saved: list[Tensor] = []
    qkv, seed = torch.randn(2, 33, 3, 2, 8, requires_grad=True), seed_tensor()

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attention_packed(qkv, dropout_p=P, seed=seed)
    kept_qkv, kept_out, statistics, kept_seed = saved
    for kept, x in ((kept_qkv, qkv), (kept_out, out), (kept_seed, seed)):
        assert kept.data_ptr() == x.data_ptr() and kept.shape == x.shape
    assert statistics.shape == (2, 2, 2, 33) and statistics.dtype == torch.float32


# ------------------------------------------------------------------- dispatch, tables, registration


def test_explain_names_the_kernels_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_requested", {})
    for batch_first in (True, False):
        layer = FusedEncoderLayer(16, 2, 32, dropout=0.3, batch_first=batch_first)
        (choice,) = (x for x in explain(layer, torch.randn(2, 5, 16)) if "attention" in x.part)
        assert choice.part == "attention_packed"
        assert choice.taken == "triton" and choice.why_not == {}
        with use_backend("pytorch"):
            (choice,) = (x for x in explain(layer, torch.randn(2, 5, 16)) if "attention" in x.part)
        assert choice.taken == "pytorch"
        assert choice.why_not == {"triton": "pytorch was asked for"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_on_the_kernels(batch_first: bool, launches: list[Launched]) -> None:
    """It drops what it drops on the pytorch backend, and lets the kernels read its projection."""
    layer = FusedEncoderLayer(16, 2, 32, dropout=0.3, batch_first=batch_first).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    batch, length = (3, 7) if batch_first else (7, 3)
    padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))
    results = []
    for backend in ("triton", "pytorch"):
        with use_backend(attention_packed=backend):
            out = layer(x, src_key_padding_mask=padding, seed=seed_tensor())
        inputs = (x, *layer.parameters())
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    torch.testing.assert_close(*results)
    assert launches
    for _, arguments in launches:
        tensors = [arguments[name] for name in "QKV"]
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1


@pytest.mark.parametrize("fenced", [True, False])
@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_every_call_has_tiles(major: int, fenced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Powers of two from 16 on; one tile holds all keys where backward is one kernel.

    Tiles have one stage, and so no copies, where a compiler does not fence them.
    """
    monkeypatch.setattr(attention_configs, "capability", lambda _: (major, 0))
    monkeypatch.setattr(attention_configs, "COPIES_ARE_FENCED", fenced)
    calls = itertools.product(
        (torch.bfloat16, torch.float32, torch.float64),
        (1, 16, 64, 65, 128, 129, 256),
        (0, 1, 63, 64, 65, 128, 129, 256, 257, 4096),
        (False, True),
    )
    whole_passes, stages = 0, set()
    for dtype, head_dim, length, has_pair_mask in calls:
        call = SimpleNamespace(
            dtype=dtype,
            head_dim=head_dim,
            seqlen_q=1,
            seqlen_k=length,
            has_pair_mask=has_pair_mask,
            device=torch.device("cpu"),
        )
        configs = [
            attention_configs.choose(kernel, call)
            for kernel in ("forward", "query gradient", "key gradient", "mask gradient")
        ]
        whole = attention_configs.choose_whole_pass(call)
        if whole is not None:
            assert whole.BLOCK_N >= length
            configs.append(whole)
        for config in configs:
            assert {config.BLOCK_M, config.BLOCK_N} <= {16, 32, 64, 128, 256}
            stages.add(config.num_stages)
        whole_passes += whole is not None
    assert whole_passes > 0
    assert stages == ({1, 2} if fenced or major in (8, 12) else {1})


#: The longest backward pass in one kernel: (without a mask of pairs, with one).
LONGEST = {
    **{(major, head_dim): (256, 128) for major in (9, 10) for head_dim in (8, 16, 32, 64)},
    **{(major, head_dim): (128, 128) for major in (9, 10) for head_dim in (40, 80, 96, 128)},
    **{(major, head_dim): (128, 128) for major in (8, 12) for head_dim in (8, 40, 64)},
    **{(major, head_dim): (0, 0) for major in (8, 12) for head_dim in (80, 128)},
    **{(major, 256): (0, 0) for major in (8, 9, 10, 12)},
}


@pytest.mark.parametrize(("major", "head_dim"), LONGEST)
def test_longest_backward_pass_in_one_kernel(
    major: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/design.md says; never in fp32."""
    monkeypatch.setattr(attention_configs, "capability", lambda _: (major, 0))

    def longest(dtype: torch.dtype, has_pair_mask: bool) -> int:
        call = SimpleNamespace(
            dtype=dtype, head_dim=head_dim, has_pair_mask=has_pair_mask, device=torch.device("cpu")
        )
        lengths = (0, 64, 128, 256, 257)
        return max(n for n in lengths if n == 0 or fits(call, n))

    def fits(call: SimpleNamespace, length: int) -> bool:
        call.seqlen_q = call.seqlen_k = length
        return attention_configs.choose_whole_pass(call) is not None

    for has_pair_mask in (False, True):
        assert longest(torch.bfloat16, has_pair_mask) == LONGEST[major, head_dim][has_pair_mask]
        assert longest(torch.float32, has_pair_mask) == 0


REFUSED = {
    "head_dim": (torch.zeros(1, 2, 1, 257), {}, "head dimensions up to 256, not 257"),
    "scale": (torch.zeros(1, 2, 1, 8), {"scale": -0.5}, "a scale of at least 0, not -0.5"),
    "dtype": (torch.zeros(1, 2, 1, 8).to(torch.float8_e5m2), {}, "not torch.float8_e5m2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_the_kernels_refuse(case: str) -> None:
    x, options, reason = REFUSED[case]
    with pytest.raises(RuntimeError, match=f"cannot run attention: .*{reason}"):
        attention(x, x, x, **options, backend="triton")
    qkv = torch.stack((x, x, x), 2)
    with pytest.raises(RuntimeError, match=f"cannot run attention_packed: .*{reason}"):
        attention_packed(qkv, **options, backend="triton")


@pytest.mark.parametrize("name", op_samples())
def test_registration_of_the_kernels(name: str) -> None:
    for sample in op_samples()[name]:
        *tensors, backend = sample
        assert backend == "pytorch"
        if "bwd" in name:
            empty = next(i for i, x in enumerate(tensors) if torch.is_tensor(x) and x.numel() == 0)
            *batch, length, heads, _ = tensors[0].shape
            tensors[empty] = torch.randn(2, *batch, heads, length)  # of fp32
        helpers.assert_registered(name, (*tensors, "triton"))


def test_compiled_with_the_backend_named() -> None:
    def run(qkv: Tensor, mask: Tensor, seed: Tensor) -> Tensor:
        options = {"dropout_p": P, "seed": seed, "backend": "triton"}
        out = attention_packed(qkv.sin(), attn_mask=mask, **options)
        return out, attention(*qkv.unbind(2), **options)

    qkv = sequence_first(torch.randn(2, 17, 3, 2, 8))
    inputs = {"qkv": qkv, "mask": torch.randn(17, 17), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs)


def test_fake_tensors_of_the_backend_named() -> None:
    def run(qkv: Tensor, seed: Tensor) -> Tensor:
        return attention_packed(qkv, dropout_p=P, seed=seed, backend="triton")

    for layout in QKV_LAYOUTS.values():
        helpers.assert_fakes_agree(run, layout(torch.randn(2, 5, 3, 2, 8)))
