"""Which calls of ``feed_forward`` take Triton's own products: those that a measurement names.

The table that ships holds what was measured on the project's GPUs, so that two runs choose alike.
:func:`tune` measures on the GPU at hand; it is never called implicitly.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Entry", "load", "tune"]

#: A call falls in the first bucket that is not below its number of tokens.
BUCKETS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 2**62)
CANDIDATE, ANCHOR = "triton_gemm", "triton"
ROUNDS = 7
LEAST_SPEEDUP = 1.02  # of the candidate over the anchor, in the median, to be chosen

_FORMAT = "fastattn-tuning 1"
_KINDS = {"str": str, "int": int, "float": (float, int), "tuple": tuple, "dict": dict}
_SHIPPED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Entry:
    """One measurement: a kind of call, and how many times as fast the candidate ran."""

    architecture: str  # such as "sm_90"
    dtype: str  # such as "bfloat16"
    activation: str
    d_model: int
    d_ff: int
    tokens: int  # a bucket of BUCKETS
    speedup: float  # median over rounds of the anchor's time / the candidate's, forward + backward
    rounds: tuple[float, ...]  # the same of every round
    measured: dict[str, str]  # GPU, versions and date

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        return (
            self.architecture,
            self.dtype,
            self.activation,
            self.d_model,
            self.d_ff,
            self.tokens,
        )


#: Of every measured kind of call, whether it takes the candidate, and the figure in words: the
#: compiler may take a number that changes for a symbol, which no message can hold.
_table: dict[tuple, tuple[bool, str]] = {}


def load(path: str | os.PathLike[str]) -> list[Entry]:
    """Take the measurements of a file that :func:`tune` wrote, for this process.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file; the message names it.
    """
    return _take(_read(Path(path)))


def _take(entries: list[Entry]) -> list[Entry]:
    """Choose by these measurements from now on."""
    for entry in entries:
        gpu = entry.measured.get("gpu", entry.architecture)
        words = f"measured at {entry.speedup} times the speed of {ANCHOR} on {gpu}"
        _table[entry.key] = (entry.speedup >= LEAST_SPEEDUP, words)
    return entries


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
    from fastattn import dispatch
    from fastattn.ops.bias_activation_dropout import check_activation

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
    before = [] if write is None else _read_if_there(Path(write))
    entries = [
        _measure(d_model, dim_feedforward, size, activation, dtype, dropout_p, device)
        for size in sizes
    ]
    if write is not None:
        _write(Path(write), {entry.key: entry for entry in (*before, *entries)}.values())
    return _take(entries)


def why_not_chosen(device: torch.device, **facts: Any) -> str | None:
    """Why a call does not take the candidate: no measurement, or one that is against it."""
    if not _table:
        return "no measurement names it (fastattn.tune makes one)"
    chosen, words = _measured(device, **facts)
    return None if chosen else words


def why_chosen(device: torch.device, **facts: Any) -> str | None:
    """The measurement by which a call takes the candidate; None without one."""
    chosen, words = _measured(device, **facts)
    return words if chosen else None


def _measured(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (),
    activation: str = "",
    tokens: int = 0,
    widths: tuple[int, ...] = (),
    **facts: Any,
) -> tuple[bool, str]:
    name = str(dtypes[0]).removeprefix("torch.") if dtypes else ""
    bucket = next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])
    if len(widths) != 3 or widths[0] != widths[2]:
        return False, "no measurement is of a block with these widths"
    key = (architecture(device), name, activation, *widths[:2], bucket)
    return _table.get(key, (False, "no measurement is of this call (fastattn.tune makes one)"))


def architecture(device: torch.device) -> str:
    """Such as ``"sm_90"``; ``"cpu"`` where Triton's interpreter runs."""
    return _architecture(device.index) if device.type == "cuda" else device.type


def _architecture(index: int | None) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


# What torch.compiler.assume_constant_result does, without importing the compiler.
_architecture._dynamo_marked_constant = True


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
        architecture(device),
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
    from fastattn.ops.feed_forward import feed_forward

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

    import fastattn

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tokens": str(tokens),
        "dropout_p": str(dropout_p),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastattn": fastattn.__version__,
        "date": datetime.date.today().isoformat(),
    }


# ---------------------------------------------------------------------------------------- files


def _read_if_there(path: Path) -> list[Entry]:
    """What a file holds already; an error before anything is measured where none could be made."""
    if not path.parent.is_dir():
        raise ValueError(f"write must be in a folder that exists, but got {str(path)!r}")
    return _read(path) if path.exists() else []


def _read(path: Path) -> list[Entry]:
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        return [_entry(row) for row in content["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no measurements of fastattn.tune: {error}") from error


def _entry(row: dict[str, Any]) -> Entry:
    entry = Entry(**{**row, "rounds": tuple(row["rounds"])})
    for field in fields(Entry):
        value, kind = getattr(entry, field.name), _KINDS[field.type.partition("[")[0]]
        if not isinstance(value, kind):
            raise TypeError(f"{field.name} is {value!r}")
    if not 0 < entry.speedup < math.inf or entry.tokens not in BUCKETS:
        raise ValueError(f"speedup is {entry.speedup} and tokens is {entry.tokens}")
    return entry


def _write(path: Path, entries: Iterable[Entry]) -> None:
    """In one step: a file that is there stays whole whatever happens."""
    rows: Sequence[dict] = [asdict(entry) for entry in sorted(entries, key=lambda e: e.key)]
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    body = f'{{"format": "{_FORMAT}", "entries": [\n{text}\n]}}\n'
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(body, "utf-8")
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


load(_SHIPPED)
