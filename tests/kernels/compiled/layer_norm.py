"""layer_norm and the residual sum before it, both ways: by width, type, and what is present."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import NormArguments, TokenDropout
from fastattn.kernels.layer_norm import (
    dropout_add_backward,
    dropout_add_forward,
    dropout_add_layer_norm_backward,
    dropout_add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from tests.kernels.compiled.variants import Kernel, Region, Variant

ROWS = 4096
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


NONE = TokenDropout()
DROPOUT = TokenDropout(0.1, empty(1, dtype=torch.int64), site=2, row_period=512)
ROW_INDEX = empty(ROWS, dtype=torch.int32)

#: Kernels that handle one chunk of each row in one pass through the counted region.
OF_CHUNKS = (
    "layer_norm_wide_forward_kernel",
    "layer_norm_wide_backward_kernel",
    "dropout_add_forward_kernel",
    "dropout_add_backward_kernel",
)

#: Instructions an element on sm_90. An H200 can issue about 29 in the time in which it moves the
#: eight bytes of an element through memory.
TARGET = 29.0


def elements(region: Region) -> float:
    """Elements of a thread in a program, or in one pass through its loop; lanes may be idle."""
    tile = region.constexprs["TILE"]
    chunks = 1 if region.kernel in OF_CHUNKS else tile.CHUNKS
    columns = min(tile.COLUMNS, 8 * tile.LANES * chunks)
    return columns * tile.ROWS / region.threads


def sum_elements(region: Region) -> float:
    return region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_N"] / region.threads


def kernels_of(name: str, target: float | None, has_sums: bool = True) -> dict[str, Kernel]:
    """A kernel and, for sums over rows, what sums their parts; loops count where there are some."""
    targets = {} if target is None else {90: target}
    loops = name not in ("layer_norm_forward_kernel", "dropout_add_forward_kernel")
    found = {name: Kernel(elements, loop=loops, at_most=targets)}
    return found | ({"column_sum_kernel": Kernel(sum_elements)} if has_sums else {})


def variants(
    name: str,
    columns: int,
    dtype: torch.dtype = bf16,
    stream_dtype: torch.dtype | None = None,
    dropout: TokenDropout = DROPOUT,
    rows: int = ROWS,
    has_bias: bool = True,
    copy_dtype: torch.dtype | None = None,
    keeps_sum: bool = True,
    sum_is_used: bool = False,
    save: str = "sum",
    targets: tuple[float | None, float | None] = (None, None),
) -> list[Variant]:
    """Forward and backward of one kind of call of the fused op."""
    stream_dtype = stream_dtype or dtype
    input, stream = (empty(rows, columns, dtype=t) for t in (dtype, stream_dtype))
    vector = empty(columns, dtype=stream_dtype)
    statistics = [empty(rows, dtype=torch.promote_types(stream_dtype, fp32))] * 2
    norm = NormArguments(vector, vector, 1e-5, stream_dtype)
    input_bias = empty(columns, dtype=dtype) if has_bias else None
    grad_copy = None if copy_dtype is None else empty(rows, columns, dtype=copy_dtype)

    def forward() -> Any:
        return dropout_add_layer_norm_forward(
            input, input_bias, stream, norm, dropout, copy_dtype, keeps_sum
        )

    def backward() -> Any:
        grad_sum = stream if sum_is_used else None
        wanted = (True, dropout.drops or dtype != stream_dtype, has_bias, True, True)
        saved, level = (grad_copy, "output") if save == "copy" else (stream, save)
        return dropout_add_layer_norm_backward(
            stream, grad_sum, grad_copy, saved, *statistics, norm, dtype, stream_dtype, dropout,
            level, wanted,
        )  # fmt: skip

    wide = "wide_" if columns > 8192 else ""
    return [
        Variant(
            f"{name} forward",
            forward,
            kernels_of(f"layer_norm_{wide}forward_kernel", targets[0], False),
        ),
        Variant(
            f"{name} backward",
            backward,
            kernels_of(f"layer_norm_{wide}backward_kernel", targets[1]),
        ),
    ]


def norm_variants(name: str, columns: int, dtype: torch.dtype = bf16) -> list[Variant]:
    """Forward and backward of a layer norm alone, from its input and from its result."""
    x, vector = empty(ROWS, columns, dtype=dtype), empty(columns, dtype=dtype)
    statistics = [empty(ROWS, dtype=fp32)] * 2
    norm = NormArguments(vector, vector, 1e-5, dtype)

    def backward(save: str) -> Any:
        return layer_norm_backward(x, x, *statistics, norm, dtype, save, (True, True, True))

    kernels = kernels_of("layer_norm_backward_kernel", TARGET)
    return [
        Variant(
            f"{name} forward",
            lambda: layer_norm_forward(x, norm),
            kernels_of("layer_norm_forward_kernel", TARGET, False),
        ),
        Variant(f"{name} backward", lambda: backward("input"), kernels),
        Variant(f"{name} backward from the result", lambda: backward("output"), kernels),
    ]


def sum_variants(name: str, dtype: torch.dtype, stream_dtype: torch.dtype) -> list[Variant]:
    """Forward and backward of the sum alone."""
    input, stream = (empty(ROWS, 1024, dtype=t) for t in (dtype, stream_dtype))
    return [
        Variant(
            f"{name} forward",
            lambda: dropout_add_forward(input, input[0], stream, DROPOUT),
            kernels_of("dropout_add_forward_kernel", TARGET, False),
        ),
        Variant(
            f"{name} backward",
            lambda: dropout_add_backward(stream, dtype, DROPOUT, (True, True)),
            kernels_of("dropout_add_backward_kernel", TARGET),
        ),
    ]


VARIANTS = [
    *variants("1024", 1024, dropout=NONE, has_bias=False, targets=(TARGET, TARGET)),
    *variants("1024 dropout", 1024, targets=(TARGET, 30.0)),
    *variants("1024 dropout, fp16", 1024, fp16),
    *variants("1024 dropout, fp32", 1024, fp32, sum_is_used=True),
    *variants("1024 dropout, fp32 stream", 1024, bf16, fp32, copy_dtype=bf16),
    *variants("1024 dropout, sum used", 1024, sum_is_used=True),
    *variants("1024 dropout, from the result", 1024, keeps_sum=False, save="output"),
    *variants(
        "1024 dropout, fp32 stream, from the copy",
        1024,
        bf16,
        fp32,
        keeps_sum=False,
        copy_dtype=bf16,
        save="copy",
    ),
    *variants("1024 dropout, odd rows", 1024, rows=ROWS - 1),
    *variants("1024 dropout, row index", 1024, dropout=DROPOUT._replace(row_index=ROW_INDEX)),
    *variants("1024 dropout, sequence first", 1024, dropout=DROPOUT._replace(batch_first=False)),
    *variants("1024 dropout, fp64", 1024, fp64),
    *variants("64 dropout", 64),
    *variants("256 dropout", 256),
    *variants("512 dropout", 512, targets=(TARGET, None)),
    *variants("768 dropout", 768, targets=(TARGET, TARGET)),
    *variants("768 dropout, sum used, from the result", 768, sum_is_used=True, save="output"),
    *variants("1000 dropout", 1000),
    *variants("1001 dropout", 1001),
    *variants("2048 dropout", 2048),
    *variants("4096 dropout, fp32", 4096, fp32, sum_is_used=True),
    *variants("8192 dropout", 8192, targets=(TARGET, None)),
    *variants("8192 dropout, fp32", 8192, fp32, sum_is_used=True),
    *variants("8192 dropout, from the result", 8192, sum_is_used=True, save="output"),
    *variants("16384 dropout", 16384),
    *norm_variants("norm, 768", 768),
    *norm_variants("norm, 1024", 1024),
    *norm_variants("norm, 1024, fp32", 1024, fp32),
    *sum_variants("sum", bf16, bf16),
    *sum_variants("sum, fp32 stream", bf16, fp32),
]
