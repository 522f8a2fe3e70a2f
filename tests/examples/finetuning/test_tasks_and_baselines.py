"""examples/finetune.py: no text is on both sides, baselines are fair, differences are paired."""

import inspect
import json
import math
from collections import Counter

import pytest
import torch

from tests.examples.finetuning.runs import write_csv
from tests.examples.programs import finetune, text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_docstrings_are_held_out_as_in_pre_training():
    task = finetune.docstrings_task("")
    assert task.classes == ["class", "function", "method", "module"]
    documents = list(dict.fromkeys(text.python_documents()))
    held_out = set(documents[:: text.HELD_OUT])
    assert {document for document, _ in task.held_out} <= held_out
    assert held_out.isdisjoint(document for document, _ in task.train)
    texts = [document for document, _ in task.train + task.held_out]
    assert len(texts) == len(set(texts)) > 1000
    labels = dict(task.train + task.held_out)
    assert labels[inspect.getdoc(json)] == "module"
    assert labels[inspect.getdoc(json.JSONEncoder)] == "class"
    assert labels[inspect.getdoc(json.dumps)] == "function"
    assert labels[inspect.getdoc(json.JSONEncoder.iterencode)] == "method"


def test_fifth_of_each_label_is_held_out_and_no_text_is_on_both_sides(tmp_path):
    rows = [(f"number {i}", "abcde"[i % 5]) for i in range(100)]
    again = [(f"  Number  {i}", "b") for i in range(100)]
    task = finetune.file_task(write_csv(tmp_path / "data.csv", rows + again))
    assert sorted(task.train + task.held_out) == sorted(rows)
    assert Counter(label for _, label in task.held_out) == dict.fromkeys("abcde", 4)
    assert task.classes == list("abcde")


def test_other_text_in_pre_training_is_said(capsys):
    finetune.docstrings_task("0")
    assert "pre-trained on other text" in capsys.readouterr().out
    documents = text.without_repeats(text.python_documents())
    corpus = text.Corpus(documents[:60], text.train_tokenizer(documents[:60], 500), 16)
    assert corpus.digest == text.digest_of(documents[:60])
    finetune.docstrings_task(text.digest_of(documents))
    assert "note" not in capsys.readouterr().out


def test_file_may_have_a_byte_order_mark_and_long_texts(tmp_path):
    rows = [("word " * 50_000 + str(i), "ab"[i % 2]) for i in range(20)]
    path = write_csv(tmp_path / "data.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    task = finetune.file_task(path)
    assert sorted(task.train + task.held_out) == sorted(rows)


def test_text_is_cut_and_marked(trainer):
    made = trainer()
    v = made.vocabulary
    tokenizer = made.pretrained.tokenizer
    texts = [text.Labelled("class method " * 20, "b"), text.Labelled("class", "a")]
    long, short = finetune.encode(texts, tokenizer, 12, ["a", "b"])
    ids = tokenizer.encode("class method " * 20, add_special_tokens=False).ids
    assert long.tokens.tolist() == [v.cls, *ids[:10], v.sep] and long.label == 1
    assert len(short.tokens) < 12 and short.label == 0
    tokens, padding, labels = finetune.collate(v.pad, [long, short])
    assert tokens.shape == (2, 12) and labels.tolist() == [1, 0]
    assert (tokens[1, len(short.tokens) :] == v.pad).all()
    assert (~padding).sum(1).tolist() == [12, len(short.tokens)]


# --------------------------------------------------------------------------------------- baselines


def test_majority_class_is_that_of_the_training_texts():
    train = [text.Labelled(f"t{i}", "a" if i % 3 else "b") for i in range(30)]
    held_out = [text.Labelled(f"h{i}", "b" if i % 4 else "a") for i in range(8)]
    right = finetune.majority_class(finetune.Task(["a", "b"], train, held_out))
    assert right.tolist() == [True, False, False, False] * 2


def colours(count: int, start: int) -> list[text.Labelled]:
    """The last word decides, and a label is four times as frequent as another."""
    words = {"red": "a", "scarlet": "a", "crimson": "a", "vermilion": "a", "green": "b"}
    return [
        text.Labelled(f"what is said at the beginning of text {start + i} is noise {word}", label)
        for i in range(count)
        for word, label in words.items()
    ]


def test_bag_of_words_learns_words_of_whole_texts():
    right = finetune.bag_of_words(finetune.Task(["a", "b"], colours(10, 0), colours(5, 100)))
    assert right.dtype == torch.bool and len(right) == 25 and right.all()


def test_bag_of_words_is_scored_on_what_is_held_out():
    swapped = [text.Labelled(t, "b" if label == "a" else "a") for t, label in colours(10, 0)]
    right = finetune.bag_of_words(finetune.Task(["a", "b"], colours(10, 0), swapped))
    assert len(right) == 50 and not right.any()


def test_difference_is_that_of_paired_texts():
    """By hand: 13 texts gained and 3 lost of 100, and one more of either."""
    one = torch.tensor([True] * 63 + [False] * 37)
    other = torch.tensor([True] * 50 + [False] * 47 + [True] * 3)
    d = finetune.Difference.of(one, other)
    half = 1.959964 * math.sqrt((18 / 102 - (10 / 102) ** 2) / 102)
    assert d.mean == pytest.approx(0.1)
    assert (d.low, d.high) == pytest.approx((10 / 102 - half, 10 / 102 + half))
    assert d.verdict == "above"
    assert finetune.Difference.of(other, one).verdict == "below"
    assert finetune.Difference.of(one, one).verdict == "not told apart from"


@pytest.mark.parametrize("texts", [12, 2000])
def test_few_texts_that_differ_tell_nothing(texts):
    """The exact test of McNemar gives four to none p = 0.125."""
    none = torch.zeros(texts, dtype=torch.bool)
    (four := none.clone())[:4] = True
    assert finetune.Difference.of(four, none).verdict == "not told apart from"
