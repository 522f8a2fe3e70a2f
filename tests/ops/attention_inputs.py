"""What the checks of ``attention`` share: inputs, eager attention, and accuracy beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import attention, dispatch
from fastattn.arguments import AttentionArguments
from tests import helpers, reference
from tests.ops.backends import Backend, Layout, few_kernels

INF, NAN = float("inf"), float("nan")
P = 0.125  # 2048 / 16384: eager's 1 / (1 - p) is then exactly the contract's scale
SEED = 2**62 + 12345
SITE = 8

#: Kinds of calls that have kernels, and tiles, of their own: dtype and head dimension.
HALF = (torch.bfloat16, 64)
KINDS = [
    *((torch.bfloat16, head_dim) for head_dim in (64, 40, 128)),
    *((torch.float16, 64), (torch.float32, 64), (torch.float32, 40), (torch.float64, 40)),
]
DROPOUT = {"dropout_p": P, "seed": torch.tensor([SEED]), "site": SITE}


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def make_inputs(
    batch: int = 2,
    seqlen_q: int = 63,
    seqlen_k: int = 63,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    return {
        **make_qkv(batch, seqlen_q, seqlen_k, heads, head_dim, dtype),
        "key_padding_mask": None,
        "attn_mask": None,
    }


def make_qkv(
    batch: int = 2,
    seqlen_q: int = 63,
    seqlen_k: int = 63,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    def tokens(length: int) -> Tensor:
        return torch.randn(batch, length, heads, head_dim).to(dtype)

    return {"query": tokens(seqlen_q), "key": tokens(seqlen_k), "value": tokens(seqlen_k)}


def lengths_tensor(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def beyond(lengths: Tensor | list[int], length: int) -> Tensor:
    """(B, length) bool: the positions from the end of each sequence on."""
    return torch.arange(length) >= torch.as_tensor(lengths)[:, None]


def skip_unless_it_takes(backend: Backend, **facts: Any) -> None:
    """Where a backend has no kernel for such a call on its device, by its own word."""
    reason = dispatch.why_not("attention", backend.name, torch.device(backend.device), **facts)
    if reason is not None:
        pytest.skip(reason)


def skip_unless_it_scales(backend: Backend, scale: float) -> None:
    skip_unless_it_takes(backend, arguments=AttentionArguments(scale=scale))


# ------------------------------------------------------------------------------------- layouts


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)[:, ::2]


def strided_features(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def unaligned(x: Tensor) -> Tensor:
    """Rows begin anywhere."""
    return F.pad(x, (1, 0))[..., 1:]


LAYOUTS = (sequence_first, heads_first, every_other_row, strided_features, unaligned)
QKV_LAYOUTS: dict[str, Layout] = {
    "batch first": lambda x: x,
    "sequence first": sequence_first,
    "planes": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "heads first": lambda x: x.movedim(3, 1).contiguous().movedim(1, 3),
}


# ------------------------------------------------------------------------------------- accuracy


@functools.cache
def keep_of(dropout_p: float, shape: tuple[int, ...]) -> Tensor | None:
    """(B, H, Sq, Sk) bool: what the contract keeps; None: everything."""
    return reference.attention_keep(SEED, SITE, dropout_p, shape) if dropout_p else None


def multiplier_of(dropout_p: float, shape: tuple[int, ...]) -> Tensor | None:
    keep = keep_of(dropout_p, shape)
    return None if keep is None else reference.factor(keep, dropout_p)


def shape_of(inputs: Mapping[str, Tensor | None]) -> tuple[int, int, int, int]:
    """(B, H, Sq, Sk)."""
    batch, seqlen_q, heads, _ = inputs["query"].shape
    return batch, heads, seqlen_q, inputs["key"].shape[1]


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's own attention; with ``keep`` the unfused one, which takes the elements to drop."""
    bias = None
    if is_causal:
        later = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        bias = reference.additive(later).to(query)
    for mask in (None if key_padding_mask is None else key_padding_mask[:, None, None], attn_mask):
        if mask is not None:
            term = additive(mask, query.dtype)
            bias = term if bias is None else bias + term
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    shape = (*q.shape[:3], k.shape[2])
    if bias is not None:
        bias = bias.to(q.dtype).expand(shape)
    if keep is None and q.is_cuda:  # whose fused ones leave NaN in a row without a key
        keep = torch.ones(shape, dtype=torch.bool, device=q.device)
    if keep is None:
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    else:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, bias, dropout_p, False, dropout_mask=keep, scale=scale
        )
    return out.transpose(1, 2)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -INF)


def check(
    backend: Backend,
    inputs: Mapping[str, Tensor | None],
    dropout_p: float = 0.0,
    *,
    attend: Callable[..., Any] = attention,
    layouts: Mapping[str, Layout] | None = None,
    ours: Mapping[str, Any] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Output and gradients of ``inputs`` are as accurate as eager PyTorch's on the same device.

    Args:
        attend: by ``backend``; what it is told in a way of its own is in ``ours``.
        masks: the same for eager and for the oracle.
        options: of all three.
    """
    keep = keep_of(dropout_p, shape_of(inputs))
    multiplier = multiplier_of(dropout_p, shape_of(inputs))
    dropout = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE}
    masks = {**(masks or {}), **options}
    helpers.assert_as_accurate_as_eager(
        backend.of(attend, layouts, **dropout, **(ours or {}), **options),
        backend.there(eager_attention, layouts, dropout_p=dropout_p, keep=keep, **masks),
        Backend("none").there(reference.attention, layouts, multiplier=multiplier, **masks),
        inputs,
    )


def exact_results(
    inputs: Mapping[str, Tensor | None], output: Tensor, dropout_p: float = 0.0, **options: Any
) -> helpers.Results:
    """In float64, of the gradients that ``helpers.results_of`` takes for an output like this."""
    multiplier = multiplier_of(dropout_p, shape_of(inputs))
    oracle = functools.partial(reference.attention, multiplier=multiplier, **options)
    return helpers.results_of(oracle, inputs, torch.float64, helpers.cotangents_of((output,)))


def assert_exact(
    backend: Backend, inputs: Mapping[str, Tensor | None], dropout_p: float = P, **options: Any
) -> helpers.Results:
    """Output and gradients are the oracle's but for rounding."""
    dropout = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE}
    found = helpers.results_of(backend.of(attention, **dropout, **options), inputs)
    expected = exact_results(inputs, found["output 0"], dropout_p, **options)
    helpers.assert_close(found, {name: x.to(found[name].dtype) for name, x in expected.items()})
    return found


# ----------------------------------------------------------------------------- what kernels cost


@pytest.fixture
def few_without_dropout(request: pytest.FixtureRequest, backend: Backend) -> None:
    """Where each kind of call makes a kernel, those without dropout are left to few checks."""
    few_kernels(backend, request.node.callspec.params.get("dropout_p") != 0)


@pytest.fixture
def larger_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels of 32 or 64 bits have larger tiles than on a GPU: they run faster."""
    if "interpreted" not in request.keywords:
        return
    from fastattn.kernels import attention as kernels
    from fastattn.kernels.attention_configs import Config, choose

    def larger(kernel: str, launch: kernels.Launch) -> Config:
        if launch.dtype.itemsize == 2:
            return choose(kernel, launch)
        return Config(128, 64, num_warps=4, num_stages=1)

    monkeypatch.setattr(kernels, "choose", larger)
