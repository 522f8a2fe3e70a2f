"""Run the tests on every core, each kind in processes of its own.

    python -m tests [PART ...] [--plain]

A part is a folder or file of tests/, such as ``ops`` or ``packaging/test_docs.py``; default: all.

- plain: PyTorch on this machine, with its GPU if it has one;
- interpreted: the Triton kernels on the CPU; Triton decides when a kernel is defined whether it is
  compiled or interpreted, so their processes are told when they start;
- compiled: the compile gate, which starts a process for every GPU architecture.

Without pytest-xdist one process runs a kind; on a GPU too, whose memory and time the tests measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

TESTS = ROOT / "tests"
#: Those that take longest first, so that no core waits for the last.
PARTS = ("packaging", "examples", "benchmarks", "kernels", "layers", "models", "ops")
INTERPRETED = ("kernels/interpreted", "ops")
OPS = TESTS / "ops"  # where those named *_checks.py are interpreted too
GATE = "kernels/compiled"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description="Run the tests.")
    parser.add_argument(
        "parts", nargs="*", default=PARTS, metavar="PART", help=f"default: all, {', '.join(PARTS)}"
    )
    parser.add_argument("--plain", action="store_true", help="no Triton kernels")
    options = parser.parse_args()
    paths = [(TESTS / part).resolve() for part in options.parts]
    for part, path in zip(options.parts, paths, strict=True):
        if not (path.exists() and path.is_relative_to(TESTS)):
            parser.error(f"there is no {part} in tests/; the parts are {', '.join(PARTS)}")
    failed, todo = [], list(runs(paths, options.plain))
    if not todo:
        parser.error("none of these tests are plain")
    for kind, arguments, environment in todo:
        print(f"== {kind}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
        print(f"== {kind}: {time.monotonic() - began:.0f} s", flush=True)
        if status != 0:  # 5 where it found no tests
            failed.append(kind)
    print(f"failed: {', '.join(failed)}" if failed else "passed")
    return bool(failed)


def runs(paths: list[Path], plain: bool) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(kind, arguments of pytest, environment) of every run."""
    gate = TESTS / GATE
    kernels = (gate, TESTS / INTERPRETED[0])
    ordinary = [path for path in paths if not any(path.is_relative_to(x) for x in kernels)]
    if ordinary:
        arguments = ["-m", "not interpreted", f"--ignore={gate}", *cores("loadfile")]
        yield "plain", [*arguments, *map(str, ordinary)], {}
    if plain:
        return
    places = overlap(paths, [TESTS / part for part in INTERPRETED])
    interpreted = [path for path in places if not (path.parent == OPS and "test_" in path.name)]
    if interpreted:
        arguments = ["-m", "interpreted", "-p", "no:cacheprovider", *cores("worksteal")]
        environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        yield "interpreted", [*arguments, *map(str, interpreted)], environment
    compiled = list(overlap(paths, [gate]))
    if compiled:
        yield "compiled", list(map(str, compiled)), {}


def overlap(paths: list[Path], places: list[Path]) -> Iterator[Path]:
    """The part of ``places`` that lies in one of ``paths``."""
    for place in places:
        for path in paths:
            if path.is_relative_to(place):
                yield path
            elif place.is_relative_to(path):
                yield place


def cores(distribution: str) -> list[str]:
    import torch

    if importlib.util.find_spec("xdist") is None or torch.cuda.is_available():
        return []
    return ["-n", "auto", "--dist", distribution]


if __name__ == "__main__":
    sys.exit(main())
