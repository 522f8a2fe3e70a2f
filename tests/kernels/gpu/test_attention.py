"""On a CUDA GPU: the attention kernels beyond the checks of the op, at the sizes of a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import FusedEncoderLayer, attention, attention_packed, explain, use_backend
from fastattn.dropout import RESOLUTION, threshold
from tests.kernels.gpu.test_layer import outputs_and_gradients
from tests.ops import attention_inputs
from tests.ops.attention_inputs import SITE, P, beyond, check, make_inputs
from tests.ops.backends import Backend

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BACKEND = Backend("triton", "on a GPU", DEVICE)
BF16, FP32 = torch.bfloat16, torch.float32
ours = partial(attention, site=SITE, backend="triton")


def seed_tensor() -> Tensor:
    return attention_inputs.seed_tensor().to(DEVICE)


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of ``function(*inputs)``, which flow from numbers between -1 and 1."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass
class Recorded:
    """A kernel that writes its name down when it is launched."""

    kernel: Any
    name: str
    names: list[str]

    def __getitem__(self, grid: Any) -> Any:
        self.names.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, in order."""
    from fastattn.kernels import attention as kernels

    names: list[str] = []
    for name in ("forward", "query_gradient", "key_gradient", "mask_gradient"):
        kernel = getattr(kernels, f"attention_{name}_kernel")
        monkeypatch.setattr(kernels, f"attention_{name}_kernel", Recorded(kernel, name, names))
    return names


def test_shares_of_a_hundred_million_decisions() -> None:
    """Of every head and of all, five standard deviations; and outputs have the mean they should."""
    batch, heads, length, p = 8, 8, 1280, threshold(0.1) / RESOLUTION
    zeros = torch.zeros(batch, length, heads, 64, dtype=BF16, device=DEVICE)
    attend = partial(ours, dropout_p=0.1, seed=seed_tensor())
    kept = torch.zeros(batch, heads, dtype=torch.int64, device=DEVICE)
    for start in range(0, length, 64):
        hot = torch.zeros_like(zeros)
        hot[:, start : start + 64] = torch.eye(64, dtype=BF16, device=DEVICE)[:, None]
        kept += (attend(zeros, zeros, hot) != 0).sum((1, 3))
    for counts, decisions in ((kept, length**2), (kept.sum(), batch * heads * length**2)):
        deviation = math.sqrt(p * (1 - p) * decisions)
        assert (counts - (1 - p) * decisions).abs().max() <= 5 * deviation
    zeros = zeros.float()
    mean = attend(zeros, zeros, zeros + 1).double().mean().item()
    assert abs(mean - 1) <= 5 * math.sqrt(p / (1 - p) / (batch * heads * length**2))


def tiles_in(choices: Any) -> Iterator[Any]:
    """The tiles of a kernel, which the table nests in tuples."""
    if hasattr(choices, "BLOCK_M"):
        yield choices
    elif isinstance(choices, tuple):
        for choice in choices:
            yield from tiles_in(choice)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_accuracy_of_every_tile(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel with every tile that the table has for it on this device."""
    from fastattn.kernels import attention as kernels
    from fastattn.kernels import attention_configs as table

    listed, taken = set(), set()

    def choose(kernel: str, launch: Any) -> Any:
        for name, choices in table._entry(launch).items():
            listed.update((name.removeprefix("short "), tile) for tile in tiles_in(choices))
        taken.add((kernel, table.choose(kernel, launch)))
        return table.choose(kernel, launch)

    def choose_whole_pass(launch: Any) -> Any:
        taken.add(("whole pass", table.choose_whole_pass(launch)))
        return table.choose_whole_pass(launch)

    def run(name: str, length: int, *shape: int) -> None:
        inputs = make_inputs(2, length, length, 2, head_dim, dtype)
        mask = {name: torch.randn(shape).to(dtype)}
        without = {key: x for key, x in inputs.items() if key != name}
        check(BACKEND, without, P, ours=mask, masks=mask)
        if length == 600:
            check(BACKEND, {**inputs, **mask}, P)  # and the gradient of the mask

    monkeypatch.setattr(kernels, "choose", choose)
    monkeypatch.setattr(kernels, "choose_whole_pass", choose_whole_pass)
    for length in (600, 248, 120, 56):
        run("key_padding_mask", length, 2, length)
    if listed - taken:  # those for a mask of pairs
        for length in (600, 248, 120, 56):
            run("attn_mask", length, length, length)
    assert listed <= taken


@pytest.mark.parametrize("head_dim", [40, 64, 96])
def test_one_key_that_outweighs_all_others(head_dim: int) -> None:
    """In fp32 its P is 1 exactly, whatever the scale rounds, and no gradient flows to the query."""
    query, key, value = (random(2, 256, 2, head_dim, dtype=FP32) for _ in "qkv")
    query *= 64
    scores = torch.einsum("bmhd,bnhd->bmhn", query.double(), key.double()) * head_dim**-0.5
    of_others = 1 - scores.softmax(-1).amax(-1)
    alone, not_alone = of_others < 1e-9, of_others > 1e-6
    assert alone.double().mean() > 0.2 and not_alone.double().mean() > 0.2
    attend = partial(ours, dropout_p=P, seed=seed_tensor())
    d_query = with_gradients(attend, query, key, value)[1]
    assert (d_query[alone] == 0).all()
    assert (d_query[not_alone] != 0).any(-1).all()


def test_offsets_past_two_to_the_31() -> None:
    heads, head_dim, length = 16, 64, 512
    sequences = 2**31 // (3 * heads * head_dim * length) + 2
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    qkv = torch.randn(sequences, length, 3, heads, head_dim, dtype=BF16, device=DEVICE)
    assert qkv[:-1].numel() > 2**31
    last = qkv[-1:].clone()

    def run(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = attention_packed(x, backend="triton", **options)
        return out.detach(), *torch.autograd.grad(out, x, out.detach())

    for all_of_it, alone in zip(run(qkv), run(last), strict=True):
        assert torch.equal(all_of_it[-1:], alone)
    # Alone, and yet of the same number, which decides what drops: the others are empty.
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * length
    empty = (starts - starts[-2]).clamp(min=0)
    options = {"max_seqlen": length, "dropout_p": 0.1, "seed": seed_tensor()}
    together = run(qkv.flatten(0, 1), cu_seqlens=starts, **options)
    apart = run(last[0], cu_seqlens=empty, **options)
    for all_of_it, alone in zip(together, apart, strict=True):
        assert torch.equal(all_of_it[-length:], alone)


def test_compiled_equals_eager() -> None:
    inputs = [random(2, 128, 2, 64, dtype=FP32) for _ in range(3)]
    padding = beyond([128, 70], 128).to(DEVICE)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"key_padding_mask": padding, "dropout_p": 0.1, "seed": seed}
        return attention(query * 2, key, value, **options)

    seed = seed_tensor()
    torch._dynamo.reset()
    compiled = with_gradients(torch.compile(attend, fullgraph=True), *inputs)
    expected = with_gradients(attend, *inputs)
    assert torch.equal(compiled[0], expected[0])
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_layer_is_that_of_the_pytorch_backend(dtype: torch.dtype) -> None:
    """As close to float64, with the same seed, as it is on plain PyTorch."""
    layer = FusedEncoderLayer(256, 4, 512, dropout=0.1, batch_first=True).to(DEVICE, dtype)
    src, padding = random(3, 128, 256, dtype=dtype), beyond([128, 70, 1], 128).to(DEVICE)
    options = {"src_key_padding_mask": padding, "seed": seed_tensor()}
    assert "attention_packed: triton" in str(explain(layer, src, **options))
    found = outputs_and_gradients(layer, src, **options)
    with use_backend("pytorch"):
        baseline = outputs_and_gradients(layer, src, **options)
        exact = outputs_and_gradients(layer.double(), src.double(), **options)
    for i, (a, b, c) in enumerate(zip(found, baseline, exact, strict=True)):
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        floor = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert error <= (2 if i == 0 else 3) * allowed + floor


def test_launches(launches: list[str]) -> None:
    """One in forward; two in backward, or one for a short sequence; one more for every mask."""
    long, short = (random(2, n, 3, 2, 64).requires_grad_() for n in (600, 128))
    padding, mask = (random(*x).requires_grad_() for x in ((2, 600), (2, 600, 600)))
    two = ["query_gradient", "key_gradient"]
    for inputs, backward in (
        ([short], ["key_gradient"]),
        ([long], two),
        ([long, padding], [*two, "mask_gradient"]),
        ([long, padding, mask], [*two, "mask_gradient", "mask_gradient"]),
    ):
        masks = dict(zip(("key_padding_mask", "attn_mask"), inputs[1:], strict=False))
        launches.clear()
        out = attention_packed(inputs[0], **masks, dropout_p=0.1, seed=seed_tensor())
        assert launches == ["forward"]
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert launches[1:] == backward
