"""The wheel holds all of the package, and importing that does nothing but import."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastattn
from fastattn.extension import loading
from tests import ROOT
from tests.packaging.building import (
    ALL_ARCHITECTURES,
    COMPILER,
    HERE_ONLY,
    LIBRARY,
    NOT_SOURCE,
    NVCC,
    PIP,
    STATUS,
    inspect,
    needs_compiler,
    needs_nvcc,
    quick_compiler,
    run,
)


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


@pytest.fixture(scope="module")
def found(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a fresh process finds, in a foreign directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return inspect(sys.executable, elsewhere, PYTHONPATH=str(installed))


@pytest.fixture(scope="module")
def printed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `python -m fastattn` prints in a foreign directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return run([sys.executable, "-m", "fastattn"], elsewhere, PYTHONPATH=str(installed))


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
def test_wheel_has_cuda_kernels(found: dict, printed: str) -> None:
    """The wheel's extension is imported here, where there need not be a driver."""
    assert found["available"] is True, found["why_not"]
    assert found["why_not_cuda"] is None
    assert "CUDA kernels      built for sm_90\n" in printed


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


def test_import_from_a_foreign_directory(found: dict, installed: Path) -> None:
    assert Path(found["package"]).is_relative_to(installed)
    assert Path(found["kernels"]).is_relative_to(installed)
    assert found["available"] is (found["why_not"] is None)


def test_import_compiles_nothing_and_leaves_cuda_alone(found: dict) -> None:
    assert found["cuda_initialised"] is False
    compilers = {"triton", "ninja", "setuptools", "torch.utils.cpp_extension", "torch._inductor"}
    assert "fastattn" in found["imported"]
    assert not compilers & set(found["imported"])


def test_environment_report_runs(printed: str) -> None:
    assert fastattn.__version__ in printed


def test_version_is_that_of_the_metadata(wheel: Path) -> None:
    assert wheel.name.startswith(f"fastattn-{fastattn.__version__}-")
