"""A little text, as the programs under examples/ read it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(sorted(topics.values())[:30]), encoding="utf-8")
    return path
