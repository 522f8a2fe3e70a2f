"""examples/text.py: documents, vocabularies, windows with their samples, and who gets which."""

import inspect
import json
import math
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch

from tests.examples.programs import python, text


def test_default_text_is_the_english_that_comes_with_python():
    documents = text.python_documents()
    assert len(documents) > len(topics)
    assert sum(map(len, documents)) > sum(map(len, topics.values()))
    assert topics["assert"] in documents
    assert any(inspect.getdoc(json) in document for document in documents)


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "silent.py").write_text("x = 1")
    (tmp_path / "module.py").write_text(
        '"""Of the module."""\nraise SystemExit\n'
        'class C:\n    "Of C."\n    def f(self):\n        "Of f."\n'
        'def g():\n    "Of g."\n'
    )
    assert text.module_docstrings(tmp_path) == [
        ("Of the module.", "module"),
        ("Of C.", "class"),
        ("Of g.", "function"),
        ("Of f.", "method"),
    ]


def test_sentences():
    assert text.sentences("One. Two!  Three\nfour? \n\n Five\n\n\n") == [
        "One.", "Two!", "Three\nfour?", "Five",
    ]  # fmt: skip


def test_vocabulary_is_a_function_of_the_text(english):
    """Hash orders differ between processes, so that another one is asked."""
    script = (
        "import sys, text\n"
        "tokenizer = text.train_tokenizer([open(sys.argv[1], encoding='utf-8').read()], 2000)\n"
        "tokenizer.save(sys.argv[2])"
    )
    path = english.with_name("tokenizer.json")
    other = python("-c", script, english, path, PYTHONHASHSEED="1")
    assert other.returncode == 0, other.stderr
    here = text.train_tokenizer([english.read_text(encoding="utf-8")], 2000)
    assert text.read_tokenizer(path).to_str() == here.to_str()


def test_trained_vocabulary_reads_its_text(english):
    content = english.read_text(encoding="utf-8")
    tokenizer = text.train_tokenizer([content], 2000)
    assert tokenizer.get_vocab_size() == 2000
    assert [tokenizer.token_to_id(token) for token in text.SPECIALS] == list(range(5))
    encoded = tokenizer.encode("The statement ##s and [MASK].").tokens
    assert encoded == ["the", "statement", "#", "#", "s", "and", "[MASK]", "."]
    assert "[UNK]" not in tokenizer.encode(content).tokens


# ----------------------------------------------------------------------------------------- windows


PLAIN = text.Vocabulary(1000, 0, 1, 2, 3, 4)


def spans_of(windows) -> list[list[int]]:
    """The tokens of each window."""
    return [
        windows.tokens[windows.bounds[start] : windows.bounds[end]].tolist()
        for start, end in windows.spans
    ]


def test_windows_are_whole_sentences_of_one_document():
    documents = [[[5, 6], [7], [8, 9, 10], [11]], [[20], [21, 22]], [[30]], []]
    windows = text.Windows(documents, PLAIN, 9)
    assert spans_of(windows) == [[5, 6, 7, 8, 9, 10], [8, 9, 10, 11], [20, 21, 22]]
    overlapping = text.Windows(documents, PLAIN, 9, overlapping=True)
    assert spans_of(overlapping) == [[5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11], [20, 21, 22]]


def test_long_sentences_are_cut():
    windows = text.Windows([[list(range(10, 30))]], PLAIN, 13)
    assert spans_of(windows) == [list(range(10, 20)), list(range(20, 30))]


def test_sample_is_two_segments_in_the_order_of_its_label():
    windows = text.Windows([[[10, 11], [12], [13, 14, 15]]], PLAIN, 12)
    seen = Counter()
    for key in range(200):
        sample = windows[str(key), 0]
        clean = sample.masked.tokens.flatten().clone()
        clean[sample.masked.chosen] = sample.masked.targets
        label = int(sample.swapped)
        assert torch.equal(sample.padding[0], clean == PLAIN.pad)
        row = clean[clean != PLAIN.pad].tolist()
        assert row[0] == PLAIN.cls and row[-1] == PLAIN.sep and row.count(PLAIN.sep) == 2
        cut = row.index(PLAIN.sep)
        segments = [row[1:cut], row[cut + 1 : -1]]
        first, second = reversed(segments) if label else segments
        assert first + second == [10, 11, 12, 13, 14, 15] and len(first) in (2, 3)
        seen[label, len(first)] += 1
    assert len(seen) == 4 and min(seen.values()) > 20


def test_sample_is_a_function_of_its_key():
    windows = text.Windows([[[10 + i] * 3 for i in range(8)]], PLAIN, 40)
    first, again, other = (windows[key, 0] for key in ("0/1", "0/1", "0/2"))
    assert torch.equal(first.masked.tokens, again.masked.tokens)
    assert torch.equal(first.masked.chosen, again.masked.chosen)
    assert torch.equal(first.swapped, again.swapped)
    assert not torch.equal(first.masked.tokens, other.masked.tokens)


def test_joined_batch_points_at_the_same_tokens():
    windows = text.Windows([[[10 + i] * 3 for i in range(40)]], PLAIN, 24)
    parts = [windows["0", number] for number in range(len(windows))]
    batch = text.join(parts)
    assert batch.masked.tokens.shape == batch.padding.shape == (len(parts), 24)
    places = batch.masked.chosen
    rows = [part.masked.chosen + 24 * i for i, part in enumerate(parts)]
    assert torch.equal(places, torch.cat(rows)) and len(places) > 5
    clean = batch.masked.tokens.flatten().clone()
    clean[places] = batch.masked.targets
    for i, part in enumerate(parts):
        row = part.masked.tokens.flatten().clone()
        row[part.masked.chosen] = part.masked.targets
        assert torch.equal(clean.view(-1, 24)[i], row)


def test_a_fifth_is_held_out():
    few = [list(range(10)), list(range(10, 13))]
    assert text.split(few) == ([list(range(8)), [10, 11, 12]], [[8, 9], []])
    many = [[number] for number in range(60)]
    train, held_out = text.split(many)
    assert held_out == many[::5] and sorted(train + held_out) == many


def test_no_document_is_trained_on_and_held_out():
    """Every document occurs twice, at places of which one is held out and one is not."""
    documents = [f"Text {number} of many. It has a second sentence." for number in range(61)]
    tokenizer = text.train_tokenizer(documents, 200)
    corpus = text.Corpus(documents * 2, tokenizer, 32)
    assert corpus.documents == 61 and len(corpus.held_out) == 13
    train, held_out = ({tuple(span) for span in spans_of(part)}
                       for part in (corpus.train, corpus.held_out))  # fmt: skip
    assert len(train) == 48 and not train & held_out


def test_unigram_entropy():
    documents = ["ab ba. " * 10_000]
    corpus = text.Corpus(documents, text.train_tokenizer(documents, 50), 16)
    assert corpus.unigram_entropy() == pytest.approx(math.log(3), abs=0.01)


def test_unigram_entropy_prices_held_out_tokens_by_training():
    """Most of what there is to train on never occurs in the last fifth."""
    documents = ["ab ab ab ba. " * 8_000 + "ba ba ba ba. " * 2_000]
    corpus = text.Corpus(documents, text.train_tokenizer(documents, 50), 16)
    counts = [
        torch.bincount(part.tokens, minlength=corpus.train.vocabulary.size).double()
        for part in (corpus.train, corpus.held_out)
    ]
    train, held_out = (count / count.sum() for count in counts)
    expected = -(held_out * (train + 1e-12).log()).sum().item()
    own = -(train * (train + 1e-12).log()).sum().item()
    assert corpus.unigram_entropy() == pytest.approx(expected, abs=0.01)
    assert abs(expected - own) > 0.1


# ----------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("processes, micro_batches", [(1, 1), (2, 1), (2, 3), (4, 1)])
def test_every_sample_comes_once_an_epoch_over_processes_and_a_resume(processes, micro_batches):
    samples, batch_size, cut, steps = 50, 12, 7, 25  # 25 * 12 is 6 epochs of 50
    seen = []
    for part in (range(cut), range(cut, steps)):
        for process in range(processes):
            sampler = text.StepSampler(
                samples,
                batch_size,
                part,
                seed=3,
                process=process,
                processes=processes,
                micro_batches=micro_batches,
            )
            batches = list(sampler)
            assert len(batches) == len(sampler) == len(part) * micro_batches
            seen += [item for batch in batches for item in batch]
    assert Counter(seen) == Counter((f"3/{e}", i) for e in range(6) for i in range(samples))


def test_steps_hold_the_same_samples_for_any_number_of_processes():
    def step_samples(processes, micro_batches, seed=0):
        parts = [
            text.StepSampler(50, 12, range(20), seed=seed, process=process, processes=processes,
                             micro_batches=micro_batches)
            for process in range(processes)
        ]  # fmt: skip
        batches = [list(part) for part in parts]
        return [
            sorted(
                item
                for mine in batches
                for batch in mine[step * micro_batches : (step + 1) * micro_batches]
                for item in batch
            )
            for step in range(20)
        ]

    assert step_samples(1, 1) == step_samples(2, 1) == step_samples(3, 2)
    assert step_samples(1, 1) != step_samples(1, 1, seed=1)


def test_epochs_are_shuffled_each_in_its_own_way():
    orders = [number for (batch,) in [list(text.StepSampler(64, 64, range(e, e + 1), seed=0))
              for e in range(2)] for _, number in batch]  # fmt: skip
    first, second = orders[:64], orders[64:]
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second and first != sorted(first)
