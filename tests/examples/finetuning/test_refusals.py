"""examples/finetune.py refuses what it cannot use, and overwrites nothing."""

from pathlib import Path

import pytest
import torch

from tests.examples.programs import refusal, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_folder_without_a_run(run, capsys, tmp_path):
    message = refusal(capsys, run, "--pretrained", tmp_path / "nowhere")
    assert "--pretrained" in message and str(tmp_path / "nowhere") in message


@pytest.fixture
def copied(pretrained, tmp_path) -> Path:
    (folder := tmp_path / "copied").mkdir()
    for name in ("best.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((pretrained / name).read_bytes())
    return folder


def test_damaged_weights(run, capsys, copied):
    path = copied / "best.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    message = refusal(capsys, run, "--pretrained", copied)
    assert "--pretrained" in message and str(path) in message and "damaged" in message


def test_weights_of_another_program(run, capsys, copied):
    training.write_checkpoint(copied / "best.safetensors", {"x": torch.zeros(1)}, {"step": 1})
    message = refusal(capsys, run, "--pretrained", copied)
    assert "--pretrained" in message and str(copied) in message


@pytest.mark.parametrize("change", [lambda t: t.replace('"class"', '"klass"'), lambda t: t[:100]])
def test_tokenizer_that_is_not_the_one_of_the_weights(run, capsys, copied, change):
    path = copied / "tokenizer.json"
    path.write_text(change(path.read_text()))
    message = refusal(capsys, run, "--pretrained", copied)
    assert "--pretrained" in message and str(path) in message


def repeated(word: str, labels: str) -> bytes:
    """A file with a text for every label, each longer by a word."""
    rows = [f"{word * (i + 1)},{label}\n" for i, label in enumerate(labels)]
    return "".join(["text,label\n", *rows]).encode()


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        (b"", "no column 'text'"),
        (b"text,class\na,b\n", "no column 'label'"),
        (b"text,label\n\xff\xfe,b\n", "UTF-8"),
        (b"text,label\none,a\ntwo,\n", "line 3"),
        (b"text,label\none,a\ntwo\n", "line 3"),
        (b"text,label\n", "two labels or more"),
        (repeated("t", "a" * 20), "two labels or more"),
        (b"text,label\ngood, really,a\n", "line 2"),
        (repeated("t", "ab" + "a" * 18), "label 'b' has too few texts: 1"),
        (repeated("!", "ab" * 10), "no bag of words"),
    ],
)
def test_unusable_data(run, capsys, tmp_path, content, complaint):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    message = refusal(capsys, run, "--data", path)
    assert message.startswith("finetune.py: error: --data: ") and complaint in message
    assert not (tmp_path / "tuned").exists()


def test_run_is_not_overwritten(run, capsys, tmp_path):
    run()
    before = {path: path.read_bytes() for path in (tmp_path / "tuned").iterdir()}
    assert "--out" in refusal(capsys, run)
    assert {path: path.read_bytes() for path in (tmp_path / "tuned").iterdir()} == before


def test_loss_that_is_not_a_number(run, capsys, tmp_path):
    message = refusal(capsys, run, "--lr", 1e30, "--epochs", 2)
    assert "fine-tuned" in message and "1e+30" in message and "loss of epoch" in message
    assert not (tmp_path / "tuned" / "result.json").exists()


def test_full_disk(run, capsys, monkeypatch, tmp_path):
    def fill_the_disk(tensors, path, metadata):
        path.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", fill_the_disk)
    message = refusal(capsys, run)
    assert "--out" in message and "No space left on device" in message
    assert not list((tmp_path / "tuned").glob("*.safetensors"))


def test_folder_of_a_pre_training_is_not_used(run, capsys, pretrained):
    before = {path: path.read_bytes() for path in pretrained.iterdir()}
    assert "--out" in refusal(capsys, run, "--out", pretrained)
    assert {path: path.read_bytes() for path in pretrained.iterdir()} == before


def test_folder_that_cannot_be_made(run, capsys, tmp_path):
    (tmp_path / "tuned").write_text("a file")
    assert "--out" in refusal(capsys, run)


def test_several_processes(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refusal(capsys, run)


@pytest.mark.parametrize(
    "option, value",
    [("--lr", 0), ("--adapt-lr", 0), ("--lr", -1), ("--epochs", 0), ("--adapt-epochs", "x"),
     ("--batch-size", 0), ("--seed", -1), ("--layer", "flash"), ("--device", "toaster")],
)  # fmt: skip
def test_unusable_option_value(run, capsys, option, value):
    assert option in refusal(capsys, run, option, value)
