"""Whether the C++ extension ``fastattn._C`` is there, and why not.

Importing this module never fails and never compiles; the extension is built once, when the package
is installed.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch  # before the extension: both then share one OpenMP thread pool

from fastattn.dropout import CONTRACT_VERSION

_PACKAGE = Path(__file__).parents[1]
_REMEDY = "install a C++17 compiler and the headers of Python, then install fastattn again"
_CUDA_REMEDY = "install fastattn again where nvcc works, with FASTATTN_CUDA=1"


@lru_cache(maxsize=2)
def _not_built(part: str) -> str | None:
    """Why setup.py could not build "C++ extension" or "CUDA kernels", where it recorded that."""
    status = _PACKAGE / "_build_status.txt"
    if not status.is_file():
        return None
    missing, _, reason = status.read_text(encoding="utf-8").strip().partition(": ")
    return reason if missing == part else None


def _load() -> tuple[ModuleType | None, str | None]:
    """(the extension, None), or (None, why it is not there)."""
    try:
        extension = importlib.import_module("fastattn._C")
        if Path(extension.__file__).parent != _PACKAGE:
            # An editable installation elsewhere answers for modules that this one lacks.
            raise ModuleNotFoundError("found in another installation", name="fastattn._C")
    except ImportError as error:
        failure = _not_built("C++ extension")
        if failure is not None:
            return None, f"the C++ extension was not built: {failure}; {_REMEDY}"
        if getattr(error, "name", None) == "fastattn._C" and isinstance(error, ModuleNotFoundError):
            return None, f"the C++ extension is not built; {_REMEDY}"
        return None, f"the C++ extension cannot be loaded: {error}; install fastattn again"
    if extension.CONTRACT_VERSION != CONTRACT_VERSION:
        return None, (
            f"the C++ extension implements version {extension.CONTRACT_VERSION} of the dropout "
            f"contract, but fastattn has version {CONTRACT_VERSION}; install fastattn again"
        )
    return extension, None


_extension, _why_not = _load()


def available() -> bool:
    """Whether the extension is built and loaded."""
    return _extension is not None


def why_not() -> str | None:
    """Why the extension is not available and what to do about it; None where it is available."""
    return _why_not


def why_not_cuda(device: torch.device | None = None) -> str | None:
    """Why the extension's CUDA kernels cannot run, and what to do about it; None where they can.

    Args:
        device: a CUDA device that they must be built for; None asks whether there are any.
    """
    if _extension is None:
        return _why_not
    if not _extension.CUDA_ARCHITECTURES:
        reason = _not_built("CUDA kernels") or "the extension was built without them"
        return f"the CUDA kernels were not built: {reason}; {_CUDA_REMEDY}"
    if device is None or not torch.cuda.is_available():
        return None
    return _why_not_on(torch.cuda.get_device_capability(device))


# What torch.compiler.assume_constant_result does, without importing the compiler.
why_not_cuda._dynamo_marked_constant = True


@lru_cache(maxsize=16)
def _why_not_on(capability: tuple[int, int]) -> str | None:
    """Why kernels of the architectures that were built do not run on a GPU of this capability."""
    driver, runtime = _extension.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"built with CUDA {runtime // 1000}, but the driver is of CUDA {driver // 1000}; "
            f"install a newer driver, or fastattn again where nvcc is of that version"
        )
    major, minor = capability
    for name in _extension.CUDA_ARCHITECTURES.split():
        number, _, ptx = name.partition("+")
        built = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):  # for this one architecture
            runs = built == capability
        else:  # machine code for later ones of the same generation, PTX for all later ones
            runs = (built[0] == major and built[1] <= minor) or (ptx and built <= capability)
        if runs:
            return None
    return (
        f"built for {cuda_architectures()}, not for compute capability {major}.{minor}; "
        f"install fastattn again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def cuda_architectures() -> str:
    """What the CUDA kernels are built for, such as "sm_80, sm_90, sm_120 and PTX"."""
    names = [f"sm_{name}" for name in loaded().CUDA_ARCHITECTURES.split()]
    return ", ".join(names).replace("+PTX", " and PTX")


def loaded() -> ModuleType:
    """The extension itself, or RuntimeError that says why there is none."""
    if _extension is None:
        raise RuntimeError(_why_not)
    return _extension
