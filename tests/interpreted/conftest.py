"""Every kernel launched by a test of this folder is interpreted and checked: see ``sanitizer``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment")

from sanitizer import Sanitizer  # noqa: E402


@pytest.fixture(autouse=True)
def sanitizer() -> Iterator[Sanitizer]:
    with Sanitizer() as installed:
        yield installed
