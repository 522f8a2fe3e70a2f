"""Runs of examples/finetune.py on sixty texts, from a short pre-training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.finetuning.runs import PRETRAINING, TUNING, in_order, write_csv


@pytest.fixture(scope="module")
def pretrained(english, tmp_path_factory) -> Path:
    from tests.examples.programs import pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    options = ["--text", str(english), "--dropout", "0", "--out", str(folder / "run")]
    pretrain.main([*PRETRAINING, *options])
    return folder / "run"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_csv(tmp_path / "data.csv", in_order(60))


@pytest.fixture
def run(pretrained, data, tmp_path):
    from tests.examples.programs import finetune

    def run(*options, out="tuned"):
        where = ["--pretrained", pretrained, "--data", data, "--out", tmp_path / out]
        return finetune.main([str(option) for option in (*TUNING, *where, *options)])

    return run


@pytest.fixture
def trainer(pretrained, data):
    from tests.examples.programs import finetune

    def make(*options):
        parsed = finetune.command_line().parse_args([*TUNING, *map(str, options)])
        task = finetune.file_task(data)
        return finetune.Trainer(parsed, task, finetune.read_pretrained(pretrained))

    return make
