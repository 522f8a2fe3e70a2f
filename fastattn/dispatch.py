"""Which backend runs an op, and why the better ones do not.

A backend is chosen once per call, in the op's public function, before autograd; the choice travels
to forward and backward as a string. A backend asked for by name is used or its reason is raised.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Every op and the backends it may have, best first, as :func:`register` was told of them.
BACKENDS: dict[str, tuple[str, ...]] = {}

#: Triton's interpreter, for tests, runs kernels on CPU tensors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON = "cpu" if _INTERPRETED else "cuda"
_DEVICES = {"triton": _TRITON, "triton_gemm": _TRITON, "cuda": "cuda", "cpu": "cpu"}


def _can_always(**facts: Any) -> None:
    """The reason of a backend that runs every call on its device."""


@dataclass
class Backend:
    """One implementation of an op: an object with its functions, and what it cannot do.

    The object may be the name of a module, which is imported when the op first runs there.
    """

    functions: Any
    why_not: Callable[..., str | None] = _can_always
    only_by_name: Callable[..., str | None] | None = None
    evidence: Callable[..., str | None] = _can_always

    def why_only_by_name(self, device: torch.device, **facts: Any) -> str | None:
        """Why this call takes it only where it is asked for by name; None if it may."""
        return None if self.only_by_name is None else self.only_by_name(device=device, **facts)


_registry: dict[str, dict[str, Backend]] = {}
_requested: dict[str, str] = {}
_always: dict[tuple[Any, ...], str | None] = {}
_record: list[Choice] | None = None


@dataclass
class Choice:
    """What one call took: the backend, or for a part run as plain modules, ``module``."""

    part: str
    taken: str
    why_not: dict[str, str] = field(default_factory=dict)
    evidence: str | None = None  # where a measurement decided

    def __str__(self) -> str:
        lines = [f"{self.part}: {self.taken}" + (f", {self.evidence}" if self.evidence else "")]
        lines += [f"    not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def register(
    op: str,
    backend: str,
    functions: Any,
    why_not: Callable[..., str | None] | None = None,
    only_by_name: Callable[..., str | None] | None = None,
    evidence: Callable[..., str | None] = _can_always,
) -> None:
    """Make ``functions`` the next best ``backend`` of ``op``, or of one that is known another.

    Args:
        op, backend: their names.
        functions: an object that has them, or the name of a module to import when they first run.
        why_not: ``why_not(device, **facts)`` says what of a call it cannot run; None: nothing.
        only_by_name: says why a call, though it can run it, takes it only where it is asked for.
        evidence: names the measurement by which a call takes it.
    """
    names = BACKENDS.setdefault(op, ())
    if backend not in names:
        BACKENDS[op] = names = (*names, backend)
    _always.clear()
    entries = _registry.setdefault(op, {})
    entries[backend] = Backend(functions, why_not or _can_always, only_by_name, evidence)
    _registry[op] = {name: entries[name] for name in names if name in entries}


def functions(op: str, backend: str) -> Any:
    """The implementation that ``backend`` registered for ``op``."""
    entry = _registry[op][backend]
    if isinstance(entry.functions, str):
        entry.functions = importlib.import_module(entry.functions)
    return entry.functions


def why_not(op: str, backend: str, device: torch.device, **facts: Any) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device`` with these facts; None if it can."""
    entry = _registry[op].get(backend)
    if entry is None:
        return f"this version of fastattn has no {backend} kernel for {op}"
    wanted = _DEVICES.get(backend, device.type)
    if device.type != wanted:
        return f"runs on {wanted}, not on {device.type}"
    return entry.why_not(device=device, **facts)


def why_not_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on ``device``; None if they can."""
    return _why_not_triton(device)


# What torch.compiler.assume_constant_result does, without importing the compiler.
why_not_triton._dynamo_marked_constant = True


@functools.cache
def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "needs compute capability 8.0 or higher, not {}.{}".format(*capability)
    return None


def choose(op: str, tensor: Tensor, backend: str | None = None, **facts: Any) -> str:
    """The backend for a call of ``op`` on ``tensor``'s device.

    Args:
        op: name of the op.
        tensor: the op's first input.
        backend: a backend asked for by name; None takes what :func:`use_backend` asked for, else
            the best that can run.
        facts: whatever the op's reasons depend on.

    Raises:
        ValueError: ``backend`` is no backend of ``op``.
        RuntimeError: the backend asked for cannot run this call; the message says why.
    """
    if backend is None and _record is None and not _requested:
        taken = _unconditional(op, tensor.device.type)
        if taken is not None:
            return taken
    taken = _select(op, tensor.device, backend, **facts)
    if _record is not None:
        better = BACKENDS[op][: BACKENDS[op].index(taken)]
        reasons = {n: _why_passed_over(op, n, taken, tensor.device, facts) for n in better}
        note(op, taken, reasons, _registry[op][taken].evidence(device=tensor.device, **facts))
    return taken


def _why_passed_over(
    op: str, backend: str, taken: str, device: torch.device, facts: dict[str, Any]
) -> str:
    """Why a better ``backend`` than the one taken was not."""
    reason = why_not(op, backend, device, **facts)
    entry = _registry[op].get(backend)
    if reason is None and entry is not None:
        reason = entry.why_only_by_name(device, **facts)
    return reason or f"{taken} was asked for"


def leaves_to_pytorch(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether ``op`` on ``device``, all in ``dtype``, takes ``pytorch``, and nobody asks.

    For an op whose reasons depend on the device and on ``dtypes`` only.
    """
    if _record is not None or _requested:
        return False
    key = op, device, dtype
    if key not in _always:
        _always[key] = _select(op, torch.device(device), dtypes=(dtype,))
    return _always[key] == "pytorch"


def has_no_gpu_kernels(device: str, ops: Iterable[str]) -> bool:
    """Whether no call of ``ops`` on ``device`` may take a GPU's kernels, and none was asked for."""
    return not _requested and all(
        name in ("cpu", "pytorch") or _DEVICES[name] != device
        for op in ops
        for name in _registry[op]
    )


def _unconditional(op: str, device: str) -> str | None:
    """The best backend of ``op`` on ``device``, if it can run every call; None if that depends."""
    if (op, device) not in _always:
        best = next(
            name for name, entry in _registry[op].items() if _DEVICES.get(name, device) == device
        )
        entry = _registry[op][best]
        takes_all = entry.why_not is _can_always and entry.only_by_name is None
        _always[op, device] = best if takes_all else None
    return _always[op, device]


def _select(op: str, device: torch.device, backend: str | None = None, **facts: Any) -> str:
    asked = backend if backend is not None else _requested.get(op)
    if asked is None:
        return next(
            name
            for name, entry in _registry[op].items()
            if why_not(op, name, device, **facts) is None
            and entry.why_only_by_name(device, **facts) is None
        )
    _known(op, asked)
    reason = why_not(op, asked, device, **facts)
    if reason is not None:
        raise RuntimeError(f"backend={asked!r} cannot run {op}: {reason}")
    return asked


def note(part: str, taken: str, reasons: dict[str, str], evidence: str | None = None) -> None:
    """Record a choice for :func:`explain`; free when nothing listens."""
    if _record is not None:
        _record.append(Choice(part, taken, reasons, evidence))


@contextlib.contextmanager
def use_backend(backend: str | None = None, **by_op: str) -> Iterator[None]:
    """Ask for backends by name, for the whole process, until the context ends.

    ``use_backend("pytorch")`` asks for it in every op that has such a backend,
    ``use_backend(attention="triton")`` in one op. A call that the backend cannot run raises.

    Raises:
        ValueError: no op has a backend of that name, or there is no such op.
    """
    wanted: dict[str, str] = {}
    if backend is not None:
        wanted = {op: backend for op, names in BACKENDS.items() if backend in names}
        if not wanted:
            raise ValueError(f"backend must be one of {_all_backends()}, not {backend!r}")
    for op, name in by_op.items():
        _known(op, name)
        wanted[op] = name
    global _requested
    before, _requested = _requested, {**_requested, **wanted}
    try:
        yield
    finally:
        _requested = before


def available_backends(op: str, device: torch.device | str | None = None) -> tuple[str, ...]:
    """The backends that can run ``op`` on this machine, best first.

    Args:
        op: an op of :data:`BACKENDS`; anything else raises ValueError.
        device: where; by default a CUDA device if there is one, else the CPU.
    """
    return tuple(name for name, reason in reasons_of(op, device).items() if reason is None)


def reasons_of(op: str, device: torch.device | str | None = None) -> dict[str, str | None]:
    """Each backend of ``op`` with the reason it cannot run on this machine, None if it can."""
    _known(op)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {name: why_not(op, name, device) for name in BACKENDS[op]}


class Explanation(list[Choice]):
    """The choices of one call, in order; prints as text."""

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self)


def explain(layer: torch.nn.Module, *inputs: Any, **keywords: Any) -> Explanation:
    """Run ``layer(*inputs, **keywords)`` once and say, per op, which backend it took and why.

    The random state is put back afterwards; hooks and buffers see one extra call.
    """
    global _record
    before, _record = _record, []
    try:
        with torch.random.fork_rng():
            layer(*inputs, **keywords)
        return Explanation(_record)
    finally:
        _record = before


def _all_backends() -> list[str]:
    return sorted({name for names in BACKENDS.values() for name in names})


def _known(op: str, backend: str | None = None) -> None:
    if op not in BACKENDS:
        raise ValueError(f"op must be one of {sorted(BACKENDS)}, not {op!r}")
    if backend is not None and backend not in BACKENDS[op]:
        raise ValueError(f"backend of {op} must be one of {BACKENDS[op]}, not {backend!r}")
