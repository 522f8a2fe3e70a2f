"""Is a provider right? Checked before it is timed: a fast wrong answer is no answer.

The oracle is the stock layer in float64 with the same weights, dropout 0. A provider matches when
no tensor is further from the oracle than a small multiple of what the stock layer is in the same
dtype, run the same way: torch.compile adds up a bias gradient less exactly than eager does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import STOCK, Case, Dtype, Provider

OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
RULE = (
    "max abs error against the stock layer in float64, dropout 0: at most "
    f"{OUTPUT_FACTOR}x that of the stock layer in the same dtype for outputs, {GRADIENT_FACTOR}x "
    "for gradients, eager measured by eager and compiled by compiled, and never stricter than one "
    "ulp of the tensor's largest element"
)


def evaluate(provider: Provider, case: Case, device: str, dtype: Dtype = None) -> dict[str, Tensor]:
    """The outputs in eval and in training mode without dropout, and every gradient, in float64."""
    layer = provider.build(case, 0.0, device, dtype)
    src = case.tensor(1, device).to(dtype or case.dtype)
    with torch.no_grad():
        eval_output = layer.eval()(src)
    src.requires_grad_()
    output = layer.train()(src)
    # A fixed random cotangent: the mean square of a layer norm's output has almost no gradient.
    output.backward(case.tensor(2, device).to(output.dtype))
    tensors = {"eval output": eval_output, "output": output.detach(), "gradient of src": src.grad}
    for name, parameter in layer.named_parameters():
        tensors[f"gradient of {name.removeprefix('_orig_mod.')}"] = parameter.grad
    return {name: tensor.double() for name, tensor in tensors.items()}


class AccuracyCheck:
    """Judges providers of one case on one device; the stock ones, run first, set the measure."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.oracle = evaluate(STOCK, case, device, torch.float64)
        self.eager_errors = self._errors(evaluate(STOCK, case, device))
        self.reference_errors: dict[bool, dict[str, float]] = {}  # of stock, by Provider.compiled

    def _errors(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: (tensors[name] - exact).abs().max().item() for name, exact in self.oracle.items()
        }

    def _verdict(self, name: str, error: float, reference: float) -> dict:
        factor = GRADIENT_FACTOR if name.startswith("gradient") else OUTPUT_FACTOR
        largest = self.oracle[name].abs().max().item()
        ulp = torch.finfo(self.case.dtype).eps * 2.0 ** math.floor(math.log2(largest))
        return {
            "tensor": name,
            "error": error,
            "eager_error": self.eager_errors[name],
            "limit": max(factor * reference, ulp),
        }

    def check(self, provider: Provider) -> dict:
        """`{"ok", "output", "gradient"}`: the worst output and the worst gradient, with figures."""
        errors = self._errors(evaluate(provider, self.case, self.device))
        if provider.is_stock and all(map(math.isfinite, errors.values())):
            self.reference_errors[provider.compiled] = errors
        references = self.reference_errors.get(provider.compiled, self.eager_errors)
        verdicts = [self._verdict(name, errors[name], references[name]) for name in errors]

        def worst(gradient: bool) -> dict:
            kind = [v for v in verdicts if v["tensor"].startswith("gradient") == gradient]
            # `not <=` rather than `>`: NaN must come out worst.
            wrong = [v for v in kind if not v["error"] <= v["limit"]]
            return max(wrong or kind, key=lambda v: v["error"] / v["limit"])

        return {
            "ok": all(v["error"] <= v["limit"] for v in verdicts),
            "output": worst(gradient=False),
            "gradient": worst(gradient=True),
        }
