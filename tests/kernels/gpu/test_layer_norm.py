"""Every CUDA kernel of norms and residual sums once, for compute-sanitizer to watch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import dropout_add, dropout_add_layer_norm
from tests import helpers
from tests.ops.norms import bf16, dropping, fp16, fp32, make_inputs, without_norm

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run on the GPU: its results and the gradients of its inputs come back."""

    def run(**inputs: Tensor | None) -> Any:
        inputs = {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}
        if "seed" in getattr(function, "keywords", {}):
            inputs["seed"] = function.keywords["seed"].to(DEVICE)
        outputs = function(**inputs)
        return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()

    return run


@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (fp16, fp32)])
@pytest.mark.parametrize("shape", [(3, 37, 8), (2, 9, 768), (1, 5, 4096), (2, 3, 1001), (2, 8200)])
def test_small_calls_for_the_sanitizer(shape: tuple[int, ...], dtypes) -> None:
    branch, stream = dtypes
    inputs = make_inputs(shape, stream, input=branch, input_bias=branch)
    inputs["weight"] = inputs["weight"].abs() + 1
    options = {"backend": "cuda", **dropping()}
    every = {"return_sum": True, "copy_dtype": fp16}
    for taken in (every, {"save": "output"}, {**every, "save": "copy"}):
        fused = partial(dropout_add_layer_norm, **options, **taken)
        results = helpers.results_of(there(fused), inputs)
        assert all(x.isfinite().all() for x in results.values())
    alone = helpers.results_of(there(partial(dropout_add, **options)), without_norm(inputs))
    assert all(x.isfinite().all() for x in alone.values())
