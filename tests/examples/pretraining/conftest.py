"""Runs of examples/pretrain.py on a little text, whole ones and ones that are cut short."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def run(english, tmp_path):
    """Runs the tiny configuration on English text; later options override earlier ones."""
    from tests.examples.pretraining.runs import TINY
    from tests.examples.programs import pretrain

    def run(*options, out="run", layer=None):
        where = ["--text", str(english), "--out", str(tmp_path / out)]
        return pretrain.main([*TINY, *where, *map(str, options)], layer)

    return run


@pytest.fixture
def cut_short(run, monkeypatch):
    """Runs until an exception in the step that follows ``steps`` others."""
    from tests.examples.pretraining.runs import Killed
    from tests.examples.programs import pretrain

    def cut_short(steps, *options, **where):
        step, left = pretrain.Trainer.step, iter(range(steps))

        def counted(trainer, batches):
            if next(left, None) is None:
                raise Killed
            return step(trainer, batches)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pretrain.Trainer, "step", counted)
            run("--checkpoint-every", 3, *options, **where)

    return cut_short


@pytest.fixture
def checkpoint(cut_short, tmp_path) -> Path:
    """Of a run with three steps behind it and nine to go."""
    cut_short(3)
    return tmp_path / "run" / "checkpoint.safetensors"
