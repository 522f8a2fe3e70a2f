"""Each test works on a copy of the source tree, and looks at what it made from a foreign folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import ROOT
from tests.packaging.building import NOT_SOURCE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A clean copy of the source tree, as a fresh clone has it."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder
