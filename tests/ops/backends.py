"""What runs the checks of an op (``<op>_checks.py``): each backend on each device, a line each.

A check takes a ``backend`` and is run by each that has the op. Inputs and results are CPU tensors,
so that a check need not know where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import dispatch

Layout = Callable[[Tensor], Tensor]

# Quirks: what of a backend is not as every check asks. A check names these, and no backend.
COMPOSED = "PyTorch's operations, one by one: they multiply by zero what drops, and NaN stays"
SCORES_TWICE = "where nothing drops torch's own attention, whose backward rounds scores differently"
READS_LENGTHS = "lengths are read by every call, which refuses wrong ones"
SHARP = "all but one P round to 0 in every row: what is left of dQ is the rounding of delta"
ROUNDED = "delta is summed from the output, in 16 bits, and no float mask pays for its correction"
OVERFLOWS = "kernels add masks to scores in fp32, and in fp64 those of fp64: less is -inf there"
SPREADS = "NaN in a key makes NaN of all dQ of a tile, also of rows that are ignored"
FP32_MEANS = "means of rows are sums in fp32; those of eager on a CPU are in fp64"
LONE_KEYS = "the scores of a sequence's only key have gradients of zero, and none of rounding"
TRITON = (SHARP, ROUNDED, OVERFLOWS, SPREADS, LONE_KEYS)


@dataclass(frozen=True)
class Backend:
    """A backend of the library, and how it runs in a process of these tests."""

    name: str  # what the ops call it
    how: str = ""  # of two with one name
    device: str = "cpu"
    mark: pytest.MarkDecorator | None = None  # what a process needs: see tests/conftest.py
    fixture: str | None = None  # what makes it run here
    quirks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.how}".strip()

    @property
    def compiles(self) -> bool:
        """Whether each kind of call makes a kernel, which takes a second or more."""
        return self.name.startswith("triton") and self.device == "cuda"

    @property
    def interprets(self) -> bool:
        """Whether each program of a kernel takes milliseconds."""
        return self.mark is not None and self.mark.name == "interpreted"

    @property
    def compiler(self) -> str:
        """The backend of torch.compile: on a GPU what users run, elsewhere one that is quick."""
        return "inductor" if self.device == "cuda" else "aot_eager"

    def has(self, op: str) -> bool:
        return self.name in dispatch.BACKENDS[op]

    def of(
        self, op: Callable[..., Any], layouts: Mapping[str, Layout] | None = None, **options: Any
    ) -> Callable[..., Any]:
        """``op`` by this backend. ``layouts``: views of inputs that it is given in their place."""
        return self.there(op, layouts, backend=self.name, **options)

    def there(
        self,
        function: Callable[..., Any],
        layouts: Mapping[str, Layout] | None = None,
        **options: Any,
    ) -> Callable[..., Any]:
        """``function(**inputs, **options)`` on this device, with inputs and results on the CPU."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: x.to(self.device) if isinstance(x, Tensor) else x
                for name, x in values.items()
            }

        options = moved(options)

        def run(**inputs: Any) -> Any:
            given = moved(inputs)
            for name, layout in (layouts or {}).items():
                if given.get(name) is not None:
                    given[name] = layout(given[name])
            results = function(**given, **options)
            return tuple(x.cpu() for x in results) if isinstance(results, tuple) else results.cpu()

        return run


BACKENDS = (
    Backend("pytorch", quirks=(COMPOSED, SCORES_TWICE, READS_LENGTHS)),
    Backend("cpu"),  # the C++ extension
    Backend("triton", "interpreted", mark=pytest.mark.interpreted, quirks=TRITON),
    Backend("triton_gemm", "interpreted", mark=pytest.mark.interpreted),
    Backend("cuda", "by g++", fixture="cuda_by_gxx", quirks=(FP32_MEANS,)),
    Backend("pytorch", "on a GPU", "cuda", mark=pytest.mark.gpu, quirks=(COMPOSED, SCORES_TWICE)),
    Backend("triton", "on a GPU", "cuda", mark=pytest.mark.gpu, quirks=TRITON),
    Backend("triton_gemm", "on a GPU", "cuda", mark=pytest.mark.gpu),
    Backend("cuda", "on a GPU", "cuda", mark=pytest.mark.gpu),
)


#: Of activations and dtypes, those that stand for the others where each would be a kernel.
FEW = ("relu", "gelu")
MOST_USED = (torch.float32, torch.bfloat16)


def few_kernels(backend: Backend, is_one_of_them: bool) -> None:
    """Skip a call that would make a kernel of its own, and shows no more than others do."""
    if backend.compiles and not is_one_of_them:
        pytest.skip(f"{backend}: would compile one more kernel of a kind")


def few_activations(backend: Backend, activation: str, dtype: torch.dtype) -> None:
    """Skip a pair that shows no more than others do, where each takes long."""
    usual = (torch.float32,) if backend.interprets else MOST_USED
    if (backend.compiles or backend.interprets) and activation not in FEW and dtype not in usual:
        pytest.skip(f"{backend}: this dtype runs with {FEW}, this activation with {usual}")


def parameters(*ops: str) -> list[Any]:
    """The backends that have all of ``ops``, to be the parameters of a test."""
    return [
        pytest.param(backend, id=str(backend), marks=backend.mark or ())
        for backend in BACKENDS
        if all(backend.has(op) for op in ops)
    ]


def not_yet(request: pytest.FixtureRequest, backend: Backend, quirk: str) -> None:
    """A backend with this quirk is known to fail here."""
    if quirk in backend.quirks:
        strict = backend.device == "cpu"  # a GPU rounds in an order of its own
        request.applymarker(pytest.mark.xfail(raises=AssertionError, reason=quirk, strict=strict))
