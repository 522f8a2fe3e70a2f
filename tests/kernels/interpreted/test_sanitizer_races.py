"""The sanitizer finds races between the programs of a launch, and none where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted.planted_kernels import (
    copy,
    copy_cube,
    copy_rows,
    increment_with_swap,
    scatter,
    shift_left,
    total,
    touch_in_turn,
)
from tests.kernels.interpreted.sanitizer import Violation

VERBS = {"load": "loaded", "store": "stored", "atomic": "updated atomically"}


def test_programs_that_store_the_same_element() -> None:
    x, out = torch.randn(50), torch.zeros(1)
    total[(1,)](x, out, 50, BLOCK=64, ATOMIC=False)
    message = r"program \(1, 0, 0\): store of argument 'Out' .* what program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        total[(4,)](x, out, 50, BLOCK=16, ATOMIC=False)


def test_a_program_that_loads_what_another_stores_later() -> None:
    # Shifted in place, program 1 stores the first element of its block, which program 0 has loaded.
    x = torch.randn(50)
    message = r"program \(1, 0, 0\): store of argument 'Out' .* program \(0, 0, 0\) loaded"
    with pytest.raises(Violation, match=message):
        shift_left[(4,)](x, x, 50, BLOCK=16)
    shift_left[(4,)](x, torch.empty(50), 50, BLOCK=16)


def test_a_program_that_loads_what_another_stored_before() -> None:
    x = torch.randn(50)
    message = r"program \(1, 0, 0\): load of argument 'X' .* program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        copy[(2,)](x[:40], x[8:48], 40, BLOCK=32)


def test_races_between_views_of_one_storage() -> None:
    storage = torch.randn(4, 10)
    copy_rows[(4,)](storage[:, :5], storage[:, 5:], 10, 10, 5, BLOCK=8)
    assert torch.equal(storage[:, :5], storage[:, 5:])
    with pytest.raises(Violation, match="race"):
        copy_rows[(3,)](storage[:3], storage[1:], 10, 10, 10, BLOCK=16)


def test_views_of_other_dtypes_race_too() -> None:
    words = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(Violation, match="race with what program"):
        copy[(2,)](words.view(torch.int8)[:8], words, 8, BLOCK=4)


def test_in_place_and_one_launch_after_another_are_no_races() -> None:
    x, out = torch.randn(50), torch.empty(50)
    before = x.clone()
    copy[(4,)](x, x, 50, BLOCK=16)
    shift_left[(4,)](x, out, 50, BLOCK=16)
    shift_left[(4,)](out, x, 50, BLOCK=16)
    assert torch.equal(x[:48], before[2:])


def test_three_dimensional_grids() -> None:
    x = torch.randn(2 * 3 * 4 * 8)
    out = torch.empty_like(x)
    copy_cube[(2, 3, 4)](x, out, BLOCK=8)
    assert torch.equal(out, x)
    with pytest.raises(Violation, match=r"program \(1, 2, 3\): load .* element offset 184"):
        copy_cube[(2, 3, 4)](x[:184], torch.empty_like(x), BLOCK=8)


@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("then", VERBS)
def test_two_programs_and_one_element(first: str, then: str) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    if first == then and first != "store":
        touch_in_turn[(3,)](x, first, then, "nothing")
        return
    message = rf"^touch_in_turn, program \(1, 0, 0\): {then} of argument 'X' .* race with what "
    with pytest.raises(Violation, match=message + rf"program \(0, 0, 0\) {VERBS[first]}$"):
        touch_in_turn[(2,)](x, first, then, "nothing")
    for action in (first, then):
        touch_in_turn[(1,)](x, action, "nothing", "nothing")


@pytest.mark.parametrize("both", ["load", "atomic"])
def test_a_program_that_stores_what_it_and_another_touched(both: str) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Violation, match=f"store of .* race with what others {VERBS[both]}"):
        touch_in_turn[(2,)](x, both, both, "store")


def test_one_program_may_touch_an_element_in_every_way() -> None:
    x, out = torch.randn(50), torch.zeros(1)
    total[(4,)](x, out, 50, BLOCK=16, ATOMIC=True)
    torch.testing.assert_close(out[0], x.sum())
    counter = torch.zeros(1, dtype=torch.int32)
    for first in VERBS:
        for last in VERBS:
            touch_in_turn[(2,)](counter, "nothing", first, last)


def test_races_far_apart_in_large_tensors() -> None:
    out = torch.zeros(1 << 22, dtype=torch.int32)
    order = torch.randperm(1 << 12) << 10
    scatter[(64,)](order, out, BLOCK=64)
    assert torch.equal(out[order], torch.arange(1 << 12, dtype=torch.int32))
    order[-1] = order[0]
    message = r"program \(63, 0, 0\): store of .* race with what program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        scatter[(64,)](order, out, BLOCK=64)


def test_compare_and_swap() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    increment_with_swap[(4,)](counter)
    assert counter == 4
    with pytest.raises(Violation, match="atomic of argument 'Counter' .* out of bounds"):
        increment_with_swap[(4,)](counter[:0])


def test_one_store_that_names_an_element_twice() -> None:
    out = torch.empty(8, dtype=torch.int32)
    scatter[(1,)](torch.tensor([3, 1, 2, 0]), out, BLOCK=4)
    with pytest.raises(Violation, match=r"'Out' .* element \(1,\), .* names the element twice"):
        scatter[(1,)](torch.tensor([3, 1, 1, 0]), out, BLOCK=4)
