"""examples/pretrain.py in two processes: what one computes, and all of them leave cleanly."""

import math
import signal
import sys

import pytest
import torch

from tests import ROOT
from tests.examples.pretraining.runs import (
    KILLED,
    TINY,
    TORCHRUN,
    assert_same_run,
    losses,
)
from tests.examples.programs import pretrain, python, training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how, resumed", [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_two_processes_equal_one_without_dropout(run, cut_short, english, tmp_path, how, resumed):
    """Two partial sums of a gradient differ from one sum by rounding alone.

    That is some 1e-7 of it, which AdamW can blow up where a gradient is about zero: to no more than
    a step of the learning rate. Twelve steps leave losses of about 6 alike to 1e-4.
    """
    options = ["--dropout", 0, "--accumulate", 2, "--parallel", how, "--out", tmp_path / "two"]
    if resumed:  # goes on from what one process began
        cut_short(5, "--dropout", 0, out="two")
        options.append("--resume")
    program = [*TORCHRUN, ROOT / "examples" / "pretrain.py"]
    two = python(*program, *TINY, "--text", english, *options)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("2 process(es)") == 1  # the first one alone prints
    assert ("1 processes before, 2 now: other dropout" in two.stdout) == resumed
    one = run("--dropout", 0, out="one")
    tensors, facts = training.read_checkpoint(
        tmp_path / "two" / "checkpoint.safetensors", "--resume"
    )
    expected, _ = training.read_checkpoint(tmp_path / "one" / "checkpoint.safetensors", "--resume")
    log = training.Log.from_tensor(pretrain.COLUMNS, tensors["log"])
    assert facts["processes"] == 2
    assert losses(log) == pytest.approx(losses(one.log), abs=1e-4)
    for name in expected:
        if name.startswith(("model.", "optimizer.")):
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=1e-3)


DECISIONS = """
import atexit, os, sys
import torch
import pretrain
from torch.nn.modules.module import register_module_forward_hook
kept = []
def note(module, inputs, output):
    if isinstance(module, torch.nn.Dropout) and module.training and not kept:
        kept.append(output != 0)
        torch.save(kept[0], sys.argv[1] + os.environ["RANK"])
register_module_forward_hook(note)
def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    of_gloo = sum("gloo" in name for name in names)
    print(f"left with {of_gloo} threads of gloo's", flush=True)  # in one piece: two processes write
if sys.platform == "linux":
    atexit.register(threads)
if sys.argv[2]:
    exec(open(sys.argv[2]).read())
pretrain.main(sys.argv[3:])
"""


def test_two_processes_drop_differently_and_resume_bit_for_bit(english, tmp_path):
    (script := tmp_path / "decisions.py").write_text(DECISIONS)
    lines = KILLED.format(steps=5).splitlines()
    (killer := tmp_path / "killer.py").write_text("\n".join(lines[:-1]))
    options = [*TINY, "--text", english, "--parallel", "fsdp", "--checkpoint-every", 2, "--out"]
    whole = python(*TORCHRUN, script, tmp_path / "kept", "", *options, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("left with 0 threads of gloo's") == 2 * (sys.platform == "linux")
    first, second = (torch.load(tmp_path / f"kept{rank}") for rank in (0, 1))
    p = 0.1
    deviation = math.sqrt(2 * p * (1 - p) / first.numel())
    assert abs(float((first != second).float().mean()) - 2 * p * (1 - p)) < 5 * deviation

    run = tmp_path / "run"
    killed = python(*TORCHRUN, script, tmp_path / "again", killer, *options, run)
    assert killed.returncode != 0
    tensors, _ = training.read_checkpoint(run / "checkpoint.safetensors", "--resume")
    assert len(tensors["log"]) - 1 == 4
    resumed = python(*TORCHRUN, script, tmp_path / "more", "", *options, run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "whole", run)


LEAVING = """
import os
import torch
import training
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
def work(how, error, group):
    parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    model = training.parallel(torch.nn.Sequential(*parts), parts, how, group)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    training.model_state(model) | training.optimizer_state(model, optimizer)
    if error is not None:
        try:
            1 / 0
        except ZeroDivisionError as cause:
            raise error from cause
for how in ("ddp", "fsdp"):
    for error in (None, training.RunError("told"), KeyboardInterrupt()):
        caught = None
        try:
            with training.processes(torch.device("cpu")) as group:
                work(how, error, group)
        except BaseException as raised:
            caught = raised
        assert caught is error
        names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
        print(how, type(error).__name__, sum("gloo" in name for name in names))
raise error
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_outlives_its_group(tmp_path):
    """One that frees a tensor while the interpreter ends would abort the process."""
    (script := tmp_path / "leaving.py").write_text(LEAVING)
    left = python(script)
    assert left.stdout.split() == [
        word
        for how in ("ddp", "fsdp")
        for error in ("NoneType", "RunError", "KeyboardInterrupt")
        for word in (how, error, "0")
    ], left.stderr
    assert left.returncode == -signal.SIGINT
    for line in ("1 / 0", "raise error from cause"):  # the traceback is whole
        assert line in left.stderr


@pytest.mark.parametrize(
    "options, complaint",
    [("--batch-size 9", "--batch-size 9"), ("--amp fp16 --parallel fsdp", "--amp fp16")],
)
def test_options_that_two_processes_cannot_use(options, complaint):
    parsed = pretrain.command_line().parse_args(options.split())
    with pytest.raises(training.RunError, match=complaint):
        pretrain.check(parsed, training.Processes(1, 2, torch.device("cpu")))
