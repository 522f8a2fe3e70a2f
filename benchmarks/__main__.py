"""Times fastattn against its peers on this machine, and shows results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import compare, report, suite
from .cases import MODES, Case, Op
from .ops import OPS

PLAIN_WIDTH = 200
QUICK_ROUNDS = 7


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def margin(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 up to but not 1, but got {value}")
    return value


class Names(argparse.Action):
    """Names separated by commas, each one of `known`."""

    known: Sequence[str] = ()

    def __call__(self, parser, namespace, values, option_string=None):
        names = [name.strip() for name in values.split(",")]
        wrong = [name for name in names if name not in self.known]
        if wrong:
            parser.error(f"{option_string} must be of {', '.join(self.known)}, but got {wrong[0]}")
        setattr(namespace, self.dest, names)


class OpNames(Names):
    known = tuple(OPS)


class ModeNames(Names):
    known = tuple(mode.name for mode in MODES)


class ProviderNames(Names):
    known = tuple(dict.fromkeys(p.name for op in OPS.values() for p in op.providers))


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="a few sizes, no max-autotune")
    parser.add_argument("--only", action=OpNames, metavar="OP[,OP]", help=", ".join(OPS))
    parser.add_argument("--case", metavar="TEXT", help="only sizes whose name contains TEXT")
    parser.add_argument(
        "--provider", action=ProviderNames, metavar="NAME[,NAME]", help="and their baselines"
    )
    parser.add_argument("--mode", action=ModeNames, metavar="NAME[,NAME]")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main.add_subparsers(dest="subcommand", metavar="run | compare | plot | list | table")
    run = commands.add_parser(
        "run",
        help="time every op against its peers (the default command)",
        description="Times the ops, the layer and a stack of layers against their peers, "
        "interleaved in one process. Each is checked against float64 first. Prints tables, writes "
        "JSON after every size, and plots.",
    )
    add_filters(run)
    run.add_argument(
        "--rounds", type=positive, help=f"default: {suite.ROUNDS}, quick {QUICK_ROUNDS}"
    )
    run.add_argument(
        "--time-limit", type=positive, metavar="SECONDS", help="begin no size later than this"
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>/"
    )
    run.add_argument("--no-plots", action="store_true", help="write the JSON file only")
    listing = commands.add_parser("list", help="list the sizes, providers and modes of a run")
    add_filters(listing)
    comparison = commands.add_parser(
        "compare",
        help="compare two results files of one machine",
        description="Shows what changed between two results of one machine, with 95 % intervals. "
        "Exits with 1 where something of fastattn's got worse for certain.",
    )
    comparison.add_argument("old", type=Path)
    comparison.add_argument("new", type=Path)
    comparison.add_argument(
        "--margin", type=margin, default=0.05, help="a smaller loss is none; default: 0.05"
    )
    plot = commands.add_parser("plot", help="draw speedup, memory and roofline of a results file")
    plot.add_argument("file", type=Path)
    plot.add_argument("--out", type=Path, metavar="DIR", help="default: beside the file")
    table = commands.add_parser("table", help="print a results file as markdown tables")
    table.add_argument("file", type=Path)
    table.add_argument("--only", action=OpNames, metavar="OP[,OP]")
    table.add_argument(
        "--write",
        type=Path,
        nargs="+",
        metavar="DOCUMENT",
        help="put them between the results comments of these documents instead",
    )
    return main


def plan_of(arguments: argparse.Namespace, device: str) -> list[tuple[Op, Case]]:
    """The pairs of op and case that the filters leave; never none."""
    plan = [
        (op, case)
        for op in OPS.values()
        for case in op.cases[device]
        if (arguments.only is None or op.name in arguments.only)
        and (arguments.case is None or arguments.case in case.name)
        and (case.quick or not arguments.quick)
        and any(arguments.mode is None or mode.name in arguments.mode for mode in op.modes)
    ]
    if not plan:
        raise report.ResultsError(
            "no size is left with these filters; `python -m benchmarks list` shows what there is"
        )
    return plan


def device_of(arguments: argparse.Namespace) -> str:
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def draw(results: dict, stem: Path) -> list[Path]:
    from . import plots  # matplotlib is needed here only

    return plots.draw(results, stem)


def list_command(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    for op, case in plan_of(arguments, device):
        print(f"{op.name} {case.name}")
        for provider in suite.chosen(op, arguments.provider, arguments.quick):
            reason = provider.why_not(case, device)
            print(f"    {provider.name}{f': skipped, {reason}' if reason else ''}")
        modes = [m.name for m in op.modes if arguments.mode is None or m.name in arguments.mode]
        print(f"    modes: {', '.join(modes)}; launches: {', '.join(suite.LAUNCHES[device])}")
    return 0


def run_command(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    plan = plan_of(arguments, device)
    (arguments.out or report.RESULTS).mkdir(parents=True, exist_ok=True)  # fail now, not at the end
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else suite.ROUNDS)
    choice = (arguments.provider, arguments.mode, arguments.quick)
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeElapsedColumn(), console=terminal, disable=not terminal.is_terminal
    )
    path: Path | None = None

    def keep(results: dict) -> None:
        nonlocal path
        path = path or report.new_path(results["environment"], arguments.out)
        report.save(results, path)

    try:
        with progress:
            task = progress.add_task(
                "starting", total=suite.count_steps(device, plan, rounds, *choice)
            )
            results = suite.run(
                device,
                plan,
                rounds,
                *choice,
                seconds=arguments.time_limit,
                on_step=lambda text: progress.update(task, advance=1, description=text),
                on_case=keep,
            )
    except (torch.AcceleratorError, KeyboardInterrupt) as error:
        kept = "nothing was written" if path is None else f"the sizes before it are in {path}"
        what = "stopped" if isinstance(error, KeyboardInterrupt) else f"the device failed: {error}"
        print(f"error: {what}; {kept}", file=sys.stderr)
        return 1
    report.save(results, path)
    report.print_tables(results, console())
    print(report.headline(results))
    print(report.ceilings(results))
    drawn = [] if arguments.no_plots else draw(results, path.with_suffix(""))
    print("wrote", path, *drawn)
    return 1 if report.faults(results) else 0


def compare_command(arguments: argparse.Namespace) -> int:
    old, new = (report.load(path) for path in (arguments.old, arguments.new))
    comparison = compare.compare(old, new, arguments.margin)
    compare.print_comparison(comparison, console())
    return 1 if comparison.regressions else 0


def plot_command(arguments: argparse.Namespace) -> int:
    results = report.load(arguments.file)
    folder = arguments.out or arguments.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    print("wrote", *draw(results, folder / arguments.file.stem))
    return 0


def table_command(arguments: argparse.Namespace) -> int:
    results, source = report.load(arguments.file), arguments.file.name
    for document in arguments.write or ():
        report.write_into(document, results, source)
    if not arguments.write:
        print(report.markdown(results, source, report.Excerpt(arguments.only)))
    return 0


COMMANDS = {
    "run": run_command,
    "list": list_command,
    "compare": compare_command,
    "plot": plot_command,
    "table": table_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "run")
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.subcommand](arguments)
    except (report.ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
