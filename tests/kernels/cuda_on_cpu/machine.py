"""The CUDA layer-norm kernels and their launchers, compiled with g++ to run on the CPU.

``cuda_runtime.h`` stands in for the CUDA toolkit. What only a GPU can show (speed, what the
hardware does to floating point, the toolkit's own conversions) is not tested so.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from fastattn import dispatch
from fastattn.extension import loading
from fastattn.extension.layer_norm import CudaNormKernels
from tests import ROOT

HERE = Path(__file__).parent
SOURCES = (
    *(ROOT / "csrc" / name for name in ("bindings.cpp", "layer_norm_cuda.cu")),
    *(ROOT / "csrc" / f"{name}_cpu.cpp" for name in ("dropout", "inference", "layer_norm")),
    *(HERE / name for name in ("controls.cpp", "planted.cu")),
)
MODULE = "fastattn_cuda_on_cpu"

#: For what is tested here. The sanitizer, which also sees misaligned accesses of 16 bytes, ends
#: the process; ``pytest -s`` shows what it says.
CHECKED = (
    *("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)


@dataclass(frozen=True)
class Machine:
    """The module that was compiled, and what its stand-in for a GPU tells."""

    module: ModuleType
    controls: ctypes.CDLL

    def block(self) -> tuple[int, int]:
        """(threads of a row, rows) of the last launch."""
        return self.controls.last_block(0), self.controls.last_block(1)


def why_not() -> str | None:
    if shutil.which("g++") is None or sys.platform != "linux":
        return "runs CUDA kernels compiled with g++, on Linux; none here"
    if importlib.util.find_spec("pybind11") is None:
        return "the extension's bindings need pybind11"
    return None


def compile_source(source: Path, folder: Path) -> Path:
    import pybind11

    compiled = folder / f"{source.name}.o"
    command = [
        *("g++", "-std=c++17", "-g0", "-fPIC", "-U_FORTIFY_SOURCE"),
        *(CHECKED if source.name.startswith("layer_norm") else ("-O0",)),
        *("-DFASTATTN_WITH_CUDA", f"-DFASTATTN_MODULE={MODULE}"),
        '-DFASTATTN_CUDA_ARCHITECTURES="none"',
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        *("-I", str(HERE), "-I", str(ROOT / "csrc")),
        *("-x", "c++", "-c", str(source), "-o", str(compiled)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return compiled


def built(folder: Path) -> Path:
    """The library in ``folder``, which the first process of a run to want it builds."""
    library = folder / f"{MODULE}.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            with ThreadPool(len(os.sched_getaffinity(0))) as pool:
                objects = pool.map(partial(compile_source, folder=folder), SOURCES)
            unfinished = folder / "unfinished.so"
            link = ["g++", "-shared", "-fsanitize=undefined", *objects, "-o", unfinished]
            subprocess.run(link, check=True)
            unfinished.rename(library)
    return library


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the processes of a run share
    folder = folder / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    library = built(folder)
    spec = importlib.util.spec_from_file_location(MODULE, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    controls = ctypes.CDLL(str(library))
    controls.run_planted.restype = ctypes.c_char_p
    controls.launch_stream.restype = ctypes.c_uint64
    controls.from_half.restype = ctypes.c_float
    for convert in (controls.to_half, controls.to_bfloat16):
        convert.argtypes, convert.restype = [ctypes.c_float], ctypes.c_uint16
    return Machine(module, controls)


@pytest.fixture
def cuda_by_gxx(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ``cuda`` backend of the ops, on CPU tensors."""
    monkeypatch.setattr(loading, "_extension", machine.module)
    monkeypatch.setattr(CudaNormKernels, "_queue", lambda self, like: (0, 0, 3))
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    dispatch._always.clear()
    yield
    dispatch._always.clear()
