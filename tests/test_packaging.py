"""The package builds and installs anywhere, and importing it does nothing but import.

Every test works on a copy of the source tree and looks at what it made from a foreign directory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
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

INSPECT = """
import json, sys
import torch
before = set(sys.modules)
import fastattn
from fastattn import extension
after_import = sorted(set(sys.modules) - before)
import fastattn.kernels
print(json.dumps({
    "package": fastattn.__file__,
    "kernels": fastattn.kernels.__file__,
    "available": extension.available(),
    "why_not": extension.why_not(),
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


def failing_compiler(folder: Path) -> Path:
    """A compiler that refuses everything, with an error message."""
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\necho 'file.cpp:1: error: this compiler is broken' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


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
    """A wheel made from a source distribution made from a clean copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)], Path(source))
    (sdist,) = folder.glob("fastattn-*.tar.gz")
    run([*PIP, "wheel", *HERE_ONLY, "-w", str(folder), str(sdist)], folder)
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


@needs_compiler
def test_wheel_holds_the_extension(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    library = "fastattn/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert library in names
    assert "fastattn/_build_status.txt" not in names


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
    reached = subprocess.run([*tools, "setuptools>=77", "pybind11>=2.13"], capture_output=True)
    if reached.returncode:
        pytest.skip("needs a package index to fetch setuptools and pybind11 from")
    setup = source / "setup.py"
    no_torch = "import importlib.util\nassert importlib.util.find_spec('torch') is None\n"
    text = setup.read_text(encoding="utf-8")
    setup.write_text(text.replace("import tempfile\n", no_torch + "import tempfile\n", 1))
    assert no_torch in setup.read_text(encoding="utf-8")
    target = tmp_path / "installed"
    install(source, target, "--no-deps")
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
    compiler = tmp_path / "no-openmp-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -fopenmp "*) echo "error: unsupported -fopenmp" >&2; exit 1;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    compiler.chmod(0o755)
    target = tmp_path / "installed"
    install(source, target, *HERE_ONLY, CC=str(compiler), CXX=str(compiler))
    found = inspect(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert found["available"] is True, found["why_not"]


@needs_compiler
def test_editable_install(source: Path, elsewhere: Path, tmp_path: Path) -> None:
    """First with a broken compiler, then with a good one, which clears the recorded failure."""
    environment = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path)
    python = environment / "bin" / "python"
    paths = run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
    )
    # torch and setuptools come from the environment that runs the tests
    Path(paths.strip(), "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [*PIP, "--python", str(python), "install", *HERE_ONLY, "-e", str(source)]
    status = source / "fastattn" / "_build_status.txt"

    compiler = str(failing_compiler(tmp_path))
    run(command, elsewhere, CC=compiler, CXX=compiler)
    assert compiler in inspect(python, elsewhere)["why_not"]
    assert status.is_file()

    run(command, elsewhere)
    found = inspect(python, elsewhere)
    assert found["available"] is True, found["why_not"]
    assert not status.exists()
    assert Path(found["package"]) == source / "fastattn" / "__init__.py"
    assert Path(found["kernels"]) == source / "kernels" / "triton" / "__init__.py"
