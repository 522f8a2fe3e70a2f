"""benchmarks.end_to_end: runs both kinds of layers, and shows what they found."""

import argparse
import csv
import json
import math
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from matplotlib.colors import to_rgba

from benchmarks import end_to_end
from benchmarks.environment import environment
from tests.examples.programs import finetune, pretrain

PRETRAINING = (
    "--steps 6 --batch-size 8 --seq-len 24 --d-model 32 --heads 4 --layers 1 --d-ff 64 "
    "--vocabulary 500 --eval-every 3 --eval-sequences 16 --order-pairs 16"
)


def a_run(layer: str, seed: int, *, right: int, low: float, high: float) -> dict:
    return {
        "layer": layer,
        "seed": seed,
        "pretraining": {
            "layer": layer,
            "configuration": {"batch_size": 8, "seq_len": 24},
            "steps": 6,
            "held_out_loss": 5.25,
            "unigram_entropy": 6.0,
            "order_right": 60,
            "order_pairs": 100,
            "order_interval": [0.502, 0.691],
            "tokens_per_second": 12345.6 + right,
            "peak_bytes": 300 * 2**20,
        },
        "curves": {
            name: [[0, 6.0 + right], [6, 5.0 + right]]
            for name in ("train_loss", "train_order_loss", "held_out_loss", "held_out_order_loss")
        },
        "finetuning": {
            "train_texts": 80,
            "held_out_texts": 20,
            "right": {"bag of words": 10, "fine-tuned": right},
            "differences": [
                {"of": "fine-tuned", "from": "bag of words", "mean": (right - 10) / 20,
                 "low": low, "high": high},
            ],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    return {
        "format": end_to_end.FORMAT,
        "version": end_to_end.VERSION,
        "environment": environment("cpu", "benchmarks.end_to_end"),
        "runs": [
            a_run("stock", 0, right=15, low=0.05, high=0.45),
            a_run("fused", 0, right=12, low=-0.1, high=0.3),
            a_run("fused", 1, right=4, low=-0.5, high=-0.1),
            a_run("stock", 1, right=16, low=0.1, high=0.5),
        ],
    }


def test_table_has_a_row_for_every_run_in_order(results):
    lines = end_to_end.markdown(results, "x.json").splitlines()
    rows = [line for line in lines if line.endswith(" 300 |")]
    assert [row.split("|")[1:3] for row in rows] == [
        [f" {layer} ", f" {seed} "] for seed in (0, 1) for layer in ("stock", "fused")
    ]
    assert rows[0] == (
        "| stock | 0 | 5.2500 | -0.7500 | 0.600 [0.502, 0.691] | 0.500 | 0.750 | 12,361 | 300 |"
    )


def test_verdict_counts_runs_beyond_their_interval(results):
    assert end_to_end.markdown(results, "x.json").endswith(
        "- fine-tuned against bag of words: +0.087 on average; above in 2 of 4 runs, below in 1, "
        "not told apart in 1."
    )


def test_table_names_hardware_command_and_source(results):
    here = results["environment"]
    head = end_to_end.markdown(results, "x.json").splitlines()[0]
    for part in (
        here["device_name"],
        here["command"],
        here["torch"],
        "C++ extension",
        "`x.json`",
        "6.0000",
    ):
        assert part in head
    assert here["command"].startswith("python -m benchmarks.end_to_end")


def test_table_goes_between_its_comments(results, tmp_path):
    (path := tmp_path / "results.json").write_text(json.dumps(results))
    (document := tmp_path / "doc.md").write_text(
        "before\n<!-- end-to-end:start -->\nold\n<!-- end-to-end:end -->\nafter\n"
    )
    assert end_to_end.main([str(path), "--write", str(document)]) == 0
    table = end_to_end.markdown(results, "results.json")
    expected = f"before\n<!-- end-to-end:start -->\n{table}\n<!-- end-to-end:end -->\nafter\n"
    assert document.read_text(encoding="utf-8") == expected


def test_document_without_a_place_is_left_alone(results, tmp_path, capsys):
    (path := tmp_path / "results.json").write_text(json.dumps(results))
    (document := tmp_path / "doc.md").write_text("nothing here\n")
    assert end_to_end.main([str(path), "--write", str(document)]) == 2
    assert str(document) in capsys.readouterr().err
    assert document.read_text() == "nothing here\n"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"format": "fastattn benchmarks", "version": 1}',
        '{"format": "fastattn end to end", "version": 1, "runs": [1]}',
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert end_to_end.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_plot_shows_every_run(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(end_to_end.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    end_to_end.draw(results, tmp_path / "x.png")
    [figure] = drawn
    masked, order, speed = figure.axes
    runs = end_to_end.in_order(results["runs"])
    names = [f"{run['layer']}, seed {run['seed']}" for run in runs]
    assert [(run["layer"], run["seed"]) for run in runs] == [
        ("stock", 0), ("fused", 0), ("stock", 1), ("fused", 1),
    ]  # fmt: skip
    assert masked.get_legend_handles_labels()[1] == [*names, "unigram entropy"]
    for axes in (masked, order):
        *lines, level = axes.lines
        assert len(lines) == 2 * len(runs)
        for index, line in enumerate(lines):
            run = runs[index // 2]
            losses = run["curves"]["train_loss"]
            assert [list(point) for point in zip(*line.get_data(), strict=True)] == losses
            assert line.get_color() == end_to_end.COLOUR[run["layer"]]
    assert masked.lines[-1].get_ydata()[0] == 6.0
    assert order.lines[-1].get_ydata()[0] == math.log(2)
    assert [label.get_text() for label in speed.get_yticklabels()] == names
    for patch, run in zip(speed.patches, runs, strict=True):
        assert patch.get_width() == run["pretraining"]["tokens_per_second"]
        assert patch.get_facecolor() == to_rgba(end_to_end.COLOUR[run["layer"]])


def test_unfinished_results_can_be_drawn(results, tmp_path):
    end_to_end.draw(results | {"runs": results["runs"][:1]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_kinds_alternate_and_each_classifier_gets_its_own_encoder(monkeypatch, tmp_path):
    started = []

    def example(program, *options):
        parsed = dict(zip(options[::2], options[1::2], strict=True))
        started.append((program, parsed))

    monkeypatch.setattr(end_to_end, "example", example)
    monkeypatch.setattr(end_to_end, "read", lambda path: str(path))
    monkeypatch.setattr(end_to_end, "curves", lambda path: str(path))
    arguments = argparse.Namespace(
        seeds=[4, 7], device="cuda", pretrain="--layer other --amp bf16", finetune="--lr 1"
    )
    found = list(end_to_end.measure(arguments))
    kinds = [("stock", "4"), ("fused", "4"), ("fused", "7"), ("stock", "7")]
    assert [(run["layer"], str(run["seed"])) for run in found] == kinds
    for index, kind in enumerate(kinds):
        (first, training), (second, tuning) = started[2 * index : 2 * index + 2]
        assert (first, second) == ("pretrain.py", "finetune.py")
        for options in (training, tuning):
            assert (options["--layer"], options["--seed"]) == kind
            assert options["--device"] == "cuda"
        assert training["--amp"] == "bf16" and tuning["--lr"] == "1"
        assert tuning["--pretrained"] == training["--out"]
        assert found[index]["pretraining"] == str(Path(training["--out"], "result.json"))
        assert found[index]["curves"] == str(Path(training["--out"], "log.csv"))
        assert found[index]["finetuning"] == str(Path(tuning["--out"], "result.json"))
    assert len({options["--out"] for _, options in started}) == 8


def test_examples_use_the_checkout_that_is_recorded(monkeypatch):
    used = []
    monkeypatch.setattr(
        end_to_end.subprocess, "run", lambda command, **options: used.append(options["env"])
    )
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    end_to_end.example("pretrain.py")
    assert used[0]["PYTHONPATH"].split(os.pathsep) == [str(end_to_end.ROOT), "elsewhere"]


def test_fused_is_set_against_stock_seed_by_seed(results):
    expected = (
        f"- fused over stock, seed by seed: tokens/s × {12357.6 / 12360.6:.2f}, "
        f"{12349.6 / 12361.6:.2f}; masked tokens +0.000, +0.000."
    )
    assert expected in end_to_end.markdown(results, "x.json").splitlines()


def test_training_curve_is_averaged_and_the_other_is_not(tmp_path):
    with (path := tmp_path / "log.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["step", "train_loss", "train_order_loss", "held_out_loss", "held_out_order_loss"]
        )
        rows.writerow([0, "", "", 9.0, 1.0])
        for step in range(1, 2 * end_to_end.POINTS + 1):
            rows.writerow([step, step, 1, *([8.0, 0.5] if step % 2 == 0 else ["", ""])])
    curves = end_to_end.curves(path)
    assert curves["train_loss"][0] == [1.5, 1.5]
    assert len(curves["train_loss"]) == end_to_end.POINTS
    assert curves["held_out_loss"][:2] == [[0, 9.0], [2, 8.0]]
    assert len(curves["held_out_loss"]) == end_to_end.POINTS + 1


@pytest.mark.usefixtures("one_thread")
def test_examples_are_run_and_what_they_found_is_kept(tmp_path, monkeypatch, capsys):
    """In this process, since the start of another takes longest."""
    programs = {"pretrain.py": pretrain, "finetune.py": finetune}
    monkeypatch.setattr(
        end_to_end, "example", lambda program, *options: programs[program].main(list(options))
    )
    (text := tmp_path / "topics.txt").write_text("\n\n".join(sorted(topics.values())[:30]))
    with (data := tmp_path / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"{word} number {i}", word] for i in range(10) for word in ("class", "if"))
    command = ["--seeds", "3", "--device", "cpu", "--out", str(tmp_path / "results")]
    command += ["--pretrain", f"{PRETRAINING} --text {text}"]
    command += ["--finetune", f"--data {data} --epochs 1 --adapt-epochs 1"]
    assert end_to_end.main(command) == 0
    [path] = (tmp_path / "results").glob("*-end-to-end.json")
    results = end_to_end.load(path)
    assert [(run["layer"], run["seed"]) for run in results["runs"]] == [("stock", 3), ("fused", 3)]
    for run in results["runs"]:
        assert run["pretraining"]["layer"] == run["finetuning"]["layer"] == run["layer"]
        assert run["pretraining"]["configuration"]["seed"] == run["finetuning"]["seed"] == 3
        assert run["pretraining"]["steps"] == 6
        assert [step for step, _ in run["curves"]["held_out_loss"]] == [0, 3, 6]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert end_to_end.markdown(results, path.name) in capsys.readouterr().out


def test_program_that_fails_keeps_what_was_measured(results, tmp_path, monkeypatch):
    def measure(arguments):
        yield results["runs"][0]
        raise end_to_end.subprocess.CalledProcessError(2, "pretrain.py")

    monkeypatch.setattr(end_to_end, "measure", measure)
    assert end_to_end.main(["--out", str(tmp_path)]) == 2
    [path] = Path(tmp_path).glob("*.json")
    assert end_to_end.load(path)["runs"] == results["runs"][:1]


def test_failing_program_is_named(tmp_path, capfd):
    options = ["--seeds", "0", "--out", str(tmp_path), "--pretrain", "--heads 3 --steps 1"]
    assert end_to_end.main(options) == 2
    message = capfd.readouterr().err
    assert "--heads 3" in message and "pretrain.py" in message


def test_missing_document(results, tmp_path, capsys):
    (path := tmp_path / "results.json").write_text(json.dumps(results))
    assert end_to_end.main([str(path), "--write", str(tmp_path / "missing.md")]) == 2
    assert "missing.md" in capsys.readouterr().err


def test_seeds_must_differ(capsys):
    with pytest.raises(SystemExit):
        end_to_end.main(["--seeds", "1", "1"])
    assert "--seeds" in capsys.readouterr().err


def test_write_needs_a_file(capsys):
    with pytest.raises(SystemExit):
        end_to_end.main(["--write", "x.md"])
    assert "--write" in capsys.readouterr().err
