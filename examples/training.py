"""What every training program here needs: processes, checkpoints, a log, plots, progress, options.

A checkpoint is one safetensors file with a digest of its contents. It is written beside its final
name and renamed, so that there always is a whole one.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import json
import math
import os
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


class RunError(Exception):
    """What the user has to know; the message names the argument or the file."""


# -------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Processes:
    """This process among those that work on the run."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = None  # all processes in a row; None: this one alone

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def agreed(self, value: Any) -> Any:
        """What the first process passes here."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process passes here, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """This process alone, or with the others that torchrun started (gloo on CPU, else NCCL)."""
    if "RANK" not in os.environ:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, mesh)
        dist.barrier()  # nobody leaves while another one may still be at work
    except BaseException as error:
        forget_locals(error)
        raise
    finally:
        leave(mesh)


def leave(mesh: DeviceMesh) -> None:
    """Destroy the processes' group and wait for its threads, which destroying alone does not.

    They live while something refers to the group: a model in a cycle of references, or the mesh,
    which DTensor's caches keep for good. A thread that then frees a tensor while the interpreter
    ends takes the process down (gloo: "terminate called without an active exception").
    """
    group = dist.group.WORLD  # the last reference: it is dropped without the GIL, which they need
    dist.destroy_process_group()
    gc.collect()
    getattr(mesh, "_pg_registry", {}).clear()
    del group


def forget_locals(error: BaseException) -> None:
    """Empty the frames that an error and its causes came through: models may be among them."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def parallel(
    model: nn.Module, blocks: Iterable[nn.Module], how: str, processes: Processes
) -> nn.Module:
    """``model`` for all processes: a copy in each (``ddp``), or its parameters spread (``fsdp``).

    Args:
        blocks: parts of the model whose parameters ``fsdp`` gathers at a time.
    """
    if not dist.is_initialized():
        return model
    if how == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    for block in blocks:
        fully_shard(block, mesh=processes.mesh)
    return fully_shard(model, mesh=processes.mesh)


def gradient_exchange(model: nn.Module, now: bool) -> AbstractContextManager:
    """Around a backward pass: whether processes add up their gradients in it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


# ------------------------------------------------------------------------------------ checkpoints


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights, on the CPU, as ``model.NAME``; of several processes only the first has them.

    Raises:
        RunError: a weight is not finite.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise RunError("the weights are no longer finite and are not saved")
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps, like :func:`model_state`, as ``optimizer.NAME.KIND``."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return {
        f"optimizer.{name}.{kind}": tensor
        for name, kinds in state.items()
        for kind, tensor in kinds.items()
    }


def load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Take up what :func:`model_state` and :func:`optimizer_state` gave."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, with_prefix("model.", tensors), options=options)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in with_prefix("optimizer.", tensors).items():
        parameter, _, kind = name.rpartition(".")
        state.setdefault(parameter, {})[kind] = tensor
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    whole = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=options)


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def random_state(processes: Processes) -> dict[str, Tensor]:
    """The state of every process's random numbers, as ``random.RANK.KIND``."""
    mine = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(processes.device)
    return {
        f"random.{rank}.{kind}": state
        for rank, states in enumerate(processes.gather(mine))
        for kind, state in states.items()
    }


def load_random_state(processes: Processes, tensors: dict[str, Tensor]) -> None:
    states = with_prefix(f"random.{processes.rank}.", tensors)
    torch.set_rng_state(states["cpu"])
    if processes.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], processes.device)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and what JSON can hold. Where it fails, ``path`` stays as it was."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts, sort_keys=True)

    def write(unfinished: Path) -> None:
        save_file(tensors, unfinished, {"facts": text, "digest": digest(tensors, text)})

    write_whole(path, write)


def read_checkpoint(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint, once they have proved to be whole.

    Raises:
        RunError: they have not; the message begins with the ``option`` that asked for the file.
    """
    if not path.is_file():
        raise RunError(f"{option}: there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"{option}: cannot read {path}: {error}") from error
    text = metadata.get("facts", "")
    if metadata.get("digest") != digest(tensors, text):
        raise RunError(f"{option}: {path} is damaged, or not a checkpoint of these programs")
    return tensors, json.loads(text)


LEFT_BY_A_RUN = ("checkpoint.safetensors", "classifier.safetensors", "result.json")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {path}: {error.strerror}") from error


def refuse_used(path: Path) -> None:
    if any((path / name).exists() for name in LEFT_BY_A_RUN):
        raise RunError(f"--out {path} holds a run: name another folder")


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over names, contents and the text."""
    content = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        kept = "; the last one is kept" if path.exists() else ""
        raise RunError(f"--out: cannot write {path}: {error}{kept}") from error
    finally:
        unfinished.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- log and progress


@dataclass
class Log:
    """What a run has measured: one row a step, the first one before any. NaN: not measured then."""

    columns: tuple[str, ...]
    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, column: str) -> list[float]:
        return [row.get(column, math.nan) for row in self.rows]

    def measured(self, column: str) -> dict[int, float]:
        """What was measured, by the number of steps done before."""
        return {step: x for step, x in enumerate(self[column]) if not math.isnan(x)}

    def median(self, column: str) -> float:
        return statistics.median(self.measured(column).values())

    def tensor(self) -> Tensor:
        rows = [[row.get(column, math.nan) for column in self.columns] for row in self.rows]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.columns))

    @classmethod
    def from_tensor(cls, columns: tuple[str, ...], tensor: Tensor) -> Log:
        named = (zip(columns, row, strict=True) for row in tensor.tolist())
        return cls(columns, [{n: x for n, x in row if not math.isnan(x)} for row in named])

    def write_csv(self, path: Path) -> None:
        def write(unfinished: Path) -> None:
            with unfinished.open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["step", *self.columns])
                for step, row in enumerate(self.rows):
                    rows.writerow([step, *(row.get(column, "") for column in self.columns)])

        write_whole(path, write)


def write_plot(
    path: Path,
    log: Log,
    title: str,
    *,
    losses: dict[str, str],
    levels: dict[str, float],
    speed: str = "tokens_per_second",
) -> None:
    """Losses above, throughput below, over the steps.

    Args:
        losses: columns of the log, each with its label.
        levels: horizontal lines, each by its label.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for column, label in losses.items():
        points = log.measured(column)
        often = len(points) > len(log.rows) / 2
        style = {"linewidth": 0.7, "alpha": 0.6} if often else {"marker": "o", "markersize": 3}
        above.plot(list(points), list(points.values()), label=label, **style)
    for label, level in levels.items():
        above.axhline(level, color="gray", linestyle="--", label=label)
    above.set(ylabel="loss (nats)", title=title)
    above.legend()
    points = log.measured(speed)
    below.plot(list(points), list(points.values()), linewidth=0.7)
    below.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=150, format="png"))


class Report:
    """A live line on a terminal; elsewhere a plain line now and then; nothing if ``silent``."""

    def __init__(self, done: int, steps: int, *, silent: bool) -> None:
        self.steps, self.silent = steps, silent
        self.bar: Progress | None = None
        if sys.stdout.isatty() and not silent:
            text = "step {task.completed}/{task.total} {task.description}"
            self.bar = Progress(BarColumn(20), TextColumn(text), TimeRemainingColumn())
            self.task = self.bar.add_task("", total=steps, completed=done)

    def context(self) -> AbstractContextManager:
        return self.bar or nullcontext()

    def show(self, step: int, line: str, *, important: bool) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        elif not self.silent and (important or step % max(self.steps // 20, 1) == 0):
            print(f"step {step}/{self.steps}  {line}", flush=True)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of the GPU's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wilson_interval(right: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a probability, from independent trials (Wilson, 1927)."""
    z = 1.959964
    centre = (right + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(right * (trials - right) / trials + z * z / 4)
    return centre - half, centre + half


# ---------------------------------------------------------------------------------------- options


def whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low}, got {text!r}")
        return int(text)

    return convert


def number(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to below {high:g}, got {text!r}"
            )
        return value

    return convert


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
