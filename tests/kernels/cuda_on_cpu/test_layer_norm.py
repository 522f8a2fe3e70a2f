"""The CUDA layer-norm kernels and their launchers, compiled with g++ and run on the CPU.

``cuda_on_cpu/cuda_runtime.h`` stands in for the CUDA toolkit. What only a GPU can show (speed, what
the hardware does to floating point, the toolkit's own conversions) is not tested here.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dropout_add, dropout_add_layer_norm, layer_norm
from fastattn.extension import loading
from tests import helpers, reference
from tests.kernels.cuda_on_cpu.machine import Machine

SEED = 2**62 + 777
SITE = 6
P = 0.125
f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TYPES = {f32: 0, f16: 1, bf16: 2, torch.float64: 3}


# ------------------------------------------------------------------------------- tensors in memory


@dataclass(frozen=True)
class Place:
    """How rows lie in memory, which is full of NaN around them."""

    gap: int = 0  # elements between a row and the next
    offset: int = 0  # elements before the first, beyond a multiple of 64 bytes


CONTIGUOUS = Place()
STRIDED = Place(gap=24)  # still on multiples of 16 bytes
MISALIGNED = Place(offset=1)
ODD = Place(gap=3)
POISON = 255  # of every byte: NaN in each type, and no NaN that arithmetic gives
GUARD = 256  # bytes before and after


class Memory:
    """A tensor amid poisoned bytes, itself poisoned until something is written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, place: Place = CONTIGUOUS):
        rows, columns = (1, *shape)[-2:]
        stride = columns + place.gap
        size = max(rows * stride, 1) + place.offset
        self.bytes = torch.full(
            (2 * GUARD + size * dtype.itemsize + 64,), POISON, dtype=torch.uint8
        )
        start = GUARD + -(self.bytes.data_ptr() + GUARD) % 64 + place.offset * dtype.itemsize
        elements = self.bytes[start:][: size * dtype.itemsize].view(dtype)
        strides = (stride, 1)[-len(shape) :]
        self.tensor = torch.as_strided(elements, shape, strides, elements.storage_offset())

    @classmethod
    def holding(cls, values: Tensor | None, place: Place = CONTIGUOUS) -> Tensor | None:
        if values is None:
            return None
        memory = cls(tuple(values.shape), values.dtype, place)
        memory.tensor.copy_(values)
        return memory.tensor

    def written(self) -> Tensor:
        """What was written, which must be the tensor and nothing else."""
        result = self.tensor.clone().contiguous()
        words = {2: torch.int16, 4: torch.int32}[result.itemsize]
        assert not (result.view(words) == -1).any(), "not written entirely"
        self.tensor.view(words).fill_(-1)
        assert (self.bytes == POISON).all(), "written around the tensor"
        return result


def rows_of(x: Tensor | None, dtype: torch.dtype = f32) -> tuple[int, int, int]:
    return (0, TYPES[dtype], 0) if x is None else (x.data_ptr(), TYPES[x.dtype], x.stride(0))


def vector_of(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), TYPES[x.dtype])


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ------------------------------------------------------------------------------------ calls


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


def check(machine: Machine, call: Call, inputs: dict[str, Tensor | None]) -> None:
    """Outputs and gradients as accurate as torch's own."""

    def ours(**tensors: Tensor | None) -> tuple[Tensor, ...]:
        return Norm.apply(machine, call, *tensors.values())

    helpers.assert_as_accurate_as_eager(ours, partial(eager, call), partial(oracle, call), inputs)


DROPS = Dropout(period=4)


# ------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    ("x", "residual"), [(f32, f32), (f16, f16), (bf16, bf16), (f16, f32), (bf16, f32), (f32, bf16)]
)
@pytest.mark.parametrize("vectors", [f32, f16, bf16], ids=lambda dtype: f"vectors {dtype}")
@pytest.mark.parametrize("columns", [264, 63])
def test_types(
    machine: Machine, x: torch.dtype, residual: torch.dtype, vectors: torch.dtype, columns: int
) -> None:
    check(machine, Call(dropout=DROPS), make_inputs(9, columns, x, residual, vectors))


@pytest.mark.parametrize(
    ("x", "residual", "out", "copy"),
    [
        (bf16, bf16, f32, bf16),
        (f16, f16, f32, f16),
        (f32, f32, bf16, None),
        (f32, f32, f16, None),
        (f32, f32, f32, bf16),
        (f32, f32, f32, f16),
        (bf16, f32, f32, bf16),
        (bf16, f32, bf16, None),
        (f16, f32, f16, None),
        (bf16, bf16, bf16, f32),
        (bf16, bf16, f16, None),
    ],
)
def test_types_of_results(
    machine: Machine,
    x: torch.dtype,
    residual: torch.dtype,
    out: torch.dtype,
    copy: torch.dtype | None,
) -> None:
    call = Call(dropout=DROPS, out_dtype=out, copy_dtype=copy)
    check(machine, call, make_inputs(9, 264, x, residual, f32))


WIDTHS = (1, 7, 8, 63, 256, 264, 768, 1000, 1024, 1032, 2048, 3072, 4096, 8192, 8200)


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        *((columns, dtype) for columns in WIDTHS for dtype in (f32, bf16)),
        *((16384, bf16), (65535, bf16), (65536, f32)),
    ],
)
def test_widths(machine: Machine, columns: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(11 if columns < 2048 else 2, columns, dtype)
    if columns == 1:
        inputs["weight"] = None  # its gradient would be rounding and nothing else
    check(machine, Call(dropout=DROPS), inputs)


def in_registers(machine: Machine, rows: int, columns: int, dtype: torch.dtype) -> list[bool]:
    """Whether forward and backward held rows in registers: a block that reads them again is 512
    threads for one row."""
    found = []
    inputs = make_inputs(rows, columns, dtype)
    result = forward(machine, Call(), **inputs)
    found.append(machine.block() != (512, 1))
    queue = (0, 0, 2)
    partial_rows = machine.module.norm_partial_rows_cuda(rows, columns, queue)
    grad, total = Memory.holding(result.out), Memory.holding(result.sum)
    none, no_vector = rows_of(None), vector_of(None)
    out = Memory((rows, columns), dtype)
    weight = Memory.holding(inputs["weight"])
    machine.module.norm_backward_cuda(
        *(rows_of(grad), none, none, rows_of(total), False, vector_of(weight), no_vector),
        *(address(result.mean), address(result.rstd), rows_of(out.tensor), none),
        *(no_vector, no_vector, no_vector, 0, partial_rows),
        *(dropout_tuple(Call()), rows, columns, queue),
    )
    found.append(machine.block() != (512, 1))
    return found


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_rows_stay_in_registers(machine: Machine, dtype: torch.dtype) -> None:
    for columns in (8, 256, 768, 1024, 1032, 3072, 4096, 5120, 7680):
        assert in_registers(machine, 2, columns, dtype) == [True, True], columns
    assert in_registers(machine, 2, 1001, dtype) == [False, False]
    assert in_registers(machine, 2, 8200, dtype) == [False, False]


@pytest.mark.parametrize("columns", [264, 2048, 8200])
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 83])
def test_more_and_fewer_rows_than_blocks(
    machine: Machine, rows: int, multiprocessors: int, columns: int
) -> None:
    if rows == 83 and columns == 8200:
        rows = 13
    call = Call(dropout=DROPS, multiprocessors=multiprocessors)
    check(machine, call, make_inputs(rows, columns))


def test_no_rows(machine: Machine) -> None:
    """Nothing runs but what writes zeros to the gradients of the vectors."""
    before = machine.controls.launches()
    tensors = make_inputs(0, 64)
    forward(machine, Call(), **tensors)
    assert machine.controls.launches() == before
    x = tensors["x"]
    dtypes = dict.fromkeys(("sum", "branch"), bf16) | {"weight": bf16, "bias": f16, "x_bias": f32}
    empty = torch.empty(0)
    gradients = backward(machine, Call(), x, x, None, x, empty, empty, None, None, dtypes)
    assert machine.controls.launches() == before + 1
    for name in ("weight", "bias", "x_bias"):
        assert torch.equal(gradients[name], torch.zeros(64, dtype=dtypes[name]))


def test_no_columns(machine: Machine) -> None:
    before = machine.controls.launches()
    tensors = make_inputs(3, 0)
    forward(machine, Call(norm=False), **tensors)
    x, dtypes = tensors["x"], dict.fromkeys(("sum", "branch", "weight", "bias", "x_bias"), bf16)
    backward(machine, Call(), x, x, None, x, torch.ones(3), torch.ones(3), None, None, dtypes)
    assert machine.controls.launches() == before


@pytest.mark.parametrize("place", [STRIDED, MISALIGNED, ODD, Place(gap=24, offset=4)], ids=str)
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("columns", [63, 264])
def test_strided_and_misaligned_rows(
    machine: Machine, place: Place, dtype: torch.dtype, columns: int
) -> None:
    call = Call(dropout=DROPS, place=place, copy_dtype=bf16)
    check(machine, call, make_inputs(9, columns, dtype))


@pytest.mark.parametrize("columns", [264, 265])
@pytest.mark.parametrize(
    "absent",
    [
        ("x_bias",),
        ("weight",),
        ("bias",),
        ("weight", "bias"),
        ("residual",),
        ("residual", "x_bias"),
        ("residual", "x_bias", "weight", "bias"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("dropout", [None, DROPS], ids=["kept", "dropped"])
def test_absent_tensors(
    machine: Machine, absent: tuple[str, ...], dropout: Dropout | None, columns: int
) -> None:
    inputs = make_inputs(9, columns)
    inputs.update(dict.fromkeys(absent))
    check(machine, Call(dropout=dropout, returns_sum="residual" not in absent), inputs)


@pytest.mark.parametrize("columns", [264, 265, 8200])
@pytest.mark.parametrize(("x", "residual"), [(f32, f32), (bf16, bf16), (bf16, f32), (f16, f16)])
def test_sum_without_norm(
    machine: Machine, x: torch.dtype, residual: torch.dtype, columns: int
) -> None:
    inputs = make_inputs(9, columns, x, residual)
    inputs.update(weight=None, bias=None)
    check(machine, Call(norm=False, dropout=DROPS), inputs)


def test_sum_that_is_not_stored_is_rounded(machine: Machine) -> None:
    """Its type counts though there is none to write."""
    for columns in (264, 265):
        inputs = {name: Memory.holding(x) for name, x in make_inputs(9, columns).items()}
        expected = forward(machine, Call(), **inputs)
        out = Memory((9, columns), bf16)
        mean, rstd = Memory((9,), f32), Memory((9,), f32)
        x, residual, x_bias, weight, bias = inputs.values()
        machine.module.norm_forward_cuda(
            *(rows_of(x), rows_of(residual), rows_of(None, bf16), rows_of(out.tensor)),
            *(rows_of(None), vector_of(x_bias), vector_of(weight), vector_of(bias)),
            *(address(mean.tensor), address(rstd.tensor), 1e-5, dropout_tuple(Call())),
            *(9, columns, (0, 0, 2)),
        )
        assert torch.equal(out.written(), expected.out)
        assert torch.equal(mean.written(), expected.mean)
        assert torch.equal(rstd.written(), expected.rstd)


SOME_WANTED = [
    {"sum"},
    {"branch"},
    {"x_bias"},
    {"weight", "bias"},
    {"sum", "weight", "bias"},
    {"branch", "x_bias"},
]
GIVEN = [("out",), ("sum",), ("copy",), ("out", "sum"), ("out", "copy"), ("copy", "sum")]


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
@pytest.mark.parametrize("columns", [264, 265])
def test_some_gradients_in_and_some_out(
    machine: Machine, given: tuple[str, ...], columns: int
) -> None:
    """Whatever is asked for, it is what the call that asks for everything gives."""
    rows = 9
    call = Call(dropout=DROPS)
    inputs = make_inputs(rows, columns)
    result = forward(machine, call, **inputs)
    gradients = [
        torch.randn(rows, columns).to(bf16) if name in given else None
        for name in ("out", "copy", "sum")
    ]
    dtypes = dict.fromkeys(("sum", "branch", "weight", "bias", "x_bias"), bf16)
    kept = result.mean, result.rstd, inputs["weight"], inputs["bias"], dtypes
    everything = backward(machine, call, result.sum, *gradients, *kept)
    expected = float64_backward(call, result, inputs["weight"], *gradients)
    for name, exact in expected.items():
        error = (everything[name] - exact).abs().amax()
        assert error <= 2**-8 * exact.abs().amax(), name
    for wanted in SOME_WANTED:
        some = backward(
            machine, replace(call, wanted=frozenset(wanted)), result.sum, *gradients, *kept
        )
        assert set(some) == wanted
        for name, gradient in some.items():
            assert torch.equal(gradient, everything[name]), name


def float64_backward(
    call: Call,
    result: Result,
    weight: Tensor,
    grad_out: Tensor | None,
    grad_copy: Tensor | None,
    grad_sum: Tensor | None,
    normalized: Tensor | None = None,
) -> dict[str, Tensor]:
    """The formulas of csrc/layer_norm.h."""
    shape = result.sum.shape
    grad = sum(g.double() for g in (grad_out, grad_copy) if g is not None)
    grad = torch.zeros(shape, dtype=torch.float64) if isinstance(grad, int) else grad
    rstd = result.rstd.double()[:, None]
    if normalized is None:
        normalized = (result.sum.double() - result.mean.double()[:, None]) * rstd
    weighted = weight.double() * grad
    projection = (weighted * normalized).mean(1, keepdim=True)
    d_sum = rstd * (weighted - weighted.mean(1, keepdim=True) - normalized * projection)
    d_sum = d_sum if grad_sum is None else d_sum + grad_sum.double()
    factor = 1.0 if call.dropout is None else call.dropout.factor(*shape)
    return {
        "sum": d_sum,
        "branch": factor * d_sum,
        "weight": (grad * normalized).sum(0),
        "bias": grad.sum(0),
        "x_bias": (factor * d_sum).sum(0),
    }


@pytest.mark.parametrize("columns", [264, 265])
@pytest.mark.parametrize(
    ("grad_out", "grad_copy", "grad_sum", "saved", "d_sum", "d_branch"),
    [
        (bf16, None, f32, bf16, f32, bf16),
        (f32, bf16, f32, bf16, f32, bf16),
        (f32, f32, f16, bf16, f32, f16),
        (bf16, f16, bf16, bf16, bf16, f16),
        (f16, None, None, bf16, f16, f32),
        (f32, f16, f32, f32, f32, f16),
        (bf16, None, bf16, bf16, f32, bf16),
        (bf16, None, f32, bf16, bf16, bf16),
        (None, bf16, f32, f32, f32, bf16),
        (None, f16, None, bf16, bf16, bf16),
        (None, None, f32, None, bf16, f16),
        (None, None, bf16, None, f32, f16),
        (None, None, f16, None, f16, f32),
    ],
)
def test_types_of_gradients(
    machine: Machine,
    columns: int,
    grad_out: torch.dtype | None,
    grad_copy: torch.dtype | None,
    grad_sum: torch.dtype | None,
    saved: torch.dtype | None,
    d_sum: torch.dtype,
    d_branch: torch.dtype,
) -> None:
    """Any type can meet any other, whether or not a kernel is made for the two."""
    rows, call = 9, Call(dropout=DROPS)
    total, weight = torch.randn(rows, columns).to(saved or f32), torch.randn(columns)
    mean = total.float().mean(1)
    rstd = (total.float().var(1, correction=0) + 1e-5).rsqrt()
    gradients = [
        None if dtype is None else torch.randn(rows, columns).to(dtype)
        for dtype in (grad_out, grad_copy, grad_sum)
    ]
    dtypes = {"sum": d_sum, "branch": d_branch, "weight": f32, "bias": bf16, "x_bias": f16}
    found = backward(
        *(machine, call, None if saved is None else total, *gradients),
        *(mean, rstd, weight, None, dtypes),
    )
    result = Result(None, total, None, mean, rstd)
    for name, exact in float64_backward(call, result, weight, *gradients).items():
        assert found[name].dtype == dtypes[name]
        error = (found[name] - exact).abs().amax()
        assert error <= max(torch.finfo(dtypes[name]).eps, 1e-5) * exact.abs().amax(), name


@pytest.mark.parametrize("columns", [264, 265, 1536])
@pytest.mark.parametrize(
    ("dtype", "kept", "grad"),
    [
        *((dtype, dtype, dtype) for dtype in (f32, f16, bf16)),
        *((f32, kept, grad) for kept in (f16, bf16) for grad in (f32, kept)),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_backward_from_the_result(
    machine: Machine, dtype: torch.dtype, kept: torch.dtype, grad: torch.dtype, columns: int,
    affine: bool,
) -> None:  # fmt: skip
    """The normalised sum is (out - bias) / weight; the mean is not read."""
    rows = 9
    call = Call(dropout=DROPS, from_output=True)
    inputs = make_inputs(rows, columns, dtype)
    inputs["weight"] = (0.5 + torch.rand(columns)).to(dtype) if affine else None
    inputs["bias"] = inputs["bias"] if affine else None
    result = forward(machine, call, **inputs)
    out = result.out.to(kept)
    grad_out, grad_sum = (torch.randn(rows, columns).to(t) for t in (grad, dtype))
    dtypes = {"sum": dtype, "branch": kept}
    weight, bias = inputs["weight"], inputs["bias"]
    without_sums = replace(call, wanted=frozenset(dtypes))
    backward(
        *(machine, without_sums, out, grad_out, None, grad_sum),
        *(None, result.rstd, weight, bias, dtypes),
    )
    assert (machine.block() != (512, 1)) == (columns != 265)  # a thread had rows in registers
    dtypes |= dict.fromkeys(("weight", "bias", "x_bias"), f32)
    found = backward(
        *(machine, call, out, grad_out, None, grad_sum),
        *(None, result.rstd, weight, bias, dtypes),
    )
    normalized, gain = out.double(), torch.ones(columns)
    if affine:
        normalized, gain = (normalized - bias.double()) / weight.double(), weight
    expected = float64_backward(call, result, gain, grad_out, None, grad_sum, normalized)
    for name, exact in expected.items():
        error = (found[name] - exact).abs().amax()
        assert error <= 2 * torch.finfo(dtypes[name]).eps * exact.abs().amax(), name


# --------------------------------------------------------------------------------------- dropout

PACKED = torch.tensor([0, 1, 2, 5, 6, 10, 13, 14, 15], dtype=torch.int32)
TOKENS = {
    "batch first": Dropout(period=5),
    "sequence first": Dropout(period=3, batch_first=False),
    "packed": Dropout(period=5, row_index=PACKED),
    "packed, sequence first": Dropout(period=3, row_index=PACKED, batch_first=False),
    "far rows": Dropout(period=2**31 - 1, row_index=PACKED + (2**31 - 20)),
    "p = 0": Dropout(p=0.0, period=5),
    "p = 1": Dropout(p=1.0, period=5),
    "p = 1/16384": Dropout(p=1 / 16384, period=5),
}


@pytest.mark.parametrize("columns", [1, 264, 265, 768, 1024, 2048, 8200])
@pytest.mark.parametrize("dropout", TOKENS.values(), ids=TOKENS)
def test_decisions_are_those_of_the_contract(
    machine: Machine, dropout: Dropout, columns: int
) -> None:
    """Bit for bit, with a norm and without, forward and backward."""
    rows = 9
    ones, zeros = torch.ones(rows, columns), torch.zeros(rows, columns)
    expected = dropout.factor(rows, columns).float()
    call = Call(dropout=dropout, wanted=frozenset({"branch"}))
    for norm in (True, False):
        result = forward(machine, replace(call, norm=norm), ones)
        assert torch.equal(result.sum, expected)
        kept = (result.mean, result.rstd) if norm else (None, None)
        gradients = backward(
            *(machine, call, result.sum if norm else None, zeros if norm else None, None, ones),
            *(*kept, None, None, {"branch": f32}),
        )
        assert torch.equal(gradients["branch"], expected)


@pytest.mark.parametrize("columns", [264, 265, 2048, 8200])
def test_nonfinite_rows_stay_alone(machine: Machine, columns: int) -> None:
    """As in torch: dropping a NaN leaves a NaN, and an infinity spoils its row, no other."""
    inputs = make_inputs(9, columns, f32)
    call = Call(dropout=DROPS)
    dropped = int((~DROPS.keep(9, columns)[2]).nonzero()[0])
    inputs["x"][2, dropped] = torch.nan
    inputs["x"][4, columns - 1] = torch.inf
    inputs["residual"][7, 0] = -torch.inf
    actual = forward(machine, call, **inputs)
    out, total = eager(call, **inputs)
    torch.testing.assert_close(actual.sum, total, equal_nan=True)
    torch.testing.assert_close(actual.out, out, rtol=1e-5, atol=1e-5, equal_nan=True)
    spoilt = actual.out.isnan().all(1)
    assert spoilt.tolist() == [row in (2, 4, 7) for row in range(9)]
    dtypes = dict.fromkeys(("sum", "branch", "weight", "bias", "x_bias"), f32)
    gradients = backward(
        *(machine, replace(call, wanted=frozenset({"sum", "branch"})), actual.sum),
        *(torch.randn(9, columns), None, None, actual.mean, actual.rstd),
        *(inputs["weight"], inputs["bias"], dtypes),
    )
    for gradient in gradients.values():
        assert torch.equal(gradient.isfinite().all(1), ~spoilt)
        assert torch.equal(gradient.isnan().any(1), spoilt)


def test_large_mean_and_tiny_variance(machine: Machine) -> None:
    """The variance is that of distances from the mean, not a difference of squares."""
    for columns in (264, 265):
        inputs = make_inputs(9, columns, f32)
        inputs["x"] += 1000.0
        inputs["residual"] *= 0.0
        inputs["x_bias"] = None
        check(machine, Call(), inputs)
        inputs["x"].fill_(3.0)
        result = forward(machine, Call(), **inputs)
        assert torch.equal(result.out, inputs["bias"].expand(9, columns))


# ---------------------------------------------------------------------------------- how it is run


@pytest.mark.parametrize("columns", [8, 264, 265, 2048, 4096, 8200])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_order_of_threads_and_blocks_changes_nothing(
    machine: Machine, dtype: torch.dtype, columns: int
) -> None:
    """Bit for bit in two runs; and from the last thread to the first, which a barrier that is
    missing would not survive."""
    call = Call(dropout=DROPS, multiprocessors=1)
    inputs = make_inputs(29 if columns < 4096 else 5, columns, dtype)
    run = partial(
        helpers.results_of, lambda **tensors: Norm.apply(machine, call, *tensors.values())
    )
    first, second = run(inputs), run(inputs)
    machine.controls.run_backwards(True)
    try:
        reversed_order = run(inputs)
    finally:
        machine.controls.run_backwards(False)
    helpers.assert_same(second, first)
    helpers.assert_same(reversed_order, first)


def test_fewer_partial_rows_than_wanted(machine: Machine) -> None:
    """A caller with room for one row of partial sums gets one block."""
    rows, columns = 40, 264
    grad, total = torch.randn(rows, columns), torch.randn(rows, columns)
    mean, rstd = total.mean(1), total.var(1).rsqrt()
    d_bias, partials = Memory((columns,), f32), Memory((1, 3 * columns), f32)
    none, no_vector = rows_of(None), vector_of(None)
    machine.module.norm_backward_cuda(
        *(rows_of(grad), none, none, rows_of(total), False, no_vector, no_vector),
        *(address(mean), address(rstd), none, none, no_vector, vector_of(d_bias.tensor)),
        *(no_vector, partials.tensor.data_ptr(), 1, dropout_tuple(Call()), rows, columns),
        (0, 0, 132),
    )
    torch.testing.assert_close(d_bias.written(), grad.sum(0), rtol=1e-5, atol=1e-5)
    partials.tensor.view(torch.int32).fill_(-1)
    assert (partials.bytes == POISON).all()


def test_partial_rows_fit_the_device(machine: Machine) -> None:
    count = machine.module.norm_partial_rows_cuda
    assert count(0, 768, (0, 0, 132)) == 0
    assert count(1, 768, (0, 0, 132)) == 1
    for columns in (1, 768, 1024, 4096, 8192, 65536):
        assert 132 <= count(10**6, columns, (0, 0, 132)) <= 6 * 132, columns


def test_device_and_stream(machine: Machine) -> None:
    """Work goes to the queue's device and stream, and the current device is current again."""
    x = torch.randn(2, 8)
    out, mean = Memory((2, 8), f32), torch.empty(2)
    none, no_vector = rows_of(None), vector_of(None)

    def run(device: int) -> None:
        machine.module.norm_forward_cuda(
            *(rows_of(x), none, none, rows_of(out.tensor), none, no_vector, no_vector, no_vector),
            *(address(mean), 0, 1e-5, dropout_tuple(Call()), 2, 8, (device, 4096, 2)),
        )

    run(1)
    assert machine.controls.launch_device() == 1
    assert machine.controls.launch_stream() == 4096
    assert machine.controls.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        run(7)
    assert machine.controls.current_device() == 0


def test_float64_is_refused(machine: Machine) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    none, no_vector = rows_of(None), vector_of(None)
    before = machine.controls.launches()
    with pytest.raises(RuntimeError, match="float64"):
        machine.module.norm_forward_cuda(
            *(rows_of(x), none, rows_of(None, x.dtype), rows_of(x), none),
            *(no_vector, no_vector, no_vector, 0, 0, 1e-5, dropout_tuple(Call())),
            *(2, 8, (0, 0, 2)),
        )
    with pytest.raises(RuntimeError, match="float64"):
        machine.module.norm_backward_cuda(
            *(none, none, rows_of(x), none, False, no_vector, no_vector, 0, 0, none, rows_of(x)),
            *(no_vector, no_vector, no_vector, 0, 0, dropout_tuple(Call()), 2, 8, (0, 0, 2)),
        )
    assert machine.controls.launches() == before


# -------------------------------------------------------------------------- the stand-in itself


def test_conversions_are_those_of_torch(machine: Machine) -> None:
    every_half = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(f16)
    from_half = torch.tensor([machine.controls.from_half(i) for i in range(1 << 16)])
    assert torch.equal(from_half.nan_to_num(7.0), every_half.float().nan_to_num(7.0))
    # Values of every magnitude, and those half-way between two that are representable.
    halves = every_half[every_half.isfinite()].float()
    ties = (halves + halves.roll(1)) / 2
    spread = torch.randn(4096) * 2.0 ** torch.randint(-30, 20, (4096,))
    values = torch.cat([halves[::7], ties[::7], spread, torch.tensor([torch.inf, -torch.inf])])
    for convert, dtype in ((machine.controls.to_half, f16), (machine.controls.to_bfloat16, bf16)):
        bits = torch.tensor([convert(value) for value in values.tolist()], dtype=torch.int32)
        expected = values.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
        assert torch.equal(bits, expected)
        assert bits.new_tensor([convert(torch.nan)]).to(torch.uint16).view(dtype).isnan().all()


def run_planted(machine: Machine, name: str) -> tuple[list[int], str | None]:
    out = (ctypes.c_int * 64)()
    message = machine.controls.run_planted(name.encode(), out)
    return list(out), None if message is None else message.decode()


PLANTED = {
    "barrier_for_some": "a barrier is reached by some threads of the block only",
    "two_barriers": "threads wait at another barrier",
    "shuffle_with_lanes_that_returned": "waits for lane 16, which takes no part",
    "shuffle_out_of_the_mask": "reads lane 16, which takes no part",
    "shuffle_out_of_the_warp": "reads lane 32, which takes no part",
    "deadlock": "waits for lane 0, which takes no part",
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_raise(machine: Machine, name: str) -> None:
    assert PLANTED[name] in (run_planted(machine, name)[1] or "nothing was raised")
    values, message = run_planted(machine, "sound")  # and the next kernel runs as if nothing was
    assert message is None
    assert values == [63 - (i ^ 1) for i in range(64)]


def test_missing_barrier_depends_on_the_order(machine: Machine) -> None:
    forwards, _ = run_planted(machine, "missing_barrier")
    machine.controls.run_backwards(True)
    try:
        reversed_order, _ = run_planted(machine, "missing_barrier")
    finally:
        machine.controls.run_backwards(False)
    assert forwards != reversed_order


# ------------------------------------------------------------------------------ the public ops


@pytest.mark.parametrize("save", ["sum", "output", "copy"])
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, f32), (f32, f16), (f16, bf16)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 264), (3, 5, 63), (0, 8)], ids=str)
def test_the_ops_run_the_cpu_kernels(cuda_by_gxx: None, shape, dtypes, save) -> None:
    """Every option of the ops, against the PyTorch backend."""
    rows = make_inputs(math.prod(shape[:-1]), shape[-1], *dtypes)
    inputs = {name: x if x.dim() == 1 else x.view(shape) for name, x in rows.items()}
    inputs["weight"] = inputs["weight"].abs() + 1
    inputs["bias"] = inputs["bias"].clamp(-1, 1)
    names = {"x": "input", "x_bias": "input_bias"}
    inputs = {names.get(name, name): x for name, x in inputs.items()}
    dropping = {"dropout_p": P, "seed": torch.tensor([SEED]), "site": SITE, "batch_first": False}
    ends = {"sum": "input", "output": "output", "copy": "output"}

    def all_ops(backend: str, input: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        affine = {name: others[name] for name in ("weight", "bias")}
        options = {**dropping, "backend": backend}
        fused = dropout_add_layer_norm(
            input, **others, **options, save=save, return_sum=True, copy_dtype=f16
        )
        alone = layer_norm(input, **affine, out_dtype=bf16, save=ends[save], backend=backend)
        unaligned = F.pad(others["residual"], (1, 0))[..., 1:]
        return *fused, alone, dropout_add(input, unaligned, **options)

    found, expected = (
        helpers.results_of(partial(all_ops, taken), inputs) for taken in ("cpu", "pytorch")
    )
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        if x.numel():  # every gradient comes through results of 16 bits
            tolerance = 2**-6 if "gradient" in name else 8 * torch.finfo(x.dtype).eps
            assert (found[name] - x).abs().max() <= tolerance * x.abs().max(), name


def test_the_ops_refuse_float64(cuda_by_gxx: None) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cuda.*layer_norm.*no kernels for float64"):
        layer_norm(x, backend="cuda")
    torch.testing.assert_close(dropout_add(x, x), 2 * x)
    low = x.float()
    for arguments in ({"weight": x[0]}, {"out_dtype": f64}, {"copy_dtype": f64}):
        with pytest.raises(RuntimeError, match="no kernels for float64"):
            dropout_add_layer_norm(low, low, **arguments, backend="cuda")
        dropout_add_layer_norm(low, low, **arguments)  # takes another


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("90", (9, 0), (8, 0)),
        ("80 86", (8, 9), (9, 0)),
        ("80 86", (8, 0), (7, 5)),
        ("86", (8, 6), (8, 0)),
        ("90a", (9, 0), (9, 1)),
        ("80 90+PTX", (12, 0), (7, 5)),
        ("100 120+PTX", (12, 1), (9, 0)),
    ],
)
def test_a_gpu_that_was_not_built_for_is_named(
    cuda_by_gxx: None, monkeypatch: pytest.MonkeyPatch, built: str, runs, does_not
) -> None:
    monkeypatch.setattr(loading._extension, "CUDA_ARCHITECTURES", built)
    loading._why_not_on.cache_clear()
    assert loading._why_not_on(runs) is None
    reason = loading._why_not_on(does_not)
    version = "{}.{}".format(*does_not)
    assert f"not for compute capability {version}" in reason
    assert f"TORCH_CUDA_ARCH_LIST={version}" in reason
    monkeypatch.setattr(loading._extension, "cuda_versions", lambda: (12080, 13000))
    loading._why_not_on.cache_clear()
    assert "built with CUDA 13, but the driver is of CUDA 12" in loading._why_not_on(runs)
    loading._why_not_on.cache_clear()
