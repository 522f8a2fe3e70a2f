"""feed_forward_gemm: the two products with an epilogue, every activation, with dropout and without.

Counted is the whole kernel, main loop included, an element of the tile.
"""

from __future__ import annotations

import torch

from fastattn.arguments import FeedForwardArguments, TokenDropout
from fastattn.kernels.feed_forward_gemm import FusedProducts
from fastattn.pytorch.activations import ACTIVATIONS
from tests.kernels.compiled.variants import Extra, Kernel, Region, Variant

TOKENS, D, D_FF = 4096, 768, 3072
SEED = torch.empty(1, dtype=torch.int64, device="meta")
ROW_INDEX = torch.empty(TOKENS, dtype=torch.int32, device="meta")
NONE = TokenDropout()
DROPOUT = TokenDropout(dropout_p=0.1, seed=SEED, site=1, row_period=512)
bf16 = torch.bfloat16


def tile_elements(region: Region) -> float:
    return region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_N"] / region.threads


def summed(region: Region) -> float:
    return region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_N"] / region.threads


PRODUCT = Kernel(tile_elements, tensor_cores=True)
BACKWARD = {"feed_forward_hidden_gradient_kernel": PRODUCT, "column_sum_kernel": Kernel(summed)}


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def variants(
    name: str,
    activation: str,
    dropout: TokenDropout,
    dtype: torch.dtype = bf16,
) -> list[Variant]:
    """Forward, forward that keeps the hidden tensor, and backward."""
    weight1, weight2 = empty(D_FF, D, dtype=dtype), empty(D, D_FF, dtype=dtype)
    bias = empty(D_FF, dtype=dtype)
    arguments = FeedForwardArguments(weight1, bias, weight2, None, activation, dropout)
    block = FusedProducts()

    def hidden() -> torch.Tensor:
        return empty(TOKENS, D_FF, dtype=dtype)

    def forward() -> object:
        return block.activate(empty(TOKENS, D, dtype=dtype), arguments, None)

    def keeping() -> object:
        return block.activate(empty(TOKENS, D, dtype=dtype), arguments, hidden())

    def backward() -> object:
        grad_out = empty(TOKENS, D, dtype=dtype)
        return block.hidden_gradient(grad_out, arguments, hidden(), hidden(), True)

    kernels = {"feed_forward_activate_kernel": PRODUCT}
    found = [Variant(f"{name} forward", forward, kernels)]
    if activation != "relu":  # what relu keeps is the result itself
        found.append(Variant(f"{name} forward keeping", keeping, kernels))
    return [*found, Variant(f"{name} backward", backward, BACKWARD)]


VARIANTS = [
    one
    for activation in ACTIVATIONS
    for kind, dropout in (("", NONE), (" dropout", DROPOUT))
    for one in variants(f"{activation}{kind}", activation, dropout)
]
VARIANTS += variants("fp16 gelu dropout", "gelu", DROPOUT, torch.float16)
VARIANTS += variants("row index", "gelu", DROPOUT._replace(row_index=ROW_INDEX))
VARIANTS += variants("sequence first", "gelu", DROPOUT._replace(batch_first=False))

#: Dropout adds so many instructions an element, and no exchange between threads. In backward before
#: Hopper its decisions cross with the sums.
EXTRAS = [
    Extra(
        f"{activation} dropout {way}",
        f"{activation} {way}",
        kernel,
        {80: 17.0 if way == "backward" else 11.0, 90: 11.0, 100: 15.0},
        may_exchange=False,
    )
    for activation in ACTIVATIONS
    for way, kernel in (
        ("forward", "feed_forward_activate_kernel"),
        ("forward keeping", "feed_forward_activate_kernel"),
        ("backward", "feed_forward_hidden_gradient_kernel"),
    )
    if way != "forward keeping" or activation not in ("relu", "identity")
]
