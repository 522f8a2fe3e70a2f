"""Reads what attention drops out of its results, decision by decision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import attention
from tests import reference
from tests.ops.attention_inputs import SEED, SITE, seed_tensor
from tests.ops.backends import Backend


class Tokens(NamedTuple):
    """Queries or keys: where each row of a flat list of them is."""

    sequence: Tensor
    position: Tensor
    shape: tuple[int, ...]  # (B, S), or (T,) packed

    @property
    def longest(self) -> int:
        return int(self.position.max()) + 1

    def tensor(self, rows: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(*shape, heads, D), the same for every head, from rows (tokens, D)."""
        rows = rows.to(dtype)[:, None].expand(-1, heads, -1)
        return rows.reshape(*self.shape, heads, -1).requires_grad_()

    def one_hot(self, first: int, step: int, dim: int) -> Tensor:
        """(tokens, dim): feature j is one at position ``first + step * j``."""
        return self.position[:, None] == first + step * torch.arange(dim)


def padded_tokens(batch: int, length: int) -> Tokens:
    position, sequence = reference.coordinates((batch, length))
    return Tokens(sequence, position, (batch, length))


def packed_tokens(lengths: list[int]) -> Tokens:
    position = torch.cat([torch.arange(length) for length in lengths])
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Tokens(sequence, position, (sum(lengths),))


class Reader(NamedTuple):
    """Reads what is dropped: (B, heads, Sq, Sk) bool, True where it is kept.

    Query, key and value are one-hot or zero, so that scores are equal (or nearly: the scale is
    small) and each number depends on one decision. A head dimension shows that many positions.
    """

    queries: Tokens
    keys: Tokens
    heads: int
    dim: int
    attend: Callable[..., Tensor]  # of query, key and value
    dtype: torch.dtype = torch.float32
    attn_mask: Tensor | None = None  # zeros, (B, heads, Sq, Sk): read its gradient too

    def nothing(self) -> Tensor:
        batch = int(self.queries.sequence.max()) + 1
        longest = self.queries.longest, self.keys.longest
        return torch.zeros(batch, self.heads, *longest, dtype=torch.bool)

    def forward(self) -> Tensor:
        """The output is the probabilities of the keys whose value is a unit vector."""
        found = self.nothing()
        step = math.ceil(self.keys.longest / self.dim)
        query, key = (
            x.tensor(torch.zeros(len(x.position), self.dim), self.heads, self.dtype)
            for x in (self.queries, self.keys)
        )
        for first in range(step):
            hot = self.keys.one_hot(first, step, self.dim)
            value = self.keys.tensor(hot, self.heads, self.dtype)
            out = self.attend(query=query, key=key, value=value)
            kept = out.reshape(-1, self.heads, self.dim) != 0
            columns = range(first, self.keys.longest, step)
            m, n = self.queries.position, slice(first, None, step)
            found[self.queries.sequence, :, m, n] = kept[..., : len(columns)]
        return found

    def gradients(self) -> dict[str, Tensor]:
        """From each gradient.

        dV is Z^T dO, with dO one-hot. For the others dO V^T is one for every second key (or every
        step-th), and zero for the rest. So delta, the mean of M over all keys, M the multiplier, is
        less than the M of a kept key, and for these keys dS = P (M - delta) is positive where kept,
        else not. dQ and dK show it for one-hot keys and queries. A sequence must have two keys or
        more.
        """
        names = ["query", "key", "value", "attn_mask"][: 3 if self.attn_mask is None else 4]
        found = {name: self.nothing() for name in names}
        step = max(2, math.ceil(self.keys.longest / self.dim))
        for first_query in range(0, self.queries.longest, self.dim):
            for first_key in range(min(step, self.keys.longest)):
                self._read(found, first_query, first_key, step)
        return found

    def _read(self, found: dict[str, Tensor], first_query: int, first_key: int, step: int) -> None:
        queries, keys, heads, dim = self.queries, self.keys, self.heads, self.dim
        hot = queries.one_hot(first_query, 1, dim)
        query = queries.tensor(hot, heads, self.dtype)
        key = keys.tensor(keys.one_hot(first_key, step, dim), heads, self.dtype)
        some = keys.position % step == first_key
        value = keys.tensor(some[:, None].expand(-1, dim), heads, self.dtype)
        leaves = [query, key, value, self.attn_mask][: len(found)]
        out = self.attend(query=query, key=key, value=value)
        gradients = torch.autograd.grad(out, leaves, query.detach().view_as(out))
        dq, dk, dv = (x.reshape(-1, heads, dim) for x in gradients[:3])
        read = hot.any(1)
        m, n = slice(first_query, first_query + dim), slice(first_key, None, step)
        rows, columns = len(range(queries.longest)[m]), len(range(keys.longest)[n])
        kept = dq[read, :, :columns] > 0
        found["query"][queries.sequence[read], :, queries.position[read], n] = kept
        kept = dk[some, :, :rows] > 0
        found["key"][keys.sequence[some], :, m, keys.position[some]] = kept
        kept = dv[..., :rows] != 0
        found["value"][keys.sequence, :, m, keys.position] = kept
        for dmask in gradients[3:]:
            found["attn_mask"][..., m, n] = dmask[..., m, n] > 0

    def assert_decisions(self, expected: Tensor) -> None:
        assert torch.equal(self.forward(), expected), "forward"
        for name, found in self.gradients().items():
            assert torch.equal(found, expected), f"gradient of {name}"


def assert_decisions(
    backend: Backend,
    shape: tuple[int, int, int, int],
    dropout_p: float = 0.4,
    *,
    seed: int = SEED,
    site: int = SITE,
    head_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    with_mask: bool = False,
) -> None:
    """Of (B, H, Sq, Sk) the backend keeps what the contract keeps; ``with_mask``: a float one."""
    batch, heads, seqlen_q, seqlen_k = shape
    mask = torch.zeros(shape, dtype=dtype, requires_grad=True) if with_mask else None
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed_tensor(seed), "site": site}
    options |= {"head_offset": head_offset, "scale": 1 / 16}
    attend = partial(backend.of(attention, **options), attn_mask=mask)
    tokens = padded_tokens(batch, seqlen_q), padded_tokens(batch, seqlen_k)
    expected = reference.attention_keep(seed, site, dropout_p, shape, head_offset)
    Reader(*tokens, heads, head_dim, attend, dtype, mask).assert_decisions(expected)
