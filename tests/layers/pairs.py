"""A stock encoder layer and ours with equal weights, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer, explain

WIDTH, HEADS, HIDDEN = 32, 4, 64
CHILDREN = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")
SEED = torch.tensor([17])

BOTH = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
ORDERS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "sequence"])


def name_of(activation: object) -> str:
    """For a test's id, which must be the same in every process."""
    return getattr(activation, "__name__", str(activation))


def pair(
    *,
    width: int = WIDTH,
    heads: int = HEADS,
    hidden: int = HIDDEN,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    stock: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer,
    fused: type[FusedEncoderLayer] = FusedEncoderLayer,
    **options: Any,
) -> tuple[nn.TransformerEncoderLayer, FusedEncoderLayer]:
    """(stock, fused), batch-first unless asked otherwise, with no parameter at a special value."""
    options = {"batch_first": True, **options}
    layers = [
        kind(width, heads, hidden, dropout, dtype=dtype, **options) for kind in (stock, fused)
    ]
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    layers[1].load_state_dict(layers[0].state_dict(), strict=True)
    return layers[0], layers[1]


def tokens(*shape: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    return torch.randn(*shape, width, dtype=dtype)


def padding_of(batch: int = 2, length: int = 5) -> Tensor:
    return torch.arange(length) >= torch.tensor([[length], [3]]).expand(2, 1)[:batch]


def given(seed: int) -> Tensor:
    return torch.tensor([seed])


def modules_of(layer: nn.Module) -> list[str]:
    return [choice.part for choice in explain(layer, tokens(1, 2)) if choice.taken == "module"]


def gradients(
    layer: nn.Module,
    src: Tensor,
    *args: Any,
    call: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The output and the gradients of ``src``, of every parameter and of float masks that want one.

    The cotangent is a fixed function of the output's shape. ``call`` runs the layer in another way.
    """
    layer.zero_grad(set_to_none=True)
    leaf = src.detach().clone().requires_grad_()
    masks = {
        f"mask {i}": x.detach().clone().requires_grad_()
        for i, x in enumerate(args)
        if isinstance(x, Tensor) and x.requires_grad
    }
    args = [masks.get(f"mask {i}", x) for i, x in enumerate(args)]
    out = (layer if call is None else call)(leaf, *args, **kwargs)
    out.backward(cotangent(out))
    found = {"output": out.detach(), "src": leaf.grad}
    found |= {name: mask.grad for name, mask in masks.items()}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return found


def cotangent(out: Tensor) -> Tensor:
    steps = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
    return torch.sin(steps).view(out.shape).to(out.dtype)


def assert_equal_runs(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float = 1e-10
) -> None:
    """Same outputs and same gradients, and gradients for the same parameters."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        if expected is None:
            assert got is None, f"{name} got a gradient"
            continue
        assert got is not None, f"{name} got no gradient"
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_as_exact(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Output within twice, gradients within three times the error of ``theirs``.

    Errors are those against float64, so that nothing depends on the order in which a machine sums.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].isfinite().all(), name
        error, allowed = ((x[name].double() - value).norm().item() for x in (ours, theirs))
        factor = 2 if name == "output" else 3
        assert error <= factor * allowed, f"{name}: error {error:.3g}, theirs {allowed:.3g}"
