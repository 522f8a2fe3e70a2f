"""Where an op meets autograd: what it saves, and when it needs the differentiable composite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import tracing

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


class Function(torch.autograd.Function):
    """Its passes are traced where torch.compile traces a call of it, and else run as they are.

    Entered on its own, a backward would be compiled as one whose result nobody differentiates.
    """

    def __init_subclass__(cls) -> None:
        tracing.not_entered(cls.forward)
        tracing.not_entered(cls.backward)


def needs_composite(*tensors: Tensor | None) -> bool:
    """Whether only plain differentiable PyTorch is right.

    That is under torch.func, forward-mode AD and ``torch.jit.trace``, and for DTensors.
    """
    if torch._C._are_functorch_transforms_active() or tracing.traced():
        return True
    if any(type(x) not in _PLAIN and hasattr(x, "device_mesh") for x in tensors):
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )


def wants_second_order() -> bool:
    """Inside backward: whether its result must be differentiable (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    composite: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor
) -> list[Tensor | None]:
    """Gradients of ``composite(*inputs)`` to differentiate again, None where not needed.

    They are partial derivatives even where one input is, or was computed from, another: each is
    taken with respect to an alias, which leads back to its own input only.
    """
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    output = composite(*inputs)
    found = torch.autograd.grad(
        output, [inputs[i] for i in wanted], grad_output, create_graph=True, allow_unused=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def twice_differentiable(
    fast: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """``fast(*inputs)``, with second derivatives from ``exact``, the same function.

    For kernels of torch's own whose backward has no derivative.
    """
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not recorded or torch.compiler.is_compiling() or tracing.traced():
        return fast(*inputs)
    return _TwiceDifferentiable.apply(fast, exact, *inputs)


class _TwiceDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, fast: Callable, exact: Callable, *inputs: Tensor | None) -> Tensor:
        ctx.fast, ctx.exact = fast, exact
        ctx.save_for_backward(*inputs)
        ctx.graph = _record(fast, inputs, ctx.needs_input_grad[2:])
        return ctx.graph[1].detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if wants_second_order():
            return None, None, *differentiable_gradients(ctx.exact, inputs, grad_output)
        leaves, output = ctx.graph or _record(ctx.fast, inputs, wanted)
        ctx.graph = None  # its memory is free once used; a second backward computes it again
        found = iter(
            torch.autograd.grad(
                output,
                [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
                grad_output,
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if want else None for want in wanted)


@torch.enable_grad()
def _record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor]:
    """Detached inputs, and ``function`` of them with its graph."""
    leaves = [
        None if x is None else x.detach().requires_grad_(want)
        for x, want in zip(inputs, wanted, strict=True)
    ]
    return leaves, function(*leaves)


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply``, which Dynamo traces only if no tensor is among the arguments twice."""
    if torch.compiler.is_compiling():
        arguments = tuple(
            x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in arguments[:i]) else x
            for i, x in enumerate(arguments)
        )
    return function.apply(*arguments)


def remember(ctx: Any, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> None:
    """In an autograd Function's forward: save ``tensors``, and ``options`` with tensors among them.

    What autograd saves it also frees and checks; a tensor kept on ``ctx`` would leak.
    """
    ctx.tensor_at = [i for i, option in enumerate(options) if isinstance(option, Tensor)]
    ctx.options = [None if isinstance(option, Tensor) else option for option in options]
    ctx.save_for_backward(*tensors, *(options[i] for i in ctx.tensor_at))


def recall(ctx: Any) -> tuple[tuple[Tensor | None, ...], list[Any]]:
    """In an autograd Function's backward: the tensors and options that :func:`remember` saved."""
    saved, options = ctx.saved_tensors, list(ctx.options)
    count = len(saved) - len(ctx.tensor_at)
    for i, tensor in zip(ctx.tensor_at, saved[count:], strict=True):
        options[i] = tensor
    return saved[:count], options


def wanted_only(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of an op (empty tensors where not wanted) as autograd takes them."""
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def column_sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias: the sum over all rows of (..., N)."""
    return rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).sum(0).to(dtype)
