"""Measurements that are made up, and files that hold them or something else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import tuned
from fastattn.tuned import Entry

CPU = torch.device("cpu")
GPU_NAME = "Some GPU"


def empty_table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple, Any]:
    """In the place of the one that this process has."""
    empty: dict[tuple, Any] = {}
    monkeypatch.setattr(tuned, "_table", empty)
    return empty


def make_entry(**changes: Any) -> Entry:
    fields = {
        "architecture": "cpu",
        "dtype": "bfloat16",
        "activation": "relu",
        "d_model": 64,
        "d_ff": 256,
        "tokens": 4096,
        "speedup": 1.25,
        "rounds": (1.25, 1.0, 1.5),
        "measured": {"gpu": GPU_NAME},
    }
    return Entry(**{**fields, **changes})


def add(**changes: Any) -> None:
    """To what this process has measured."""
    tuned.take([make_entry(**changes)])


def why_not_chosen(**changes: Any) -> str | None:
    """Of a call that the measurement of ``make_entry`` is about."""
    facts = {
        "device": CPU,
        "dtypes": (torch.bfloat16,),
        "activation": "relu",
        "tokens": 4096,
        "widths": (64, 256, 64),
        "column_offset": 0,
    }
    return tuned.why_not_chosen(**{**facts, **changes})


def content_of(*entries: Entry) -> dict[str, Any]:
    return {"format": "fastattn-tuning 1", "entries": [asdict(entry) for entry in entries]}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def without(name: str) -> dict[str, Any]:
    """A file whose second measurement lacks a field."""
    content = content_of(make_entry(), make_entry(activation="gelu"))
    del content["entries"][1][name]
    return content


def with_extra() -> dict[str, Any]:
    content = content_of(make_entry(), make_entry(activation="gelu"))
    content["entries"][1]["colour"] = "red"
    return content


NO_MEASUREMENTS = {
    "empty": "",
    "truncated": json.dumps(content_of(make_entry()))[:-20],
    "a list": "[]",
    "a number": "1",
    "no format": json.dumps({"entries": []}),
    "another format": json.dumps({**content_of(), "format": "fastattn-tuning 2"}),
    "no entries": json.dumps({"format": "fastattn-tuning 1"}),
    "entries of another kind": json.dumps({**content_of(), "entries": [1]}),
    "a missing field": json.dumps(without("speedup")),
    "no rounds": json.dumps(without("rounds")),
    "an extra field": json.dumps(with_extra()),
}
