"""What callers of torch's encoder layer pass as masks, turned into what the attention ops take.

The shapes, meanings, errors and warnings are those of ``torch.nn.TransformerEncoderLayer`` and
``torch.nn.functional.multi_head_attention_forward`` (torch 2.13). Nothing here synchronises with
the device and nothing is expanded to (batch, heads, length, length).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor
from torch import bool as torch_bool


class Masks(NamedTuple):
    """Masks of one self-attention call; True or -inf means *do not attend*."""

    key_padding_mask: Tensor | None = None  # (B, S) bool, or float and added to the scores
    attn_mask: Tensor | None = None  # (B|1, H|1, S, S) bool, or float and added to the scores
    is_causal: bool = False  # key n only for queries m >= n, on top of the masks


def canonical(
    src_mask: Tensor | None,
    src_key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    batch: int,
    heads: int,
    length: int,
    batched: bool,
) -> Masks:
    """Check an encoder layer's mask arguments and bring them to the shapes of :class:`Masks`.

    Args:
        src_mask: (S, S) or (B * heads, S, S), bool or float.
        src_key_padding_mask: (B, S), or (S,) for unbatched input, bool or float.
        is_causal: torch's hint. It needs a mask; with a mask alone true causal attention replaces
            the mask, with a padding mask as well the hint is dropped and the mask is used.
        batch, heads, length: B, the number of heads and S.
        batched: whether the caller's input had a batch dimension.

    Raises:
        AssertionError, RuntimeError: as torch does, in torch's words.
    """
    if src_mask is None and src_key_padding_mask is None and not is_causal:
        return Masks()
    _check_type(src_key_padding_mask, "src_key_padding_mask")
    _check_type(src_mask, "src_mask")
    if (
        src_mask is not None
        and src_key_padding_mask is not None
        and src_mask.dtype != src_key_padding_mask.dtype
    ):
        warnings.warn(
            "Support for mismatched src_key_padding_mask and src_mask is deprecated. "
            "Use same type for both instead.",
            stacklevel=3,
        )
    _check_dims(src_key_padding_mask, src_mask, heads, length, batched)
    if is_causal and src_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module "
            "method `generate_square_subsequent_mask` to create this mask."
        )
    if src_key_padding_mask is None and is_causal:
        return Masks(is_causal=True)
    attn_mask = None if src_mask is None else _four_dimensional(src_mask, batch, heads, length)
    if src_key_padding_mask is None:
        return Masks(attn_mask=attn_mask)
    return Masks(_padding(src_key_padding_mask, batch, length, batched), attn_mask)


def _check_type(mask: Tensor | None, name: str) -> None:
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, not {type(mask).__name__}")
    if mask is not None and mask.dtype != torch_bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")


def _check_dims(
    padding: Tensor | None, mask: Tensor | None, heads: int, length: int, batched: bool
) -> None:
    kind, padding_dim = ("batched (3-D)", 2) if batched else ("unbatched (2-D)", 1)
    if padding is not None and padding.dim() != padding_dim:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {padding_dim}-D"
            f" but found {padding.dim()}-D tensor instead"
        )
    if mask is None:
        return
    if mask.dim() not in (2, 3):
        raise AssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
            f" but found {mask.dim()}-D tensor instead"
        )
    if not batched and mask.dim() == 3 and mask.shape != (heads, length, length):
        raise AssertionError(
            f"Expected `attn_mask` shape to be {(heads, length, length)} but got {mask.shape}"
        )


def _four_dimensional(mask: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """(S, S) or (B * heads, S, S) as (1, 1, S, S) or (B, heads, S, S)."""
    if mask.dim() == 2:
        if mask.shape != (length, length):
            raise RuntimeError(
                f"The shape of the 2D attn_mask is {mask.shape}, but should be {(length, length)}."
            )
        return mask[None, None]
    expected = (batch * heads, length, length)
    if mask.shape != expected:
        raise RuntimeError(
            f"The shape of the 3D attn_mask is {mask.shape}, but should be {expected}."
        )
    return mask.view(batch, heads, length, length)


def _padding(mask: Tensor, batch: int, length: int, batched: bool) -> Tensor:
    mask = mask if batched else mask[None]
    for axis, expected in enumerate((batch, length)):
        if mask.shape[axis] != expected:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{axis}] to be {expected}, "
                f"but got {mask.shape[axis]}"
            )
    return mask
