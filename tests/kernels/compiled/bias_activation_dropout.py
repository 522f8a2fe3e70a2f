"""bias_activation_dropout: every activation, with dropout and without, both ways; other types."""

from __future__ import annotations

from functools import partial

import torch

from fastattn.arguments import TokenDropout
from fastattn.kernels.bias_activation_dropout import (
    bias_activation_dropout_backward,
    bias_activation_dropout_forward,
)
from fastattn.pytorch.activations import ACTIVATIONS
from tests.kernels.compiled.variants import Kernel, Region, Variant

ROWS, COLUMNS = 4096, 3072
SEED = torch.empty(1, dtype=torch.int64, device="meta")
ROW_INDEX = torch.empty(ROWS, dtype=torch.int32, device="meta")
NONE = TokenDropout()
DROPOUT = TokenDropout(dropout_p=0.1, seed=SEED, site=1, row_period=512)

#: Instructions an element of forward in bf16 with dropout, on sm_90. An H200 can issue about 29 in
#: the time in which it moves an element through memory; exact gelu alone takes most of them.
TARGETS = {"relu": 16.0, "gelu": 39.0}


def elements(region: Region) -> float:
    """A program handles BLOCK_M rows of BLOCK_G groups of eight columns."""
    return 8 * region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_G"] / region.threads


def summed(region: Region) -> float:
    """A program of the last sum handles at least BLOCK_M parts of BLOCK_N columns."""
    return region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_N"] / region.threads


BACKWARD = {
    "bias_activation_dropout_backward_kernel": Kernel(elements, loop=True),
    "column_sum_kernel": Kernel(summed),
}


def variants(
    name: str,
    activation: str,
    dtype: torch.dtype,
    dropout: TokenDropout,
    columns: int = COLUMNS,
    bias_dtype: torch.dtype | None = None,
    has_bias: bool = True,
    target: float | None = None,
) -> list[Variant]:
    """Forward and backward of one kind of call."""
    input = torch.empty(ROWS, columns, dtype=dtype, device="meta")
    bias = torch.empty(columns, dtype=bias_dtype or dtype, device="meta") if has_bias else None
    targets = {} if target is None else {90: target}

    def forward() -> torch.Tensor:
        return bias_activation_dropout_forward(input, bias, activation, dropout)

    def backward() -> object:
        grad_out = torch.empty_like(input if bias is None else input + bias)
        return bias_activation_dropout_backward(grad_out, input, bias, activation, dropout, True)

    return [
        Variant(
            f"{name} forward",
            forward,
            {"bias_activation_dropout_forward_kernel": Kernel(elements, at_most=targets)},
        ),
        Variant(f"{name} backward", backward, BACKWARD),
    ]


def feed_forward_backward(activation: str, dropout: TokenDropout) -> object:
    """What the feed-forward block calls: relu from its result, others with the result again."""
    grad_out, saved = (torch.empty(ROWS, COLUMNS, dtype=bf16, device="meta") for _ in range(2))
    from_output = activation == "relu"
    return bias_activation_dropout_backward(
        grad_out,
        saved,
        None,
        activation,
        dropout,
        True,
        from_output=from_output,
        out=grad_out,
        activated=None if from_output else torch.empty_like(saved),
    )


bf16 = torch.bfloat16
VARIANTS = [
    one
    for activation in ACTIVATIONS
    for one in (
        *variants(f"bf16 {activation}", activation, bf16, NONE),
        *variants(
            f"bf16 {activation} dropout",
            activation,
            bf16,
            DROPOUT,
            target=TARGETS.get(activation),
        ),
    )
]

VARIANTS += [
    Variant(
        f"feed-forward {activation} {kind}",
        partial(feed_forward_backward, activation, dropout),
        BACKWARD,
    )
    for activation in ACTIVATIONS
    for kind, dropout in (("alone", NONE), ("dropout", DROPOUT))
]

# What else makes a kernel of its own, each on its own.
VARIANTS += variants("fp16 relu dropout", "relu", torch.float16, DROPOUT)
VARIANTS += variants("fp16 gelu dropout", "gelu", torch.float16, DROPOUT)
VARIANTS += variants("fp32 relu dropout", "relu", torch.float32, DROPOUT)
VARIANTS += variants("fp32 gelu dropout", "gelu", torch.float32, DROPOUT)
VARIANTS += variants("without bias", "gelu", bf16, DROPOUT, has_bias=False)
VARIANTS += variants("fp32 bias", "gelu", bf16, DROPOUT, bias_dtype=torch.float32)
VARIANTS += variants("row index", "gelu", bf16, DROPOUT._replace(row_index=ROW_INDEX))
VARIANTS += variants("sequence first", "gelu", bf16, DROPOUT._replace(batch_first=False))
VARIANTS += variants("fp64", "gelu", torch.float64, DROPOUT)
VARIANTS += variants("two columns an access", "gelu", bf16, DROPOUT, columns=3070)
VARIANTS += variants("one column an access", "gelu", bf16, DROPOUT, columns=3071)
VARIANTS += variants("64 columns", "gelu", bf16, DROPOUT, columns=64)
