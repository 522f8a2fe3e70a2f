"""Inputs of the norms and residual sums, and how a backend is held against float64 on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, dropout_add, dropout_add_layer_norm, layer_norm
from tests import helpers, reference
from tests.ops.backends import Backend, Layout

P = 0.125
SEED = 2**62 + 777
SITE = 6
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

#: Views of a (B, S, N) tensor.
LAYOUTS: dict[str, Layout] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda x: F.pad(x, (0, 24))[..., : x.shape[-1]],
    "rows oddly apart": lambda x: F.pad(x, (0, 3))[..., : x.shape[-1]],
    "unaligned": lambda x: F.pad(x.flatten(), (3, 0))[3:].view(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[:1, :1].expand_as(x),
}

#: (rows, columns), dtype: edges of groups, accesses, tiles, warps and blocks, up to the widest rows
#: that stay in registers (8192), and wider ones. A GPU compiles kernels for each: no product.
WIDTHS = [
    ((40, 1), fp32),
    ((33, 7), bf16),
    ((33, 8), fp32),
    ((9, 63), fp16),
    ((5, 127), fp32),
    ((20, 256), bf16),
    ((5, 768), fp16),
    ((5, 1000), fp32),
    ((9, 1024), bf16),
    ((2, 4097), bf16),
    ((2, 8192), fp32),
    ((2, 8200), bf16),
    ((5, 8200), fp32),
]

#: Those of WIDTHS for which a backend compiles kernels if that takes seconds.
COMPILED_COLUMNS = (1, 63, 1000, 1024, 4097, 8192, 8200)


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def make_inputs(
    shape: tuple[int, ...] = (3, 21, 40), dtype: torch.dtype = fp32, **dtypes: torch.dtype
) -> dict[str, Tensor | None]:
    """Of the fused op, all in ``dtype`` but those that have a dtype of their own."""
    inputs = {
        "input": torch.randn(shape),
        "residual": torch.randn(shape),
        **{name: torch.randn(shape[-1]) for name in ("input_bias", "weight", "bias")},
    }
    return {name: x.to(dtypes.get(name, dtype)) for name, x in inputs.items()}


def without_norm(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: inputs[name] for name in ("input", "residual", "input_bias")}


def of_norm(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: inputs[name] for name in ("input", "weight", "bias")}


def away_from_zero(weight: Tensor) -> Tensor:
    """So that backward may divide by it."""
    return (weight.sign() * (0.5 + weight.abs())).to(weight.dtype)


def needs_float64(backend: Backend) -> None:
    """Where a backend has none, by its own word."""
    facts = {"dtypes": (torch.float64,)}
    reason = dispatch.why_not("layer_norm", backend.name, torch.device(backend.device), **facts)
    if reason is not None:
        pytest.skip(reason)


def few_programs(backend: Backend, shape: tuple[int, ...]) -> None:
    """Skip many rows where each takes a program of an interpreter; other checks have some."""
    if backend.interprets and math.prod(shape[:-1]) > 100:
        pytest.skip(f"{backend}: would interpret a program for each of many rows")


def keep_of(shape: tuple[int, ...], p: float = P, batch_first: bool = True) -> Tensor:
    """(rows, columns) bool: what the contract keeps of tokens of this shape."""
    where = reference.coordinates(shape[:-1] or (1,), batch_first)
    return reference.residual_keep(SEED, SITE, p, *where, torch.arange(shape[-1]))


# ------------------------------------------------------------------------------ torch and float64


def eager_sum(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    *,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    branch = input if input_bias is None else input + input_bias
    if keep is not None:
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 1.0  # as in torch: nothing is kept
        branch = branch * keep.view(branch.shape) * factor
    if residual is None:
        return branch.to(input.dtype)
    return (residual + branch).to(torch.promote_types(input.dtype, residual.dtype))


def eager_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Of a mixture of dtypes in at least fp32: torch's own norm does not take every one."""
    out_dtype = out_dtype or input.dtype
    others = (out_dtype, *(x.dtype for x in (weight, bias) if x is not None))
    mixed = any(dtype != input.dtype for dtype in others)
    wide = torch.promote_types(input.dtype, fp32) if mixed else input.dtype
    weight, bias = (None if x is None else x.to(wide) for x in (weight, bias))
    out = F.layer_norm(input.to(wide), input.shape[-1:], weight, bias, eps)
    return out.to(out_dtype)


def eager_fused(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    keep: Tensor | None,
    dropout_p: float,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The result, the sum, and the copy if one is wanted."""
    total = eager_sum(input, residual, input_bias, keep=keep, dropout_p=dropout_p)
    out_dtype = out_dtype or total.dtype
    wide = torch.promote_types(out_dtype, copy_dtype or out_dtype)
    exact = eager_norm(total, weight, bias, eps=eps, out_dtype=wide)
    results = exact.to(out_dtype), total
    return results if copy_dtype is None else (*results, exact.to(copy_dtype))


def oracle_fused(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    multiplier: Tensor | None,
    eps: float,
    copied: bool,
) -> tuple[Tensor, ...]:
    total = reference.dropout_add(input, residual, input_bias, multiplier)
    out = reference.layer_norm(total, weight, bias, eps)
    return (out, total, out) if copied else (out, total)


def gradient_from_output(
    out: Tensor, grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """float64: the gradient of a norm's input, from its result as it was rounded."""
    xhat = (out.double() - bias.double()) / weight.double()
    rstd = 1 / (input.double().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    flow = grad.double() * weight.double()
    along = (flow * xhat).mean(-1, keepdim=True)
    return rstd * (flow - flow.mean(-1, keepdim=True) - xhat * along)


# ------------------------------------------------------------------------------------- comparison

ORACLE = Backend("none")  # runs where the tests do


def check_norm(
    backend: Backend,
    inputs: Mapping[str, Tensor | None],
    layouts: Mapping[str, Layout] | None = None,
    *,
    eps: float = 1e-5,
    save: str = "input",
    out_dtype: torch.dtype | None = None,
    floor_ulps: float = helpers.FLOOR_ULPS,
) -> None:
    """A norm alone is as accurate as eager PyTorch on the same device."""
    options = {"eps": eps, "out_dtype": out_dtype}
    ours = backend.of(layer_norm, layouts, save=save, **options)
    theirs = backend.there(eager_norm, layouts, **options)
    exact = ORACLE.there(reference.layer_norm, layouts, eps=eps)
    helpers.assert_as_accurate_as_eager(ours, theirs, exact, of_norm(inputs), floor_ulps)


def check_sum(
    backend: Backend,
    inputs: Mapping[str, Tensor | None],
    dropout_p: float = P,
    layouts: Mapping[str, Layout] | None = None,
    batch_first: bool = True,
) -> None:
    """So is ``dropout_add``."""
    keep, multiplier = decisions(inputs, dropout_p, layouts, batch_first)
    ours = backend.of(dropout_add, layouts, **dropping(dropout_p, batch_first=batch_first))
    theirs = backend.there(eager_sum, layouts, keep=keep, dropout_p=dropout_p)
    exact = ORACLE.there(reference.dropout_add, layouts, multiplier=multiplier)
    helpers.assert_as_accurate_as_eager(ours, theirs, exact, without_norm(inputs))


def check_fused(
    backend: Backend,
    inputs: Mapping[str, Tensor | None],
    dropout_p: float = P,
    layouts: Mapping[str, Layout] | None = None,
    batch_first: bool = True,
    *,
    used: Sequence[int] = (0, 1),
    save: str = "sum",
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
) -> None:
    """So is ``dropout_add_layer_norm``, of whose (result, sum, copy) some are ``used``."""
    keep, multiplier = decisions(inputs, dropout_p, layouts, batch_first)
    options = {"eps": eps, "out_dtype": out_dtype, "copy_dtype": copy_dtype}
    ours = backend.of(
        dropout_add_layer_norm, layouts, return_sum=True, save=save,
        **dropping(dropout_p, batch_first=batch_first), **options,
    )  # fmt: skip
    theirs = backend.there(eager_fused, layouts, keep=keep, dropout_p=dropout_p, **options)
    exact = ORACLE.there(
        oracle_fused, layouts, multiplier=multiplier, eps=eps, copied=copy_dtype is not None
    )
    functions = (some(function, used) for function in (ours, theirs, exact))
    helpers.assert_as_accurate_as_eager(*functions, inputs)


def dropping(dropout_p: float = P, **options: Any) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, **options}


def some(function: Callable[..., Any], used: Sequence[int]) -> Callable[..., Any]:
    """``function`` with these of its results."""

    def run(**inputs: Any) -> tuple[Tensor, ...]:
        results = function(**inputs)
        return tuple(results[i] for i in used)

    return run


def decisions(
    inputs: Mapping[str, Tensor | None],
    dropout_p: float,
    layouts: Mapping[str, Layout] | None,
    batch_first: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What the contract keeps of ``input``, and what it multiplies it by; None where all stays."""
    if not dropout_p:
        return None, None
    layout = (layouts or {}).get("input", lambda x: x)
    keep = keep_of(layout(inputs["input"]).shape, dropout_p, batch_first)
    return keep, reference.factor(keep, dropout_p)
