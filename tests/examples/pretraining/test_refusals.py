"""examples/pretrain.py refuses what it cannot use, and keeps the last checkpoint where it fails."""

import math

import pytest
from torch import nn

from tests.examples.programs import pretrain, python, refusal, text, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_folder_of_a_classifier_is_not_used(run, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "classifier.safetensors").write_bytes(b"kept")
    assert "--out" in refusal(capsys, run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["classifier.safetensors"]


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
    "option, value",
    [("--d-model", 64), ("--dropout", 0.2), ("--seed", 1), ("--lr", 1e-4), ("--amp", "bf16")],
)
def test_checkpoint_of_another_configuration(run, capsys, checkpoint, option, value):
    before = checkpoint.read_bytes()
    message = refusal(capsys, run, "--resume", option, value)
    assert option in message and str(value) in message and str(checkpoint) in message
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_text(run, capsys, checkpoint, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else. " * 1000)
    message = refusal(capsys, run, "--resume", "--text", other)
    assert "--text" in message and str(checkpoint) in message


def test_checkpoint_of_another_vocabulary(run, capsys, checkpoint, english):
    before = checkpoint.read_bytes()
    other = text.train_tokenizer([english.read_text()], 400)
    other.save(str(checkpoint.parent / "other.json"))
    message = refusal(capsys, run, "--resume", "--tokenizer", checkpoint.parent / "other.json")
    assert "--tokenizer" in message and str(checkpoint) in message
    other.save(str(checkpoint.parent / "tokenizer.json"))  # the run's own, spoilt
    message = refusal(capsys, run, "--resume")
    assert "--tokenizer" in message and str(checkpoint) in message
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        ("{}", "not a tokenizer"),
        (text.Tokenizer(text.models.WordPiece({"a": 0}, unk_token="a")).to_str(), "[MASK]"),
    ],
)
def test_unusable_tokenizer(run, capsys, tmp_path, content, complaint):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    message = refusal(capsys, run, "--tokenizer", path)
    assert "--tokenizer" in message and str(path) in message and complaint in message


def test_run_is_not_overwritten_unless_resumed(run, capsys, checkpoint):
    before = checkpoint.read_bytes()
    message = refusal(capsys, run)
    assert "--out" in message and str(checkpoint.parent) in message and "--resume" in message
    assert checkpoint.read_bytes() == before


def test_fewer_steps_than_done(run, capsys, checkpoint):
    assert "--steps 1" in refusal(capsys, run, "--resume", "--steps", 1)


def test_full_disk_leaves_the_old_checkpoint(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def fill_the_disk(tensors, path, metadata):
        path.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", fill_the_disk)
    message = refusal(capsys, run, "--resume", "--eval-every", 100)
    assert "No space left on device" in message and "--out" in message
    assert str(checkpoint.parent) in message and "the last one is kept" in message
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("unfinished*"))


def test_file_size_limit_leaves_the_old_checkpoint(arguments, checkpoint):
    """A real failing write: the system refuses to let the file grow."""
    before = checkpoint.read_bytes()
    limited = (
        "import resource, signal, sys, pretrain\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)\n"
        "pretrain.main(sys.argv[1:])\n"
    )
    stopped = python("-c", limited, *arguments("--eval-every", 100, "--resume"))
    assert stopped.returncode == 2 and str(checkpoint) in stopped.stderr
    assert "--out" in stopped.stderr and "the last one is kept" in stopped.stderr
    assert checkpoint.read_bytes() == before


def test_loss_that_is_not_a_number_stops_the_run(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    loss = pretrain.masked_language_model_loss
    monkeypatch.setattr(
        pretrain, "masked_language_model_loss", lambda *a, **k: loss(*a, **k) * math.nan
    )
    message = refusal(capsys, run, "--resume")
    assert "loss of step 4 is nan" in message and "last checkpoint is kept" in message
    assert checkpoint.read_bytes() == before


def test_gradients_that_are_not_finite_stop_the_run(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *inputs: clip(*inputs) * math.inf)
    message = refusal(capsys, run, "--resume")
    assert "gradients of step 4" in message and "inf" in message
    assert checkpoint.read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(run, capsys, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def spoil(trainer, number):
        next(trainer.model.parameters()).data.fill_(math.inf)
        return 1.0

    monkeypatch.setattr(pretrain.Trainer, "update", spoil)
    options = "--resume --checkpoint-every 4 --eval-every 100".split()
    assert "finite" in refusal(capsys, run, *options)
    assert checkpoint.read_bytes() == before


def test_interrupt_keeps_the_checkpoint_and_says_how_to_go_on(run, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def interrupt(*inputs, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(pretrain, "masked_language_model_loss", interrupt)
        run("--resume")
    assert stopped.value.code == f"stopped; --resume goes on from what {checkpoint.parent} holds"
    assert checkpoint.read_bytes() == before
    assert len(run("--resume").log.rows) == 13


def test_interrupt_while_writing_keeps_the_checkpoint(run, checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def interrupt(tensors, path, metadata):
        path.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_file", interrupt)
    with pytest.raises(SystemExit, match="--resume goes on"):
        run("--resume")
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("unfinished*"))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"too short", "too short"),
        (b"Two sentences. " * 20, "too short"),
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
        ("--seq-len", "4"),
        ("--accumulate", "3"),
        ("--dropout", "1"),
        ("--dropout", "nan"),
        ("--lr", "-1"),
        ("--heads", "5"),
        ("--amp", "fp8"),
        ("--parallel", "pipeline"),
        ("--seed", "-1"),
        ("--device", "abacus"),
    ],
)
def test_unusable_option_value(run, capsys, option, value):
    message = refusal(capsys, run, option, value)
    assert option in message and value in message
