"""Short runs of examples/pretrain.py, in this process or in others, and what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.examples.programs import pretrain, training

TINY = (
    "--steps 12 --batch-size 8 --seq-len 24 --d-model 32 --heads 4 --layers 2 --d-ff 64 "
    "--vocabulary 500 --warm-up 4 --eval-every 4 --eval-sequences 16 --order-pairs 16 --device cpu"
).split()


def losses(log) -> list[float]:
    """All that a run has measured but its speed, which is never twice the same."""
    columns = [column for column in log.columns if column != "tokens_per_second"]
    return [row[column] for row in log.rows for column in columns if column in row]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, moments, random numbers and losses are the same, bit for bit."""
    (one, facts), (other, others) = (
        training.read_checkpoint(folder / "checkpoint.safetensors", "--resume")
        for folder in (first, second)
    )
    assert facts == others
    assert one.keys() == other.keys()
    speed = training.Log.from_tensor(pretrain.COLUMNS, one["log"]).columns.index(
        "tokens_per_second"
    )
    for tensors in (one, other):
        tensors["log"] = tensors["log"].nan_to_num(-1)
        tensors["log"][:, speed] = 0
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Killed(Exception):
    """In place of a signal that ends the process."""


def run_until_killed(steps: int, arguments: list[str]) -> None:
    """Run the program until an exception in the step that follows ``steps`` others."""
    step, left = pretrain.Trainer.step, iter(range(steps))

    def counted(trainer, batches):
        if next(left, None) is None:
            raise Killed
        return step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain.Trainer, "step", counted)
        pretrain.main([*arguments, "--checkpoint-every", "3"])
