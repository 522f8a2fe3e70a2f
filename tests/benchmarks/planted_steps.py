"""Steps of a GPU check that do what they are told, and a file of tests for no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu_check import Step

# Without the words by which gpu_check finds files with tests for a GPU: this is none.
PLANTED = """
import os
import signal

import pytest

mark = pytest.mark


@mark.gpu
def test_right():
    pass


@mark.gpu
def test_wrong():
    assert 1 + 1 == 3, "one and one"


@mark.gpu
@pytest.mark.skip(reason="not today")
def test_absent():
    pass


@mark.gpu
def test_last():
    if INTERRUPTED:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        os.kill(os.getpid(), signal.SIGINT)


def test_of_no_gpu():
    pass
"""


def python(code: str, name: str = "planted", share: float = 1) -> Step:
    return Step(name, [sys.executable, "-c", code], share)


def planted_tests(folder: Path, interrupted: bool = False) -> Path:
    path = folder / "test_planted.py"
    path.write_text(PLANTED.replace("INTERRUPTED", str(interrupted)))
    return path
