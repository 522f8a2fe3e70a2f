"""Times the encoder layer on this machine; `table` prints a result as markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import report, suite
from .cases import CASES, PROVIDERS

PLAIN_WIDTH = 168
QUICK_ROUNDS = 7
EAGER = {provider.name for provider in PROVIDERS if not provider.compiled}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main.add_subparsers(dest="subcommand", metavar="run | table")
    run = commands.add_parser(
        "run",
        help="time stock, stock compiled, fastattn and fastattn compiled (the default command)",
        description="Times the stock encoder layer and fastattn's, eager and compiled, interleaved "
        "in one process: eval forward, forward, forward+backward and a whole training step. Each "
        "is checked against float64 first. Prints tables, writes JSON and a PNG.",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument(
        "--rounds", type=positive, help=f"default: {suite.ROUNDS}, quick {QUICK_ROUNDS}"
    )
    run.add_argument("--quick", action="store_true", help="the smallest size only")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>/"
    )
    table = commands.add_parser("table", help="print a results file as a markdown table")
    table.add_argument("file", type=Path)
    return main


def run_command(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    (arguments.out or report.RESULTS).mkdir(parents=True, exist_ok=True)  # fail now, not at the end
    cases = CASES[device][:1] if arguments.quick else CASES[device]
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else suite.ROUNDS)
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeElapsedColumn(), console=terminal, disable=not terminal.is_terminal
    )
    with progress:
        task = progress.add_task("starting", total=suite.count_steps(cases, rounds, PROVIDERS))
        results = suite.run(
            device,
            cases,
            rounds,
            PROVIDERS,
            on_step=lambda text: progress.update(task, advance=1, description=text),
        )
    paths = report.save(results, arguments.out)
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    report.print_tables(results, console)
    print(report.headline(results))
    print("wrote", *paths)
    # A compiler may be missing; a wrong result or a failing eager layer is a fault.
    faults = [
        row
        for row in results["rows"]
        if row["status"] == "mismatch" or (row["status"] == "failed" and row["provider"] in EAGER)
    ]
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "run")
    arguments = parser().parse_args(argv)
    try:
        if arguments.subcommand == "run":
            return run_command(arguments)
        print(report.markdown(report.load(arguments.file), arguments.file.name))
        return 0
    except (report.ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
        print(f"error: the device failed, nothing was written: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
