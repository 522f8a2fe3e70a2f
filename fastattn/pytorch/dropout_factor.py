"""The multiplier that dropout applies, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.arguments import AttentionDropout, TokenDropout
from fastattn.dropout import RESOLUTION, replays_twister, threshold


def attention_factor(dropout: AttentionDropout, shape: list[int], dtype: torch.dtype) -> Tensor:
    """What attention probabilities of ``shape`` are multiplied by, in ``dtype``."""
    replays = replays_twister(dropout.seed)
    decisions = _replayed(dropout, shape) if replays else dropout.decisions(shape)
    return _scaled(decisions, dropout.scale, dtype)


def token_factor(
    dropout: TokenDropout, grouping: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """What a token tensor (rows, columns) is multiplied by, in ``dtype``."""
    if replays_twister(dropout.seed):
        decisions = _replayed(dropout, (rows, columns))
    else:
        decisions = dropout.decisions(grouping, rows, columns)
    return _scaled(decisions, dropout.scale, dtype)


def _replayed(dropout: AttentionDropout | TokenDropout, shape: Sequence[int]) -> Tensor:
    return twister_decisions(int(dropout.seed), dropout.site, dropout.dropout_p, tuple(shape))


def twister_decisions(seed: int, site: int, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Decisions of a negative seed: 14-bit lanes in memory order from ``torch.Generator``.

    The same seed, site and shape give the same decisions, so that backward and activation
    checkpointing can replay them; unlike the contract's they depend on the tensor's layout.
    """
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(_mix(seed, site))
    lanes = torch.empty(-(-count // 4), dtype=torch.int64).random_(generator=generator)
    lanes = lanes.view(torch.int16)[:count].bitwise_and_(RESOLUTION - 1)
    return lanes.ge(threshold(dropout_p)).view(shape)


def _mix(seed: int, site: int) -> int:
    """32 well-mixed bits (the twister takes no more): the finaliser of SplitMix64."""
    word = (seed + (site + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return (word ^ (word >> 31)) % 2**32


def _scaled(decisions: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    factor = decisions.view(torch.int8).to(dtype, memory_format=torch.contiguous_format)
    return factor.mul_(scale)
