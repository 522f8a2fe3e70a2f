"""The package builds and installs anywhere, and importing it does nothing but import.

Every test works on a copy of the source tree and looks at what it made from a foreign directory.
CUDA kernels take long to compile, so the wheel alone has real ones, for one architecture. Where
only setup.py's decisions count, scripts stand in for the compilers and note how they were called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastattn
from fastattn.extension import loading
from tests import ROOT

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


def failing_compiler(folder: Path) -> Path:
    """A compiler that refuses everything, with an error message."""
    text = "echo 'file.cpp:1: error: this compiler is broken' >&2\nexit 1\n"
    return script(folder / "broken-c++", text)


def quick_compiler(folder: Path) -> Path:
    """The C++ compiler, in a hurry; it notes how it was called."""
    return script(folder / "quick-c++", f'{NOTE}exec {COMPILER} "$@" -O0\n')


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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A clean copy of the source tree, as a fresh clone has it."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a source distribution made from a clean copy; CUDA kernels for sm_90.

    The compilers are in a hurry; what the build asks of them is another test's.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)], Path(source))
    (sdist,) = folder.glob("fastattn-*.tar.gz")
    command = [*PIP, "wheel", *HERE_ONLY, "-w", str(folder), str(sdist)]
    compiler = str(quick_compiler(folder)) if COMPILER else "c++"
    compilers = {"CC": compiler, "CXX": compiler, "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0"}
    run(command, folder, FASTATTN_CUDA="auto", TORCH_CUDA_ARCH_LIST="9.0", **compilers)
    (wheel,) = folder.glob("fastattn-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder in which the wheel is installed."""
    target = wheel.parent / "installed"
    run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], wheel.parent)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).parts[0].split("-")[0] for name in names} == {"fastattn"}
    assert "fastattn/kernels/__init__.py" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastattn").rglob("*.py")}
    assert modules <= set(names)


def test_source_distribution_holds_the_sources_of_the_extension(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("fastattn-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names


@needs_compiler
def test_wheel_holds_the_extension(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert (STATUS in names) is (NVCC is None)


@needs_compiler
@needs_nvcc
def test_wheel_has_cuda_kernels(installed: Path, elsewhere: Path) -> None:
    """The wheel's extension is imported here, where there need not be a driver."""
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(installed))
    assert found["available"] is True, found["why_not"]
    assert found["why_not_cuda"] is None
    report = run([sys.executable, "-m", "fastattn"], elsewhere, PYTHONPATH=str(installed))
    assert "CUDA kernels      built for sm_90\n" in report


@needs_compiler
@needs_nvcc
def test_wheel_needs_no_library_of_cuda(installed: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    needed = run(["readelf", "--dynamic", str(installed / LIBRARY)], installed)
    assert "libstdc++" in needed
    assert "libcuda" not in needed


@needs_compiler
@needs_nvcc
def test_machine_code_in_the_wheel(installed: Path) -> None:
    cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    listed = run([cuobjdump, "--list-elf", "--list-ptx", str(installed / LIBRARY)], installed)
    assert len(listed.splitlines()) == listed.count(".sm_90.cubin") > 0


def test_size_of_the_whole_extension() -> None:
    """That which these tests run with, if it was built for every architecture."""
    if not loading.available() or loading.loaded().CUDA_ARCHITECTURES != ALL_ARCHITECTURES:
        pytest.skip(f"needs an installation with kernels for {ALL_ARCHITECTURES}")
    assert Path(loading.loaded().__file__).stat().st_size < 10e6


def test_import_from_a_foreign_directory(installed: Path, elsewhere: Path) -> None:
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(installed))
    assert Path(found["package"]).is_relative_to(installed)
    assert Path(found["kernels"]).is_relative_to(installed)
    assert found["available"] is (found["why_not"] is None)


def test_import_compiles_nothing_and_leaves_cuda_alone(installed: Path, elsewhere: Path) -> None:
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(installed))
    assert found["cuda_initialised"] is False
    compilers = {"triton", "ninja", "setuptools", "torch.utils.cpp_extension", "torch._inductor"}
    assert "fastattn" in found["imported"]
    assert not compilers & set(found["imported"])


def test_environment_report_runs(installed: Path, elsewhere: Path) -> None:
    report = run([sys.executable, "-m", "fastattn"], elsewhere, PYTHONPATH=str(installed))
    assert fastattn.__version__ in report


def test_version_is_that_of_the_metadata(wheel: Path) -> None:
    assert wheel.name.startswith(f"fastattn-{fastattn.__version__}-")


def test_isolated_install(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    """The build environment holds what pyproject.toml asks for: no torch."""
    tools = [*PIP, "download", "--no-deps", "--dest", str(tmp_path / "tools")]
    wanted = ["setuptools>=77", "pybind11>=2.13", "ninja"]
    if subprocess.run([*tools, *wanted], capture_output=True).returncode:
        pytest.skip("needs a package index to fetch setuptools, pybind11 and ninja from")
    isolated = (
        "from importlib.util import find_spec\n"
        "assert find_spec('torch') is None and find_spec('ninja') is not None\n"
    )
    change(source / "setup.py", "import subprocess\n", f"{isolated}import subprocess\n")
    target, compiler = tmp_path / "installed", str(quick_compiler(tmp_path))
    install(source, target, "--no-deps", FASTATTN_CUDA="0", CC=compiler, CXX=compiler)
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert Path(found["package"]).is_relative_to(target)


def test_broken_compiler_installs_the_rest(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    compiler = str(failing_compiler(tmp_path))
    target = tmp_path / "installed"
    install(source, target, *HERE_ONLY, CC=compiler, CXX=compiler)
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert Path(found["package"]).is_relative_to(target)
    assert found["available"] is False
    assert compiler in found["why_not"]
    assert "file.cpp:1: error: this compiler is broken" in found["why_not"]


def test_missing_compiler_is_named(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install(source, target, *HERE_ONLY, CC="/nowhere/c++", CXX="/nowhere/c++")
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert found["available"] is False
    assert "/nowhere/c++" in found["why_not"]


@needs_compiler
def test_compiler_without_openmp(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    compiler = script(
        tmp_path / "no-openmp-c++",
        'case " $* " in *" -fopenmp "*) echo "error: unsupported -fopenmp" >&2; exit 1;; esac\n'
        f'exec {COMPILER} "$@" -O0\n',
    )
    target = tmp_path / "installed"
    compilers = {"CC": str(compiler), "CXX": str(compiler)}
    install(source, target, *HERE_ONLY, FASTATTN_CUDA="0", **compilers)
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert found["available"] is True, found["why_not"]


@needs_compiler
def test_editable_install(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    """Neither compiler works, then nvcc alone does not: what works is there, with the reasons."""
    environment = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path)
    python = environment / "bin" / "python"
    paths = run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
    )
    # torch and setuptools come from the environment that runs the tests
    Path(paths.strip(), "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [*PIP, "--python", str(python), "install", *HERE_ONLY, "-e", str(source)]
    nvcc = script(tmp_path / "bin" / "nvcc", "echo 'nvcc fatal   : this nvcc is broken'; exit 1\n")

    compiler = str(failing_compiler(tmp_path))
    run(command, elsewhere, CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path))
    found = inspect(python, elsewhere)
    assert compiler in found["why_not"]
    assert found["why_not_cuda"] == found["why_not"]
    assert (source / STATUS).is_file()

    compiler = str(quick_compiler(tmp_path))
    run(command, elsewhere, CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path))
    found = inspect(python, elsewhere)
    assert found["available"] is True, found["why_not"]
    assert found["why_not_cuda"].startswith(
        f"the CUDA kernels were not built: {nvcc} failed: nvcc fatal : this nvcc is broken; "
    )
    assert Path(found["package"]) == source / "fastattn" / "__init__.py"
    assert Path(found["kernels"]) == source / "kernels" / "triton" / "__init__.py"

    run(command, elsewhere, CC=compiler, CXX=compiler, FASTATTN_CUDA="0")
    found = inspect(python, elsewhere)
    assert found["available"] is True, found["why_not"]
    assert "FASTATTN_CUDA=0" in found["why_not_cuda"]


# ------------------------------------------------------------------------ what setup.py decides


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


def test_bad_setting_stops_pip(source: Path, tmp_path: Path) -> None:
    command = [*PIP, "install", "--target", str(tmp_path / "installed"), *HERE_ONLY, str(source)]
    variables = {**os.environ, "FASTATTN_CUDA": "on"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "fastattn: FASTATTN_CUDA must be auto, 0 or 1, but it is 'on'" in done.stderr
    assert not (tmp_path / "installed").exists()


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
def test_where_nvcc_is_looked_for(build: Build, variable: str) -> None:
    toolkit = build.nvcc.parent if variable == "PATH" else build.nvcc.parent.parent
    done = build(**{"CUDA_HOME": "", "PATH": "/nowhere", variable: str(toolkit)})
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
    compiler = quick_compiler(tmp_path)

    def compiled() -> set[str]:
        done = build(CC=str(compiler), CXX=str(compiler), FASTATTN_CUDA="0")
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"csrc/\w+\.cpp", "\n".join(calls(compiler))))

    csrc = build.source / "csrc"
    assert compiled() == {"csrc/bindings.cpp", *(f"csrc/{p.name}" for p in csrc.glob("*_cpu.cpp"))}
    assert compiled() == set()
    change(csrc / "inference.h", "#pragma once\n", "#pragma once\n\n")
    assert compiled() == {"csrc/bindings.cpp", "csrc/inference_cpu.cpp"}
