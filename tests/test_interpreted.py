"""Runs ``tests/interpreted``, the tests of Triton kernels on a CPU, in processes of their own.

Triton decides when a kernel is defined whether it is compiled or interpreted.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import helpers
import pytest

FOLDER = Path(__file__).parent / "interpreted"


def why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (
        tuple(int(number) for number in version(package).split(".")[:2])
        for package in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 needs NumPy older than 2.4"
    return None


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_interpreted_kernels() -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # the interpreter itself keeps to one core
        options += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        cwd=FOLDER.parents[1],
        env=helpers.environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    passed = re.search(r"^(\d+) passed", run.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 0, run.stdout
