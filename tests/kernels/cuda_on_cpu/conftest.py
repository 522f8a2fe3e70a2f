"""The fixtures of the CUDA kernels that g++ compiled."""

from tests.kernels.cuda_on_cpu.machine import cuda_by_gxx, machine

__all__ = ["cuda_by_gxx", "machine"]
