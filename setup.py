"""Builds the C++ extension ``fastattn._C``, and installs without it where that fails.

The reason for a failed build is written to ``fastattn/_build_status.txt``, which
``fastattn.extension.why_not()`` reports. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXTENSION = Extension(
    "fastattn._C",
    sources=["csrc/bindings.cpp", "csrc/dropout_cpu.cpp"],
    depends=["csrc/dropout.h", "csrc/philox.h"],
    include_dirs=["csrc"],
    language="c++",
    optional=True,
)


def run_compiler(command: list[str], **_: object) -> None:
    """Run one compiler command; raise with the first error it printed."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        error = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{command[0]} failed: {error.strip()}")


class BuildOrExplain(build_ext):
    """Builds with OpenMP, else without, else says why not and lets the installation go on."""

    failure: str | None = None

    def build_extension(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        flags = ["/std:c++17", "/O2"] if msvc else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        openmp = "/openmp" if msvc else "-fopenmp"
        if not msvc:
            self.compiler.spawn = run_compiler
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            try:
                ext.extra_compile_args = [*flags, openmp]
                ext.extra_link_args = [] if msvc else [openmp]
                super().build_extension(ext)
            except Exception:
                ext.extra_compile_args, ext.extra_link_args = flags, []
                super().build_extension(ext)
        except Exception as error:
            self.failure = " ".join(str(error).split())

    def run(self) -> None:
        super().run()
        library = Path(self.get_ext_fullpath(EXTENSION.name))
        status = library.with_name("_build_status.txt")
        if self.failure is None:
            status.unlink(missing_ok=True)
        else:
            library.unlink(missing_ok=True)  # left over from an earlier build
            library.parent.mkdir(parents=True, exist_ok=True)
            status.write_text(self.failure + "\n", encoding="utf-8")
            self.warn(f"fastattn is installed without its C++ extension: {self.failure}")


setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildOrExplain})
