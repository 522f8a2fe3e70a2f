"""How the tests build and install the package, with compilers that are in a hurry or broken.

CUDA kernels take long to compile, so the wheel alone has real ones, for one architecture. Where
only setup.py's decisions count, scripts stand in for the compilers and note how they were called.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "*.pyd", "_build_status.txt", "runs"
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
HERE_ONLY = ["--no-build-isolation", "--no-deps"]
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="needs a C++ compiler and the headers of Python",
)
NVCC = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc; none here")
ALL_ARCHITECTURES = "80 86 89 90 100 120+PTX"
LIBRARY = "fastattn/_C" + sysconfig.get_config_var("EXT_SUFFIX")
STATUS = "fastattn/_build_status.txt"
# In a script: how it was called, as calls() reads it. nvcc takes that variable for arguments.
NOTE = 'echo "$* $NVCC_APPEND_FLAGS" >> "$0.calls"\n'
INSPECT = """
import json, sys
import torch
before = set(sys.modules)
import fastattn
from fastattn.extension import loading
after_import = sorted(set(sys.modules) - before)
import fastattn.kernels
print(json.dumps({
    "package": fastattn.__file__,
    "kernels": fastattn.kernels.__file__,
    "available": loading.available(),
    "why_not": loading.why_not(),
    "why_not_cuda": loading.why_not_cuda(),
    "cuda_initialised": torch.cuda.is_initialized(),
    "imported": after_import,
}))
"""


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def inspect(python: str | Path, cwd: Path, **environment: str) -> dict:
    """What a fresh process in ``cwd`` finds."""
    return json.loads(run([str(python), "-c", INSPECT], cwd, **environment))


def install(source: Path, target: Path, *options: str, **environment: str) -> None:
    run(
        [*PIP, "install", "--target", str(target), *options, str(source)],
        source.parent,
        **environment,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def packages_of(*modules: str) -> str:
    """Lines of a .pth file: the folders that these modules of this Python come from."""
    folders = {Path(importlib.import_module(name).__file__).parents[1] for name in modules}
    return "".join(f"{folder}\n" for folder in sorted(folders))


def ninja_alone(folder: Path) -> Path:
    """A new folder with ninja in it, for a PATH on which there is nothing else."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    folder.mkdir()
    (folder / "ninja").symlink_to(shutil.which("ninja", path=places))
    return folder


def failing_compiler(folder: Path) -> Path:
    """A compiler that refuses everything, with an error message."""
    text = "echo 'file.cpp:1: error: this compiler is broken' >&2\nexit 1\n"
    return script(folder / "broken-c++", text)


def quick_compiler(folder: Path) -> Path:
    """The C++ compiler, in a hurry; it notes how it was called."""
    return script(folder / "quick-c++", f'{NOTE}exec {COMPILER} "$@" -O0\n')


def compiler_that_copies(library: Path, folder: Path) -> Path:
    """A C++ compiler whose objects are empty and whose libraries are a copy of ``library``."""
    text = (
        'case " $* " in *" -c "*) from=/dev/null;; *) from=' + f"'{library}';; esac\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && cp "$from" "$2"; shift; done\n'
        "exit 0\n"
    )
    return script(folder / "copying-c++", NOTE + text)


def compiler_that_only_reads(folder: Path) -> Path:
    """A C++ compiler that reads what it would compile, so that it knows which files that takes."""
    text = 'case " $* " in *" -c "*) set -- "$@" -E;; *) exec touch "${last:?}";; esac\n'
    last = 'for last do [ "$before" = -o ] && break; before=$last; done\n'
    return script(folder / "reading-c++", f'{NOTE}{last}{text}exec {COMPILER} "$@"\n')


def calls(program: Path) -> list[str]:
    """How a script was called since the last time that this was asked."""
    notes = program.with_name(f"{program.name}.calls")
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
