"""What setup.py decides: with which compilers it builds what, and what it says of the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.building import (
    ALL_ARCHITECTURES,
    LIBRARY,
    NOTE,
    STATUS,
    calls,
    change,
    compiler_that_only_reads,
    failing_compiler,
    needs_compiler,
    ninja_alone,
    script,
)


class Build:
    """An in-place build by scripts that write empty files and note how they were called."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        empty = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n'
        folder.mkdir()
        self.compiler = script(folder / "c++", NOTE + empty)
        self.nvcc = script(
            folder / "bin" / "nvcc",
            f'{NOTE}plan=\'#$ LIBRARIES=  "-L/toolkit/stubs" "-L/toolkit/lib"\'\n'
            'case "$*" in\n'
            "*--list-gpu-code*) echo $KNOWN; exit;;\n"
            '*--dryrun*) echo "$plan" >&2; exit;;\n'
            f"esac\n{empty}",
        )
        self.variables = {
            "KNOWN": "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
            "CC": str(self.compiler),
            "CXX": str(self.compiler),
            "CUDA_HOME": str(folder),
        }

    def __call__(self, **variables: str) -> subprocess.CompletedProcess:
        cleared = ("FASTATTN_CUDA", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
        inherited = {name: value for name, value in os.environ.items() if name not in cleared}
        return subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.source,
            env={**inherited, **self.variables, **variables},
            capture_output=True,
            text=True,
        )

    def status(self) -> str | None:
        """The recorded reason, None where there is none; the library is there with CUDA or not."""
        file = self.source / STATUS
        text = file.read_text(encoding="utf-8").strip() if file.exists() else None
        missing = text is not None and text.startswith("C++ extension: ")
        assert (self.source / LIBRARY).exists() is not missing
        return text

    def architectures(self) -> tuple[str, list[str]]:
        """What the last build told the bindings, and nvcc."""
        (told,) = re.findall(
            '-DFASTATTN_CUDA_ARCHITECTURES="(.*?)"', "\n".join(calls(self.compiler))
        )
        (compiled,) = (call for call in calls(self.nvcc) if "-gencode" in call)
        return told, re.findall(r"-gencode=arch=(\S+)", compiled)


@pytest.fixture
def build(source: Path, tmp_path: Path) -> Build:
    return Build(source, tmp_path / "tools")


def hide_usual_toolkit(source: Path) -> None:
    change(source / "setup.py", '"/usr/local/cuda/bin"', '"/nowhere"')


@pytest.mark.parametrize(
    "name, value",
    [
        ("FASTATTN_CUDA", "yes"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "two"),
        ("TORCH_CUDA_ARCH_LIST", "8.0,9.0"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;90"),
    ],
)
def test_bad_setting_is_named(build: Build, name: str, value: str) -> None:
    allowed = {"FASTATTN_CUDA": "auto, 0 or 1", "MAX_JOBS": "a positive integer"}
    done = build(**{name: value})
    assert done.returncode == 1
    meaning = allowed.get(name, "a list of numbers like '8.0;9.0a;12.0+PTX'")
    assert done.stderr == f"fastattn: {name} must be {meaning}, but it is {value!r}\n"
    assert not calls(build.compiler) and not calls(build.nvcc)


@pytest.mark.parametrize(
    "listed, told, compiled",
    [
        ("9.0", "90", ["compute_90,code=sm_90"]),
        ("9.0a", "90a", ["compute_90a,code=sm_90a"]),
        (
            "8.0;12.0+PTX",
            "80 120+PTX",
            [
                "compute_80,code=sm_80",
                "compute_120,code=sm_120",
                "compute_120,code=compute_120",
            ],
        ),
        (" 7.5 8.6; 10.0 8.6", "86 100 86", ["compute_86,code=sm_86", "compute_100,code=sm_100"]),
    ],
)
def test_chosen_architectures(build: Build, listed: str, told: str, compiled: list[str]) -> None:
    done = build(TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode == 0, done.stderr
    assert build.status() is None
    assert build.architectures() == (told, compiled)


@pytest.mark.parametrize(
    "known, told",
    [
        ("sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120", ALL_ARCHITECTURES),
        ("sm_50 sm_70 sm_75 sm_80 sm_86 sm_89 sm_90", "80 86 89 90+PTX"),
        ("sm_75 sm_80 sm_86", "80 86+PTX"),
    ],
)
def test_default_architectures_are_those_nvcc_knows(build: Build, known: str, told: str) -> None:
    done = build(KNOWN=known)
    assert done.returncode == 0, done.stderr
    numbers = told.removesuffix("+PTX").split()
    machine = [f"compute_{number},code=sm_{number}" for number in numbers]
    ptx = f"compute_{numbers[-1]},code=compute_{numbers[-1]}"
    assert build.architectures() == (told, [*machine, ptx])


@pytest.mark.parametrize("known, listed", [("sm_70 sm_75", ""), ("sm_80", "7.5")])
def test_no_architecture_is_left(build: Build, known: str, listed: str) -> None:
    done = build(KNOWN=known, TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode == 0, done.stderr
    assert "architecture from 8.0 on" in build.status()


def test_how_the_compilers_are_called(build: Build) -> None:
    """With CUDA the bindings know it, and its runtime is linked in; one compiler runs at a time."""
    alone = 'mkdir "$0.running" || exit 1; trap \'rmdir "$0.running"\' EXIT; sleep 0.1\n'
    change(build.compiler, NOTE, NOTE + alone)
    done = build(MAX_JOBS="1")
    assert done.returncode == 0, done.stderr
    assert build.status() is None
    cpu, gpu = calls(build.compiler), calls(build.nvcc)
    assert all("-fopenmp" in call for call in cpu)
    (with_cuda,) = (call for call in cpu if "-DFASTATTN_WITH_CUDA" in call)
    assert "csrc/bindings.cpp" in with_cuda
    *_, link = cpu
    assert "-L/toolkit/stubs -L/toolkit/lib -lcudart_static -ldl -lrt -lpthread" in link
    compiled = [call for call in gpu if " -o " in call]
    sources = sorted((build.source / "csrc").glob("*.cu"))
    assert len(compiled) == len(sources) > 0
    for call in compiled:
        assert "-O3 -std=c++17" in call or "-std=c++17 -O3" in call
        assert "--threads=1" in call
        assert "fast_math" not in call


def test_without_nvcc(build: Build, tmp_path: Path) -> None:
    hide_usual_toolkit(build.source)
    nowhere = {"CUDA_HOME": "", "CUDA_PATH": "/nowhere", "PATH": str(tmp_path)}
    done = build(**nowhere)
    assert done.returncode == 0, done.stderr
    reason = "there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    assert build.status() == f"CUDA kernels: {reason}"
    assert f"fastattn is installed without its CUDA kernels: {reason}" in done.stderr

    done = build(**nowhere, FASTATTN_CUDA="1")
    assert done.returncode == 1
    assert done.stderr == f"fastattn: FASTATTN_CUDA=1, but no CUDA kernels: {reason}\n"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_where_nvcc_is_looked_for(build: Build, tmp_path: Path, variable: str) -> None:
    hide_usual_toolkit(build.source)
    path = ninja_alone(tmp_path / "ninja")
    toolkit = f"{path}:{build.nvcc.parent}" if variable == "PATH" else build.nvcc.parent.parent
    done = build(**{"CUDA_HOME": "", "PATH": str(path), variable: str(toolkit)})
    assert done.returncode == 0, done.stderr
    assert build.status() is None
    assert calls(build.nvcc)


def test_cuda_can_be_left_out(build: Build) -> None:
    done = build(FASTATTN_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert build.status() == "CUDA kernels: FASTATTN_CUDA=0 left them out"
    assert not calls(build.nvcc)
    assert not any("FASTATTN_WITH_CUDA" in call for call in calls(build.compiler))


def test_failure_leaves_nothing_of_an_earlier_build(build: Build, tmp_path: Path) -> None:
    assert build().returncode == 0
    assert build.status() is None
    broken = str(failing_compiler(tmp_path))
    assert build(CC=broken, CXX=broken).returncode == 0
    assert build.status().startswith(f"C++ extension: {broken} failed: file.cpp:1: error")
    assert build().returncode == 0
    assert build.status() is None
    done = build(CC=broken, CXX=broken, FASTATTN_CUDA="1")
    assert done.returncode == 1
    assert "FASTATTN_CUDA=1, but no C++ extension: " in done.stderr
    assert not list((build.source / "fastattn").glob("_[Cb]*"))


def test_missing_compiler_is_named(build: Build) -> None:
    done = build(CC="/nowhere/c++", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert build.status().startswith("C++ extension: ") and "/nowhere/c++" in build.status()


def test_link_that_fails(build: Build) -> None:
    """As where the toolkit has no static runtime: the C++ part is installed."""
    cannot = "*lcudart_static*) echo 'ld: cannot find -lcudart_static' >&2; exit 1;;"
    change(build.compiler, NOTE, f'{NOTE}case "$*" in {cannot} esac\n')
    done = build()
    assert done.returncode == 0, done.stderr
    assert build.status() == (
        f"CUDA kernels: {build.compiler} failed: ld: cannot find -lcudart_static"
    )


def test_without_ninja_the_cpu_part_is_built(build: Build) -> None:
    change(build.source / "setup.py", 'find("ninja"', 'find("no-such-ninja"')
    done = build()
    assert done.returncode == 0, done.stderr
    assert build.status() == "CUDA kernels: they take ninja, and another compiler than MSVC"
    assert any("-fopenmp" in call and "csrc/bindings.cpp" in call for call in calls(build.compiler))


@needs_compiler
def test_second_build_compiles_what_has_changed(build: Build, tmp_path: Path) -> None:
    compiler = compiler_that_only_reads(tmp_path)

    def compiled() -> set[str]:
        done = build(CC=str(compiler), CXX=str(compiler), FASTATTN_CUDA="0")
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"csrc/\w+\.cpp", "\n".join(calls(compiler))))

    csrc = build.source / "csrc"
    assert compiled() == {"csrc/bindings.cpp", *(f"csrc/{p.name}" for p in csrc.glob("*_cpu.cpp"))}
    assert compiled() == set()
    change(csrc / "inference.h", "#pragma once\n", "#pragma once\n\n")
    assert compiled() == {"csrc/bindings.cpp", "csrc/inference_cpu.cpp"}
