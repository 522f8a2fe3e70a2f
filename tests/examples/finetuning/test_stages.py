"""examples/finetune.py: each stage trains what it should, and what it learns is scored."""

import json

import pytest
import torch

from tests.examples.finetuning.runs import in_order, write_csv
from tests.examples.programs import finetune, text, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fine_tuning_learns_what_no_bag_of_words_tells(run, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.Trainer, "untrained", finetune.Trainer.adapted)  # not judged here
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
