"""The tests of this folder need processes that interpret: ``python -m tests`` starts them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.interpreted.attention_tiles_and_launches import (
    by_the_attention_kernels,
    launches,
    tiles,
)
from tests.ops.attention_inputs import larger_tiles

__all__ = ["by_the_attention_kernels", "larger_tiles", "launches", "tiles"]

FOLDER = Path(__file__).parent

collect_ignore_glob = ["test_*.py"] if find_spec("triton") is None else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.interpreted)
