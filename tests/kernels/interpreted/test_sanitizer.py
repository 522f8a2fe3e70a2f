"""The sanitizer is installed, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.interpreted.planted_kernels import copy
from tests.kernels.interpreted.sanitizer import Sanitizer, Violation
from tests.kernels.interpreted.watched_memory import POISON_LIMIT


class TestInstallation:
    @pytest.fixture(autouse=True)
    def sanitizer(self) -> Iterator[None]:
        """None is installed in these tests."""
        yield

    @staticmethod
    def attributes() -> dict[object, dict[str, object]]:
        owners = [
            interpreter,
            interpreter.interpreter_builder,
            interpreter.GridExecutor,
            interpreter.InterpreterBuilder,
            interpreter.ReduceScanOpInterface,
            interpreter.TensorDescHandle,
            interpreter.TritonSemantic,
            tl.block_type,
            torch,
            Tensor,
        ]
        return {owner: dict(vars(owner)) for owner in owners}

    def test_everything_is_put_back(self) -> None:
        copy[(1,)](torch.ones(8), torch.zeros(8), 8, BLOCK=8)  # Triton's first launch adds some
        before = self.attributes()
        with Sanitizer():
            assert self.attributes() != before
            with pytest.raises(Violation):
                copy[(1,)](torch.ones(3), torch.empty(8), 8, BLOCK=8)
        after = self.attributes()
        for owner, attributes in before.items():
            assert after[owner].keys() == attributes.keys()
            for name, value in attributes.items():
                if name not in {"grid_dim", "grid_idx"}:
                    assert after[owner][name] is value, (owner, name)

    def test_an_error_inside_puts_everything_back(self) -> None:
        before = torch.empty
        with pytest.raises(ZeroDivisionError), Sanitizer():
            raise ZeroDivisionError
        assert torch.empty is before

    def test_they_do_not_nest_and_can_follow_one_another(self) -> None:
        for _ in range(2):
            with Sanitizer() as first:
                with pytest.raises(RuntimeError, match="do not nest"), Sanitizer():
                    pass
                out = torch.empty(3)
                with pytest.raises(Violation):
                    first.assert_written(out)
            with pytest.raises(ValueError, match="not allocated"):
                first.assert_written(out)

    def test_without_it_the_fault_is_silent(self) -> None:
        x = torch.randn(64)
        copy[(4,)](x[:50], torch.empty(64), 64, BLOCK=16)


def test_huge_allocations_are_not_poisoned() -> None:
    at_limit = torch.empty(POISON_LIMIT // 4)
    assert at_limit.isnan().all()
    x = torch.empty(POISON_LIMIT // 4 + 1)
    copy[(1,)](x, torch.empty(8), 8, BLOCK=8)
