"""Pre-training of a small encoder on text that is already on the machine.

    python examples/pretrain.py                          # fused layers, text that comes with Python
    python examples/pretrain.py --layer stock --out runs/stock
    python examples/pretrain.py --text book.txt --steps 5000 --out runs/book
    python examples/pretrain.py --resume                 # go on from runs/pretrain
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel fsdp --out runs/two

The objectives are masked language modelling and the order of two segments. A run leaves in its
folder ``checkpoint.safetensors`` and ``best.safetensors`` (the weights with the lowest held-out
loss), ``tokenizer.json``, ``log.csv``, ``loss.png`` and ``result.json``. A resumed run computes,
bit for bit, what the uninterrupted one would have, given the same options and number of processes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from text import (
    Batch,
    Corpus,
    StepSampler,
    TextError,
    Vocabulary,
    file_documents,
    join,
    minilm_tokenizer,
    python_documents,
    read_tokenizer,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import (
    Log,
    Processes,
    Report,
    RunError,
    digest,
    gradient_exchange,
    load_random_state,
    load_state,
    make_folder,
    model_state,
    number,
    optimizer_state,
    parallel,
    peak_memory,
    processes,
    random_state,
    read_checkpoint,
    refuse_used,
    usable_device,
    whole,
    wilson_interval,
    write_checkpoint,
    write_json,
    write_plot,
    write_whole,
)

from fastattn.models import SequenceEncoder
from fastattn.objectives import masked_language_model_loss, sentence_order_loss

Layer = str | Callable[..., nn.Module]

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = (
    "train_loss",  # of masked tokens, in nats
    "train_order_loss",
    "learning_rate",
    "gradient_norm",  # before clipping
    "held_out_loss",
    "held_out_order_loss",
    "held_out_order_accuracy",
    "tokens_per_second",
)


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
    warm_up: int
    clip: float
    order_weight: float
    amp: str
    seed: int
    text: str  # digest of the documents
    tokenizer: str  # digest


# ------------------------------------------------------------------------------------------ model


class Losses(NamedTuple):
    """Sums over the sequences of a batch, or of several."""

    masked: Tensor  # nats
    order: Tensor  # nats
    right: Tensor  # orders that were recognised


def make_encoder(
    c: Configuration, vocabulary: Vocabulary, layer: Layer, checkpoint_layers: bool = False
) -> SequenceEncoder:
    return SequenceEncoder(
        vocabulary.size,
        c.d_model,
        c.heads,
        c.d_ff,
        c.layers,
        c.dropout,
        layer=layer,
        max_len=c.seq_len,
        batch_first=True,
        checkpoint_layers=checkpoint_layers,
        activation="gelu",
    )


class PretrainingModel(nn.Module):
    """An encoder with a head for each objective."""

    def __init__(
        self, c: Configuration, vocabulary: Vocabulary, layer: Layer, checkpoint_layers: bool
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(c, vocabulary, layer, checkpoint_layers)
        self.order = nn.Linear(c.d_model, 2)

    def forward(self, batch: Batch) -> Losses:
        hidden = self.encoder(batch.masked.tokens, batch.padding, return_hidden=True)
        masked = masked_language_model_loss(
            hidden, batch.masked, self.encoder.output, reduction="sum"
        )
        order = sentence_order_loss(hidden, batch.swapped, self.order, batch_first=True)
        with torch.no_grad():
            right = (self.order(hidden[:, 0]).argmax(-1) == batch.swapped).sum()
        return Losses(masked, order * len(batch.swapped), right)


def learning_rate(step: int, steps: int, c: Configuration) -> float:
    """Of the step that has ``step`` before it: a linear rise, then half a cosine down to zero."""
    if step < c.warm_up:
        return c.lr * (step + 1) / c.warm_up
    done = (step - c.warm_up) / max(steps - c.warm_up, 1)
    return c.lr * (1 + math.cos(math.pi * done)) / 2


# ------------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    loss: float  # nats a masked token
    order_loss: float  # nats a sequence
    right: int
    sequences: int

    @property
    def accuracy(self) -> float:
        return self.right / self.sequences


def held_out_sequences(available: int, wanted: int, batch_size: int) -> list[int]:
    """Evenly spaced windows, in whole batches: at least ``wanted``, if there are."""
    batches = min(math.ceil(wanted / batch_size), available // batch_size)
    count = batches * batch_size
    return [place * available // count for place in range(count)]


@torch.no_grad()
def evaluate(trainer: Trainer, wanted: int) -> Evaluation:
    """Losses and accuracy on the same held-out windows in every run, without dropout.

    Windows overlap, and those of one document have a subject in common: an interval that takes them
    for independent is somewhat narrow.
    """
    windows, batch_size = trainer.corpus.held_out, trainer.c.batch_size
    group = trainer.processes
    sequences = held_out_sequences(len(windows), wanted, batch_size)
    trainer.model.eval()
    sums, predictions = torch.zeros(3, dtype=torch.float64), 0
    for start in range(0, len(sequences), batch_size):
        mine = sequences[start + group.rank : start + batch_size : group.count]
        batch = join([windows["held out", number] for number in mine])
        with trainer.precision():
            losses = trainer.model(batch.to(group.device))
        sums += torch.stack([loss.double().cpu() for loss in losses])
        predictions += len(batch.masked.targets)
    trainer.model.train()
    masked, order, right, predictions = group.total(*sums.tolist(), predictions)
    count = len(sequences)
    return Evaluation(masked / max(predictions, 1), order / count, round(right), count)


# --------------------------------------------------------------------------------------- training


class Trainer:
    """A model in training, with all that a checkpoint holds."""

    def __init__(
        self,
        options: argparse.Namespace,
        c: Configuration,
        corpus: Corpus,
        layer: Layer,
        processes: Processes,
    ) -> None:
        self.options, self.c, self.corpus, self.processes = options, c, corpus, processes
        self.path = options.out / "checkpoint.safetensors"
        torch.manual_seed(c.seed)
        vocabulary = corpus.train.vocabulary
        model = PretrainingModel(c, vocabulary, layer, options.checkpoint_layers)
        model.to(processes.device).train()
        self.model = parallel(model, model.encoder.layers, options.parallel, processes)
        torch.manual_seed(c.seed + processes.rank)  # each process has dropout of its own
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=c.lr)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=c.amp == "fp16")
        self.log = Log(COLUMNS)
        self.best = math.inf

    @property
    def done(self) -> int:
        return max(len(self.log.rows) - 1, 0)

    def precision(self) -> torch.autocast:
        dtype = AMP[self.c.amp]
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None)

    def batches(self) -> Iterator[Batch]:
        """The micro-batches of this process, from the next step to the last."""
        group, options = self.processes, self.options
        sampler = StepSampler(
            len(self.corpus.train),
            self.c.batch_size,
            range(self.done, options.steps),
            seed=self.c.seed,
            process=group.rank,
            processes=group.count,
            micro_batches=options.accumulate,
        )
        loader = DataLoader(
            self.corpus.train,
            batch_sampler=sampler,
            collate_fn=join,
            num_workers=options.workers,
            generator=torch.Generator(),  # else the loader draws from the one that decides dropout
        )
        return iter(loader)

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Train on the next micro-batches; returns the row of the log.

        Losses are divided by the predictions and the sequences of all processes and micro-batches,
        so that a gradient does not depend on how they were dealt out.
        """
        started = time.perf_counter()
        c, group, number = self.c, self.processes, self.done + 1
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate(self.done, self.options.steps, c)
        parts = [next(batches) for _ in range(self.options.accumulate)]
        predictions, tokens = group.total(
            sum(len(part.masked.targets) for part in parts),
            sum(int((~part.padding).sum()) for part in parts),
        )
        predictions = max(predictions, 1)
        masked = order = 0.0
        for index, part in enumerate(parts):
            with gradient_exchange(self.model, index + 1 == len(parts)), self.precision():
                losses = self.model(part.to(group.device))
                loss = losses.masked / predictions + c.order_weight * losses.order / c.batch_size
                # The exchange takes the mean over processes, and the sum is due.
                self.scaler.scale(loss * group.count).backward()
            masked, order = masked + losses.masked.detach(), order + losses.order.detach()
        masked, order = group.total(float(masked), float(order))
        if not math.isfinite(masked + order):
            raise RunError(
                f"the loss of step {number} is {masked + order}; the last checkpoint is kept"
            )
        norm = self.update(number)
        return {
            "train_loss": masked / predictions,
            "train_order_loss": order / c.batch_size,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }

    def update(self, number: int) -> float:
        """Clip the gradients and change the weights; returns the norm that was."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.c.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # which skips such steps
            raise RunError(
                f"the gradients of step {number} have the norm {norm}; the last checkpoint is kept"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def evaluate(self, row: dict[str, float]) -> None:
        """Add held-out losses to a row of the log, and keep the best weights."""
        result = evaluate(self, self.options.eval_sequences)
        row["held_out_loss"] = result.loss
        row["held_out_order_loss"] = result.order_loss
        row["held_out_order_accuracy"] = result.accuracy
        whole_loss = result.loss + self.c.order_weight * result.order_loss
        if whole_loss < self.best:
            self.best = whole_loss
            weights = model_state(self.model)
            if self.processes.first:
                facts = {"configuration": asdict(self.c), "step": self.done, "loss": whole_loss}
                write_checkpoint(self.options.out / "best.safetensors", weights, facts)

    def save(self) -> None:
        group = self.processes
        tensors = model_state(self.model) | optimizer_state(self.model, self.optimizer)
        tensors |= random_state(group)
        if group.first:
            tensors["log"] = self.log.tensor()
            facts = {
                "configuration": asdict(self.c),
                "steps": self.options.steps,
                "layer": self.options.layer,
                "accumulate": self.options.accumulate,
                "processes": group.count,
                "scaler": self.scaler.state_dict(),
                "best": self.best,
            }
            write_checkpoint(self.path, tensors, facts)
            self.log.write_csv(self.options.out / "log.csv")

    def resume(self) -> None:
        """Go on from the checkpoint, and say what keeps the run from being the uninterrupted one.

        Raises:
            RunError: there is no whole checkpoint, or it belongs to another configuration.
        """
        tensors, facts = read_checkpoint(self.path, "--resume")
        for name, value in asdict(self.c).items():
            if facts["configuration"].get(name) != value:
                raise RunError(
                    f"--resume: {self.path} belongs to another configuration: "
                    f"--{name.replace('_', '-')} was {facts['configuration'].get(name)}, "
                    f"now it is {value}"
                )
        load_state(self.model, self.optimizer, tensors)
        self.scaler.load_state_dict(facts["scaler"])
        self.log = Log.from_tensor(COLUMNS, tensors["log"])
        self.best = facts["best"]
        group, steps = self.processes, self.options.steps
        if self.done > steps:
            raise RunError(f"--steps {steps}: {self.path} has {self.done} steps behind it already")
        notes = []
        if facts["processes"] == group.count:
            load_random_state(group, tensors)
        else:
            torch.manual_seed(self.c.seed + self.done * group.count + group.rank)
            notes.append(f"{facts['processes']} processes before, {group.count} now: other dropout")
        for name in ("layer", "accumulate"):
            before, now = facts.get(name), getattr(self.options, name)
            if before != now:
                notes.append(f"--{name} was {before}, now it is {now}: other dropout")
        if facts["steps"] != steps:
            notes.append(f"--steps was {facts['steps']}, now it is {steps}: other learning rates")
        if group.first:
            print("\n".join([f"resumed after step {self.done}", *notes]))

    def train(self) -> None:
        options = self.options
        report = Report(self.done, options.steps, silent=not self.processes.first)
        if not self.log.rows:
            first: dict[str, float] = {}
            self.evaluate(first)
            self.log.rows.append(first)
        batches = self.batches()
        with report.context():
            while self.done < options.steps:
                row = self.step(batches)
                self.log.rows.append(row)
                last = self.done == options.steps
                if last or self.done % options.eval_every == 0:
                    self.evaluate(row)
                if last or self.done % options.checkpoint_every == 0:
                    self.save()
                report.show(self.done, self.summary(), important="held_out_loss" in row)

    def summary(self) -> str:
        """The last measurements in a line."""
        row, speed = self.log.rows[-1], self.log["tokens_per_second"][1:][-10:]
        held_out = list(self.log.measured("held_out_loss").values())[-1]
        accuracy = list(self.log.measured("held_out_order_accuracy").values())[-1]
        return (
            f"train {row['train_loss']:.4f} + {row['train_order_loss']:.4f}  "
            f"held out {held_out:.4f}, order {accuracy:.3f}  "
            f"{sum(speed) / len(speed):,.0f} tokens/s"
        )


# ----------------------------------------------------------------------------------- command line


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, natural = parser.add_argument, whole(1)
    add("--layer", choices=("stock", "fused"), default="fused", help="kind of encoder layer")
    add("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 files instead of Python's text")
    add("--tokenizer", default="trained", metavar="NAME",
        help="'trained' on the text, 'minilm', or a tokenizer.json")  # fmt: skip
    add("--vocabulary", type=natural, default=8000, help="tokens that 'trained' aims at")
    add("--steps", type=natural, default=3000)
    add("--batch-size", type=natural, default=32, help="sequences in a step, over all processes")
    add("--accumulate", type=natural, default=1, help="parts in which a step takes its sequences")
    add("--seq-len", type=whole(8), default=64, help="tokens in a sequence")
    add("--d-model", type=natural, default=128)
    add("--heads", type=natural, default=4)
    add("--layers", type=natural, default=2)
    add("--d-ff", type=natural, default=512)
    add("--dropout", type=number(0, 1), default=0.1)
    add("--lr", type=number(0, math.inf), default=1e-3, help="learning rate after the warm-up")
    add("--warm-up", type=whole(0), default=200, metavar="STEPS")
    add("--clip", type=number(0, math.inf), default=1.0, help="largest norm of the gradients")
    add("--order-weight", type=number(0, math.inf), default=1.0, help="of that objective")
    add("--amp", choices=AMP, default="off", help="precision of matrix products")
    add("--checkpoint-layers", action="store_true", help="run layers twice to keep less memory")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    add("--workers", type=whole(0), default=0, help="processes that prepare batches")
    add("--seed", type=whole(0), default=0)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--checkpoint-every", type=natural, default=250, metavar="STEPS")
    add("--eval-every", type=natural, default=250, metavar="STEPS")
    add("--eval-sequences", type=natural, default=512, help="held out, at an evaluation")
    add("--order-pairs", type=natural, default=2000, help="held out, at the end")
    return parser


def choose_tokenizer(options: argparse.Namespace, documents: list[str]) -> Tokenizer:
    """The one that ``--tokenizer`` names; when a run goes on, the one that it began with."""
    if options.tokenizer == "minilm":
        return minilm_tokenizer()
    if options.tokenizer != "trained":
        return read_tokenizer(Path(options.tokenizer))
    if options.resume:
        return read_tokenizer(options.out / "tokenizer.json")
    return train_tokenizer(documents, options.vocabulary)


def read_corpus(options: argparse.Namespace, group: Processes) -> tuple[Corpus, Tokenizer]:
    try:
        documents = file_documents(options.text) if options.text else python_documents()
    except TextError as error:
        raise RunError(f"--text: {error}") from error
    try:
        chosen = choose_tokenizer(options, documents).to_str() if group.first else ""
    except TextError as error:
        raise RunError(f"--tokenizer: {error}") from error
    tokenizer = Tokenizer.from_str(group.agreed(chosen))
    corpus = Corpus(documents, tokenizer, options.seq_len)
    name = ", ".join(map(str, options.text)) if options.text else "Python's own text"
    if not len(corpus.train):
        raise RunError(f"--text: {name} is too short: it has no two sentences to train on")
    if len(corpus.held_out) < options.batch_size:
        raise RunError(
            f"--text: {name} is too short: the fifth held out makes {len(corpus.held_out)} "
            f"sequences, and --batch-size asks for {options.batch_size}"
        )
    return corpus, tokenizer


def check(options: argparse.Namespace, group: Processes) -> None:
    """Refuse options that do not go together."""
    if options.d_model % options.heads:
        raise RunError(f"--heads {options.heads} does not divide --d-model {options.d_model}")
    if options.batch_size % (options.accumulate * group.count):
        raise RunError(
            f"--batch-size {options.batch_size} cannot be dealt out to {group.count} processes "
            f"with --accumulate {options.accumulate}"
        )
    if options.amp == "fp16" and options.parallel == "fsdp" and group.count > 1:
        raise RunError("--amp fp16 does not go with --parallel fsdp: use bf16, or ddp")
    path = options.out / "checkpoint.safetensors"
    if not options.resume and path.exists():
        raise RunError(f"--out {options.out} holds a run: --resume it, or name another folder")
    if not options.resume:
        refuse_used(options.out)
    if options.resume and not path.exists():
        raise RunError(f"--resume: there is no checkpoint {path}")


class Result(NamedTuple):
    log: Log
    final: Evaluation
    unigram_entropy: float  # nats per token


def run(options: argparse.Namespace, layer: Layer, group: Processes) -> Result:
    check(options, group)
    corpus, tokenizer = read_corpus(options, group)
    values = vars(options) | {"text": corpus.digest, "tokenizer": digest({}, tokenizer.to_str())}
    c = Configuration(**{field.name: values[field.name] for field in fields(Configuration)})
    trainer = Trainer(options, c, corpus, layer, group)
    if options.resume:
        trainer.resume()
    elif group.first:
        make_folder(options.out)
        write_whole(options.out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    if group.first:
        print(
            f"{corpus.documents:,} documents, {corpus.characters:,} characters, "
            f"{len(corpus.train.tokens):,} tokens of {tokenizer.get_vocab_size():,} kinds in "
            f"{len(corpus.train):,} sequences; {options.layer} layers, {group.count} process(es)",
            flush=True,
        )
    trainer.train()
    result = Result(trainer.log, evaluate(trainer, options.order_pairs), corpus.unigram_entropy())
    if group.first:
        show(result, options, trainer)
    return result


def show(result: Result, options: argparse.Namespace, trainer: Trainer) -> None:
    final, unigram, log = result.final, result.unigram_entropy, result.log
    write_plot(
        options.out / "loss.png",
        log,
        f"{options.layer} encoder layers",
        losses={
            "train_loss": "training",
            "held_out_loss": "held out",
            "train_order_loss": "training, order",
            "held_out_order_loss": "held out, order",
        },
        levels={"unigram entropy": unigram, "order by chance": math.log(2)},
    )
    low, high = wilson_interval(final.right, final.sequences)
    speed, peak = log.median("tokens_per_second"), peak_memory(trainer.processes.device)
    write_json(
        options.out / "result.json",
        {
            "layer": options.layer,
            "configuration": asdict(trainer.c),
            "steps": trainer.done,
            "processes": trainer.processes.count,
            "train_tokens": len(trainer.corpus.train.tokens),
            "held_out_loss": final.loss,
            "unigram_entropy": unigram,
            "order_right": final.right,
            "order_pairs": final.sequences,
            "order_interval": [low, high],
            "tokens_per_second": speed,
            "peak_bytes": peak,
        },
    )
    print(
        f"held-out loss {final.loss:.4f} nats; unigram entropy {unigram:.4f}: "
        f"{final.loss - unigram:+.4f}\n"
        f"order of {final.sequences:,} held-out pairs: {final.accuracy:.4f} right "
        f"(95 % interval {low:.4f} to {high:.4f})\n"
        f"{speed:,.0f} tokens/s (median step); at most {peak / 2**20:,.0f} MiB of memory\n"
        f"wrote checkpoint, best weights, tokenizer, log, plot and result to {options.out}"
    )


def main(arguments: list[str] | None = None, layer: Layer | None = None) -> Result:
    """Run the program; ``layer`` makes the encoder layers in place of ``--layer``."""
    options = command_line().parse_args(arguments)
    try:
        with processes(options.device) as group:
            return run(options, layer or options.layer, group)
    except RunError as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; --resume goes on from what {options.out} holds") from None


if __name__ == "__main__":
    main()
