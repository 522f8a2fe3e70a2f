"""Which calls of ``feed_forward`` take Triton's own products: those that a measurement names.

The table that ships holds what was measured on the project's GPUs, so that two runs choose alike;
:func:`fastattn.tune` measures on the GPU at hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

#: A call falls in the first bucket that is not below its number of tokens.
BUCKETS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 2**62)
CANDIDATE, ANCHOR = "triton_gemm", "triton"
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
    """Take the measurements of a file that :func:`fastattn.tune` wrote, for this process.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file; the message names it.
    """
    return take(_read(Path(path)))


def take(entries: list[Entry]) -> list[Entry]:
    """Choose by these measurements from now on."""
    for entry in entries:
        gpu = entry.measured.get("gpu", entry.architecture)
        words = f"measured at {entry.speedup} times the speed of {ANCHOR} on {gpu}"
        _table[entry.key] = (entry.speedup >= LEAST_SPEEDUP, words)
    return entries


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


def read_if_there(path: Path) -> list[Entry]:
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


def write(path: Path, entries: Iterable[Entry]) -> None:
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
