"""Measure on the GPU at hand which products ``feed_forward`` should take (:mod:`fastattn.tuned`).

:func:`tune` is never called implicitly.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, tuned
from fastattn.ops.bias_activation_dropout import check_activation
from fastattn.ops.feed_forward import feed_forward
from fastattn.tuned import ANCHOR, BUCKETS, CANDIDATE, Entry, load
from fastattn.version import __version__

__all__ = ["Entry", "load", "tune"]

ROUNDS = 7


def tune(
    d_model: int,
    dim_feedforward: int,
    tokens: Iterable[int] = (4096, 16384),
    *,
    activation: str = "relu",
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.1,
    device: torch.device | str = "cuda",
    write: str | os.PathLike[str] | None = None,
) -> list[Entry]:
    """Time both ways to run ``feed_forward`` on this GPU, and choose by it in this process.

    Forward and backward of the whole block, with torch's products and a kernel against Triton's
    products, in interleaved rounds.

    Args:
        d_model, dim_feedforward: widths of the block.
        tokens: numbers of tokens; each answers for its bucket (:data:`BUCKETS`).
        activation: one that has a fused kernel.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        dropout_p: probability of dropping while it is timed.
        device: a CUDA device.
        write: a file to which the measurements are added, for :func:`load`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: there is no such GPU, or one of both ways cannot run there.
    """
    device = torch.device(device)
    sizes = _checked_sizes(d_model, dim_feedforward, tokens)
    check_activation(activation)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, but got {dtype!r}")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, but got {dropout_p!r}")
    facts = {
        "dtypes": (dtype,),
        "activation": activation,
        "widths": (d_model, dim_feedforward, d_model),
    }
    for backend in (CANDIDATE, ANCHOR):
        reason = dispatch.why_not("feed_forward", backend, device, **facts)
        if reason is not None:
            raise RuntimeError(f"tune: device={str(device)!r} cannot run {backend}: {reason}")
    before = [] if write is None else tuned.read_if_there(Path(write))
    entries = [
        _measure(d_model, dim_feedforward, size, activation, dtype, dropout_p, device)
        for size in sizes
    ]
    if write is not None:
        tuned.write(Path(write), {entry.key: entry for entry in (*before, *entries)}.values())
    return tuned.take(entries)


# --------------------------------------------------------------------------------- measurements


def _checked_sizes(d_model: int, dim_feedforward: int, tokens: Iterable[int]) -> list[int]:
    if not isinstance(tokens, Iterable):
        raise ValueError(f"tokens must be numbers of tokens, but got {tokens!r}")
    sizes = list(tokens)
    named = {"d_model": [d_model], "dim_feedforward": [dim_feedforward], "tokens": sizes}
    for name, numbers in named.items():
        for number in numbers:
            if type(number) is not int or not 1 <= number <= BUCKETS[-1]:
                raise ValueError(f"{name} must be at least 1, but got {number!r}")
    if not sizes:
        raise ValueError("tokens must hold at least one number")
    return sizes


def _measure(
    d_model: int,
    d_ff: int,
    tokens: int,
    activation: str,
    dtype: torch.dtype,
    dropout_p: float,
    device: torch.device,
) -> Entry:
    calls = {
        backend: _call(backend, d_model, d_ff, tokens, activation, dtype, dropout_p, device)
        for backend in (ANCHOR, CANDIDATE)
    }
    rounds = []
    for number in range(ROUNDS):
        order = (ANCHOR, CANDIDATE) if number % 2 == 0 else (CANDIDATE, ANCHOR)
        ms = {backend: _milliseconds(calls[backend]) for backend in order}
        rounds.append(ms[ANCHOR] / ms[CANDIDATE])
    return Entry(
        tuned.architecture(device),
        str(dtype).removeprefix("torch."),
        activation,
        d_model,
        d_ff,
        next(bucket for bucket in BUCKETS if tokens <= bucket),
        round(statistics.median(rounds), 4),
        tuple(round(ratio, 4) for ratio in rounds),
        _circumstances(device, tokens, dropout_p),
    )


def _call(
    backend: str,
    d_model: int,
    d_ff: int,
    tokens: int,
    activation: str,
    dtype: torch.dtype,
    dropout_p: float,
    device: torch.device,
) -> Callable[[], Any]:
    """Forward and backward of one block, as a training step runs them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return x.to(device, dtype).requires_grad_()

    inputs = [random(tokens, d_model), random(d_ff, d_model), random(d_ff), random(d_model, d_ff)]
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    gradient = random(tokens, d_model).detach()
    options = {"activation": activation, "dropout_p": dropout_p, "seed": seed, "backend": backend}

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return torch.autograd.grad(feed_forward(*inputs, **options), inputs, gradient)

    return step


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median device time with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=60, return_mode="median")


def _circumstances(device: torch.device, tokens: int, dropout_p: float) -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tokens": str(tokens),
        "dropout_p": str(dropout_p),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastattn": __version__,
        "date": datetime.date.today().isoformat(),
    }
