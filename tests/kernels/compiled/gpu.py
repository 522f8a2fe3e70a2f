"""A GPU that is not there: launchers run on meta tensors, and what they launch is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    shared_memory: int  # bytes that a block may ask for


GPUS = {
    80: Gpu("A100", 108, 163 * KIB),
    90: Gpu("H200", 132, 227 * KIB),
    100: Gpu("B200", 148, 227 * KIB),
}

#: Columns of tensor memory, which sm_100 has.
TENSOR_MEMORY_COLUMNS = 512

_launched: list[Any] = []


class AbsentDriver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": GPUS[arch].shared_memory,
                "multiprocessor_count": GPUS[arch].multiprocessors,
            }
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("an autotuned kernel cannot be timed here: choose from a table")


def become_gpu(arch: int) -> None:
    """Make this process one that has a GPU of this architecture, and for good."""
    gpu = GPUS[arch]
    capability = divmod(arch, 10)
    properties = SimpleNamespace(
        name=gpu.name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=gpu.multiprocessors,
        shared_memory_per_block_optin=gpu.shared_memory,
        warp_size=32,
    )
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_name = lambda device=None: gpu.name
    torch.cuda.current_device = lambda: 0
    torch.cuda.device = torch.cuda.device_of = lambda device: nullcontext()
    triton.runtime.driver.set_active(AbsentDriver(arch))
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, warmup=True, **kwargs)
        _launched.append(kernel)
        return kernel

    JITFunction.run = compile_only


def launched_by(call: Callable[[], object]) -> list[Any]:
    """The compiled kernels that ``call`` would have launched, in order."""
    _launched.clear()
    call()
    return list(_launched)


def constexprs_of(kernel: Any) -> dict[str, Any]:
    """The constexpr arguments of a compiled kernel, and those that Triton found to be 1."""
    names = kernel.src.fn.arg_names
    return {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
