"""Builds the C++ extension ``fastattn._C``, and installs without it where that fails.

The reason for a failed build is written to ``fastattn/_build_status.txt``, which
``fastattn.extension.why_not()`` reports. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXTENSION = Extension(
    "fastattn._C",
    sources=["csrc/bindings.cpp", "csrc/dropout_cpu.cpp", "csrc/inference_cpu.cpp"],
    depends=["csrc/dropout.h", "csrc/inference.h", "csrc/parallel.h", "csrc/philox.h"],
    language="c++",
    optional=True,
)


@contextmanager
def stderr_into(log: BinaryIO) -> Iterator[None]:
    """Send what this process and the compilers it starts write to stderr to ``log``."""
    stderr = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def summary(error: Exception, log: str) -> str:
    """One line: what failed, and the first error that the compiler printed."""
    origin = error.__cause__ or error.__context__ or error
    if isinstance(origin, subprocess.CalledProcessError):
        error = RuntimeError(f"{origin.cmd[0]} failed with exit code {origin.returncode}")
    printed = [line for line in log.splitlines() if "error" in line][:1]
    return " ".join(": ".join([str(error), *printed]).split())


class BuildOrExplain(build_ext):
    """Builds with OpenMP, else without, else says why not and lets the installation go on."""

    failure: str | None = None

    def build_extension(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        flags = (
            ["/std:c++17", "/O2"] if msvc else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        )
        openmp = "/openmp" if msvc else "-fopenmp"
        for attempt in ([openmp], []):
            ext.extra_compile_args = flags + attempt
            ext.extra_link_args = [] if msvc else attempt
            self.failure = self.try_build(ext)
            if self.failure is None:
                break

    def try_build(self, ext: Extension) -> str | None:
        """Why the extension could not be built, None if it was."""
        with tempfile.TemporaryFile() as log:
            try:
                import pybind11

                ext.include_dirs = ["csrc", pybind11.get_include()]
                with stderr_into(log):
                    super().build_extension(ext)
                return None
            except Exception as error:
                log.seek(0)
                return summary(error, log.read().decode(errors="replace"))

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
