"""examples/finetune.py: both stages learn, baselines are fair, and bad input is refused."""

import csv
import importlib
import inspect
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from tests import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

sys.path.insert(0, str(ROOT / "examples"))
finetune, pretrain, training, text = map(
    importlib.import_module, ("finetune", "pretrain", "training", "text")
)

pytestmark = pytest.mark.usefixtures("one_thread")

PRETRAINING = (
    "--steps 10 --batch-size 8 --seq-len 24 --d-model 32 --heads 4 --layers 2 --d-ff 64 "
    "--vocabulary 500 --warm-up 4 --eval-every 10 --eval-sequences 16 --order-pairs 16 --device cpu"
).split()
TUNING = "--adapt-epochs 1 --epochs 1 --batch-size 16 --device cpu".split()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (source := folder / "topics.txt").write_text("\n\n".join(sorted(topics.values())[:30]))
    options = ["--text", str(source), "--dropout", "0", "--out", str(folder / "run")]
    pretrain.main([*PRETRAINING, *options])
    return folder / "run"


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


@pytest.fixture
def data(tmp_path) -> Path:
    return write_csv(tmp_path / "data.csv", in_order(60))


@pytest.fixture
def run(pretrained, data, tmp_path):
    def run(*options, out="tuned"):
        where = ["--pretrained", pretrained, "--data", data, "--out", tmp_path / out]
        return finetune.main([str(option) for option in (*TUNING, *where, *options)])

    return run


@pytest.fixture
def trainer(pretrained, data):
    def make(*options):
        parsed = finetune.command_line().parse_args([*TUNING, *map(str, options)])
        task = finetune.file_task(data)
        return finetune.Trainer(parsed, task, finetune.read_pretrained(pretrained))

    return make


# ---------------------------------------------------------------------------------------- learning


def test_fine_tuning_learns_what_no_bag_of_words_tells(run, tmp_path):
    data = write_csv(tmp_path / "long.csv", in_order(600))
    right = run("--data", data, "--epochs", 12, "--lr", 2e-3)
    accuracy = {name: texts.double().mean().item() for name, texts in right.items()}
    assert len(right["fine-tuned"]) == 120
    assert accuracy["fine-tuned"] > 0.9
    assert accuracy["bag of words"] < 0.7 and accuracy["majority class"] < 0.7
    assert finetune.Difference.of(right["fine-tuned"], right["bag of words"]).verdict == "above"


def test_first_stage_trains_the_classifier_alone(trainer):
    trainer = trainer()
    model = trainer.adapted()
    for name, weight in trainer.pretrained.weights.items():
        assert torch.equal(model.encoder.state_dict()[name], weight), name
    torch.manual_seed(0)
    begun = finetune.TaskAdapter(trainer.encoder(), 2).classifier
    assert not torch.equal(model.classifier.weight, begun.weight)


def test_second_stage_goes_on_from_the_first(trainer, monkeypatch):
    trainer = trainer()
    adapted = trainer.adapted()
    classifier = adapted.classifier.weight.clone()
    seen = []

    def observed(model, loader, epochs, lr):
        seen.append((model.classifier.weight.clone(), model.encoder.state_dict(), model.freeze))

    monkeypatch.setattr(finetune, "train_adapted_model", observed)
    trainer.tuned(adapted)
    [(begun, encoder, frozen)] = seen
    assert torch.equal(begun, classifier) and not frozen
    for name, weight in trainer.pretrained.weights.items():
        assert torch.equal(encoder[name], weight), name


def test_stages_see_the_training_texts_alone_in_a_new_order_each_time(trainer, monkeypatch):
    trainer = trainer("--adapt-epochs", 2, "--epochs", 3, "--adapt-lr", 0.5, "--lr", 0.25)
    stages = []

    def observed(model, loader, epochs, lr):
        orders = [[tuple(row) for batch in loader for row in batch[0].tolist()] for _ in range(2)]
        stages.append((model.freeze, epochs, lr, orders))

    monkeypatch.setattr(finetune, "train_adapted_model", observed)
    trainer.tuned(trainer.adapted())
    trainer.untrained()
    assert [stage[:3] for stage in stages] == [(True, 2, 0.5), (False, 3, 0.25), (False, 3, 0.25)]
    [train, held_out] = [
        sorted(tuple(e.tokens.tolist()) for e in texts)
        for texts in (trainer.train_texts, trainer.held_out)
    ]
    assert len(held_out) == len(trainer.task.held_out) and not set(train) & set(held_out)
    for *_, (first, second) in stages:
        unpadded = [tuple(x for x in row if x != trainer.vocabulary.pad) for row in first]
        assert sorted(unpadded) == train
        assert first != second


def test_each_score_is_of_its_own_model(run, monkeypatch, tmp_path):
    made, scored = {}, []

    def note(stage):
        build = getattr(finetune.Trainer, stage)

        def observed(self, *inputs):
            made[stage] = build(self, *inputs)
            return made[stage]

        monkeypatch.setattr(finetune.Trainer, stage, observed)

    for stage in ("adapted", "tuned", "untrained"):
        note(stage)

    def right(self, model):
        scored.append(model)
        texts = torch.zeros(len(self.held_out), dtype=torch.bool)
        texts[: len(scored)] = True
        return texts

    monkeypatch.setattr(finetune.Trainer, "right", right)
    result = run()
    assert [model is made[stage] for model, stage in zip(scored, made, strict=True)] == [True] * 3
    counts = [int(result[name].sum()) for name in ("adapted", "fine-tuned", "not pre-trained")]
    assert counts == [1, 2, 3]


def test_score_is_taken_without_dropout(trainer):
    made = trainer()
    model = made.tuned(made.adapted())
    modes = []
    model.train()
    model.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    made.right(model)
    assert modes and not any(modes)


@pytest.mark.parametrize("layer, kind", [("stock", "TransformerEncoderLayer"), ("fused", "Fused")])
def test_layers_are_of_the_kind_asked_for(trainer, layer, kind):
    encoder = trainer("--layer", layer).encoder()
    assert all(type(one).__name__.startswith(kind) for one in encoder.layers)


def test_every_parameter_of_the_encoder_is_fine_tuned(trainer):
    trainer = trainer("--lr", 1e-2)
    encoder = trainer.tuned(trainer.adapted()).encoder
    used = [name for name, _ in encoder.named_parameters() if not name.startswith("output.")]
    assert used
    for name in used:
        assert not torch.equal(encoder.state_dict()[name], trainer.pretrained.weights[name]), name


def test_control_has_not_been_pre_trained(trainer, monkeypatch):
    trainer = trainer()
    monkeypatch.setattr(finetune, "train_adapted_model", lambda *arguments: None)
    state = trainer.untrained().encoder.state_dict()
    matrices = [name for name, weight in trainer.pretrained.weights.items() if weight.dim() > 1]
    assert matrices
    for name in matrices:
        assert not torch.equal(state[name], trainer.pretrained.weights[name]), name


def test_stock_and_fused_layers_agree_without_dropout(trainer):
    def logits(layer):
        made = trainer("--layer", layer)
        model = made.tuned(made.adapted()).eval()
        tokens, padding, _ = finetune.collate(made.vocabulary.pad, made.held_out)
        with torch.no_grad():
            return model(tokens, padding)

    torch.testing.assert_close(logits("fused"), logits("stock"), rtol=1e-3, atol=1e-3)


def test_same_seed_same_result(run, tmp_path):
    run(out="one"), run(out="two"), run("--seed", 1, out="three")
    one, two, three = (
        training.read_checkpoint(tmp_path / name / "classifier.safetensors", "--out")[0]
        for name in ("one", "two", "three")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.classifier.weight"], three["model.classifier.weight"])


def test_score_does_not_depend_on_the_batch(trainer):
    made = trainer("--batch-size", 1)
    model = made.adapted()
    alone = made.right(model)
    made.options.batch_size = 7
    assert torch.equal(made.right(model), alone)


def test_kept_classifier_is_the_one_that_was_scored(run, trainer, tmp_path):
    right = run()
    tensors, facts = training.read_checkpoint(tmp_path / "tuned" / "classifier.safetensors", "")
    assert facts["classes"] == ["else", "if"]
    tokenizer = text.read_tokenizer(tmp_path / "tuned" / "tokenizer.json")
    assert training.digest({}, tokenizer.to_str()) == facts["configuration"]["tokenizer"]
    made = trainer()
    model = finetune.TaskAdapter(made.encoder(), 2)
    model.load_state_dict(training.with_prefix("model.", tensors))
    assert torch.equal(made.right(model), right["fine-tuned"])


def test_result_and_summary_say_what_was_measured(run, capsys, tmp_path):
    right = run()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "tuned" / "result.json").read_text())
    assert (result["train_texts"], result["held_out_texts"]) == (48, 12)
    assert result["right"] == {name: int(texts.sum()) for name, texts in right.items()}
    for name, count in result["right"].items():
        assert f"{name:<16} {count / 12:.4f} right" in printed
    pairs = [(d["of"], d["from"]) for d in result["differences"]]
    assert pairs == list(finetune.COMPARED)
    for d in result["differences"]:
        verdict = finetune.Difference(d["mean"], d["low"], d["high"]).verdict
        assert f"{d['of']} is {verdict} {d['from']}: {d['mean']:+.4f}" in printed
    assert "MiB of memory" in printed


# --------------------------------------------------------------------------------------- the tasks


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


# ------------------------------------------------------------------------------------------ errors


def refusal(capsys, run, *options) -> str:
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    return capsys.readouterr().err


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
