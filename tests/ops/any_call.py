"""Calls that drop: hypothesis draws from all that the contract allows (docs/dropout.md).

One version of hypothesis draws the same few each time; ``HYPOTHESIS_PROFILE=long`` draws hundreds
of others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

settings.register_profile(
    "tests",
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "long", settings.get_profile("tests"), max_examples=500, derandomize=False, print_blob=True
)
#: By name, since torch.testing loads a profile of its own wherever it is imported.
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

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


def drawn(**strategies: Any) -> Callable[[Any], Any]:
    """A check is given arguments from these, by the profile."""
    return lambda check: PROFILE(given(**strategies)(check))


def with_edges(**others: Any) -> Callable[[Any], Any]:
    """A check is given each of ``EDGES`` too, with these values of its other arguments."""

    def decorate(check: Any) -> Any:
        for seed, site, p in reversed(EDGES):
            check = example(seed=seed, site=site, p=p, **others)(check)
        return check

    return decorate
