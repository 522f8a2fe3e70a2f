"""What an encoder is pre-trained on: masked tokens, and the order of two segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MaskedTokens",
    "SentencePairs",
    "mask_tokens",
    "masked_language_model_loss",
    "sentence_order_loss",
    "sentence_order_pairs",
]


class MaskedTokens(NamedTuple):
    """Corrupted tokens and what there is to predict in them."""

    tokens: Tensor  # the shape and dtype of what was corrupted
    chosen: Tensor  # (predictions,) int64: places in the flattened tokens, ascending
    targets: Tensor  # (predictions,) int64: what stood there


class SentencePairs(NamedTuple):
    """Two segments a sequence, in the right or the swapped order."""

    tokens: Tensor  # (N, S) int64: cls, one segment, sep, the other, sep, padding
    key_padding_mask: Tensor  # (N, S) bool: True where there is no token
    labels: Tensor  # (N,) int64: 1 where the segments are swapped


def mask_tokens(
    tokens: Tensor,
    vocab_size: int,
    mask_id: int,
    *,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Choose tokens to predict and corrupt them, as BERT does (Devlin et al., 2019, section 3.1).

    Args:
        tokens: any shape, integer. It is not changed.
        vocab_size: number of tokens.
        mask_id: what stands for a hidden token.
        special_ids: tokens that are never chosen and never replace one, padding among them;
            ``mask_id`` is one too.
        probability: with which a token is chosen.
        masked, replaced: shares of the chosen that become ``mask_id``, and a random token; the
            rest stay.
        generator: of the decisions, on the device of ``tokens``; None: torch's own.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, not {tokens.dtype}")
    shares = {"probability": probability, "masked": masked, "replaced": replaced}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {share}")
    if masked + replaced > 1:
        raise ValueError(f"masked + replaced must be at most 1, not {masked + replaced}")
    specials = sorted({mask_id, *special_ids})
    for name, ids in (("mask_id", [mask_id]), ("special_ids", specials)):
        if not 0 <= ids[0] <= ids[-1] < vocab_size:
            raise ValueError(f"{name} must be below vocab_size {vocab_size}, not {ids}")
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[specials] = True
    ordinary = (~special).nonzero().squeeze(1)
    if len(ordinary) == 0:
        raise ValueError("special_ids leave no token of the vocabulary")

    options = {"generator": generator, "device": tokens.device}
    choice = torch.rand(tokens.shape, **options)
    action = torch.rand(tokens.shape, **options)
    substitute = torch.randint(len(ordinary), tokens.shape, **options)
    chosen = (choice < probability) & ~special.to(tokens.device)[tokens.long()]
    corrupted = torch.where(chosen & (action < masked), mask_id, tokens)
    swap = chosen & (action >= masked) & (action < masked + replaced)
    substitute = ordinary.to(tokens.device)[substitute].to(tokens.dtype)
    places = chosen.flatten().nonzero().squeeze(1)
    return MaskedTokens(
        torch.where(swap, substitute, corrupted), places, tokens.flatten()[places].long()
    )


def masked_language_model_loss(
    hidden: Tensor,
    masked: MaskedTokens,
    output: Callable[[Tensor], Tensor],
    *,
    reduction: str = "mean",
) -> Tensor:
    """-log P(token | corrupted tokens) in nats over the chosen places; only these get logits.

    Args:
        hidden: (*masked.tokens.shape, E) states of the corrupted tokens.
        masked: from :func:`mask_tokens`.
        output: makes (predictions, vocab_size) logits of (predictions, E) states.
        reduction: ``"mean"`` over the chosen places, or ``"sum"``.

    Returns:
        A scalar in fp32 or wider; zero, with a gradient of zero, where nothing was chosen.

    Raises:
        ValueError: ``hidden`` is of another shape, or ``reduction`` is something else.
    """
    if hidden.shape[:-1] != masked.tokens.shape:
        raise ValueError(
            f"hidden must be {tuple(masked.tokens.shape)} states, not {tuple(hidden.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')
    logits = output(hidden.reshape(-1, hidden.shape[-1])[masked.chosen])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, masked.targets, reduction="sum")
    return total / max(len(masked.targets), 1) if reduction == "mean" else total


def sentence_order_pairs(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    length: int | None = None,
    generator: torch.Generator | None = None,
) -> SentencePairs:
    """Segments that follow each other, in the right order or, as often, in the other one.

    From ALBERT (Lan et al., 2020, section 3.1).

    Args:
        first, second: N segments each, 1-D integer tensors on the CPU; second[i] follows first[i].
        cls_id, sep_id, pad_id: tokens at the start, after each segment, and in what is left.
        length: of every row; by default that of the longest.
        generator: of the decisions, on the CPU; None: torch's own.

    Raises:
        ValueError: there are not as many of one as of the other, or a pair is longer than
            ``length``.
    """
    if len(first) != len(second):
        raise ValueError(f"second has {len(second)} segments, and first {len(first)}")
    labels = torch.randint(2, (len(first),), generator=generator)
    cls, sep = torch.tensor([cls_id]), torch.tensor([sep_id])
    rows = []
    for one, other, swapped in zip(first, second, labels.tolist(), strict=True):
        left, right = (other, one) if swapped else (one, other)
        rows.append(torch.cat((cls, left.long(), sep, right.long(), sep)))
    longest = max((len(row) for row in rows), default=0)
    if length is not None and longest > length:
        raise ValueError(f"length is {length}, and a pair with its marks has {longest} tokens")
    tokens = torch.full((len(rows), longest if length is None else length), pad_id)
    padding = torch.ones(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        padding[i, : len(row)] = False
    return SentencePairs(tokens, padding, labels)


def sentence_order_loss(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], *, batch_first: bool = False
) -> Tensor:
    """Cross-entropy in nats of a binary classifier on the first token.

    Args:
        hidden: (S, N, E), with ``batch_first`` (N, S, E).
        labels: (N,) int64, 1 where the segments are swapped.
        head: makes (N, 2) logits of (N, E) states.

    Returns:
        The mean, a scalar in fp32 or wider.

    Raises:
        ValueError: ``hidden`` or ``labels`` has another shape.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[0 if batch_first else 1 :][:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}")
    logits = head(hidden[:, 0] if batch_first else hidden[0])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
