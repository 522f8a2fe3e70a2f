"""The dropout contract: which elements drop, as a pure function of (seed, site, row, column).

Every backend reproduces these decisions bit for bit, so a run on one device can be replayed on
another and no kernel stores a mask. This file is the definition, in readable int64 PyTorch;
``docs/dropout.md`` states it in words. The random numbers are Philox4x32 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) with seven rounds, the fewest that pass BigCrush
there.

One Philox call yields four 32-bit words, cut into eight 14-bit *lanes*, and each lane decides one
element: kept if and only if ``lane >= round(p * 16384)``. Lane ``w`` is the low 14 bits of half
``w % 2`` of word ``w // 2``. Which eight elements share a call (the *grouping*) depends on the kind
of site, and is chosen so that one GPU thread owns all eight:

=============  ==========================================  ==============================
site kind      counter words 0, 1                          lane
=============  ==========================================  ==============================
attention      (m // 16) * 8 + m % 8,                      4 * (m // 8 % 2)
               (n // 16) * 4 + n % 8 // 2                  + 2 * (n // 8 % 2) + n % 2
activation     position, (n // 64) * 8 + n % 8             n % 64 // 8
residual       position, n // 8                            n % 8
=============  ==========================================  ==============================

with m the query position, n the key position or the feature column. Counter word 2 is the index of
the sequence in the batch, word 3 is ``site * HEADS + head`` (head 0 where there are none), and the
key is the 64-bit seed, low word first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, tracing

#: Version 0 may still change its groupings; it is frozen once they have been timed on a GPU.
CONTRACT_VERSION = 0

LANE_BITS = 14
RESOLUTION = 1 << LANE_BITS  # p is resolved to 1/16384
PHILOX_ROUNDS = 7

#: The four kinds of site in an encoder layer, in the order in which it reaches them.
ATTENTION, ACTIVATION, RESIDUAL_1, RESIDUAL_2 = range(4)
SITES_PER_LAYER = 4

#: The groupings of a token site: which eight elements share a Philox call. The hidden features of
#: a feed-forward block are strided, the features of a residual branch adjacent.
STRIDED, ADJACENT = 0, 1

#: Numbers of heads, and of sites: they share counter word 3.
HEADS = 1 << 16

_WORD = 0xFFFFFFFF
_LANE = RESOLUTION - 1


def site_of(layer_index: int, kind: int) -> int:
    """The number of a dropout site: ``4 * layer_index + kind``, unique within a stack."""
    return SITES_PER_LAYER * layer_index + kind


def threshold(dropout_p: float) -> int:
    """Lanes below this number drop: ``round(p * 16384)``. 0 drops nothing, 16384 everything."""
    return round(dropout_p * RESOLUTION)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (the realised keep probability), 0 at p = 1.

    The realised probability is ``1 - threshold(p) / 16384``, so dropout is unbiased at every p.
    """
    kept = RESOLUTION - threshold(dropout_p)
    return RESOLUTION / kept if kept else 0.0


class TokenRows(NamedTuple):
    """How a row of a token tensor (rows, columns) maps to a (position, sequence) pair.

    Row ``r`` is *logical row* ``row_index[r]`` where an index is given (packed tokens), else ``r``.
    A logical row of a batch-first tensor is ``sequence * period + position`` with ``period`` the
    padded sequence length; of a sequence-first tensor ``position * period + sequence`` with
    ``period`` the batch size. Packing a batch or transposing it therefore changes no decision.
    """

    row_index: Tensor | None = None  # (rows,) int32
    period: int = 1
    batch_first: bool = True

    def coordinates(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(position, sequence) of every row, each (rows,) int64."""
        if self.row_index is None:
            logical = torch.arange(rows, device=device)
        else:
            logical = self.row_index.to(torch.int64)
        outer = torch.div(logical, max(self.period, 1), rounding_mode="floor")
        inner = logical - outer * max(self.period, 1)
        return (inner, outer) if self.batch_first else (outer, inner)


# ---------------------------------------------------------------------------------------- Philox


def _mul_hi_lo(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * multiplier, without leaving int64."""
    low_half = (word & 0xFFFF) * multiplier
    high = ((word >> 16) * multiplier + (low_half >> 16)) >> 16
    return high & _WORD, (word * multiplier) & _WORD


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 of broadcastable int64 counters under a 64-bit seed: four words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _mul_hi_lo(c0, 0xD2511F53)
        high2, low2 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _decide(
    seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], dropout_p: float
) -> Tensor:
    """(8, *groups) bool: whether each of the eight lanes of every counter is kept."""
    words = torch.broadcast_tensors(*philox(seed.reshape(()), counter))
    least = threshold(dropout_p)
    lanes = [half >= least for word in words for half in (word & _LANE, (word >> 16) & _LANE)]
    return torch.stack(lanes)


# ------------------------------------------------------------------------------- kinds of site


def attention_decisions(
    seed: Tensor,
    site: int,
    dropout_p: float,
    shape: tuple[int, int, int, int],
    head_offset: int = 0,
) -> Tensor:
    """Which attention probabilities are kept.

    Args:
        seed: (1,) or () int64, the 64-bit key.
        site: number of the dropout site.
        dropout_p: probability of dropping, resolved to 1/16384.
        shape: (batch, heads, query length, key length).
        head_offset: global number of the first head (tensor parallelism).

    Returns:
        bool of ``shape``, True where kept.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    blocks_q, blocks_k = -(-seqlen_q // 16), -(-seqlen_k // 16)
    device = seed.device
    row_group = torch.arange(blocks_q * 8, device=device)[:, None]
    column_group = torch.arange(blocks_k * 4, device=device)
    sequence = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None] + head_offset
    kept = _decide(seed, (row_group, column_group, sequence, site * HEADS + head), dropout_p)
    # in a call [m // 8 % 2, n // 8 % 2, n % 2]; calls [B, H, m // 16, m % 8, n // 16, n % 8 // 2]
    kept = kept.reshape(2, 2, 2, batch, heads, blocks_q, 8, blocks_k, 4)
    kept = kept.permute(3, 4, 5, 0, 6, 7, 1, 8, 2)
    kept = kept.reshape(batch, heads, blocks_q * 16, blocks_k * 16)
    return kept[:, :, :seqlen_q, :seqlen_k]


def activation_decisions(
    seed: Tensor,
    site: int,
    dropout_p: float,
    shape: tuple[int, int],
    rows: TokenRows,
    column_offset: int = 0,
) -> Tensor:
    """Which hidden features of a feed-forward block are kept (column-strided grouping).

    Args:
        seed: (1,) or () int64, the 64-bit key.
        site: number of the dropout site.
        dropout_p: probability of dropping, resolved to 1/16384.
        shape: (rows, columns).
        rows: what position and sequence each row has.
        column_offset: global number of the first column (a sharded hidden dimension).

    Returns:
        bool of ``shape``, True where kept.
    """
    position, sequence = rows.coordinates(shape[0], seed.device)
    first, last = column_offset // 64, -(-(column_offset + shape[1]) // 64)
    column_group = torch.arange(first * 8, last * 8, device=seed.device)
    kept = _decide_tokens(seed, site, dropout_p, position, sequence, column_group)
    kept = kept.reshape(8, shape[0], last - first, 8).permute(1, 2, 0, 3)
    return _columns(kept, shape, column_offset - first * 64)


def residual_decisions(
    seed: Tensor,
    site: int,
    dropout_p: float,
    shape: tuple[int, int],
    rows: TokenRows,
    column_offset: int = 0,
) -> Tensor:
    """Which features of a residual branch are kept (eight adjacent columns share a call).

    Arguments and result as for :func:`activation_decisions`.
    """
    position, sequence = rows.coordinates(shape[0], seed.device)
    first, last = column_offset // 8, -(-(column_offset + shape[1]) // 8)
    column_group = torch.arange(first, last, device=seed.device)
    kept = _decide_tokens(seed, site, dropout_p, position, sequence, column_group)
    return _columns(kept.permute(1, 2, 0), shape, column_offset - first * 8)


def _decide_tokens(
    seed: Tensor,
    site: int,
    dropout_p: float,
    position: Tensor,
    sequence: Tensor,
    column_group: Tensor,
) -> Tensor:
    """(8, rows, column groups) bool"""
    site_word = torch.full((), site * HEADS, device=seed.device)
    counter = (position[:, None], column_group, sequence[:, None], site_word)
    return _decide(seed, counter, dropout_p)


def _columns(kept: Tensor, shape: tuple[int, int], skip: int) -> Tensor:
    rows, columns = shape
    return kept.reshape(rows, kept.shape[1:].numel())[:, skip : skip + columns]


# ------------------------------------------------------------------------------- seeds and sites


def check_site(site: int) -> None:
    """Raise unless ``site`` is an integer that fits its half of a counter word."""
    if not isinstance(site, int):
        raise TypeError(f"site must be an integer, not {type(site).__name__}")
    if not 0 <= site < HEADS:
        raise ValueError(f"site must be between 0 and {HEADS - 1}, but got {site}")


def check_seed(seed: Tensor) -> Tensor:
    """Raise unless ``seed`` is one int64 in a tensor (a graph would freeze a Python integer)."""
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"seed must be a torch.int64 tensor of one element, not {type(seed).__name__}"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            "seed must be a torch.int64 tensor of one element, "
            f"but got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    return seed


def draw_seed(device: torch.device | str) -> Tensor:
    """One seed on ``device`` from torch's own generator: (1,) int64.

    It follows ``torch.manual_seed``, activation checkpointing and CUDA graphs, and stays on the
    device. Seeds in [0, 2**63) name decisions of the contract. On a CPU without the C++ extension
    the drawn seed is negative instead: its decisions come from torch's Mersenne Twister (in
    :mod:`fastattn.pytorch.dropout_factor`), an order of magnitude faster there than Philox in
    tensor operations; but not what ``torch.jit.trace`` records, which always follows the contract.
    """
    device = torch.device(device)
    seed = torch.randint(2**63 - 1, (1,), device=device)
    if device.type == "cpu" and not tracing.traced():
        if dispatch.why_not("dropout_factor", "cpu", device) is not None:
            return -1 - seed
    return seed


def replays_twister(seed: Tensor) -> bool:
    """Whether decisions are those of torch's generator: of negative seeds, on CPUs only."""
    return seed.device.type == "cpu" and int(seed) < 0
