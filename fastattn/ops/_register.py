"""How an op becomes known to torch, and what its implementations return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, library

from fastattn import tracing

_ops = library.Library("fastattn", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Register ``fastattn::<schema>`` for CPU and CUDA and return the callable overload."""
    name = schema[: schema.index("(")]
    _ops.define(schema)
    for key in ("CPU", "CUDA"):
        _ops.impl(name, _without_autocast(implementation), key)
    library.register_fake(f"fastattn::{name}", fake, lib=_ops)
    return getattr(torch.ops.fastattn, name).default


def or_empty(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an op returns: an empty tensor for every result that was not wanted."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _without_autocast(implementation: Callable) -> Callable:
    """An op's dtypes are settled in its public function; nothing inside may cast again."""

    @tracing.opaque
    @functools.wraps(implementation)
    def wrapped(*arguments: Any) -> Any:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return wrapped(*arguments)
        return implementation(*arguments)

    return wrapped
