"""attention: both directions, by head dimension, type and mask; the whole backward pass in one."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import AttentionArguments
from fastattn.kernels.attention import attention_backward, attention_forward
from fastattn.ops.attention import _results
from tests.kernels.compiled.variants import Extra, Kernel, Region, Variant

BATCH, HEADS = 4, 16
bf16, fp32 = torch.bfloat16, torch.float32


def elements(region: Region) -> float:
    """Scores of a thread in one pass through a loop, which handles one tile."""
    tile = region.constexprs["TILE"]
    return tile.BLOCK_M * tile.BLOCK_N / region.threads


KERNEL = Kernel(elements, loop=True, tensor_cores=True)


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def variants(
    name: str,
    head_dim: int = 64,
    dtype: torch.dtype = bf16,
    length: int = 512,
    dropout_p: float = 0.1,
    lengths: int | None = None,
    **masks: Any,
) -> list[Variant]:
    """Forward and backward of one kind of call, on a packed projection as the layer makes it.

    lengths: so many sequences, packed without padding.
    """
    shape = (BATCH, length) if lengths is None else (BATCH * length,)
    qkv = empty(*shape, 3, HEADS, head_dim, dtype=dtype)
    query, key, value = qkv.unbind(-3)
    d_qkv = torch.empty_like(qkv)
    cu_seqlens = None if lengths is None else empty(lengths + 1, dtype=torch.int32)
    arguments = AttentionArguments(
        scale=head_dim**-0.5,
        dropout_p=dropout_p,
        seed=empty(1, dtype=torch.int64),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=length,
        max_seqlen_k=length,
        backend="triton",
        **masks,
    )
    out, statistics = _results(query, *arguments)
    added = [
        mask is not None and mask.is_floating_point()
        for mask in (arguments.key_padding_mask, arguments.attn_mask)
    ]

    def forward() -> None:
        attention_forward(query, key, value, arguments, out, statistics)

    def backward() -> None:
        gradients = d_qkv.unbind(-3)
        wanted = (all(added), added[1])
        attention_backward(out, query, key, value, out, statistics, arguments, wanted, gradients)

    backward_kernels = ["attention_query_gradient_kernel", "attention_key_gradient_kernel"]
    backward_kernels += ["attention_mask_gradient_kernel"] if added[1] else []
    return [
        Variant(f"{name} forward", forward, {"attention_forward_kernel": KERNEL}),
        Variant(f"{name} backward", backward, dict.fromkeys(backward_kernels, KERNEL)),
    ]


bool_keys = empty(BATCH, 512, dtype=torch.bool)
float_keys = empty(BATCH, 512, dtype=fp32)

VARIANTS = [
    *variants("64", dropout_p=0.0),
    *variants("64 dropout"),
    *variants("64 dropout, bool keys", key_padding_mask=bool_keys),
    *variants("64 dropout, float keys", key_padding_mask=float_keys),
    *variants("64 dropout, packed", lengths=BATCH),
    *variants("64 dropout, causal", is_causal=True),
    *variants("64 dropout, bias", attn_mask=empty(1, HEADS, 512, 512)),
    *variants(
        "64 dropout, bias and float keys",
        attn_mask=empty(1, 1, 512, 512, dtype=fp32),
        key_padding_mask=float_keys,
    ),
    *variants("64 dropout, fp32", dtype=fp32, key_padding_mask=bool_keys),
    *variants("128 dropout, fp32", head_dim=128, dtype=fp32, key_padding_mask=bool_keys),
    *variants("128 dropout, bool keys", head_dim=128, key_padding_mask=bool_keys),
    *variants("256 dropout, bool keys", head_dim=256, key_padding_mask=bool_keys),
    *variants("40 dropout, bool keys", head_dim=40, key_padding_mask=bool_keys),
    *variants("80 dropout, bool keys", head_dim=80, key_padding_mask=bool_keys),
    *(
        variant
        for length in (128, 256)
        for variant in variants(
            f"{length} keys, dropout, bool keys",
            length=length,
            key_padding_mask=empty(BATCH, length, dtype=torch.bool),
        )
    ),
    *variants(
        "128 keys, dropout, float keys",
        length=128,
        key_padding_mask=empty(BATCH, 128, dtype=fp32),
    ),
]

#: Every entry of the tables of tiles but those for gradients of masks, whose products take nothing
#: from a mask; under every boolean mask and with dropout: operands are laid out by what is loaded
#: for them, and a byte is the narrowest. fp16 is bf16 there. A head dimension that is padded takes
#: the tiles of masks of pairs.
LENGTHS = {64: (512, 64, 128, 256), 128: (512, 64, 128), 256: (512,), 40: (512,)}
LAYOUTS = [
    variant
    for dtype in (bf16, fp32)
    for head_dim, lengths in LENGTHS.items()
    for length in (lengths if dtype == bf16 else lengths[:1])
    for name, kinds in {"keys": "K", "pairs": "P", "keys and pairs": "KP"}.items()
    if head_dim != 40 or (name == "keys" and dtype == bf16)
    for variant in variants(
        f"{head_dim} {dtype}, {length} keys, bool {name}",
        head_dim=head_dim,
        dtype=dtype,
        length=length,
        key_padding_mask=empty(BATCH, length, dtype=torch.bool) if "K" in kinds else None,
        attn_mask=empty(BATCH, 1, length, length, dtype=torch.bool) if "P" in kinds else None,
    )
]

#: What dropout may add: an integer pipe has about four instructions a score to spare beside the
#: tensor cores at head dimension 64, and a transposed tile uses half of the words it makes.
EXTRAS = [
    Extra("64 dropout forward", "64 forward", "attention_forward_kernel", {90: 5.0}),
    Extra("64 dropout backward", "64 backward", "attention_key_gradient_kernel", {90: 11.0}),
]
