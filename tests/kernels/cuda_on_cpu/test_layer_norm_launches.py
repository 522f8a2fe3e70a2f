"""How the norm kernels run: layouts, blocks, order, partial sums, device and stream."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests import helpers
from tests.kernels.cuda_on_cpu.layer_norm_calls import (
    DROPS,
    Call,
    Norm,
    backward,
    check,
    dropout_tuple,
    forward,
    make_inputs,
)
from tests.kernels.cuda_on_cpu.machine import Machine
from tests.kernels.cuda_on_cpu.poisoned_memory import (
    MISALIGNED,
    ODD,
    POISON,
    STRIDED,
    Memory,
    Place,
    address,
    rows_of,
    vector_of,
)

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


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
