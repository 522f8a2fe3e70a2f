"""Calls of the norm kernels as functions of tensors, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import helpers, reference
from tests.kernels.cuda_on_cpu.machine import Machine
from tests.kernels.cuda_on_cpu.poisoned_memory import (
    CONTIGUOUS,
    POISON,
    Memory,
    Place,
    address,
    rows_of,
    vector_of,
)

SEED = 2**62 + 777
SITE = 6
P = 0.125

f32, bf16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Dropout:
    p: float = P
    row_index: Tensor | None = None
    period: int = 1
    batch_first: bool = True

    def keep(self, rows: int, columns: int) -> Tensor:
        index = torch.arange(rows) if self.row_index is None else self.row_index.long()
        where = index % self.period, index // self.period
        where = where if self.batch_first else where[::-1]
        return reference.residual_keep(SEED, SITE, self.p, *where, torch.arange(columns))

    def factor(self, rows: int, columns: int) -> Tensor:
        return reference.factor(self.keep(rows, columns), self.p)


@dataclass(frozen=True)
class Call:
    """What a call of the kernels asks for beside its tensors."""

    norm: bool = True
    eps: float = 1e-5
    out_dtype: torch.dtype | None = None
    copy_dtype: torch.dtype | None = None
    returns_sum: bool = True  # with its gradient
    from_output: bool = False
    dropout: Dropout | None = None
    place: Place = CONTIGUOUS
    multiprocessors: int = 2
    wanted: frozenset[str] = field(
        default_factory=lambda: frozenset(("sum", "branch", "weight", "bias", "x_bias"))
    )


SEED_TENSOR = torch.tensor([SEED])


def dropout_tuple(call: Call) -> tuple[Any, ...]:
    dropout = call.dropout
    if dropout is None:
        return (0, 0, 0, 1.0, 0, 1, True)
    least = round(dropout.p * 16384)
    scale = 16384 / (16384 - least) if least < 16384 else 0.0
    return (
        *(SEED_TENSOR.data_ptr(), SITE, least, scale, address(dropout.row_index)),
        *(dropout.period, dropout.batch_first),
    )


@dataclass
class Result:
    out: Tensor | None
    sum: Tensor
    copy: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def forward(
    machine: Machine,
    call: Call,
    x: Tensor,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Result:
    shape, dtype, place = tuple(x.shape), sum_dtype(x, residual), call.place
    total = Memory(shape, dtype, place)
    out = Memory(shape, call.out_dtype or dtype, place) if call.norm else None
    copy = Memory(shape, call.copy_dtype, place) if call.copy_dtype else None
    mean, rstd = (Memory(shape[:1], f32) if call.norm else None for _ in range(2))
    written = [total, out, copy, mean, rstd]
    inputs = [Memory.holding(tensor, place) for tensor in (x, residual)]
    vectors = [Memory.holding(v, Place(offset=place.offset)) for v in (x_bias, weight, bias)]
    addresses = [None if memory is None else memory.tensor for memory in written]
    machine.module.norm_forward_cuda(
        *(rows_of(tensor) for tensor in inputs),
        *(rows_of(tensor) for tensor in addresses[:3]),
        *(vector_of(vector) for vector in vectors),
        *(address(tensor) for tensor in addresses[3:]),
        call.eps,
        dropout_tuple(call),
        *shape,
        (0, 0, call.multiprocessors),
    )
    total, out, copy, mean, rstd = (m if m is None else m.written() for m in written)
    return Result(out, total, copy, mean, rstd)


def backward(
    machine: Machine,
    call: Call,
    saved: Tensor | None,
    grad_out: Tensor | None,
    grad_copy: Tensor | None,
    grad_sum: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dtypes: dict[str, torch.dtype],  # of the gradients
) -> dict[str, Tensor]:
    """The gradients that ``call.wanted`` names."""
    rows, columns = shape = tuple(next(x for x in (saved, grad_sum) if x is not None).shape)
    place, queue = call.place, (0, 0, call.multiprocessors)
    results = {
        name: Memory(shape, dtypes[name], place) if name in call.wanted else None
        for name in ("sum", "branch")
    }
    results |= {
        name: Memory((columns,), dtypes[name]) if name in call.wanted else None
        for name in ("weight", "bias", "x_bias")
    }
    tensors = {name: None if m is None else m.tensor for name, m in results.items()}
    partial_rows = machine.module.norm_partial_rows_cuda(rows, columns, queue)
    partials = Memory((partial_rows, 3 * columns), f32)
    gradients = [Memory.holding(g, place) for g in (grad_out, grad_copy, grad_sum)]
    kept = Memory.holding(saved, place)
    vectors = [Memory.holding(v, Place(offset=place.offset)) for v in (weight, bias)]
    machine.module.norm_backward_cuda(
        *(rows_of(gradient) for gradient in gradients),
        rows_of(kept),
        call.from_output,
        *(vector_of(vector) for vector in vectors),
        address(None if call.from_output else mean),
        address(rstd),
        *(rows_of(tensors[name]) for name in ("sum", "branch")),
        *(vector_of(tensors[name]) for name in ("weight", "bias", "x_bias")),
        partials.tensor.data_ptr(),
        partial_rows,
        dropout_tuple(call),
        rows,
        columns,
        queue,
    )
    partials.tensor.view(torch.int32).fill_(-1)
    assert (partials.bytes == POISON).all(), "written around the partial sums"
    return {name: memory.written() for name, memory in results.items() if memory is not None}


class Norm(torch.autograd.Function):
    """out, sum (if returned) and copy (if wanted) as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, machine: Machine, call: Call, *tensors: Tensor | None) -> Any:
        x, residual, x_bias, weight, bias = tensors
        result = forward(machine, call, *tensors)
        ctx.machine, ctx.call, ctx.tensors, ctx.result = machine, call, tensors, result
        ctx.set_materialize_grads(False)
        outputs = [result.out] if call.norm else []
        outputs += [result.sum] if call.returns_sum else []
        outputs += [result.copy] if call.copy_dtype else []
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        call, result = ctx.call, ctx.result
        x, residual, x_bias, weight, bias = ctx.tensors
        given = list(gradients)
        grad_out = given.pop(0) if call.norm else None
        grad_sum = given.pop(0) if call.returns_sum else None
        grad_copy = given.pop(0) if call.copy_dtype else None
        named = {"sum": residual, "branch": x, "weight": weight, "bias": bias, "x_bias": x_bias}
        wanted = frozenset(name for name, tensor in named.items() if tensor is not None)
        call = replace(call, wanted=wanted)
        dtypes = {name: tensor.dtype for name, tensor in named.items() if tensor is not None}
        dtypes["sum"] = result.sum.dtype
        saved = result.out if call.from_output else result.sum
        found = backward(
            ctx.machine,
            call,
            saved if call.norm else None,
            *(grad_out, grad_copy, grad_sum, result.mean, result.rstd, weight, bias, dtypes),
        )
        if residual is not None:
            found["sum"] = found["sum"].to(residual.dtype)
        order = ("branch", "sum", "x_bias", "weight", "bias")
        return None, None, *(found.get(name) for name in order)


def outputs_of(call: Call, out: Tensor | None, total: Tensor) -> tuple[Tensor, ...]:
    outputs = [out] if call.norm else []
    outputs += [total] if call.returns_sum else []
    outputs += [out.to(call.copy_dtype)] if call.copy_dtype else []
    return tuple(outputs)


def eager(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Torch's own operations in the inputs' types."""
    dtype = sum_dtype(x, residual)
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    if call.dropout is not None:
        branch = branch * call.dropout.factor(*x.shape).to(x.dtype)
    total = branch.to(dtype) if residual is None else residual.to(dtype) + branch
    out = None
    if call.norm:
        affine = (v if v is None else v.to(dtype) for v in (weight, bias))
        out = F.layer_norm(total, total.shape[-1:], *affine, call.eps)
        out = out.to(call.out_dtype or dtype)
    return outputs_of(call, out, total)


def oracle(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    factor = None if call.dropout is None else call.dropout.factor(*x.shape)
    total = reference.dropout_add(x, residual, x_bias, factor)
    out = reference.layer_norm(total, weight, bias, call.eps) if call.norm else None
    return outputs_of(replace(call, copy_dtype=call.copy_dtype and torch.float64), out, total)


def make_inputs(
    rows: int,
    columns: int,
    dtype: torch.dtype = bf16,
    residual_dtype: torch.dtype | None = None,
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    vectors = {
        name: torch.randn(columns, dtype=f32).to(vector_dtype or dtype)
        for name in ("x_bias", "weight", "bias")
    }
    return {
        "x": torch.randn(rows, columns).to(dtype),
        "residual": torch.randn(rows, columns).to(residual_dtype or dtype),
        **vectors,
    }


def check(
    machine: Machine,
    call: Call,
    inputs: dict[str, Tensor | None],
    floor_ulps: float = helpers.FLOOR_ULPS,
) -> None:
    """Outputs and gradients as accurate as torch's own."""

    def ours(**tensors: Tensor | None) -> tuple[Tensor, ...]:
        return Norm.apply(machine, call, *tensors.values())

    functions = ours, partial(eager, call), partial(oracle, call)
    helpers.assert_as_accurate_as_eager(*functions, inputs, floor_ulps)


DROPS = Dropout(period=4)
