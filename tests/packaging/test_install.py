"""pip installs the package anywhere, without the parts that cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.packaging.building import (
    COMPILER,
    HERE_ONLY,
    LIBRARY,
    NOT_SOURCE,
    PIP,
    STATUS,
    calls,
    change,
    compiler_that_copies,
    failing_compiler,
    inspect,
    install,
    needs_compiler,
    packages_of,
    run,
    script,
)


def test_isolated_install(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    """The build environment holds what pyproject.toml asks for: no torch."""
    tools = str(tmp_path / "tools")
    fetch = [*PIP, "download", "--no-deps", "--dest", tools]
    wanted = ["setuptools>=77", "pybind11>=2.13", "ninja"]
    if subprocess.run([*fetch, *wanted], capture_output=True).returncode:
        pytest.skip("needs a package index to fetch setuptools, pybind11 and ninja from")
    isolated = (
        "from importlib.util import find_spec\n"
        "assert find_spec('torch') is None and find_spec('ninja') is not None\n"
    )
    change(source / "setup.py", "import subprocess\n", f"{isolated}import subprocess\n")
    target, compiler = tmp_path / "installed", compiler_that_copies(Path(os.devnull), tmp_path)
    compilers = {"CC": str(compiler), "CXX": str(compiler)}
    fetched = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tools}
    install(source, target, "--no-deps", FASTATTN_CUDA="0", **compilers, **fetched)
    assert any("csrc/bindings.cpp" in call for call in calls(compiler))
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


@pytest.fixture(scope="module")
def without_openmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installation by a compiler that has no OpenMP and is in a hurry."""
    folder = tmp_path_factory.mktemp("without-openmp")
    source = Path(shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE))
    compiler = script(
        folder / "no-openmp-c++",
        'case " $* " in *" -fopenmp "*) echo "error: unsupported -fopenmp" >&2; exit 1;; esac\n'
        f'exec {COMPILER} "$@" -O0\n',
    )
    compilers = {"CC": str(compiler), "CXX": str(compiler)}
    install(source, folder / "installed", *HERE_ONLY, FASTATTN_CUDA="0", **compilers)
    return folder / "installed"


@needs_compiler
def test_compiler_without_openmp(without_openmp: Path, elsewhere: Path) -> None:
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(without_openmp))
    assert found["available"] is True, found["why_not"]


@needs_compiler
def test_editable_install(
    source: Path, elsewhere: Path, tmp_path: Path, without_openmp: Path
) -> None:
    """Neither compiler works, then nvcc alone does not: what works is there, with the reasons."""
    environment = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path)
    python = environment / "bin" / "python"
    paths = run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
    )
    # they come from the environment that runs the tests
    Path(paths.strip(), "tests.pth").write_text(packages_of("torch", "setuptools", "pybind11"))
    command = [*PIP, "--python", str(python), "install", *HERE_ONLY, "-e", str(source)]
    nvcc = script(tmp_path / "bin" / "nvcc", "echo 'nvcc fatal   : this nvcc is broken'; exit 1\n")

    compiler = str(failing_compiler(tmp_path))
    run(command, elsewhere, CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path))
    found = inspect(python, elsewhere)
    assert compiler in found["why_not"]
    assert found["why_not_cuda"] == found["why_not"]
    assert (source / STATUS).is_file()

    compiler = str(compiler_that_copies(without_openmp / LIBRARY, tmp_path))
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


def test_bad_setting_stops_pip(source: Path, tmp_path: Path) -> None:
    command = [*PIP, "install", "--target", str(tmp_path / "installed"), *HERE_ONLY, str(source)]
    variables = {**os.environ, "FASTATTN_CUDA": "on"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "fastattn: FASTATTN_CUDA must be auto, 0 or 1, but it is 'on'" in done.stderr
    assert not (tmp_path / "installed").exists()
