"""Steps with ``.backward()`` inside torch.compile, each beside its eager self; run as a script.

Prints one JSON object: the largest difference of a gradient by case. In a process of its own, since
a tensor that is freed before a kernel reads it may end the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn import FusedEncoderLayer
from fastattn.extension import loading
from fastattn.ops.attention import attention_packed
from fastattn.ops.bias_activation_dropout import bias_activation_dropout
from fastattn.ops.dropout_add import dropout_add
from fastattn.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.layer_norm import layer_norm

SEED = torch.tensor([5])
NORMS = "cpu" if loading.available() else None
DROPS = {"dropout_p": 0.25, "seed": SEED}


def rows() -> Tensor:
    """Two sequences of five tokens, not contiguous: wrappers copy them first."""
    return torch.randn(2, 16, 5).transpose(1, 2)


def op_cases() -> dict[str, tuple[Callable, tuple[Tensor, ...]]]:
    qkv = (torch.randn(2, 5, 3, 2, 8),)
    norm = (rows(), rows(), torch.rand(16) + 0.5, torch.randn(16), torch.randn(16))
    block = (rows(), torch.randn(24, 16), torch.randn(24), torch.randn(16, 24))

    def tail(x, residual, weight, bias, input_bias, **options):
        return dropout_add_layer_norm(
            x, residual, weight, bias, input_bias=input_bias, **DROPS, **options
        )

    return {
        "attention_packed": (lambda x: attention_packed(x, is_causal=True, **DROPS), qkv),
        "feed_forward": (lambda *x: feed_forward(*x, activation="gelu", **DROPS), block),
        "bias_activation_dropout": (
            lambda x, b: bias_activation_dropout(x, b, **DROPS),
            (rows(), torch.randn(16)),
        ),
        "layer_norm": (lambda x, w, b: layer_norm(x, w, b, backend=NORMS), norm[:1] + norm[2:4]),
        "layer_norm, output": (
            lambda x, w, b: layer_norm(x, w, b, save="output", backend=NORMS),
            norm[:1] + norm[2:4],
        ),
        "dropout_add": (
            lambda x, r, b: dropout_add(x, r, input_bias=b, **DROPS),
            norm[:2] + norm[4:],
        ),
        "dropout_add_layer_norm": (tail, norm),
        "dropout_add_layer_norm, output": (lambda *x: tail(*x, save="output"), norm),
        "dropout_add_layer_norm, copy": (
            lambda *x: sum(y.float() for y in tail(*x, copy_dtype=torch.bfloat16, save="copy")),
            norm,
        ),
    }


def module_cases() -> dict[str, tuple[torch.nn.Module, Callable]]:
    layer = FusedEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    dropping = FusedEncoderLayer(16, 2, 32, dropout=0.1, norm_first=True, activation="gelu")
    return {
        "FusedEncoderLayer": (layer, layer),
        "FusedEncoderLayer, dropping": (dropping, lambda x: dropping(x, seed=SEED)),
    }


def difference(run: Callable, inputs: list[Tensor], parameters: list[Tensor], steps: int) -> float:
    """Of the gradients that eager and compiled steps leave, the largest."""

    def step(*inputs: Tensor) -> None:
        run(*inputs).square().mean().backward()

    leaves = [*inputs, *parameters]
    found = []
    for function, times in ((step, 1), (torch.compile(step, backend="eager"), steps)):
        for _ in range(times):
            for leaf in leaves:
                leaf.grad = None
            function(*inputs)
        found.append([leaf.grad for leaf in leaves])
    torch.compiler.reset()
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def main() -> None:
    torch.manual_seed(0)
    differences = {}
    for name, (op, inputs) in op_cases().items():
        inputs = [x.detach().requires_grad_() for x in inputs]
        differences[name] = difference(op, inputs, [], 3)
    for name, (module, run) in module_cases().items():
        parameters = list(module.parameters())
        differences[name] = difference(run, [rows().requires_grad_()], parameters, 10)
    json.dump(differences, sys.stdout)


if __name__ == "__main__":
    main()
