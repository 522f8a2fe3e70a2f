"""What follows torch's calls, and sees nothing of a kernel that gets addresses.

Compilers, tracers and modes record or rewrite what torch's dispatcher is asked for. An op is such a
call; what an op does inside, or what runs without one, must be hidden from the first and may not
happen under the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable)


def watched() -> bool:
    """Whether anything follows the calls: a tracer, a mode, a transform, forward-mode AD.

    Only what the dispatcher sees may then run.
    """
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def traced() -> bool:
    """Whether ``torch.jit.trace``, or the ONNX export built on it, records the calls.

    It takes sizes for tensors, which an op's schema does not, and the name of an autograd Function
    for a call into Python, which no file can hold. What it records is therefore plain PyTorch.
    """
    return torch._C._get_tracing_state() is not None


def opaque(function: _Function) -> _Function:
    """``function``, which torch.compile leaves as it is, with everything that it calls.

    Of a function that it enters, it puts off ``data_ptr()`` and lets go of the tensor, so that a
    kernel may get the address of memory that is no longer there. This is
    ``torch.compiler.disable``, without an import of the compiler and at no cost a call.
    """
    function._torchdynamo_disable = True  # what it reads before it inlines a call
    function._torchdynamo_disable_msg = "it hands addresses to a kernel"
    return function if not_entered(function) else torch._disable_dynamo(function)


def not_entered(function: Callable) -> bool:
    """Have torch.compile leave the frames of ``function`` as they are; it may inline a call of it.

    False where this torch has other names for that.
    """
    try:
        native = torch._C._dynamo.eval_frame
        skip = native._FrameAction.SKIP  # the frame itself, and what it calls
        native.set_code_exec_strategy(function.__code__, native._FrameExecStrategy(skip, skip))
    except AttributeError:
        return False
    return True
