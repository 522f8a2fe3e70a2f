"""The stand-in for a GPU itself: its conversions, and the faults that it reports."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.cuda_on_cpu.machine import Machine

f16, bf16 = torch.float16, torch.bfloat16


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
