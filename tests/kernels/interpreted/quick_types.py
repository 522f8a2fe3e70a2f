"""Types of Triton's front end are made once; comparing and unwrapping them takes a short way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.language import core


def type_patches() -> Iterator[tuple[Any, str, Any]]:
    """Made anew, the types are a fifth to a quarter of the time of these tests."""
    initialize_type, initialize_tensor = tl.block_type.__init__, tl.tensor.__init__
    equal, unwrap = tl.dtype.__eq__, core._unwrap_if_constexpr
    types: dict[Any, dict[str, Any]] = {}  # by the id of the element's type, and the shape
    tensors: dict[int, tuple[Any, dict[str, Any]]] = {}  # by the id of the shape of their type
    plain = {tl.tensor, tl.dtype, int, float, bool, str, type(None)}  # what holds no constexpr

    def block_type(made: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = id(element_ty), tuple(shape)
        if key in types:  # which keep what has an id here, so that nothing else gets it
            vars(made).update(types[key])
        else:
            initialize_type(made, element_ty, shape)
            types[key] = dict(vars(made))

    def tensor(made: tl.tensor, handle: Any, type: tl.dtype) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) in tensors:
            _, attributes = tensors[id(shape)]
            vars(made).update(attributes, handle=handle, type=type, dtype=type.scalar)
        else:
            initialize_tensor(made, handle, type)
            tensors[id(shape)] = shape, vars(made) | {"handle": None}

    yield tl.block_type, "__init__", block_type
    yield tl.tensor, "__init__", tensor
    yield tl.dtype, "__eq__", lambda a, b: a is b or equal(a, b)
    yield core, "_unwrap_if_constexpr", lambda x: x if type(x) in plain else unwrap(x)
