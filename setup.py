"""Builds the extension ``fastattn._C``, and installs without the part that cannot be built.

First the C++ part, with OpenMP or else without it; then the CUDA kernels are added. ninja drives
the compilers in build/, where a later build finds what has not changed; without ninja, or with
MSVC, setuptools builds the C++ part alone. Neither torch nor a GPU nor its driver is needed. What
is missing, and why, is left in ``fastattn/_build_status.txt`` for fastattn/extension/loading.py.

FASTATTN_CUDA         auto (the default): with CUDA where nvcc works; 0: without; 1: with, or fail
TORCH_CUDA_ARCH_LIST  numbers, as torch takes them: "8.0;9.0a;12.0+PTX"; from 8.0 on
MAX_JOBS              how many compilers run at once, and threads of nvcc
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BINDINGS = "csrc/bindings.cpp"
CPU_SOURCES = [BINDINGS, *sorted(glob("csrc/*_cpu.cpp"))]
CUDA_SOURCES = sorted(glob("csrc/*.cu"))
HEADERS = sorted(glob("csrc/*.h") + glob("csrc/*.cuh"))
EXTENSION = Extension(
    "fastattn._C", CPU_SOURCES, depends=CUDA_SOURCES + HEADERS, language="c++", optional=True
)
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # those that nvcc knows; PTX of the newest
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
CUDA_RUNTIME = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]  # static: loads without a driver
NINJA_FILE = """\
builddir = {folder}
rule cxx
  command = {cxx} $bindings -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out {libraries}
{objects}
build {library}: link {inputs}
"""
# What ninja prints of a compiler that failed: the command, then the compiler's own lines.
FAILED = r"^FAILED: .*\n(\S+).*\n((?:(?!\[\d+/\d+\]|ninja: ).*\n)*)"


class CannotBuild(Exception):
    """Why the extension, or its CUDA part, cannot be built."""


def setting(name: str, allowed: str, meaning: str) -> str:
    """An environment variable, which must match ``allowed``; "" where it is not set."""
    value = os.environ.get(name, "").strip("; ")
    if value and not re.fullmatch(allowed, value):
        raise SystemExit(f"fastattn: {name} must be {meaning}, but it is {value!r}")
    return value


def find(program: str, *folders: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join(folders))


def output_of(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a program prints; where it fails, or a compiler that ninja starts, the first error."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, **pipes)
    if done.returncode == 0:
        return done.stdout
    print(done.stdout, flush=True)
    compiler = re.search(FAILED, done.stdout, re.MULTILINE)
    program, printed = compiler.groups() if compiler else (command[0], done.stdout)
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|fatal|cannot|not found", line)]
    raise CannotBuild(f"{program} failed: {(errors or lines or ['it printed nothing'])[0]}")


def choose_architectures(nvcc: str, wanted: str) -> list[str]:
    """Such as ["80", "90a", "120+PTX"]; ``wanted`` is TORCH_CUDA_ARCH_LIST."""
    names = re.findall(r"[^;\s]+", wanted.replace(".", ""))
    if not names:
        known = output_of([nvcc, "--list-gpu-code"]).split()
        names = [number for number in ARCHITECTURES if f"sm_{number}" in known]
        names[-1:] = [f"{number}+PTX" for number in names[-1:]]
    chosen = [name for name in names if int(re.match(r"\d+", name)[0]) >= 80]
    if not chosen:
        raise CannotBuild("neither TORCH_CUDA_ARCH_LIST nor nvcc has an architecture from 8.0 on")
    return chosen


def code_flags(architectures: Sequence[str]) -> list[str]:
    """Machine code for every architecture, and PTX as well where its name says so."""
    flags = []
    for number, _, ptx in (name.partition("+") for name in architectures):
        kinds = ("sm", "compute") if ptx else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return list(dict.fromkeys(flags))


def library_folders(nvcc: str) -> list[str]:
    """Linker options for where this nvcc, which may be a script, has its libraries."""
    plan = output_of([nvcc, "--dryrun", "-c", "any.cu"])
    return shlex.split(" ".join(re.findall(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)))


def quoted(command: list[str]) -> str:
    """A command as the shell reads it from a build.ninja."""
    return shlex.join(command).replace("$", "$$")


class BuildWhatCanBeBuilt(build_ext):
    """The C++ part, then the CUDA part; fails only where an environment variable asks for it."""

    def run(self) -> None:
        self.cuda = setting("FASTATTN_CUDA", "auto|0|1", "auto, 0 or 1")
        self.jobs = setting("MAX_JOBS", r"0*[1-9]\d*", "a positive integer")
        self.wanted = ""
        if self.cuda != "0":
            versions = r"(\d+\.\d[af]?(\+PTX)?([;\s]+|$))+"
            like = "a list of numbers like '8.0;9.0a;12.0+PTX'"
            self.wanted = setting("TORCH_CUDA_ARCH_LIST", versions, like)
        self.missing: str | None = None
        built = Path(self.build_lib, self.get_ext_filename(EXTENSION.name))
        library = Path(self.get_ext_fullpath(EXTENSION.name))  # among the sources if editable
        status = library.with_name("_build_status.txt")
        for earlier in (built, built.with_name(status.name), library, status):
            earlier.unlink(missing_ok=True)
        super().run()
        if self.missing:
            self.warn(f"fastattn is installed without its {self.missing}")
            status.parent.mkdir(parents=True, exist_ok=True)
            status.write_text(f"{self.missing}\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        for part, build in (("C++ extension", self.build_cpu), ("CUDA kernels", self.add_cuda)):
            try:
                build(ext)
            except Exception as error:
                reason = " ".join(str(error).split())
                self.missing = f"{part}: {reason}"
                if self.cuda == "1":
                    raise SystemExit(f"fastattn: FASTATTN_CUDA=1, but no {self.missing}") from error
                return

    def build_cpu(self, ext: Extension) -> None:
        import pybind11

        self.msvc = self.compiler.compiler_type == "msvc"
        self.ninja = find("ninja", sysconfig.get_path("scripts"), os.environ.get("PATH", ""))
        self.include_dirs = ["csrc", pybind11.get_include(), *self.include_dirs]
        with_ninja = self.ninja and not self.msvc
        build = self.build_with_ninja if with_ninja else self.build_with_setuptools
        try:
            self.openmp = ["/openmp" if self.msvc else "-fopenmp"]
            build(ext)
        except Exception:
            self.openmp = []
            build(ext)

    def add_cuda(self, ext: Extension) -> None:
        if self.cuda == "0":
            raise CannotBuild("FASTATTN_CUDA=0 left them out")
        toolkits = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
        folders = [os.path.join(toolkit, "bin") for toolkit in toolkits]
        nvcc = find("nvcc", *folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin")
        if nvcc is None:
            raise CannotBuild("there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
        if self.ninja is None or self.msvc:
            raise CannotBuild("they take ninja, and another compiler than MSVC")
        self.build_with_ninja(ext, nvcc, choose_architectures(nvcc, self.wanted))

    def build_with_setuptools(self, ext: Extension) -> None:
        ext.include_dirs = self.include_dirs
        ext.extra_compile_args = (["/std:c++17", "/O2"] if self.msvc else CXX_FLAGS) + self.openmp
        ext.extra_link_args = [] if self.msvc else self.openmp
        super().build_extension(ext)

    def build_with_ninja(
        self, ext: Extension, nvcc: str | None = None, architectures: Sequence[str] = ()
    ) -> None:
        """The bindings alone know of Python and of CUDA; nothing else is compiled twice for it."""
        bindings = [f"-I{path}" for path in self.include_dirs]
        gpu, libraries = [], self.openmp
        if nvcc:
            names = " ".join(architectures)
            bindings += ["-DFASTATTN_WITH_CUDA", f'-DFASTATTN_CUDA_ARCHITECTURES="{names}"']
            gpu = [nvcc, *NVCC_FLAGS, *code_flags(architectures)]
            libraries = [*self.openmp, *library_folders(nvcc), *CUDA_RUNTIME]
        folder = Path("build", f"{sys.implementation.cache_tag}-{self.plat_name}")
        kind = "with_cuda" if nvcc else "without_cuda"
        objects = {f"{folder}/{kind}.o": f"cxx {BINDINGS}\n  bindings = {quoted(bindings)}"}
        for rule, sources in (("cxx", CPU_SOURCES[1:]), ("nvcc", CUDA_SOURCES if nvcc else [])):
            objects |= {f"{folder}/{Path(file).stem}.o": f"{rule} {file}" for file in sources}
        text = NINJA_FILE.format(
            folder=folder,
            cxx=quoted([*self.compiler.compiler_so_cxx, *CXX_FLAGS, *self.openmp]),
            nvcc=quoted(gpu),
            link=quoted([*self.compiler.compiler_cxx, *self.compiler.linker_so_cxx[1:]]),
            libraries=quoted(libraries),
            objects="\n".join(f"build {name}: {how}" for name, how in objects.items()),
            inputs=" ".join(objects),
            library=f"{folder}/{kind}.so",
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(text, encoding="utf-8")
        jobs = [f"-j{self.jobs}"] if self.jobs else []
        # Not in the command, so that another number compiles nothing again; 0: one for each core.
        threads = {"NVCC_APPEND_FLAGS": f"--threads={self.jobs or 0}", **os.environ}
        command = [self.ninja, "-f", f"{folder}/build.ninja", *jobs]
        print(output_of(command, threads), end="", flush=True)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{kind}.so", library)


setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildWhatCanBeBuilt})
