"""A run of examples/pretrain.py goes on bit for bit, or says what keeps it from that."""

import signal

import pytest
import torch

from tests import ROOT
from tests.examples.pretraining.runs import (
    assert_same_run,
    losses,
)
from tests.examples.programs import pretrain, python, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resumed_run_remembers_the_best_loss(run, cut_short, tmp_path, monkeypatch):
    evaluate = pretrain.evaluate
    losses_to_come = iter([3.0, 1.0])  # before the first step and after four; 9 from then on

    def pretend(trainer, wanted):
        return evaluate(trainer, wanted)._replace(loss=next(losses_to_come, 9.0), order_loss=0.0)

    monkeypatch.setattr(pretrain, "evaluate", pretend)
    cut_short(7)
    run("--resume")
    _, facts = training.read_checkpoint(tmp_path / "run" / "best.safetensors", "--resume")
    assert facts["step"] == 4 and facts["loss"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        "--layer stock",
        "--layer fused --accumulate 2 --checkpoint-layers",
        "--amp bf16",
        "--amp fp16",
    ],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(run, cut_short, tmp_path, options):
    options = options.split()
    whole = run(*options, out="whole")
    cut_short(8, *options)
    torch.rand(3)  # the random state of the process is no part of a run
    resumed = run(*options, "--resume")
    assert losses(resumed.log) == losses(whole.log)
    assert resumed.final == whole.final
    assert_same_run(tmp_path / "whole", tmp_path / "run")


KILLED = """
import os, signal, sys
import pretrain
step, left = pretrain.Trainer.step, iter(range(5))
def counted(trainer, batches):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, batches)
pretrain.Trainer.step = counted
pretrain.main(sys.argv[1:])
"""


def test_killed_run_goes_on_bit_for_bit(run, arguments, tmp_path):
    options = ("--checkpoint-every", 3)
    killed = python("-c", KILLED, *arguments(*options))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tensors, _ = training.read_checkpoint(tmp_path / "run" / "checkpoint.safetensors", "--resume")
    assert len(tensors["log"]) - 1 == 3
    resumed = python(ROOT / "examples" / "pretrain.py", *arguments(*options, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    run(*options, out="whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_fp16_keeps_its_scale_over_a_resume(run, cut_short, tmp_path):
    cut_short(4, "--amp", "fp16")
    _, facts = training.read_checkpoint(tmp_path / "run" / "checkpoint.safetensors", "--resume")
    assert facts["scaler"]["scale"] > 1 and facts["scaler"]["_growth_tracker"] == 3


def test_stock_checkpoint_goes_on_with_fused_layers(run, cut_short):
    stock = run("--layer", "stock", "--dropout", 0, out="whole").log
    cut_short(6, "--layer", "stock", "--dropout", 0)
    mixed = run("--layer", "fused", "--dropout", 0, "--resume").log
    assert losses(mixed) == pytest.approx(losses(stock), abs=1e-4)


def test_other_options_that_change_the_dropout_are_said(run, cut_short, capsys):
    cut_short(3, "--layer", "stock")
    run("--resume", "--layer", "fused", "--accumulate", 2)
    printed = capsys.readouterr().out
    assert "--layer was stock, now it is fused: other dropout" in printed
    assert "--accumulate was 1, now it is 2: other dropout" in printed


def test_longer_run_says_that_the_schedule_changes(run, capsys):
    run("--steps", 4)
    capsys.readouterr()
    log = run("--steps", 6, "--resume").log
    assert "--steps was 4, now it is 6" in capsys.readouterr().out
    assert len(log.rows) == 7


def test_other_number_of_processes_is_said(run, capsys, cut_short, monkeypatch, tmp_path):
    cut_short(4)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, facts = training.read_checkpoint(path, "--resume")
    training.write_checkpoint(path, tensors, {**facts, "processes": 2})
    capsys.readouterr()
    run("--resume")
    assert "2 processes before, 1 now: other dropout" in capsys.readouterr().out
