"""Trains the models of `examples/` with stock and with fused layers, and puts both side by side.

    python -m benchmarks.end_to_end                       # three seeds; under an hour on two cores
    python -m benchmarks.end_to_end --seeds 0 --pretrain="--steps 100"
    python -m benchmarks.end_to_end FILE --write docs/performance.md

For each seed `pretrain.py` and then `finetune.py` runs with either kind of layer, each in a process
of its own, in alternating order. What they measured goes to a JSON file in the folder of the
machine, with a plot of all curves.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from . import report
from .environment import ROOT, environment
from .plots import BASELINE, COLOURS, DPI

FORMAT, VERSION = "fastattn end to end", 1
LAYERS = ("stock", "fused")
COLOUR = {"stock": BASELINE, "fused": COLOURS["fastattn"]}
LINES = ("-", "--", ":", "-.")  # of the seeds
POINTS = 60  # of a training curve; each is a mean over as many steps
PLACE = "end-to-end"  # in a document


# -------------------------------------------------------------------------------------------- runs


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """What every run of the examples found, seed by seed."""
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(arguments.seeds):
            for layer in LAYERS if index % 2 == 0 else LAYERS[::-1]:
                out = Path(folder, f"{layer}-{seed}")
                common = ["--layer", layer, "--seed", str(seed), "--device", arguments.device]
                options = [*common, "--out", str(out)]
                example("pretrain.py", *shlex.split(arguments.pretrain), *options)
                found = {
                    "layer": layer,
                    "seed": seed,
                    "pretraining": read(out / "result.json"),
                    "curves": curves(out / "log.csv"),
                }
                tuned = out / "finetuned"
                options = [*common, "--pretrained", str(out), "--out", str(tuned)]
                example("finetune.py", *shlex.split(arguments.finetune), *options)
                yield found | {"finetuning": read(tuned / "result.json")}


def example(program: str, *options: str) -> None:
    """Run it with the fastattn of this checkout, whichever is installed."""
    command = [sys.executable, str(ROOT / "examples" / program), *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print("running", program, *options, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def curves(log: Path) -> dict[str, list[list[float]]]:
    """Pairs of step and loss, the training losses averaged over neighbouring steps."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for column in ("train_loss", "train_order_loss", "held_out_loss", "held_out_order_loss"):
        points = [[int(row["step"]), float(row[column])] for row in rows if row[column]]
        size = math.ceil(len(points) / POINTS) if column.startswith("train") else 1
        parts = [points[start : start + size] for start in range(0, len(points), size)]
        found[column] = [
            [round(statistics.fmean(x), 4) for x in zip(*p, strict=True)] for p in parts
        ]
    return found


# ------------------------------------------------------------------------------------------ report


def load(path: Path) -> dict:
    """A file that this program wrote; `report.ResultsError` for any other."""
    results = report.read(path, FORMAT, VERSION)
    if not (isinstance(results.get("environment"), dict) and results.get("runs")):
        raise report.ResultsError(f"{path} is incomplete: it has no environment or no runs")
    return results


def markdown(results: dict, source: str) -> str:
    """A table with a row for every run, and what it was made of."""
    here, runs = results["environment"], in_order(results["runs"])
    one, tuned = runs[0]["pretraining"], runs[0]["finetuning"]
    names = list(tuned["right"])
    lines = [
        f"{report.headline(results)}: `{here['command']}`. {one['steps']:,} steps of "
        f"{one['configuration']['batch_size']} sequences of {one['configuration']['seq_len']} "
        "tokens; held-out losses in nats, the "
        f"unigram entropy is {one['unigram_entropy']:.4f}; order of {one['order_pairs']:,} "
        f"held-out pairs; accuracy on {tuned['held_out_texts']:,} held-out texts after training on "
        f"{tuned['train_texts']:,}. From `{source}`.",
        "",
        "| layers | seed | masked tokens | − unigram | order, 95 % interval | "
        + " | ".join(names)
        + " | tokens/s | peak MiB |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(names) + "--:|--:|",
    ]
    for run in runs:
        p, f = run["pretraining"], run["finetuning"]
        low, high = p["order_interval"]
        cells = [
            run["layer"],
            str(run["seed"]),
            f"{p['held_out_loss']:.4f}",
            f"{p['held_out_loss'] - p['unigram_entropy']:+.4f}",
            f"{p['order_right'] / p['order_pairs']:.3f} [{low:.3f}, {high:.3f}]",
            *(f"{f['right'][name] / f['held_out_texts']:.3f}" for name in names),
            f"{p['tokens_per_second']:,.0f}",
            f"{p['peak_bytes'] / 2**20:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts(runs)])


def in_order(runs: Sequence[dict]) -> list[dict]:
    return sorted(runs, key=lambda run: (run["seed"], LAYERS.index(run["layer"])))


def verdicts(runs: Sequence[dict]) -> Iterator[str]:
    """Fused against stock by seed; how often a classifier is above another beyond its interval."""
    by_kind = {(run["seed"], run["layer"]): run["pretraining"] for run in runs}
    pairs = [
        (by_kind[seed, "stock"], by_kind[seed, "fused"])
        for seed, layer in by_kind
        if layer == "stock" and (seed, "fused") in by_kind
    ]
    if pairs:
        speeds = ", ".join(
            f"{f['tokens_per_second'] / s['tokens_per_second']:.2f}" for s, f in pairs
        )
        losses = ", ".join(f"{f['held_out_loss'] - s['held_out_loss']:+.3f}" for s, f in pairs)
        yield f"- fused over stock, seed by seed: tokens/s × {speeds}; masked tokens {losses}."
    pairs = [(d["of"], d["from"]) for d in runs[0]["finetuning"]["differences"]]
    for index, (one, other) in enumerate(pairs):
        found = [run["finetuning"]["differences"][index] for run in runs]
        above, below = sum(d["low"] > 0 for d in found), sum(d["high"] < 0 for d in found)
        mean = statistics.fmean(d["mean"] for d in found)
        yield (
            f"- {one} against {other}: {mean:+.3f} on average; above in {above} of {len(runs)} "
            f"runs, below in {below}, not told apart in {len(runs) - above - below}."
        )


def draw(results: dict, path: Path) -> None:
    """The curves of all runs: masked tokens, order, throughput."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    masked, order, speed = figure.subplots(3, 1, height_ratios=(4, 3, 1.5))
    runs, here = in_order(results["runs"]), results["environment"]
    seeds = sorted({run["seed"] for run in runs})
    for run in runs:
        line = LINES[seeds.index(run["seed"]) % len(LINES)]
        style = {"color": COLOUR[run["layer"]], "linestyle": line}
        label = f"{run['layer']}, seed {run['seed']}"
        for axes, name in ((masked, "loss"), (order, "order_loss")):
            for part, look in (("train", {"linewidth": 0.6, "alpha": 0.6}), ("held_out", {})):
                steps, losses = zip(*run["curves"][f"{part}_{name}"], strict=True)
                named = label if part == "held_out" else None
                axes.plot(steps, losses, label=named, **style, **look)
    masked.axhline(runs[0]["pretraining"]["unigram_entropy"], color="gray", label="unigram entropy")
    order.axhline(math.log(2), color="gray", label="chance")
    masked.set(ylabel="masked tokens (nats)", title="held out: thick, training: thin")
    order.set(ylabel="order of segments (nats)", xlabel="step")
    masked.legend(fontsize="small", ncols=2)
    names = [f"{run['layer']}, seed {run['seed']}" for run in runs]
    rates = [run["pretraining"]["tokens_per_second"] for run in runs]
    speed.barh(names, rates, color=[COLOUR[run["layer"]] for run in runs])
    speed.tick_params("y", labelsize="small")
    speed.invert_yaxis()
    speed.set(xlabel="tokens per second of pre-training, median step")
    figure.suptitle(f"{here['device_name']}, {here['threads']} threads, torch {here['torch']}")
    figure.savefig(path, dpi=DPI)


# ------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("file", nargs="?", type=Path, metavar="FILE", help="results to show again: nothing runs")
    add("--write", type=Path, metavar="DOC", help=f"put the table of FILE in its place, {PLACE}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--pretrain", default="", metavar="OPTIONS", help="further options of pretrain.py")
    add("--finetune", default="", metavar="OPTIONS", help="further options of finetune.py")
    add("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>/")
    arguments = parser.parse_args(argv)
    if arguments.write and not arguments.file:
        parser.error("--write needs the FILE whose table is meant")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error("--seeds must differ")
    try:
        if arguments.file:
            results, path = load(arguments.file), arguments.file
        else:
            results, path = run(arguments)
        if arguments.write:
            report.put(arguments.write, PLACE, lambda _: markdown(results, path.name))
        else:
            print(markdown(results, path.name))
    except (report.ResultsError, OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.end_to_end: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> tuple[dict, Path]:
    results = {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment(arguments.device, "benchmarks.end_to_end"),
        "runs": [],
    }
    path = report.new_path(results["environment"], arguments.out, "-end-to-end")
    for found in measure(arguments):
        results["runs"].append(found)
        report.save(results, path)  # what has been measured outlives what fails later
        draw(results, path.with_suffix(".png"))
    print("wrote", path, path.with_suffix(".png"))
    return results, path


if __name__ == "__main__":
    raise SystemExit(main())
