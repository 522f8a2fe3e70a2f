"""Calls that drop: hypothesis draws from all that the contract allows (docs/dropout.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import example
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**63 - 1)
SITES = st.integers(0, 2**16 - 1)
PROBABILITIES = st.integers(1, 2**14).map(lambda n: n / 2**14)
LENGTH = st.integers(1, 24)
TOKENS = st.tuples(st.integers(1, 6), st.integers(1, 6))
#: Seed, site and probability at the ends of their ranges, and at the edges of 32-bit words.
EDGES = (
    (0, 0, 1 / 2**14),
    (0, 2**16 - 1, 1.0),
    (1, 2**16 - 1, 0.5),
    (2**31, 0, 0.1),
    (2**32 - 1, 2**16 - 1, 1 - 1 / 2**14),
    (2**63 - 1, 0, 0.1),
    (2**63 - 1, 2**16 - 1, 1 / 2**14),
)


def with_edges(**others: Any) -> Callable[[Any], Any]:
    """A check is given each of ``EDGES`` too, with these values of its other arguments."""

    def decorate(check: Any) -> Any:
        for seed, site, p in reversed(EDGES):
            check = example(seed=seed, site=site, p=p, **others)(check)
        return check

    return decorate
