"""torch's own ModuleInfo samples for TransformerEncoderLayer, run against our class."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer

common_modules = pytest.importorskip("torch.testing._internal.common_modules")

INFO = next(m for m in common_modules.module_db if m.module_cls is nn.TransformerEncoderLayer)
seen: Counter[str] = Counter()


def samples(dtype: torch.dtype, training: bool) -> list:
    return INFO.module_inputs_func(INFO, "cpu", dtype, True, training)


CASES = [
    pytest.param(dtype, training, i, id=f"{str(dtype)[6:]}-{training}-{i}-{sample.desc}")
    for dtype, training in itertools.product((torch.float32, torch.float64), (True, False))
    for i, sample in enumerate(samples(dtype, training))
]


def test_torch_has_as_many_samples_as_it_had():
    assert len(CASES) > 100


@pytest.mark.parametrize(("dtype", "training", "index"), CASES)
def test_sample(dtype, training, index):
    sample = samples(dtype, training)[index]
    constructor, forward = sample.constructor_input, sample.forward_input
    stock = nn.TransformerEncoderLayer(*constructor.args, **constructor.kwargs)
    fused = FusedEncoderLayer(*constructor.args, **constructor.kwargs)
    for layer in (stock, fused):
        layer.to(dtype).train(training)
    fused.load_state_dict(stock.state_dict(), strict=True)
    out = fused(*forward.args, **forward.kwargs)
    assert not out.isnan().any()
    torch.testing.assert_close(out, stock(*forward.args, **forward.kwargs))
    seen["samples"] += 1
    if sample.reference_fn is not None:
        expected = sample.reference_fn(fused, *forward.args, **forward.kwargs)
        torch.testing.assert_close(out, expected)
        seen["references"] += 1
    for other in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        torch.testing.assert_close(other(*forward.args, **forward.kwargs), out)
    assert repr(fused).startswith("FusedEncoderLayer(")
    if dtype == torch.float64 and training:
        names = list(dict(fused.named_parameters()))
        run = functools.partial(functional, fused, names, forward)
        inputs = [forward.args[0], *fused.parameters()]
        inputs = [x.detach().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        seen["gradient checks"] += 1


def functional(layer: nn.Module, names: list[str], forward, src: Tensor, *values: Tensor) -> Tensor:
    arguments = (src, *forward.args[1:])
    parameters = dict(zip(names, values, strict=True))
    return torch.func.functional_call(layer, parameters, arguments, forward.kwargs)


def test_every_kind_of_check_ran():
    """After all samples: none was left out, and the reference functions did run."""
    if seen["samples"] != len(CASES):
        pytest.skip("only some of the samples were asked for")
    assert seen["references"] > 100 and seen["gradient checks"] > 30
