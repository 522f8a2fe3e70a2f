"""The C++ extension ``fastattn._C``: whether it is there, why not, and typed calls into it.

It writes dropout *factors*: tensors that hold ``kept`` where the contract of
:mod:`fastattn.dropout` keeps an element, and zero where it drops. For inference it does what lies
between an encoder layer's matrix products in one pass. Importing this module never fails and never
compiles; the extension is built once, when the package is installed.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch  # before the extension: both then share one OpenMP thread pool
from torch import Tensor

from fastattn.arguments import AttentionDropout, TokenDropout
from fastattn.dropout import ADJACENT, CONTRACT_VERSION, STRIDED, threshold
from fastattn.tracing import opaque

_BITS_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = "install a C++17 compiler and the headers of Python, then install fastattn again"
_CUDA_REMEDY = "install fastattn again where nvcc works, with FASTATTN_CUDA=1"


@lru_cache(maxsize=2)
def _not_built(part: str) -> str | None:
    """Why setup.py could not build "C++ extension" or "CUDA kernels", where it recorded that."""
    status = Path(__file__).with_name("_build_status.txt")
    if not status.is_file():
        return None
    missing, _, reason = status.read_text(encoding="utf-8").strip().partition(": ")
    return reason if missing == part else None


def _load() -> tuple[ModuleType | None, str | None]:
    """(the extension, None), or (None, why it is not there)."""
    try:
        extension = importlib.import_module("fastattn._C")
        if Path(extension.__file__).parent != Path(__file__).parent:
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


def attention_factor(dropout: AttentionDropout, shape: list[int], dtype: torch.dtype) -> Tensor:
    """What attention probabilities of ``shape`` are multiplied by, in ``dtype``."""
    out = torch.empty(shape, dtype=dtype)
    p, seed, site, head_offset = dropout
    return write_attention_factor(out, dropout.scale, int(seed), site, threshold(p), head_offset)


def token_factor(
    dropout: TokenDropout, grouping: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """What a token tensor (rows, columns) is multiplied by, in ``dtype``."""
    out = torch.empty(rows, columns, dtype=dtype)
    p, seed, site, *rows_map, column_offset = dropout
    return write_token_factor(
        out, dropout.scale, int(seed), site, threshold(p), grouping, *rows_map, column_offset
    )


@opaque
def write_attention_factor(
    out: Tensor, kept: float, seed: int, site: int, threshold: int, head_offset: int = 0
) -> Tensor:
    """Fill ``out`` with the dropout factor of attention probabilities.

    Args:
        out: (batch, heads, query length, key length), contiguous, on the CPU; bool or floating.
        kept: what kept elements become (True where ``out`` is bool); dropped ones become zero.
        seed: the 64-bit key, in [0, 2**63).
        site: number of the dropout site.
        threshold: lanes below it drop, see :func:`fastattn.dropout.threshold`.
        head_offset: global number of the first head.

    Returns:
        ``out``.
    """
    extension = loaded()
    _check(out, 4)
    extension.attention_factor(
        out.data_ptr(),
        out.itemsize,
        _kept_bits(out.dtype, kept),
        seed,
        site,
        threshold,
        *out.shape,
        head_offset,
        torch.get_num_threads(),
    )
    return out


@opaque
def write_token_factor(
    out: Tensor,
    kept: float,
    seed: int,
    site: int,
    threshold: int,
    grouping: int,
    row_index: Tensor | None = None,
    period: int = 1,
    batch_first: bool = True,
    column_offset: int = 0,
) -> Tensor:
    """Fill ``out`` with the dropout factor of a token tensor.

    Args:
        out: (rows, columns), contiguous, on the CPU; bool or floating.
        kept: what kept elements become (True where ``out`` is bool); dropped ones become zero.
        seed: the 64-bit key, in [0, 2**63).
        site: number of the dropout site.
        threshold: lanes below it drop, see :func:`fastattn.dropout.threshold`.
        grouping: :data:`STRIDED` or :data:`ADJACENT`.
        row_index, period, batch_first: as in :class:`fastattn.dropout.TokenRows`.
        column_offset: global number of the first column.

    Returns:
        ``out``.
    """
    extension = loaded()
    _check(out, 2)
    if grouping not in (STRIDED, ADJACENT):
        raise ValueError(f"grouping must be STRIDED (0) or ADJACENT (1), but got {grouping}")
    if row_index is not None:
        _check_row_index(row_index, out.shape[0])
    extension.token_factor(
        out.data_ptr(),
        out.itemsize,
        _kept_bits(out.dtype, kept),
        seed,
        site,
        threshold,
        grouping,
        *out.shape,
        column_offset,
        0 if row_index is None else row_index.data_ptr(),
        max(period, 1),
        batch_first,
        torch.get_num_threads(),
    )
    return out


def runs_inference(*tensors: Tensor | None) -> bool:
    """Whether the extension is there and all these are contiguous fp32 tensors on the CPU."""
    return available() and all(
        x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous())
        for x in tensors
    )


@opaque
def add_bias_relu_(x: Tensor, bias: Tensor | None) -> Tensor:
    """max(x + bias, 0) in place, in one pass.

    Args:
        x: (..., N), of which :func:`runs_inference` is true.
        bias: (N,), likewise, or None.
    """
    extension = loaded()
    _check_inference(x, bias)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    extension.add_bias_relu(x.data_ptr(), _address(bias), rows, columns, torch.get_num_threads())
    return x


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_inference(x: Tensor, bias: Tensor | None) -> None:
    columns = x.shape[-1:]
    if bias is not None and bias.shape != columns:
        raise ValueError(f"bias must be of shape {tuple(columns)}, but got {tuple(bias.shape)}")
    if not runs_inference(x, bias):
        raise ValueError("x and bias must be contiguous fp32 tensors on the CPU")


@lru_cache(maxsize=256)
def _kept_bits(dtype: torch.dtype, kept: float) -> int:
    """The bit pattern of ``kept`` in ``dtype``, as an unsigned integer."""
    value = torch.tensor([kept], dtype=dtype, device="cpu")
    bits = value.view(_BITS_DTYPES[dtype.itemsize]).item()
    return bits % (1 << 8 * dtype.itemsize)


def _check(out: Tensor, dimensions: int) -> None:
    if out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous tensor on the CPU, but got strides {out.stride()} "
            f"of shape {tuple(out.shape)} on {out.device}"
        )
    if out.dim() != dimensions:
        raise ValueError(f"out must have {dimensions} dimensions, but got {tuple(out.shape)}")
    if out.dtype not in _DTYPES:
        raise TypeError(f"out must be bool, float16, bfloat16, float32 or float64, not {out.dtype}")


def _check_row_index(row_index: Tensor, rows: int) -> None:
    if row_index.dtype != torch.int32 or row_index.shape != (rows,):
        raise ValueError(
            f"row_index must be int32 of shape ({rows},), "
            f"but got {row_index.dtype} of shape {tuple(row_index.shape)}"
        )
    if row_index.device.type != "cpu" or not row_index.is_contiguous():
        raise ValueError(
            f"row_index must be contiguous on the CPU, but got strides {row_index.stride()} "
            f"on {row_index.device}"
        )
