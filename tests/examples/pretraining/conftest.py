"""Runs of examples/pretrain.py on a little text, whole ones and ones that are cut short."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def english(english) -> Path:
    """Its beginning: a short run would spend most of its time on the rest."""
    text = english.read_text(encoding="utf-8")[:40_000]
    (path := english.with_name("beginning.txt")).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def arguments(english, tmp_path):
    """Those of the tiny configuration on English text; later options override earlier ones."""
    from tests.examples.pretraining.runs import TINY

    def arguments(*options, out="run"):
        where = ["--text", str(english), "--out", str(tmp_path / out)]
        return [*TINY, *where, *map(str, options)]

    return arguments


@pytest.fixture
def run(arguments, monkeypatch):
    """Runs the program, without the plot: that takes longest of so short a run."""
    from tests.examples.programs import pretrain

    monkeypatch.setattr(pretrain, "write_plot", lambda *inputs, **options: None)

    def run(*options, out="run", layer=None):
        return pretrain.main(arguments(*options, out=out), layer)

    return run


@pytest.fixture
def cut_short(arguments):
    from tests.examples.pretraining.runs import run_until_killed

    def cut_short(steps, *options, out="run"):
        run_until_killed(steps, arguments(*options, out=out))

    return cut_short


@pytest.fixture
def checkpoint(cut_short, tmp_path) -> Path:
    """Of a run with three steps behind it and nine to go."""
    cut_short(3)
    return tmp_path / "run" / "checkpoint.safetensors"
