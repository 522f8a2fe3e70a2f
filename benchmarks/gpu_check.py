"""`make gpu-check OUT=folder`: everything that needs a GPU, in one command of under nine minutes.

Builds the extension in place, runs the tests marked `gpu`, then the quick set of the suite, and
writes a log, the tests' outcomes, a results file, its plots and a summary to the folder. It needs
no network and installs nothing into the Python it is started with. Every step is a process of its
own with its share of the time, since a kernel may hang, or leave the device unusable for the
process that ran it: what goes wrong is recorded, and the rest goes on.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case

# What needs fastattn is imported where it is used: on a bare machine it has to be installed first.

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "gpu-check"
OP_NAMES = sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("[a-z]*.py"))
TESTS = ROOT / "tests"
LAYER_TESTS = TESTS / "kernels" / "gpu" / "test_layer.py"  # of the whole layer, whatever the ops
SANITIZED_TESTS = TESTS / "kernels" / "gpu" / "test_layer_norm.py"

GRACE = 3.0  # seconds a step has to write what it knows, once its time is up
PLOTTING = 30.0  # seconds
LINES, COLUMNS = 40, 110  # of the summary that is printed
SUMMARISED = "forward+backward"
WRONG = ("mismatch", "failed")  # statuses of a row


# ------------------------------------------------------------------------------------------- steps


@dataclass
class Step:
    """One process; `share` is its part of the time left, relative to the steps after it."""

    name: str
    command: list[str]
    share: float
    variables: dict[str, str] = field(default_factory=dict)
    status: str = "not run"  # later "ok", "failed" or "killed"
    reason: str = "the time was up"
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status != "ok"

    def command_within(self, limit: float) -> list[str]:
        """The command, for a run of at most `limit` seconds."""
        return self.command

    def end(self, exit_code: int, last_line: str, limit: float | None) -> None:
        """Take the outcome down; `limit` is given where the step was killed after so long."""
        self.status, self.reason = ("failed", last_line) if exit_code else ("ok", "")
        if limit is not None:
            self.status, self.reason = "killed", f"after {limit:.0f} s; the last line: {last_line}"
        elif exit_code < 0:
            self.reason = f"{signal.strsignal(-exit_code)}; the last line: {last_line}"

    def fail(self, reason: str) -> None:
        """Take down what is wrong with a step besides how its process ended."""
        self.reason = f"{reason}; {self.reason}" if self.failed else reason
        self.status = "failed" if self.status == "ok" else self.status

    def row(self) -> str:
        return f"{self.status:<7} {self.seconds:4.0f} s  {self.name}  {self.reason}".rstrip()


@dataclass
class GpuTests(Step):
    """The tests marked `gpu` of one file; pytest writes their outcomes to the file `junit`."""

    junit: Path = Path()
    tests: list[dict] = field(default_factory=list)  # {"test", "outcome", "reason"}

    def end(self, exit_code: int, last_line: str, limit: float | None) -> None:
        super().end(exit_code, last_line, limit)
        with contextlib.suppress(OSError, ElementTree.ParseError):  # pytest died before it wrote
            self.tests = [outcome(case) for case in ElementTree.parse(self.junit).iter("testcase")]
        if self.tests:
            outcomes = [test["outcome"] for test in self.tests]
            kinds = ("passed", "failed", "skipped")
            self.reason = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds)
            self.reason += "" if limit is None else f", killed after {limit:.0f} s"


def outcome(case: ElementTree.Element) -> dict:
    """A `testcase` of pytest's report: its name, its outcome and the first line of the reason.

    A test in which pytest was interrupted is reported without its name and without a failure.
    """
    found = {"test": case.get("name"), "outcome": "passed", "reason": None}
    if found["test"] is None:
        found = {"test": "unnamed", "outcome": "failed", "reason": "interrupted, see the log"}
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            lines = (child.get("message") or child.text or "").strip().splitlines()
            kind = "skipped" if child.tag == "skipped" else "failed"
            found |= {"outcome": kind, "reason": lines[0][:300] if lines else child.tag}
    return found


@dataclass
class Benchmark(Step):
    """The quick cases of one op, whose results are written to a folder."""

    folder: Path = Path()

    def command_within(self, limit: float) -> list[str]:
        # A size that begins late would be killed with the step; those before it are kept.
        return [*self.command, "--time-limit", str(max(1, int(0.6 * limit)))]

    def results(self) -> dict | None:
        """What it wrote, None if that is nothing usable. Faults of fastattn's fail the step."""
        written = list(self.folder.glob("[!.]*.json"))
        if not written:
            return None
        try:
            from . import report

            results = report.load(written[0])
            at_fault = {
                f"{row['provider']} {row['status']}": None
                for row in results["rows"]
                if row["provider"].startswith("fastattn") and row["status"] in WRONG
            }
        except Exception as error:  # whatever it is, the other ops have results too
            self.fail(one_line(error))
            return None
        if at_fault:
            self.fail(", ".join(at_fault))
        return results


def attempt(steps: list[Step], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of this process returns; where it fails, None, and `steps` get one more."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever it is, the summary has to be written
        steps.append(Step(name, [], share=0, status="failed", reason=one_line(error)))
        return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def run(steps: Sequence[Step], log: Path, deadline: float) -> None:
    """Run the steps one after the other until the deadline; what one does not use, the next get."""
    for number, step in enumerate(steps):
        part = step.share / sum(later.share for later in steps[number:])
        limit = (deadline - time.monotonic()) * part - GRACE
        if limit > 0:
            run_step(step, log, limit)
        print(step.row()[:COLUMNS], flush=True)


def run_step(step: Step, log: Path, limit: float) -> None:
    command, began = step.command_within(limit), time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n=== {step.name}: {shlex.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.variables},
            start_new_session=True,
        )
        in_time = ends(process, limit)
    step.seconds = time.monotonic() - began
    step.end(process.returncode, last_line(log, start), None if in_time else limit)


def ends(process: subprocess.Popen, limit: float) -> bool:
    """Whether a process ended by itself in time. Nothing of its group is left afterwards."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGINT)  # pytest then writes the outcomes that it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return False
    finally:
        signal_group(process, signal.SIGKILL)
        process.wait()


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(log: Path, start: int) -> str:
    """The last line that says something, of what was written from `start` on."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# ---------------------------------------------------------------------------------------- the plan


def finds_kernels() -> bool:
    """Whether this Python finds the kernels of this checkout, which takes an editable install."""
    package = [str(ROOT / "fastattn")]
    found = (finder.find_spec("fastattn.kernels", package) for finder in sys.meta_path)
    return any(spec and spec.origin and Path(spec.origin).is_relative_to(ROOT) for spec in found)


def environment_packages() -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(ENVIRONMENT)}))


def make_environment() -> str:
    """The interpreter of a new virtual environment that sees every package of this Python.

    Also those of a virtual environment that this Python is in itself: `--system-site-packages`
    looks at what lies below that.
    """
    options = ("--system-site-packages", "--without-pip", "--clear")
    subprocess.run([sys.executable, "-m", "venv", *options, str(ENVIRONMENT)], check=True)
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
    (environment_packages() / "outer.pth").write_text("".join(lines), encoding="utf-8")
    return str(ENVIRONMENT / "bin" / "python")


def install_step(python: str) -> Step:
    """An editable install without the extension: it must not depend on a compiler's success."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    no_compiler = {"CC": "false", "CXX": "false", "FASTATTN_CUDA": "0"}
    return Step("install", [*pip, *options], share=1, variables=no_compiler)


def only_this_gpu() -> dict[str, str]:
    """Lets nvcc compile for the GPU that is here and no other."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def build_steps(python: str, device: str) -> list[Step]:
    """The extension, whether it has what the device needs, and a report of what there is."""
    part = "why_not_cuda" if device == "cuda" else "why_not"
    loads = f"import sys; from fastattn import extension; sys.exit(extension.{part}())"
    build = [python, "setup.py", "build_ext", "--inplace"]
    steps = [
        Step("build", build, share=60, variables=only_this_gpu()),
        Step("extension", [python, "-c", loads], share=20),
        Step("report", [python, "-m", "fastattn"], share=20),
    ]
    if shutil.which("nvidia-smi"):
        steps.append(Step("nvidia-smi", ["nvidia-smi"], share=10))
    return steps


def gpu_test_files(ops: Sequence[str] | None) -> list[Path]:
    """The checks of ops, and the tests of `kernels/gpu`; with ops, the layer's and theirs."""
    files = [*TESTS.glob("ops/*_checks.py"), *TESTS.glob("kernels/gpu/test_*.py")]
    return sorted(
        path
        for path in files
        if ops is None or path == LAYER_TESTS or any(concerns(path, op) for op in ops)
    )


def concerns(path: Path, op: str) -> bool:
    """Whether a file of tests is of an op, or of one that the op contains."""
    names = [path.stem.removeprefix("test_")]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPS":
            names = ast.literal_eval(node.value)
    return any(op in name or name in op for name in names)


def sanitizer_steps(python: str, device: str) -> list[Step]:
    """The CUDA kernels' small calls under NVIDIA's compute-sanitizer, where that works."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or device != "cuda":
        return []
    touch = [python, "-c", "import torch; torch.zeros(1, device='cuda')"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run([sanitizer, *touch], capture_output=True, timeout=60).returncode == 0:
            calls = ["-m", "pytest", "-q", "-m", "gpu", "-k", "sanitizer", str(SANITIZED_TESTS)]
            return [
                Step(tool, [sanitizer, "--tool", tool, "--error-exitcode=9", python, *calls], 15)
                for tool in ("memcheck", "racecheck")
            ]
    return []


def gpu_tests(python: str, ops: Sequence[str] | None, scratch: Path) -> list[GpuTests]:
    """A step for every file of tests for a GPU that the ops choose."""
    pytest = [python, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    steps = []
    for number, path in enumerate(gpu_test_files(ops)):
        junit = scratch / f"tests-{number}.xml"
        command = [*pytest, f"--junitxml={junit}", str(path)]
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        steps.append(GpuTests(str(name), command, share=20, junit=junit))
    return steps


def quick_cases(device: str, ops: Sequence[str] | None) -> dict[str, list[Case]]:
    """The cases of a quick run, by op."""
    from .ops import OPS

    chosen = [op for op in OPS.values() if ops is None or op.name in ops]
    cases = {op.name: [case for case in op.cases[device] if case.quick] for op in chosen}
    return {op: quick for op, quick in cases.items() if quick}


def quick_benchmarks(
    python: str, device: str, cases: dict[str, list[Case]], scratch: Path, options: Sequence[str]
) -> list[Benchmark]:
    """A step for every op, the short ones first: what they leave goes to the layer and the stack.

    Most of the time is torch.compile's, which grows with the layers.
    """
    suite = [
        python,
        "-m",
        "benchmarks",
        "run",
        "--quick",
        "--no-plots",
        "--device",
        device,
        *options,
    ]
    steps = []
    for op, quick in reversed(cases.items()):
        folder = scratch / op
        command = [*suite, "--only", op, "--out", str(folder)]
        share = 15 + sum(5 + case.layers for case in quick)
        steps.append(Benchmark(op, command, share, folder=folder))
    return steps


# --------------------------------------------------------------------------------- what came of it


def merged(parts: dict[str, dict], planned: Sequence[tuple[str, str]], command: str) -> dict:
    """The results of the ops as those of one run; `planned` are pairs of an op and a case."""
    first = next(iter(parts.values()))
    done = {(case["op"], case["name"]) for part in parts.values() for case in part["cases"]}
    ceilings = {op: part["ceilings"] for op, part in parts.items()}
    return {
        **first,
        "environment": {**first["environment"], "command": command},
        "method": {**first["method"], "ceilings_by_op": ceilings},
        "cases": [case for part in parts.values() for case in part["cases"]],
        "rows": [row for part in parts.values() for row in part["rows"]],
        "not_run": [f"{op} {name}" for op, name in planned if (op, name) not in done],
    }


def failed_tests(tests: Sequence[GpuTests]) -> list[str]:
    return [
        f"! {step.name} {test['test']}: {test['reason']}"
        for step in tests
        for test in step.tests
        if test["outcome"] == "failed"
    ]


def wrong(results: dict | None) -> list[str]:
    """A line for every provider that is wrong or fails, and for every size that was not run."""
    if results is None:
        return []
    from . import report

    rows = [row for row in results["rows"] if row["status"] in WRONG]
    lines = [f"! {line}" for line in report.withheld(rows)]
    return [*lines, *(f"! not run: {name}" for name in results["not_run"])]


def summarised(rows: Sequence[dict]) -> dict[str, dict]:
    """The rows of forward and backward by provider, of replayed graphs where there are any."""
    of_mode = [row for row in rows if row["mode"] == SUMMARISED]
    replayed = [row for row in of_mode if row["launch"] == "graph"]
    return {row["provider"]: row for row in replayed or of_mode}


def speedup(row: dict) -> str:
    if row["status"] != "ok":
        return {"mismatch": "wrong", "failed": "fails"}.get(row["status"], "-")
    return f"{row['fastattn_speedup']['median']:.2f}" if "fastattn_speedup" in row else "?"


def table(op: str, cases: dict[str, dict[str, dict]]) -> list[str]:
    """The op's peers, then a line per case: fastattn's speedups, and its share of the floor."""
    every = [row for rows in cases.values() for row in rows.values()]
    ran = {row["provider"] for row in every if row["status"] != "skipped"}
    order = list(dict.fromkeys(row["provider"] for row in every))
    peers = [name for name in order if name in ran and not name.startswith("fastattn")]
    short = [name.removeprefix(f"{order[0]} ") for name in peers]
    short = [textwrap.shorten(name, 12, placeholder="").rstrip(",") for name in short]
    lines = [[op, *short, "floor"]]
    for name, rows in cases.items():
        ours = rows.get("fastattn", {})
        floor = f"{ours['floor_share']:.0%}" if ours.get("status") == "ok" else "-"
        lines.append([name, *(speedup(rows[peer]) for peer in peers), floor])
    widths = [max(5, *map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([f"{cells[0]:<{widths[0]}}", *map(str.rjust, cells[1:], widths[1:])])
        for cells in lines
    ]


def tables(results: dict | None) -> list[str]:
    if results is None:
        return []
    from . import report

    by_op: dict[str, dict] = {}
    for case, rows in report.by_case(results):
        by_op.setdefault(case["op"], {})[case["name"]] = summarised(rows)
    heading = f"{SUMMARISED}: times as fast as its peers that fastattn is, share of the floor"
    lines = [line for op, cases in by_op.items() for line in table(op, cases)]
    return [*textwrap.wrap(report.headline(results), COLUMNS), heading, *lines]


def verdict_on(steps: Sequence[Step], results: dict | None, seconds: float, summary: Path) -> str:
    failed = [step.name for step in steps if step.failed]
    missed = len(results["not_run"]) if results else 0
    said = "FAILED" if failed else "found no fault"
    if missed:
        sizes = "1 size was" if missed == 1 else f"{missed} sizes were"
        said += f"{'' if failed else ' in what ran'}; {sizes} not reached;"
    said += f" in {seconds:.0f} s, see {summary}"
    return f"gpu-check {said}" + (f": {', '.join(failed)}" if failed else "")


def shortened(
    rows: Sequence[str], wrong: Sequence[str], tables: Sequence[str], verdict: str
) -> list[str]:
    """At most LINES lines of at most COLUMNS columns."""
    room = max(4, LINES - 1 - len(rows) - len(tables))
    if len(wrong) > room:
        wrong = [*wrong[: room - 1], f"! and {len(wrong) - room + 1} more in the summary"]
    lines = [*rows, *wrong, *tables][: LINES - 1]
    return [line[:COLUMNS] for line in (*lines, verdict)]


# ----------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Files:
    """What is written beside the results file and its plots."""

    log: Path
    tests: Path
    summary: Path

    @classmethod
    def new(cls, out: Path) -> Files:
        """In a folder, under names that are not there yet."""
        for number in count(1):
            end = "" if number == 1 else f"-{number}"
            names = (f"log{end}.txt", f"tests{end}.json", f"summary{end}.txt")
            if not any((out / name).exists() for name in names):
                return cls(*(out / name for name in names))
        raise AssertionError("there is always a next number")


def installed(log: Path, deadline: float) -> tuple[str, list[Step]]:
    """A Python that finds fastattn with its kernels, and the steps that this took."""
    if finds_kernels():
        return sys.executable, []
    python = make_environment()
    steps = [install_step(python)]
    run(steps, log, time.monotonic() + (deadline - time.monotonic()) / 4)
    site.addsitedir(str(environment_packages()))
    return python, steps


def write_tests(path: Path, tests: Sequence[GpuTests]) -> None:
    files = [
        {"file": step.name, "status": step.status, "reason": step.reason, "tests": step.tests}
        for step in tests
    ]
    path.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def write_results(out: Path, results: dict, python: str, log: Path) -> Step:
    """A results file and its plots; the step that drew these."""
    from . import report

    path = report.new_path(results["environment"], out)
    report.save(results, path)
    plots = Step("plots", [python, "-m", "benchmarks", "plot", str(path)], share=1)
    run([plots], log, time.monotonic() + PLOTTING)
    return plots


def check(
    out: Path,
    device: str,
    ops: Sequence[str] | None,
    seconds: float,
    options: Sequence[str] = (),
    command: str = "",
) -> int:
    """Run everything, write it to the folder `out` and print the summary; the exit code.

    Args:
        out: an existing folder.
        device: "cuda" or "cpu".
        ops: names; None takes all.
        seconds: by when all of it has ended.
        options: further ones of every `python -m benchmarks run`.
        command: how this was called, for the results file.
    """
    began = time.monotonic()
    deadline = began + seconds - PLOTTING
    files, results = Files.new(out), None
    python, steps = installed(files.log, deadline)
    with tempfile.TemporaryDirectory() as folder:
        cases = quick_cases(device, ops)
        tests = gpu_tests(python, ops, Path(folder))
        benchmarks = quick_benchmarks(python, device, cases, Path(folder), options)
        sanitized = sanitizer_steps(python, device)
        todo = [*build_steps(python, device), *tests, *sanitized, *benchmarks]
        run(todo, files.log, deadline)
        steps += todo
        write_tests(files.tests, tests)
        found = {step.name: step.results() for step in benchmarks}
    parts = {op: found[op] for op in cases if found[op] is not None}
    if parts:
        planned = [(op, case.name) for op, quick in cases.items() for case in quick]
        results = attempt(steps, "results", merged, parts, planned, command)
    if results is not None:
        plots = attempt(steps, "plots", write_results, out, results, python, files.log)
        steps += [] if plots is None else [plots]
    faults = failed_tests(tests) + (attempt(steps, "faults", wrong, results) or [])
    figures = attempt(steps, "tables", tables, results) or []
    rows = [step.row() for step in steps]
    verdict = verdict_on(steps, results, time.monotonic() - began, files.summary)
    files.summary.write_text("\n".join([*rows, *faults, *figures, verdict]) + "\n", "utf-8")
    print("", *shortened(rows, faults, figures, verdict), sep="\n")
    return 1 if any(step.failed for step in steps) else 0


def op_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OP_NAMES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(OP_NAMES)}, but got {name}")
    return names


def minutes(text: str) -> float:
    value = float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value:g}")
    return value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__.partition("\n\n")[2],
        epilog="What follows -- is given to every `python -m benchmarks run`.",
    )
    parser.add_argument("out", type=Path, help="the folder that everything is written to")
    parser.add_argument("--only", type=op_names, metavar="OP[,OP]", help=", ".join(OP_NAMES))
    parser.add_argument(
        "--minutes", type=minutes, default=8, help="by when all has ended; default: 8"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="cpu rehearses all this without a GPU: tests that need one are skipped",
    )
    return parser


def why_not(device: str) -> str | None:
    """What this machine lacks, None if it lacks nothing."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; PYTHON=... chooses one that has"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device here; --device cpu rehearses the check without one"
    return None


def why_not_into(out: Path) -> str | None:
    """Why nothing can be written to the folder `out`, None if it can; the folder is made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except FileExistsError:
        return f"out must be a folder, but {out} is a file"
    except OSError as error:
        return f"out must be a folder that can be written to, but got {out}: {error.strerror}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    ours = argv[: argv.index("--")] if "--" in argv else argv
    arguments = parser().parse_args(ours)
    out, device = arguments.out.resolve(), arguments.device
    reason = why_not(device) or why_not_into(out)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the step under way
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *argv])
    seconds, options = 60 * arguments.minutes, argv[len(ours) + 1 :]
    return check(out, device, arguments.only, seconds, options, command)


if __name__ == "__main__":
    sys.exit(main())
