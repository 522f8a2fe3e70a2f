"""Masked-language-model pre-training of a small encoder, on text that is already on the machine.

    python examples/pretrain.py                          # fused layers, text that comes with Python
    python examples/pretrain.py --layer stock --out runs/stock
    python examples/pretrain.py --text book.txt --steps 5000 --out runs/book
    python examples/pretrain.py --steps 4000 --resume    # go on from runs/pretrain

Each run leaves ``checkpoint.safetensors``, ``log.csv`` and ``loss.png`` in its folder. A resumed
run computes, bit for bit, what the uninterrupted one would have.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from text import VOCABULARY, Batch, Corpus, TextError, file_documents, make_batch, python_documents
from torch import Tensor, nn

from fastattn import FusedEncoderLayer

LAYERS = {"stock": nn.TransformerEncoderLayer, "fused": FusedEncoderLayer}
WARM_UP = 100  # steps over which the learning rate rises to --lr, to stay there
HELD_OUT_BATCHES = 8  # the same ones at every evaluation of every run

LayerClass = Callable[..., nn.Module]


class RunError(Exception):
    """What the user has to know; the message names the argument or the file."""


@dataclass(frozen=True)
class Configuration:
    """What a checkpoint depends on. The kind of layer is not part of it: the weights fit both."""

    seq_len: int
    batch_size: int
    d_model: int
    heads: int
    layers: int
    d_ff: int
    dropout: float
    lr: float
    seed: int
    text: str  # digest of the training text


# ----------------------------------------------------------------------------------------- model


class MaskedLanguageModel(nn.Module):
    """Embedding and sinusoidal positions -> encoder layers -> logits of the chosen tokens only."""

    def __init__(self, configuration: Configuration, layer_class: LayerClass) -> None:
        super().__init__()
        c = configuration
        self.embedding = nn.Embedding(VOCABULARY, c.d_model)
        self.register_buffer("positions", sinusoids(c.seq_len, c.d_model), persistent=False)
        self.layers = nn.ModuleList(
            layer_class(
                c.d_model, c.heads, c.d_ff, dropout=c.dropout, activation="gelu", batch_first=True
            )
            for _ in range(c.layers)
        )
        self.head = nn.Linear(c.d_model, VOCABULARY)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, padding: Tensor | None, chosen: Tensor) -> Tensor:
        """Logits (predictions, vocabulary) for the places ``chosen`` in the flattened batch."""
        width = self.embedding.embedding_dim
        hidden = self.embedding(tokens) * math.sqrt(width) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return self.head(hidden.reshape(-1, width)[chosen])


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as in "Attention is all you need" (arXiv:1706.03762), section 3.5."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, averaged over the chosen tokens (zero where none was chosen)."""
    logits = model(batch.tokens, batch.padding, batch.chosen)
    total = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    return total / max(len(batch.targets), 1)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, corpus: Corpus, c: Configuration, device: torch.device
) -> float:
    """Loss on a fixed sample of the held-out text, in evaluation mode."""
    model.eval()
    total, predictions = 0.0, 0
    for index in range(HELD_OUT_BATCHES):
        batch = make_batch(corpus.held_out, c.batch_size, c.seq_len, f"held out/{index}").to(device)
        total += mean_loss(model, batch).item() * len(batch.targets)
        predictions += len(batch.targets)
    model.train()
    return total / max(predictions, 1)


# ------------------------------------------------------------------------------- log and progress


@dataclass
class History:
    """What a run has measured so far."""

    train_loss: list[float] = field(default_factory=list)  # one a step
    tokens_per_second: list[float] = field(default_factory=list)  # one a step
    held_out_loss: dict[int, float] = field(default_factory=dict)  # by the steps done before

    def to_tensors(self) -> dict[str, Tensor]:
        return {
            "history.train_loss": torch.tensor(self.train_loss, dtype=torch.float64),
            "history.tokens_per_second": torch.tensor(self.tokens_per_second, dtype=torch.float64),
            "history.evaluated": torch.tensor(list(self.held_out_loss), dtype=torch.int64),
            "history.held_out_loss": torch.tensor(
                list(self.held_out_loss.values()), dtype=torch.float64
            ),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> History:
        evaluated = tensors["history.evaluated"].tolist()
        losses = tensors["history.held_out_loss"].tolist()
        return cls(
            tensors["history.train_loss"].tolist(),
            tensors["history.tokens_per_second"].tolist(),
            dict(zip(evaluated, losses, strict=True)),
        )

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "train_loss", "held_out_loss", "tokens_per_second"])
            for step in range(len(self.train_loss) + 1):
                train = [self.train_loss[step - 1], self.tokens_per_second[step - 1]]
                loss, speed = train if step else ["", ""]
                rows.writerow([step, loss, self.held_out_loss.get(step, ""), speed])

    def write_plot(self, path: Path, unigram: float, title: str) -> None:
        axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
        steps = range(1, len(self.train_loss) + 1)
        axes.plot(steps, self.train_loss, linewidth=0.7, alpha=0.6, label="training")
        axes.plot(self.held_out_loss.keys(), self.held_out_loss.values(), "o-", label="held out")
        axes.axhline(unigram, color="gray", linestyle="--", label="unigram entropy")
        axes.set(xlabel="step", ylabel="loss (nats per masked byte)", title=title)
        axes.legend()
        figure.savefig(path, dpi=150)


class Report:
    """A live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, done: int, steps: int) -> None:
        self.steps = steps
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            text = "step {task.completed}/{task.total} {task.description}"
            self.bar = Progress(BarColumn(20), TextColumn(text), TimeRemainingColumn())
            self.task = self.bar.add_task("", total=steps, completed=done)

    def context(self) -> AbstractContextManager:
        return self.bar or nullcontext()

    def show(self, history: History) -> None:
        step = len(history.train_loss)
        speed = history.tokens_per_second[-10:]
        line = (
            f"train {history.train_loss[-1]:.4f}  "
            f"held out {list(history.held_out_loss.values())[-1]:.4f}  "
            f"{sum(speed) / len(speed):,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        elif step in history.held_out_loss or step % max(self.steps // 20, 1) == 0:
            print(f"step {step}/{self.steps}  {line}", flush=True)


# ------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    configuration: Configuration,
    device: torch.device,
) -> None:
    """Write a checkpoint beside ``path`` and rename it, so that ``path`` is never half written."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RunError("the weights are no longer finite; the last checkpoint is kept")
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors |= history.to_tensors()
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"configuration": json.dumps(asdict(configuration)), "digest": digest(tensors)}

    unfinished = path.with_suffix(".unfinished")
    try:
        save_file(tensors, unfinished, metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"--out: cannot write {path}: {error}; the last one is kept") from error


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    configuration: Configuration,
    device: torch.device,
) -> History:
    """Take up a checkpoint's weights, moments and random state; returns its history."""
    tensors, saved = read_checkpoint(path)
    for name, value in asdict(configuration).items():
        if saved.get(name) != value:
            raise RunError(
                f"--resume: {path} belongs to another configuration: "
                f"--{name.replace('_', '-')} was {saved.get(name)}, now it is {value}"
            )
    model.load_state_dict(
        {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return History.from_tensors(tensors)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a checkpoint and its configuration, once they have proved to be whole."""
    if not path.is_file():
        raise RunError(f"--resume: there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"--resume: cannot read {path}: {error}") from error
    if metadata.get("digest") != digest(tensors):
        raise RunError(f"--resume: {path} is damaged, or not a checkpoint of this program")
    return tensors, json.loads(metadata["configuration"])


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and contents."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


# --------------------------------------------------------------------------------------- training


class Result(NamedTuple):
    history: History
    unigram_entropy: float  # nats per byte


def train(
    options: argparse.Namespace, corpus: Corpus, c: Configuration, layer_class: LayerClass
) -> History:
    torch.manual_seed(c.seed)
    device: torch.device = options.device
    model = MaskedLanguageModel(c, layer_class).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr)
    checkpoint = options.out / "checkpoint.safetensors"
    if options.resume:
        history = load_checkpoint(checkpoint, model, optimizer, c, device)
    else:
        history = History(held_out_loss={0: held_out_loss(model, corpus, c, device)})
    done = len(history.train_loss)
    if done > options.steps:
        raise RunError(f"--steps {options.steps}: {checkpoint} has {done} steps behind it already")

    report = Report(done, options.steps)
    with report.context():
        for step in range(done, options.steps):
            started = time.perf_counter()
            batch = make_batch(corpus.train, c.batch_size, c.seq_len, f"{c.seed}/{step}").to(device)
            for group in optimizer.param_groups:
                group["lr"] = c.lr * min(1.0, (step + 1) / WARM_UP)
            loss = mean_loss(model, batch)
            if not loss.isfinite():
                raise RunError(
                    f"the loss of step {step + 1} is {loss}; the last checkpoint is kept"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.train_loss.append(loss.item())
            padded = 0 if batch.padding is None else int(batch.padding.sum())
            tokens = batch.tokens.numel() - padded
            history.tokens_per_second.append(tokens / (time.perf_counter() - started))

            last = step + 1 == options.steps
            if last or (step + 1) % options.eval_every == 0:
                history.held_out_loss[step + 1] = held_out_loss(model, corpus, c, device)
            if last or (step + 1) % options.checkpoint_every == 0:
                save_checkpoint(checkpoint, model, optimizer, history, c, device)
                history.write_csv(options.out / "log.csv")
            report.show(history)
    return history


# --------------------------------------------------------------------------------- command line


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


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, natural = parser.add_argument, whole(1)
    add("--layer", choices=LAYERS, default="fused", help="kind of encoder layer")
    add("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 files instead of Python's text")
    add("--steps", type=natural, default=2000)
    add("--batch-size", type=natural, default=32, help="sequences in a step")
    add("--seq-len", type=natural, default=64, help="bytes in a sequence")
    add("--d-model", type=natural, default=128)
    add("--heads", type=natural, default=4)
    add("--layers", type=natural, default=2)
    add("--d-ff", type=natural, default=512)
    add("--dropout", type=number(0, 1), default=0.1)
    add("--lr", type=number(0, math.inf), default=3e-3, help="learning rate after the warm-up")
    add("--seed", type=whole(0), default=0)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--checkpoint-every", type=natural, default=200, metavar="STEPS")
    add("--eval-every", type=natural, default=100, metavar="STEPS")
    return parser


def read_corpus(options: argparse.Namespace) -> Corpus:
    try:
        corpus = Corpus(file_documents(options.text) if options.text else python_documents())
    except TextError as error:
        raise RunError(f"--text: {error}") from error
    if len(corpus.held_out.tokens) < options.seq_len:
        name = ", ".join(map(str, options.text)) if options.text else "Python's own text"
        raise RunError(
            f"--text: {name} is too short: "
            f"the tenth held out has {len(corpus.held_out.tokens)} bytes, "
            f"and --seq-len asks for {options.seq_len}"
        )
    return corpus


def run(options: argparse.Namespace, layer_class: LayerClass) -> Result:
    if options.d_model % options.heads:
        raise RunError(f"--heads {options.heads} does not divide --d-model {options.d_model}")
    if not options.resume and (options.out / "checkpoint.safetensors").exists():
        raise RunError(f"--out {options.out} holds a run: --resume it, or name another folder")
    corpus = read_corpus(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {options.out}: {error.strerror}") from error
    values = vars(options) | {"text": corpus.digest}
    c = Configuration(**{name: values[name] for name in Configuration.__dataclass_fields__})
    print(f"{corpus.documents:,} documents, {corpus.size:,} bytes; {options.layer} layers")

    history = train(options, corpus, c, layer_class)
    unigram = corpus.unigram_entropy()
    final = history.held_out_loss[len(history.train_loss)]
    history.write_plot(options.out / "loss.png", unigram, f"{options.layer} encoder layers")
    print(f"held-out loss {final:.4f} nats; unigram entropy {unigram:.4f}: {final - unigram:+.4f}")
    print(f"wrote checkpoint.safetensors, log.csv and loss.png to {options.out}")
    return Result(history, unigram)


def main(arguments: list[str] | None = None, layer_class: LayerClass | None = None) -> Result:
    """Run the program; ``layer_class`` builds the encoder layers in place of ``--layer``."""
    options = command_line().parse_args(arguments)
    try:
        return run(options, layer_class or LAYERS[options.layer])
    except RunError as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; --resume goes on from what {options.out} holds") from None


if __name__ == "__main__":
    main()
