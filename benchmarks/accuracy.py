"""Is a provider right? Checked before it is timed: a fast wrong answer is no answer.

The oracle is the op's baseline, torch's own implementation, in float64 with the same weights and
dropout 0. A provider matches when no tensor is further from the oracle than a small multiple of
what the baseline is in the same precision, run the same way: torch.compile adds up a bias gradient
less exactly than eager does.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cases import Case, Dtype, Op, Provider, without_padding

OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
RULE = (
    "max abs error against the baseline in float64, dropout 0, where no padding is: at most "
    f"{OUTPUT_FACTOR}x that of the baseline in the same precision for outputs, {GRADIENT_FACTOR}x "
    "for gradients, eager measured by eager and compiled by compiled, and never stricter than one "
    "ulp of the tensor's largest element; on as many sequences of the batch as float64 leaves room "
    "for"
)
ORACLE_BYTES = 2**32


def checkable(case: Case) -> Case:
    """The case without dropout, with as many sequences as the oracle may have memory for."""
    width = case.nhead * case.sequence + 12 * case.d_model
    sequence_bytes = 8 * case.layers * case.sequence * width
    batch = min(case.batch, max(1, ORACLE_BYTES // sequence_bytes))
    return replace(case, batch=batch, dropout=0.0)


def evaluate(
    op: Op, provider: Provider, case: Case, device: str, dtype: Dtype = None
) -> dict[str, Tensor]:
    """The outputs in eval and in training mode and every gradient, in float64.

    With a `dtype` everything is computed in it, without autocast.
    """
    module = provider.build(case, device, dtype)
    inputs, masks = op.tensors(case, device, dtype), op.masks(case, device)

    def call(module: nn.Module) -> Tensor:
        # A context for each call: autocast would give weights that it cast without a graph again.
        with case.autocast(device) if dtype is None else contextlib.nullcontext():
            return module(*inputs, **masks)

    with torch.no_grad():
        eval_output = call(module.eval())
    output = call(module.train())
    # A fixed random cotangent: the mean square of a layer norm's output has almost no gradient.
    output.backward(op.cotangent(case, output, device))
    tensors = {
        "eval output": without_padding(case, eval_output),
        "output": without_padding(case, output.detach()),
    }
    for name, leaf in zip(op.inputs(case), inputs, strict=True):
        tensors[f"gradient of {name}"] = leaf.grad
    for name, parameter in module.named_parameters():
        tensors[f"gradient of {name.removeprefix('_orig_mod.')}"] = parameter.grad
    return {name: tensor.double() for name, tensor in tensors.items()}


def exact(op: Op, case: Case, device: str) -> dict[str, Tensor]:
    """The oracle, without the fused inference paths, which know no float64 on some devices."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return evaluate(op, op.baseline, case, device, torch.float64)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class AccuracyCheck:
    """Judges providers of one case on one device; the baselines, run first, set the measure."""

    def __init__(self, op: Op, case: Case, device: str):
        self.op, self.case, self.device = op, checkable(case), device
        self.oracle = exact(op, self.case, device)
        self.eager_errors = self._errors(evaluate(op, op.baseline, self.case, device))
        self.reference_errors: dict[str | None, dict[str, float]] = {}  # by Provider.compile_mode

    def _errors(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: (tensors[name] - exact).abs().max().item() for name, exact in self.oracle.items()
        }

    def _ulp(self, name: str) -> float:
        largest = self.oracle[name].abs().max().item()
        eps = torch.finfo(self.case.dtype).eps
        return eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0

    def _verdict(self, name: str, error: float, reference: float) -> dict:
        factor = GRADIENT_FACTOR if name.startswith("gradient") else OUTPUT_FACTOR
        return {
            "tensor": name,
            "error": error,
            "eager_error": self.eager_errors[name],
            "limit": max(factor * reference, self._ulp(name)),
        }

    def check(self, provider: Provider) -> dict:
        """`{"ok", "output", "gradient"}`: the worst output and the worst gradient, with figures."""
        errors = self._errors(evaluate(self.op, provider, self.case, self.device))
        if provider.module is self.op.baseline.module and all(map(math.isfinite, errors.values())):
            self.reference_errors[provider.compile_mode] = errors
        references = self.reference_errors.get(provider.compile_mode, self.eager_errors)
        verdicts = [self._verdict(name, errors[name], references[name]) for name in errors]

        def worst(gradient: bool) -> dict:
            kind = [v for v in verdicts if v["tensor"].startswith("gradient") == gradient]
            # `not <=` rather than `>`: NaN must come out worst.
            wrong = [v for v in kind if not v["error"] <= v["limit"]]
            return max(wrong or kind, key=lambda v: v["error"] / (v["limit"] or math.inf))

        return {
            "ok": all(v["error"] <= v["limit"] for v in verdicts),
            "output": worst(gradient=False),
            "gradient": worst(gradient=True),
        }
