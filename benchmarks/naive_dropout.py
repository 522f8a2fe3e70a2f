"""A peer: dropout as a Triton tutorial would write it, one `tl.rand` an element.

Its seed is drawn by torch's generator on the device, as ours is; backward makes the mask again.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .cases import Case

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _dropout_kernel(X, Out, seed, numel, p, BLOCK: tl.constexpr):
        """Out = X / (1 - p) where kept, else 0; one program owns BLOCK elements."""
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # from int64, tl.rand costs more
        inside = offsets < numel
        kept = tl.rand(tl.load(seed), offsets) >= p
        x = tl.load(X + offsets, mask=inside, other=0.0)
        tl.store(Out + offsets, tl.where(kept, x / (1 - p), 0.0), mask=inside)


BLOCK = 1024


def why_not_naive_dropout(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "a Triton kernel, which runs on CUDA only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if case.rows * case.dim_feedforward >= 2**31:
        return "its offsets are 32 bits wide"
    return None


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    out = torch.empty_like(x)
    _dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, seed, x.numel(), p, BLOCK)
    return out


class _NaiveDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        seed = torch.randint(2**31 - 1, (1,), device=x.device)
        ctx.p = p
        ctx.save_for_backward(seed)
        return _drop(x.contiguous(), seed, p)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (seed,) = ctx.saved_tensors
        return _drop(grad_output.contiguous(), seed, ctx.p), None


def naive_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of `x` with probability `p`; `x` itself where nothing drops."""
    return _NaiveDropout.apply(x, p) if p else x
