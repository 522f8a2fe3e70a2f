"""Two-stage training: a classifier on a frozen pre-trained encoder, then both fine-tuned.

    python examples/pretrain.py                          # first: makes runs/pretrain
    python examples/finetune.py                          # what does a docstring document?
    python examples/finetune.py --pretrained runs/stock --layer stock --out runs/stock-classifier
    python examples/finetune.py --data reviews.csv --out runs/reviews     # columns: text, label

The default task is to tell the docstrings of Python's own modules, classes, functions and methods
apart. Those held out are the ones that pre-training holds out. Accuracies are set beside those of
the most frequent class, of logistic regression on a bag of words (whole texts, TF-IDF, with the
regularisation that cross-validation prefers), and of the same encoder trained on labelled text
alone. A run leaves ``classifier.safetensors``, ``tokenizer.json`` and ``result.json`` behind.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pretrain import Configuration, make_encoder
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from text import (
    HELD_OUT,
    Labelled,
    TextError,
    Vocabulary,
    digest_of,
    python_docstrings,
    python_documents,
    read_tokenizer,
    split,
    without_repeats,
)
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from training import (
    RunError,
    digest,
    make_folder,
    model_state,
    number,
    peak_memory,
    read_checkpoint,
    refuse_used,
    usable_device,
    whole,
    wilson_interval,
    with_prefix,
    write_checkpoint,
    write_json,
    write_whole,
)

from fastattn.models import SequenceEncoder, TaskAdapter, train_adapted_model

FOLDS = 5  # of cross-validation
LEAST = 7  # texts of a label, of which FOLDS are then in training

MAJORITY, WORDS = "majority class", "bag of words"
ADAPTED, TUNED, UNTRAINED = "adapted", "fine-tuned", "not pre-trained"


# ------------------------------------------------------------------------------------------- task


class Task(NamedTuple):
    """Labelled texts; those held out are in no other part."""

    classes: list[str]
    train: list[Labelled]
    held_out: list[Labelled]


def docstrings_task(documents_digest: str) -> Task:
    """Does a docstring document a module, a class, a function or a method?

    Args:
        documents_digest: of what was pre-trained on. Where the documents are others, held-out
            docstrings may have been among them, and a note says so.
    """
    labels = dict(reversed(python_docstrings()))  # of one that occurs again the first counts
    documents = without_repeats(python_documents())
    if digest_of(documents) != documents_digest:
        print("note: pre-trained on other text; what is held out here may have been in it")
    parts = split([[text] for text in documents])
    train, held_out = (
        [Labelled(text, labels[text]) for [text] in part if text in labels] for part in parts
    )
    return Task(sorted(set(labels.values())), train, held_out)


def file_task(path: Path) -> Task:
    """Texts and labels of a CSV file; a fifth of each label's texts is held out.

    Of texts that differ in case and white space alone, the first counts.

    Raises:
        TextError: it cannot be used; the message names the file.
    """
    texts: dict[str, Labelled] = {}
    csv.field_size_limit(2**31 - 1)  # a text may be a book
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            for column in Labelled._fields:
                if column not in (rows.fieldnames or ()):
                    raise TextError(f"{path} has no column {column!r} in its first line")
            for row in rows:
                if not all((row[column] or "").strip() for column in Labelled._fields):
                    raise TextError(f"{path}, line {rows.line_num}: a text or a label is missing")
                if None in row:
                    raise TextError(f"{path}, line {rows.line_num}: more fields than columns")
                same = " ".join(row["text"].lower().split())
                texts.setdefault(same, Labelled(row["text"], row["label"]))
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TextError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return split_task(list(texts.values()))


def split_task(texts: list[Labelled]) -> Task:
    counts = Counter(label for _, label in texts)
    if len(counts) < 2:
        raise TextError(f"there must be two labels or more, not {sorted(counts)}")
    for label, count in sorted(counts.items()):
        if count < LEAST:
            raise TextError(f"label {label!r} has too few texts: {count}, and {LEAST} are needed")
    train, held_out = train_test_split(
        texts, test_size=1 / HELD_OUT, random_state=0, stratify=[label for _, label in texts]
    )
    return Task(sorted(counts), train, held_out)


class Encoded(NamedTuple):
    """A text as the encoder reads it: cls, as many of its tokens as fit, sep."""

    tokens: Tensor  # (length,) int64
    label: int


def encode(
    texts: list[Labelled], tokenizer: Tokenizer, length: int, classes: list[str]
) -> list[Encoded]:
    v, numbers = Vocabulary.of(tokenizer), {label: i for i, label in enumerate(classes)}
    encodings = tokenizer.encode_batch_fast([text for text, _ in texts], add_special_tokens=False)
    return [
        Encoded(torch.tensor([v.cls, *encoding.ids[: length - 2], v.sep]), numbers[label])
        for encoding, (_, label) in zip(encodings, texts, strict=True)
    ]


def collate(pad: int, texts: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """(N, S) tokens, (N, S) bool that is True where there is none, and (N,) labels."""
    tokens = pad_sequence([text.tokens for text in texts], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text.tokens) for text in texts])
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    return tokens, padding, torch.tensor([text.label for text in texts])


# --------------------------------------------------------------------------------------- baselines


def majority_class(task: Task) -> Tensor:
    """(held-out texts,) bool: whether the most frequent label of the training texts is right."""
    [(label, _)] = Counter(label for _, label in task.train).most_common(1)
    return torch.tensor([text.label == label for text in task.held_out])


def bag_of_words(task: Task) -> Tensor:
    """(held-out texts,) bool: whether logistic regression on their words is right.

    Raises:
        TextError: no text has a word of two letters or more.
    """
    search = GridSearchCV(
        make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [0.3, 1, 3, 10, 30, 100]},
        cv=FOLDS,
    )
    texts, labels = zip(*task.train, strict=True)
    try:
        search.fit(texts, labels)
    except ValueError as error:
        raise TextError(f"no bag of words can be made of the texts: {error}") from error
    texts, labels = zip(*task.held_out, strict=True)
    return torch.from_numpy(search.predict(texts) == labels)


# ----------------------------------------------------------------------------------------- encoder


class Pretrained(NamedTuple):
    configuration: Configuration
    tokenizer: Tokenizer
    weights: dict[str, Tensor]  # of the encoder


def read_pretrained(folder: Path) -> Pretrained:
    """The best weights of a run of pretrain.py. Raises :class:`RunError`."""
    tensors, facts = read_checkpoint(folder / "best.safetensors", "--pretrained")
    try:
        configuration = Configuration(**facts["configuration"])
    except (KeyError, TypeError) as error:
        raise RunError(f"--pretrained: {folder} was not made by this pretrain.py") from error
    try:
        tokenizer = read_tokenizer(folder / "tokenizer.json")
    except TextError as error:
        raise RunError(f"--pretrained: {error}") from error
    if digest({}, tokenizer.to_str()) != configuration.tokenizer:
        raise RunError(f"--pretrained: {folder / 'tokenizer.json'} is not the one of the weights")
    return Pretrained(configuration, tokenizer, with_prefix("model.encoder.", tensors))


class Trainer:
    """Trains and scores classifiers on one task."""

    def __init__(self, options: argparse.Namespace, task: Task, pretrained: Pretrained) -> None:
        self.options, self.task, self.pretrained = options, task, pretrained
        c, self.vocabulary = pretrained.configuration, Vocabulary.of(pretrained.tokenizer)
        self.train_texts, self.held_out = (
            encode(texts, pretrained.tokenizer, c.seq_len, task.classes)
            for texts in (task.train, task.held_out)
        )

    def encoder(self) -> SequenceEncoder:
        """With the weights it begins with before any training."""
        c, o = self.pretrained.configuration, self.options
        return make_encoder(c, self.vocabulary, o.layer).to(o.device)

    def train(self, model: TaskAdapter, epochs: int, lr: float, name: str) -> TaskAdapter:
        print(f"{name}:", flush=True)
        loader = DataLoader(
            self.train_texts,
            self.options.batch_size,
            shuffle=True,
            collate_fn=partial(collate, self.vocabulary.pad),
            generator=torch.Generator().manual_seed(self.options.seed),
        )
        try:
            train_adapted_model(model, loader, epochs, lr)
        except FloatingPointError as error:
            raise RunError(f"{name}, at the learning rate {lr}: {error}") from error
        return model

    @torch.no_grad()
    def right(self, model: TaskAdapter) -> Tensor:
        """(held-out texts,) bool: whether the likeliest class is theirs."""
        model.eval()
        parts = []
        for start in range(0, len(self.held_out), self.options.batch_size):
            texts = self.held_out[start : start + self.options.batch_size]
            tokens, padding, labels = collate(self.vocabulary.pad, texts)
            device = self.options.device
            logits = model(tokens.to(device), padding.to(device))
            parts.append(logits.argmax(-1).cpu() == labels)
        return torch.cat(parts)

    def adapted(self) -> TaskAdapter:
        """First stage: a linear map on the frozen pre-trained encoder."""
        o = self.options
        torch.manual_seed(o.seed)
        encoder = self.encoder()
        encoder.load_state_dict(self.pretrained.weights)
        model = TaskAdapter(encoder, len(self.task.classes))
        return self.train(model, o.adapt_epochs, o.adapt_lr, ADAPTED)

    def tuned(self, adapted: TaskAdapter) -> TaskAdapter:
        """Second stage: everything goes on from where the first one ended."""
        o = self.options
        torch.manual_seed(o.seed)
        model = TaskAdapter(adapted.encoder, len(self.task.classes), freeze=False)
        model.classifier.load_state_dict(adapted.classifier.state_dict())
        return self.train(model, o.epochs, o.lr, TUNED)

    def untrained(self) -> TaskAdapter:
        """The second stage alone, of an encoder that has not been pre-trained."""
        o = self.options
        torch.manual_seed(o.seed)
        model = TaskAdapter(self.encoder(), len(self.task.classes), freeze=False)
        return self.train(model, o.epochs, o.lr, UNTRAINED)


# ------------------------------------------------------------------------------------------ report


class Difference(NamedTuple):
    """Of two accuracies on the same texts, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> Difference:
        """From which texts either got right; Bonett and Price (2012), for paired proportions."""
        trials = len(one) + 2
        gained, lost = ((int(only.sum()) + 1) / trials for only in (one & ~other, other & ~one))
        mean = gained - lost
        half = 1.959964 * math.sqrt((gained + lost - mean**2) / trials)
        return cls((one.double() - other.double()).mean().item(), mean - half, mean + half)

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "not told apart from"


COMPARED = (
    (ADAPTED, MAJORITY),
    (ADAPTED, WORDS),
    (TUNED, MAJORITY),
    (TUNED, WORDS),
    (TUNED, UNTRAINED),
)


def show(right: dict[str, Tensor]) -> None:
    for name, texts in right.items():
        low, high = wilson_interval(int(texts.sum()), len(texts))
        print(f"{name:<16} {accuracy(texts):.4f} right (95 % interval {low:.4f} to {high:.4f})")
    for one, other in COMPARED:
        d = Difference.of(right[one], right[other])
        print(f"{one} is {d.verdict} {other}: {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})")


def accuracy(right: Tensor) -> float:
    return right.double().mean().item()


# ------------------------------------------------------------------------------------ command line


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, natural, rate = parser.add_argument, whole(1), number(0, math.inf)
    add(
        "--pretrained", type=Path, default=Path("runs/pretrain"), help="folder of a pretrain.py run"
    )
    add("--layer", choices=("stock", "fused"), default="fused", help="kind of encoder layer")
    add("--data", type=Path, metavar="FILE", help="CSV with columns text and label")
    add("--adapt-epochs", type=natural, default=5, help="of the first stage")
    add("--adapt-lr", type=rate, default=3e-3)
    add("--epochs", type=natural, default=4, help="of the second stage")
    add("--lr", type=rate, default=3e-4)
    add("--batch-size", type=natural, default=32)
    add("--seed", type=whole(0), default=0)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/finetune"), help="folder of the run")
    return parser


def run(options: argparse.Namespace) -> dict[str, Tensor]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RunError("finetune.py runs in one process, not under torchrun")
    for name in ("lr", "adapt_lr"):
        if not getattr(options, name):
            raise RunError(f"--{name.replace('_', '-')} must be more than 0")
    refuse_used(options.out)
    pretrained = read_pretrained(options.pretrained)
    try:
        if options.data:
            task = file_task(options.data)
        else:
            task = docstrings_task(pretrained.configuration.text)
        right = {MAJORITY: majority_class(task), WORDS: bag_of_words(task)}
    except TextError as error:
        raise RunError(f"--data: {error}") from error
    make_folder(options.out)
    print(
        f"{len(task.train):,} texts to train on, {len(task.held_out):,} held out, of "
        f"{len(task.classes)} classes: {', '.join(task.classes)}; {options.layer} layers",
        flush=True,
    )
    trainer = Trainer(options, task, pretrained)
    model = trainer.adapted()
    right[ADAPTED] = trainer.right(model)
    model = trainer.tuned(model)
    right[TUNED] = trainer.right(model)
    save(options, task, pretrained, model)
    right[UNTRAINED] = trainer.right(trainer.untrained())
    show(right)
    peak = peak_memory(options.device)
    write_json(
        options.out / "result.json",
        {
            "layer": options.layer,
            "seed": options.seed,
            "classes": task.classes,
            "train_texts": len(task.train),
            "held_out_texts": len(task.held_out),
            "right": {name: int(texts.sum()) for name, texts in right.items()},
            "differences": [
                {"of": one, "from": other, **Difference.of(right[one], right[other])._asdict()}
                for one, other in COMPARED
            ],
            "peak_bytes": peak,
        },
    )
    print(
        f"at most {peak / 2**20:,.0f} MiB of memory\n"
        f"wrote classifier, tokenizer and result to {options.out}"
    )
    return right


def save(
    options: argparse.Namespace, task: Task, pretrained: Pretrained, model: TaskAdapter
) -> None:
    tokenizer = pretrained.tokenizer
    write_whole(options.out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    facts = {"configuration": asdict(pretrained.configuration), "classes": task.classes}
    write_checkpoint(options.out / "classifier.safetensors", model_state(model), facts)


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    """Run the program; returns which held-out texts each classifier got right."""
    options = command_line().parse_args(arguments)
    try:
        return run(options)
    except RunError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
