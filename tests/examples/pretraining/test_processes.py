"""examples/pretrain.py in two processes: what one computes, and all of them leave cleanly."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.examples.pretraining.runs import TINY, assert_same_run, losses, run_until_killed
from tests.examples.programs import pretrain, python, training

pytestmark = pytest.mark.usefixtures("one_thread")

#: The address is this machine's whatever its name; torchrun's store finds a free port itself.
TORCHRUN = "-m torch.distributed.run --standalone --local-addr localhost --nproc-per-node 2".split()

#: Run after run in the same processes, whose start takes longest. Arguments: a folder, the runs as
#: JSON, and after how many steps of the last run a process kills itself; 0: it does not.
RUNS = """
import atexit, contextlib, functools, json, os, signal, sys
import torch
import torch.distributed as dist
import pretrain
from torch.nn.modules.module import register_module_forward_hook
folder, runs, kill_after = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
def note(module, inputs, output):
    if isinstance(module, torch.nn.Dropout) and module.training and not kept:
        kept.append(output != 0)
        torch.save(kept[0], f"{folder}/{name}-{os.environ['RANK']}")
register_module_forward_hook(note)
def threads(when):
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # one that has ended since
            names.append(open(f"/proc/self/task/{task}/comm").read())
    of_gloo = sum("gloo" in name for name in names)
    print(f"{when} with {of_gloo} threads of gloo's", flush=True)  # in one piece: two write
init_process_group = dist.init_process_group
step, left = pretrain.Trainer.step, iter(range(kill_after))
def counted(trainer, batches):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, batches)
if sys.platform == "linux":
    atexit.register(threads, "left")
for number, (name, options) in enumerate(runs.items()):
    if number:  # torchrun's store has the addresses of the first run
        store = dist.FileStore(f"{folder}/store-{os.getppid()}-{number}", 2)
        place = {"store": store, "rank": int(os.environ["RANK"]), "world_size": 2}
        dist.init_process_group = functools.partial(init_process_group, **place)
    if kill_after and number == len(runs) - 1:
        pretrain.Trainer.step = counted
    kept = []
    pretrain.main(options)
    if sys.platform == "linux":
        threads("done")
"""


class Started(NamedTuple):
    """Two processes, twice: at first killed in their second run, then to the end of four."""

    folder: Path
    killed: subprocess.CompletedProcess
    went_on: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def started(english, tmp_path_factory) -> Started:
    folder = tmp_path_factory.mktemp("two")
    (script := folder / "runs.py").write_text(RUNS)

    def run(name: str, *options: str) -> dict[str, list[str]]:
        return {name: [*TINY, "--text", str(english), "--out", str(folder / name), *options]}

    def start(runs: dict[str, list[str]], kill_after: int = 0) -> subprocess.CompletedProcess:
        return python(*TORCHRUN, script, folder, json.dumps(runs), kill_after)

    dropping = ("--parallel", "fsdp", "--checkpoint-every", "2")
    killed = start(run("whole", *dropping) | run("killed", *dropping), kill_after=5)
    shutil.copytree(folder / "killed", folder / "resumed")
    exact = ("--dropout", "0", "--accumulate", "2")
    [begun] = run("ddp from one", "--dropout", "0").values()
    run_until_killed(5, begun)
    went_on = start(
        run("resumed", *dropping, "--resume")
        | run("ddp", *exact)
        | run("ddp from one", *exact, "--resume")
        | run("fsdp", *exact, "--parallel", "fsdp")
    )
    return Started(folder, killed, went_on)


@pytest.fixture(scope="module")
def one(english, tmp_path_factory):
    """The log and the checkpoint of one process, without dropout."""
    folder = tmp_path_factory.mktemp("one")
    result = pretrain.main([*TINY, "--text", str(english), "--out", str(folder), "--dropout", "0"])
    path = folder / "checkpoint.safetensors"
    return result.log, training.read_checkpoint(path, "--resume")[0]


@pytest.mark.parametrize("how", ["ddp", "ddp from one", "fsdp"])
def test_two_processes_equal_one_without_dropout(started, one, how):
    """Two partial sums of a gradient differ from one sum by rounding alone.

    The gradient of the keys' bias is nothing else, since all scores of a query change by the same:
    AdamW may make a step of the learning rate of it.
    """
    assert started.went_on.returncode == 0, started.went_on.stderr
    path = started.folder / how / "checkpoint.safetensors"
    tensors, facts = training.read_checkpoint(path, "--resume")
    log = training.Log.from_tensor(pretrain.COLUMNS, tensors["log"])
    expected_log, expected = one
    assert facts["processes"] == 2
    assert losses(log) == pytest.approx(losses(expected_log), abs=1e-4)
    for name in expected:
        if name.startswith("model.") and name.endswith("in_proj_bias"):
            query, key, value = tensors[name].chunk(3)
            wanted = expected[name].chunk(3)[1]
            assert (key - wanted).abs().max() < 2 * sum(log["learning_rate"][1:])
            tensors[name] = torch.cat([query, wanted, value])
        if name.startswith(("model.", "optimizer.")):
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-4, atol=1e-4)


def test_first_process_alone_prints_and_says_what_has_changed(started):
    printed = started.went_on.stdout
    assert printed.count("2 process(es)") == 4
    assert printed.count("1 processes before, 2 now: other dropout") == 1


def test_two_processes_drop_differently(started):
    first, second = (torch.load(started.folder / f"whole-{rank}") for rank in (0, 1))
    p = 0.1
    deviation = math.sqrt(2 * p * (1 - p) / first.numel())
    assert abs(float((first != second).float().mean()) - 2 * p * (1 - p)) < 5 * deviation


def test_killed_processes_go_on_bit_for_bit(started):
    assert started.killed.returncode != 0
    path = started.folder / "killed" / "checkpoint.safetensors"
    tensors, _ = training.read_checkpoint(path, "--resume")
    assert len(tensors["log"]) - 1 == 4
    assert started.went_on.returncode == 0, started.went_on.stderr
    assert_same_run(started.folder / "whole", started.folder / "resumed")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_processes_leave_without_threads(started):
    """Of every run, and of what the interpreter ends with."""
    assert started.killed.stdout.count("done with 0 threads of gloo's") == 2
    assert started.went_on.stdout.count("done with 0 threads of gloo's") == 2 * 4
    assert started.went_on.stdout.count("left with 0 threads of gloo's") == 2


LEAVING = """
import contextlib, os
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
        names = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # one that has ended since
                names.append(open(f"/proc/self/task/{task}/comm").read())
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
