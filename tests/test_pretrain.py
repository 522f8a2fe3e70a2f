"""examples/pretrain.py: it learns, resumes bit for bit, and refuses what it cannot use."""

import csv
import importlib
import inspect
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pretrain, text = map(importlib.import_module, ("pretrain", "text"))

TINY = "--steps 50 --batch-size 4 --seq-len 32 --d-model 32 --heads 4 --layers 2 --d-ff 64".split()
SMALL = "--batch-size 32 --seq-len 32 --d-model 64 --heads 4 --layers 2 --d-ff 256".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


@pytest.fixture
def run(english, tmp_path):
    """Runs the tiny configuration on English text; later options override earlier ones."""

    def run(*options, out="run", layer_class=None):
        where = ["--text", str(english), "--device", "cpu", "--out", str(tmp_path / out)]
        return pretrain.main([*TINY, *where, *map(str, options)], layer_class)

    return run


def largest_difference(first, second) -> float:
    assert len(first.train_loss) == len(second.train_loss) == 50
    pairs = zip(first.train_loss, second.train_loss, strict=True)
    return max(abs(one - other) for one, other in pairs)


# ------------------------------------------------------------------------------------- learning


def test_stock_and_fused_curves_coincide_without_dropout(run):
    stock = run("--layer", "stock", "--dropout", 0, out="stock").history
    fused = run("--layer", "fused", "--dropout", 0, out="fused").history
    assert largest_difference(stock, fused) <= 1e-5
    for step, loss in stock.held_out_loss.items():
        assert abs(fused.held_out_loss[step] - loss) <= 1e-5


def test_fused_curve_with_dropout_equals_plain_replay_of_its_decisions(run, contract_seeds):
    from reference import ReplayEncoderLayer

    fused = run("--layer", "fused", "--dropout", 0.1, out="fused").history
    replay = run("--dropout", 0.1, out="replay", layer_class=ReplayEncoderLayer).history
    without = run("--layer", "fused", "--dropout", 0, out="without").history
    assert largest_difference(fused, replay) <= 1e-5
    assert largest_difference(fused, without) > 1e-3


def test_training_learns_from_context(run):
    """A tenth of the chosen bytes stays in place, so 0.9 * unigram takes no context at all."""
    result = run(*SMALL, "--steps", 600, "--lr", 5e-3, "--dropout", 0, "--eval-every", 600)
    assert result.history.held_out_loss[600] < 0.9 * result.unigram_entropy - 0.15
    assert result.history.held_out_loss[600] < result.history.held_out_loss[0] / 2


def test_log_and_plot_are_written(run, tmp_path):
    history = run("--steps", 7, "--eval-every", 3).history
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [float(row["train_loss"]) for row in rows[1:]] == history.train_loss
    assert [row["held_out_loss"] != "" for row in rows] == [
        step in (0, 3, 6, 7) for step in range(8)
    ]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("layer", ["stock", "fused"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(run, tmp_path, layer):
    whole = run("--layer", layer, "--steps", 12, "--eval-every", 4, out="whole").history
    run("--layer", layer, "--steps", 5, "--eval-every", 4)
    torch.rand(3)  # the random state of the process is no part of a run
    resumed = run("--layer", layer, "--steps", 12, "--eval-every", 4, "--resume").history
    assert resumed.train_loss == whole.train_loss
    assert {**whole.held_out_loss, **resumed.held_out_loss} == resumed.held_out_loss
    weights, _ = pretrain.read_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")
    resumed_weights, _ = pretrain.read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    for name in weights:
        if name.startswith(("model.", "optimizer.", "random.")):
            assert torch.equal(weights[name], resumed_weights[name]), name


def test_stock_checkpoint_goes_on_with_fused_layers(run):
    stock = run("--layer", "stock", "--dropout", 0, "--steps", 20, out="whole").history
    run("--layer", "stock", "--dropout", 0, "--steps", 10)
    mixed = run("--layer", "fused", "--dropout", 0, "--steps", 20, "--resume").history
    assert mixed.train_loss == pytest.approx(stock.train_loss, abs=1e-5)


def refusal(capsys, run, *options) -> str:
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def checkpoint(run, tmp_path) -> Path:
    run("--steps", 2)
    return tmp_path / "run" / "checkpoint.safetensors"


def test_missing_checkpoint(run, capsys, tmp_path):
    message = refusal(capsys, run, "--resume")
    assert "--resume" in message and str(tmp_path / "run" / "checkpoint.safetensors") in message


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_weight(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


@pytest.mark.parametrize("damage", [truncate, flip_a_weight, lambda content: b""])
def test_corrupt_checkpoint(run, capsys, checkpoint, damage):
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    message = refusal(capsys, run, "--resume")
    assert "--resume" in message and str(checkpoint) in message
    assert checkpoint.read_bytes() == damaged


@pytest.mark.parametrize(
    "option, value", [("--d-model", 64), ("--dropout", 0.2), ("--seed", 1), ("--lr", 1e-4)]
)
def test_checkpoint_of_another_configuration(run, capsys, checkpoint, option, value):
    before = checkpoint.read_bytes()
    message = refusal(capsys, run, "--resume", option, value)
    assert option in message and str(value) in message and str(checkpoint) in message
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_text(run, capsys, checkpoint, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 100)
    message = refusal(capsys, run, "--resume", "--text", other)
    assert "--text" in message and str(checkpoint) in message


def test_run_is_not_overwritten_unless_resumed(run, capsys, checkpoint):
    before = checkpoint.read_bytes()
    message = refusal(capsys, run)
    assert "--out" in message and str(checkpoint.parent) in message and "--resume" in message
    assert checkpoint.read_bytes() == before


def test_fewer_steps_than_done(run, capsys, checkpoint):
    assert "--steps 1" in refusal(capsys, run, "--resume", "--steps", 1)


def test_interrupted_write_leaves_the_old_checkpoint(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def fill_the_disk(tensors, path, metadata):
        path.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain, "save_file", fill_the_disk)
    message = refusal(capsys, run, "--resume", "--steps", 4)
    assert "No space left on device" in message and str(checkpoint) in message
    assert checkpoint.read_bytes() == before
    assert not checkpoint.with_suffix(".unfinished").exists()


def test_loss_that_is_not_a_number_stops_the_run(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    mean_loss = pretrain.mean_loss
    monkeypatch.setattr(pretrain, "mean_loss", lambda *inputs: mean_loss(*inputs) * math.nan)
    message = refusal(capsys, run, "--resume", "--steps", 4)
    assert "loss of step 3 is" in message and "nan" in message
    assert checkpoint.read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf),
    )
    assert "finite" in refusal(capsys, run, "--resume", "--steps", 3)
    assert checkpoint.read_bytes() == before


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"too short", "too short"),
        (b"caf\xe9 " * 1000, "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_unusable_text_file(run, capsys, tmp_path, content, complaint):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    message = refusal(capsys, run, "--text", path)
    assert "--text" in message and str(path) in message and complaint in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--layer", "quick"),
        ("--steps", "0"),
        ("--batch-size", "-1"),
        ("--seq-len", "1.5"),
        ("--dropout", "1"),
        ("--dropout", "nan"),
        ("--lr", "-1"),
        ("--heads", "5"),
        ("--seed", "-1"),
        ("--device", "abacus"),
    ],
)
def test_unusable_option_value(run, capsys, option, value):
    message = refusal(capsys, run, option, value)
    assert option in message and value in message


# ------------------------------------------------------------------------------------------- text


def test_default_text_is_the_english_that_comes_with_python():
    documents = text.python_documents()
    assert len(documents) > len(topics)
    assert sum(map(len, documents)) > sum(map(len, topics.values()))
    assert topics["assert"].encode() in documents
    assert any(inspect.getdoc(json).encode() in document for document in documents)


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "silent.py").write_text("x = 1")
    (tmp_path / "module.py").write_text(
        '"""Of the module."""\nraise SystemExit\nclass C:\n    def f(self):\n        "Of f."\n'
    )
    assert text.module_docstrings(tmp_path) == ["Of the module.\n\nOf f."]


def test_last_tenth_of_every_document_is_held_out():
    corpus = text.Corpus([b"a" * 90 + b"A" * 10, b"b" * 900 + b"B" * 100, b"short"])
    assert bytes(corpus.train.tokens.tolist()) == b"a" * 90 + b"b" * 900 + b"short"
    assert bytes(corpus.held_out.tokens.tolist()) == b"A" * 10 + b"B" * 100


def test_windows_lie_within_one_document():
    pieces = text.Pieces([b"abc", b"", b"ABCDEFGH"])
    windows = pieces.sample(1000, 5, torch.Generator().manual_seed(0)).tolist()
    pad = text.PAD
    possible = [list(b"abc") + [pad, pad]] + [list(b"ABCDEFGH")[i : i + 5] for i in range(4)]
    assert all(windows.count(window) > 100 for window in possible)
    assert all(window in possible for window in windows)


def test_batch_is_a_function_of_its_key():
    pieces = text.Pieces([bytes(range(97, 123)) * 10, b"short"])
    first, again, other = (text.make_batch(pieces, 8, 16, key) for key in ("0/1", "0/1", "0/2"))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


def test_corruption_follows_its_probabilities():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.BYTES, (1000, 500), generator=generator)
    tokens[:, 400:] = text.PAD
    corrupted, chosen = text.corrupt(tokens, generator)
    assert not chosen[:, 400:].any()
    assert torch.equal(corrupted[~chosen], tokens[~chosen])

    def binomial(count: int, trials: int, probability: float) -> bool:
        deviation = math.sqrt(trials * probability * (1 - probability))
        return abs(count - trials * probability) < 5 * deviation

    total = int(chosen.sum())
    masked = int((corrupted == text.MASK).sum())
    kept = int((corrupted == tokens)[chosen].sum())
    assert binomial(total, 400 * 1000, 0.15)
    assert binomial(masked, total, 0.8)
    assert binomial(kept, total, 0.1 + 0.1 / text.BYTES)  # a random byte may be the same one
    assert int(corrupted[chosen].max()) == text.MASK
    substitutes = corrupted[chosen & (corrupted != text.MASK) & (corrupted != tokens)]
    counts = torch.bincount(substitutes, minlength=text.BYTES)
    assert all(binomial(int(n), total - masked - kept, 1 / text.BYTES) for n in counts)


def test_unigram_entropy():
    corpus = text.Corpus([b"ab" * 50_000])
    assert corpus.unigram_entropy() == pytest.approx(math.log(2), abs=0.01)
