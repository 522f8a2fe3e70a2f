"""Short runs of examples/finetune.py, and the files that they read."""

from __future__ import annotations

import csv
import random
from pathlib import Path

PRETRAINING = (
    "--steps 10 --batch-size 8 --seq-len 24 --d-model 32 --heads 4 --layers 2 --d-ff 64 "
    "--vocabulary 500 --warm-up 4 --eval-every 10 --eval-sequences 16 --order-pairs 16 --device cpu"
).split()
TUNING = "--adapt-epochs 1 --epochs 1 --batch-size 16 --device cpu".split()


def write_csv(path: Path, rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def in_order(count: int) -> list[tuple[str, str]]:
    """Texts whose label is which of two words comes first: no bag of words can tell."""
    decide, rows = random.Random(0), []
    while len(rows) < count:
        words = decide.sample(("module class method string object value name").split(), 5)
        one, other = sorted(decide.sample(range(6), 2))
        first, second = decide.sample(("if", "else"), 2)
        words[one:one], words[other:other] = [first], [second]
        rows.append((" ".join(words), first))
    return rows
