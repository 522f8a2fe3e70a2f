"""``layer_norm``, ``dropout_add_layer_norm`` and ``dropout_add`` by the compiled extension.

One description of a call (``csrc/layer_norm.h``) serves two backends: :data:`cpu`, C++ kernels on
torch's threads, and :data:`cuda`, CUDA kernels on the current stream. Both have the functions of
:mod:`fastattn.pytorch.layer_norm` by the same names. Results are contiguous; an input whose rows
are not evenly spaced, or whose columns are not adjacent, is copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.arguments import NormArguments, TokenDropout, stream_dtype
from fastattn.dropout import threshold
from fastattn.extension import loading
from fastattn.pytorch import layer_norm as in_pytorch
from fastattn.tracing import opaque

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class NormKernels:
    """The functions of a backend, on one kind of device."""

    #: Of tensors of any kind.
    dtypes = frozenset(_TYPES)

    #: What the kernels read without a conversion: pairs of dtypes; None where that is everything.
    gradient_pairs: frozenset[tuple[torch.dtype, torch.dtype]] | None = None

    def layer_norm_forward(
        self, input: Tensor, norm: NormArguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """LN(input) in ``out_dtype``, and mean and 1 / deviation of each row in at least fp32."""
        out, _, _, mean, rstd = self.dropout_add_layer_norm_forward(
            input, None, None, norm, TokenDropout(), None, False
        )
        return out, mean, rstd

    def layer_norm_backward(
        self,
        grad_out: Tensor,
        saved: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        norm: NormArguments,
        input_dtype: torch.dtype,
        save: str,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; None where not ``wanted``."""
        want_input, want_weight, want_bias = wanted
        d_input, _, _, d_weight, d_bias = self.dropout_add_layer_norm_backward(
            grad_out, None, None, saved, mean, rstd, norm, input_dtype, input_dtype,
            TokenDropout(), save, (want_input, False, False, want_weight, want_bias),
        )  # fmt: skip
        return d_input, d_weight, d_bias

    def dropout_add_forward(
        self,
        input: Tensor,
        input_bias: Tensor | None,
        residual: Tensor | None,
        dropout: TokenDropout,
    ) -> Tensor:
        """residual + dropout(input + input_bias)."""
        if _replays_twister(dropout):
            return in_pytorch.dropout_add_forward(input, input_bias, residual, dropout)
        total = input.new_empty(input.shape, dtype=stream_dtype(input, residual))
        self._forward(input, input_bias, residual, dropout, total.dtype, sum=total)
        return total

    def dropout_add_backward(
        self, grad: Tensor, dtype: torch.dtype, dropout: TokenDropout, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the branch, in ``dtype``, and of its bias; None where not ``wanted``."""
        if _replays_twister(dropout):
            return in_pytorch.dropout_add_backward(grad, dtype, dropout, wanted)
        d_branch = grad.new_empty(grad.shape, dtype=dtype) if wanted[0] else None
        d_bias = grad.new_empty(grad.shape[-1:], dtype=_wide(grad.dtype)) if wanted[1] else None
        self._backward(grad.dtype, dropout, grad_sum=grad, d_branch=d_branch, d_input_bias=d_bias)
        return d_branch, d_bias

    def dropout_add_layer_norm_forward(
        self,
        input: Tensor,
        input_bias: Tensor | None,
        residual: Tensor | None,
        norm: NormArguments,
        dropout: TokenDropout,
        copy_dtype: torch.dtype | None,
        keep_sum: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """The result, the sum (None unless kept), the copy (None unless wanted), mean and rstd."""
        if _replays_twister(dropout):
            return in_pytorch.dropout_add_layer_norm_forward(
                input, input_bias, residual, norm, dropout, copy_dtype, keep_sum
            )
        dtype, shape = stream_dtype(input, residual), input.shape
        out = input.new_empty(shape, dtype=norm.out_dtype)
        total = input.new_empty(shape, dtype=dtype) if keep_sum else None
        copy = None if copy_dtype is None else input.new_empty(shape, dtype=copy_dtype)
        mean, rstd = (input.new_empty(shape[:-1], dtype=_wide(dtype)) for _ in range(2))
        self._forward(
            input,
            input_bias,
            residual,
            dropout,
            dtype,
            norm=norm,
            sum=total,
            out=out,
            copy=copy,
            mean=mean,
            rstd=rstd,
        )
        return out, total, copy, mean, rstd

    def dropout_add_layer_norm_backward(
        self,
        grad_out: Tensor | None,
        grad_sum: Tensor | None,
        grad_copy: Tensor | None,
        saved: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        norm: NormArguments,
        input_dtype: torch.dtype,
        sum_dtype: torch.dtype,
        dropout: TokenDropout,
        save: str,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of sum, branch, its bias, weight and bias; None where not ``wanted``.

        At least one of the three gradients flowing in is there.
        """
        if _replays_twister(dropout):
            return in_pytorch.dropout_add_layer_norm_backward(
                grad_out, grad_sum, grad_copy, saved, mean, rstd, norm, input_dtype, sum_dtype,
                dropout, save, wanted,
            )  # fmt: skip
        shape, wide = saved.shape, _wide(sum_dtype)
        columns = shape[-1:]
        targets = (
            (shape, sum_dtype),
            (shape, input_dtype),
            (columns, wide),
            (columns, norm.weight.dtype if norm.weight is not None else wide),
            (columns, norm.bias.dtype if norm.bias is not None else wide),
        )
        results = tuple(
            saved.new_empty(size, dtype=dtype) if want else None
            for (size, dtype), want in zip(targets, wanted, strict=True)
        )
        d_sum, d_branch, d_input_bias, d_weight, d_bias = results
        self._backward(
            sum_dtype,
            dropout,
            grad_out=grad_out,
            grad_copy=grad_copy,
            grad_sum=grad_sum,
            saved=saved,
            from_output=save == "output",
            norm=norm,
            mean=mean,
            rstd=rstd,
            d_sum=d_sum,
            d_branch=d_branch,
            d_weight=d_weight,
            d_bias=d_bias,
            d_input_bias=d_input_bias,
        )
        return results

    def add_layer_norm_(
        self,
        input: Tensor,
        input_bias: Tensor | None,
        residual: Tensor,
        norm: NormArguments,
    ) -> Tensor:
        """LN(residual + input + input_bias) in place of ``input``, contiguous, without a graph.

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        if residual.shape != input.shape:
            expected, got = tuple(input.shape), tuple(residual.shape)
            raise ValueError(f"residual must be of input's shape {expected}, but got {got}")
        columns = input.shape[-1:]
        vectors = {"input_bias": input_bias, "weight": norm.weight, "bias": norm.bias}
        for name, x in vectors.items():
            if x is not None and x.shape != columns:
                got = tuple(x.shape)
                raise ValueError(f"{name} must be of shape {tuple(columns)}, but got {got}")
        for name, x in {"residual": residual, **vectors}.items():
            if x is not None and x.device != input.device:
                raise ValueError(
                    f"{name} must be on {input.device}, as input is, but got {x.device}"
                )
        self._forward(
            input, input_bias, residual, TokenDropout(), input.dtype, norm=norm, out=input
        )
        return input

    @opaque
    def _forward(
        self,
        input: Tensor,
        input_bias: Tensor | None,
        residual: Tensor | None,
        dropout: TokenDropout,
        sum_dtype: torch.dtype,
        norm: NormArguments | None = None,
        sum: Tensor | None = None,
        out: Tensor | None = None,
        copy: Tensor | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> None:
        """Write ``sum``, ``out``, ``copy``, ``mean`` and ``rstd``, those that are there."""
        if residual is not None:
            residual = residual.to(sum_dtype)
        weight, bias, eps = (
            (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        )
        call = _Call()
        self._run_forward(
            input,
            call.rows(input),
            call.rows(residual),
            call.rows(sum, sum_dtype),
            call.rows(out),
            call.rows(copy),
            call.vector(input_bias),
            call.vector(weight),
            call.vector(bias),
            _address(mean),
            _address(rstd),
            eps,
            call.dropout(dropout),
            input.shape[:-1].numel(),
            input.shape[-1],
        )

    @opaque
    def _backward(
        self,
        sum_dtype: torch.dtype,
        dropout: TokenDropout,
        grad_out: Tensor | None = None,
        grad_copy: Tensor | None = None,
        grad_sum: Tensor | None = None,
        saved: Tensor | None = None,
        from_output: bool = False,
        norm: NormArguments | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
        d_sum: Tensor | None = None,
        d_branch: Tensor | None = None,
        d_weight: Tensor | None = None,
        d_bias: Tensor | None = None,
        d_input_bias: Tensor | None = None,
    ) -> None:
        """Write the gradients that are there."""
        like = next(x for x in (saved, grad_sum) if x is not None)
        rows, columns = like.shape[:-1].numel(), like.shape[-1]
        if grad_sum is not None:
            grad_sum = grad_sum.to(sum_dtype)
        pairs = self.gradient_pairs
        if grad_out is not None and pairs and (grad_out.dtype, saved.dtype) not in pairs:
            grad_out = grad_out.float()
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        partial_rows = self._partial_rows(like, rows, columns)
        partials = like.new_empty(partial_rows, 3, columns, dtype=_wide(sum_dtype))
        call = _Call()
        self._run_backward(
            like,
            call.rows(grad_out),
            call.rows(grad_copy),
            call.rows(grad_sum),
            call.rows(saved),
            from_output,
            call.vector(weight),
            call.vector(bias),
            _address(mean),
            _address(rstd),
            call.rows(d_sum, sum_dtype),
            call.rows(d_branch),
            call.vector(d_weight),
            call.vector(d_bias),
            call.vector(d_input_bias),
            partials.data_ptr(),
            partial_rows,
            call.dropout(dropout),
            rows,
            columns,
        )

    def _run_forward(self, like: Tensor, *arguments: Any) -> None:
        loading.loaded().norm_forward(*arguments, torch.get_num_threads())

    def _run_backward(self, like: Tensor, *arguments: Any) -> None:
        loading.loaded().norm_backward(*arguments, torch.get_num_threads())

    def _partial_rows(self, like: Tensor, rows: int, columns: int) -> int:
        return torch.get_num_threads()


class CudaNormKernels(NormKernels):
    """On a CUDA device, in fp16, bf16 and fp32."""

    dtypes = NormKernels.dtypes - {torch.float64}
    gradient_pairs = frozenset(
        pair
        for low in (torch.float16, torch.bfloat16)
        for pair in (
            (torch.float32, torch.float32),
            (low, low),
            (low, torch.float32),
            (torch.float32, low),
        )
    )

    def _run_forward(self, like: Tensor, *arguments: Any) -> None:
        with torch.cuda.device_of(like):
            loading.loaded().norm_forward_cuda(*arguments, self._queue(like))

    def _run_backward(self, like: Tensor, *arguments: Any) -> None:
        with torch.cuda.device_of(like):
            loading.loaded().norm_backward_cuda(*arguments, self._queue(like))

    def _partial_rows(self, like: Tensor, rows: int, columns: int) -> int:
        return loading.loaded().norm_partial_rows_cuda(rows, columns, self._queue(like))

    def _queue(self, like: Tensor) -> tuple[int, int, int]:
        """The device, torch's current stream there, and its multiprocessors."""
        properties = torch.cuda.get_device_properties(like.device)
        stream = torch.cuda.current_stream(like.device).cuda_stream
        return like.device.index, stream, properties.multi_processor_count


cpu = NormKernels()
cuda = CudaNormKernels()


class _Call:
    """The arguments of one call as the extension takes them; copies live as long as this does."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def rows(self, x: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
        """(address, type, elements from one row to the next) of (..., N) as (rows, N)."""
        if x is None:
            return 0, _TYPES[dtype], 0
        if not x.is_contiguous():
            x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            if x.stride(1) != 1 and x.shape[1] > 1:
                x = x.contiguous()
            self._held.append(x)
            return x.data_ptr(), _TYPES[x.dtype], x.stride(0)
        return x.data_ptr(), _TYPES[x.dtype], x.shape[-1]

    def vector(self, x: Tensor | None) -> tuple[int, int]:
        """(address, type) of (N,)."""
        if x is None:
            return 0, 0
        if not x.is_contiguous():
            x = x.contiguous()
            self._held.append(x)
        return x.data_ptr(), _TYPES[x.dtype]

    def dropout(self, dropout: TokenDropout) -> tuple[Any, ...]:
        """(seed, site, threshold, scale, row_index, period, batch_first)."""
        if not dropout.drops:
            return _NOTHING_DROPS
        if dropout.column_offset:
            raise NotImplementedError("a norm's rows are whole: column_offset must be 0")
        index = dropout.row_index
        if index is not None and not index.is_contiguous():
            index = index.contiguous()
            self._held.append(index)
        return (
            dropout.seed.data_ptr(),
            dropout.site,
            threshold(dropout.dropout_p),
            dropout.scale,
            _address(index),
            max(dropout.row_period, 1),
            dropout.batch_first,
        )


_NOTHING_DROPS = (0, 0, 0, 1.0, 0, 1, True)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _replays_twister(dropout: TokenDropout) -> bool:
    """Negative seeds, which draw on torch's generator, are replayed in tensor operations."""
    return dropout.drops and dropout.replays_twister
