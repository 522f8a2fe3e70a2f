"""Layer normalisation. Backends: ``cuda``, ``cpu`` (C++), ``triton``, ``pytorch``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastattn import dispatch
from fastattn.arguments import NORM_ARGUMENTS, NormArguments, accumulation_dtype, options_of
from fastattn.extension import layer_norm as in_extension
from fastattn.extension import loading
from fastattn.ops._autograd import (
    Function,
    apply,
    differentiable_gradients,
    needs_composite,
    recall,
    remember,
    wanted_only,
    wants_second_order,
)
from fastattn.ops._checks import check_floating, check_rows, check_save, check_vector
from fastattn.ops._register import define, or_empty
from fastattn.pytorch import layer_norm as in_pytorch

#: What layer_norm may keep for backward.
SAVE_LEVELS = ("input", "output")

#: Of inputs for which torch's own kernel keeps statistics and sums in at least fp32.
_EXACT = (torch.float32, torch.float64)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    save: str = "input",
    backend: str | None = None,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Ba, Kiros and Hinton, "Layer normalization", 2016. Statistics are in at least fp32.

    Args:
        input: (..., N), fp16, bf16, fp32 or fp64.
        weight, bias: (N,) or None, any floating dtype.
        eps: added to the variance.
        out_dtype: of the result; by default that of ``input``, under CUDA autocast fp32.
        save: what backward keeps: ``"input"``, or ``"output"``, which costs nothing where a linear
            layer keeps it anyway. Backward then divides by ``weight``, so that must not be close
            to zero (:func:`why_not_from_output`), and there are no second derivatives.
        backend: ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"pytorch"``; None chooses.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    plain = backend is None and out_dtype is None and save == "input" and input.is_cpu
    dtype = input.dtype
    if plain and dtype in _EXACT and dispatch.leaves_to_pytorch("layer_norm", "cpu", dtype):
        try:  # before all checks: they take a good part of the time of a call
            shape = input.shape[-1:] if weight is None else weight.shape[-1:]
            return torch.layer_norm(input, shape, weight, bias, eps)
        except RuntimeError:
            pass  # what torch refuses either raises below, by name, or runs in another way
    check_norm(input, weight, bias, out_dtype)
    check_save(save, SAVE_LEVELS)
    dtypes = (*dtypes_of(input, weight, bias), out_dtype)
    backend = dispatch.choose("layer_norm", input, backend, dtypes=dtypes)
    arguments = NormArguments(weight, bias, eps, out_dtype or norm_dtype(input.dtype, input))
    to_torch = leaves_it_to_torch(backend, input.dtype, save)
    if to_torch or needs_composite(input, weight, bias):
        return in_pytorch.layer_norm_composite(input, weight, bias, arguments)
    return apply(_LayerNorm, input, *BackwardOptions(*arguments, input.dtype, save, backend))


def why_not_from_output(weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why a norm's backward should not start from its result (``save="output"``); None if it may.

    The result is rounded to its dtype, and backward divides its deviation from ``bias`` by
    ``weight``. So rounding errors grow by 1 + ``|bias / weight|``, which must stay below 3. Reads
    the parameters: on a GPU that waits for the device. Of tensors without data nothing is known.
    """
    if weight is None or weight.is_meta or isinstance(weight, FakeTensor):
        return None
    size = weight.detach().abs()
    if not bool((size >= MIN_WEIGHT).all()):
        return f"a weight is smaller than {MIN_WEIGHT} (or not a number)"
    if bias is not None and not bool((bias.detach().abs() <= 2 * size).all()):
        return "a bias is more than twice its weight (or not a number)"
    return None


#: Weights below it would take a result in fp16 to subnormal numbers.
MIN_WEIGHT = 2.0**-10


def leaves_it_to_torch(backend: str, dtype: torch.dtype, save: str) -> bool:
    """Whether torch's own autograd is the backend: in half precision it would keep fp32 copies."""
    return backend == "pytorch" and dtype in _EXACT and save in ("input", "sum")


def norm_dtype(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """The dtype of a norm's result: as in torch, autocast on a GPU normalises in fp32."""
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return accumulation_dtype(dtype)
    return dtype


def check_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    """Raise unless a norm with this affine map and result can take ``input``."""
    check_rows(input)
    check_floating("out_dtype", out_dtype)
    check_vector("weight", weight, input)
    check_vector("bias", bias, input)


# --------------------------------------------------------------------- why not, per backend


#: A call's dtypes; None where the default is.
Dtypes = tuple[torch.dtype | None, ...]


def dtypes_of(*tensors: Tensor | None) -> Dtypes:
    """The dtypes of those that are there."""
    return tuple(x.dtype for x in tensors if x is not None)


def why_not_cuda(device: torch.device, dtypes: Dtypes = ()) -> str | None:
    """Why the extension's CUDA kernels cannot run a call with these dtypes."""
    reason = _why_not_dtypes(dtypes, in_extension.CudaNormKernels.dtypes)
    return reason or loading.why_not_cuda(device)


def why_not_cpu(device: torch.device, dtypes: Dtypes = ()) -> str | None:
    """Why the extension's C++ kernels cannot."""
    reason = loading.why_not()
    return reason or _why_not_dtypes(dtypes, in_extension.NormKernels.dtypes)


def why_not_triton(device: torch.device, dtypes: Dtypes = ()) -> str | None:
    """Why the Triton kernels cannot."""
    return dispatch.why_not_triton(device)


def _why_not_dtypes(dtypes: Dtypes, known: frozenset[torch.dtype]) -> str | None:
    for dtype in dtypes:
        if dtype is not None and dtype not in known:
            return f"has no kernels for {str(dtype).removeprefix('torch.')}"
    return None


def why_cpu_only_by_name(device: torch.device, dtypes: Dtypes = ()) -> str | None:
    """Why a norm alone takes the C++ kernels by name only.

    In 16 bits it takes them: torch's own keep mean and deviation for backward in the dtype of the
    input, and add up the gradients of weight and bias in it.
    """
    if dtypes and dtypes[0] in _EXACT:
        return "a norm alone in fp32 or fp64 is left to torch's own kernel on a CPU"
    return None


def register_backends(op: str, cpu_only_by_name: Callable[..., str | None] | None = None) -> None:
    """Register the four backends of an op with a norm or a residual sum."""
    dispatch.register(op, "cuda", in_extension.cuda, why_not_cuda)
    dispatch.register(op, "cpu", in_extension.cpu, why_not_cpu, cpu_only_by_name)
    dispatch.register(op, "triton", "fastattn.kernels.layer_norm", why_not_triton)
    dispatch.register(op, "pytorch", in_pytorch)


register_backends("layer_norm", cpu_only_by_name=why_cpu_only_by_name)


# ------------------------------------------------------------- schema, fake, implementation


#: What the op takes besides its input, and its backward besides gradient and statistics.
Options = options_of("Options", NormArguments, "backend")
BackwardOptions = options_of("BackwardOptions", NormArguments, "input_dtype", "save", "backend")


def _forward(input, *options):
    options = Options(*options)
    functions = dispatch.functions("layer_norm", options.backend)
    return functions.layer_norm_forward(input, NormArguments.of(options))


def statistics_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd."""
    dtype = accumulation_dtype(input.dtype)
    return tuple(input.new_empty(input.shape[:-1], dtype=dtype) for _ in range(2))


def _forward_fake(input, *options):
    dtype = Options(*options).out_dtype
    return input.new_empty(input.shape, dtype=dtype), *statistics_fake(input)


def _backward(grad_out, saved, mean, rstd, *options):
    *options, wanted = options
    options = BackwardOptions(*options)
    functions = dispatch.functions("layer_norm", options.backend)
    norm, dtype = NormArguments.of(options), options.input_dtype
    gradients = functions.layer_norm_backward(
        grad_out, saved, mean, rstd, norm, dtype, options.save, wanted
    )
    return or_empty(gradients, saved)


def _backward_fake(grad_out, saved, mean, rstd, *options):
    *options, wanted = options
    options = BackwardOptions(*options)
    targets = ((saved, options.input_dtype), (options.weight, None), (options.bias, None))
    return tuple(
        x.new_empty(x.shape, dtype=dtype) if want else saved.new_empty(0)
        for (x, dtype), want in zip(targets, wanted, strict=True)
    )


_forward_op = define(
    f"layer_norm_fwd(Tensor input, {NORM_ARGUMENTS}, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    f"layer_norm_bwd(Tensor grad_out, Tensor saved, Tensor? mean, Tensor rstd, {NORM_ARGUMENTS}, "
    "ScalarType input_dtype, str save, str backend, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, input, *options):
        named = BackwardOptions(*options)
        out, mean, rstd = _forward_op(input, *NormArguments.of(named), named.backend)
        saved = (out, None) if named.save == "output" else (input, mean)
        remember(ctx, (*saved, rstd), options)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (saved, mean, rstd), options = recall(ctx)
        wanted = list(ctx.needs_input_grad[:3])
        if wants_second_order():
            named = BackwardOptions(*options)
            check_second_order(named.save)
            gradients = norm_gradients(saved, NormArguments.of(named), grad_out)
        else:
            gradients = _backward_op(grad_out, saved, mean, rstd, *options, wanted)
        return *wanted_only(gradients, wanted), *(None,) * (len(options) - 2)


def check_second_order(save: str) -> None:
    """Raise if the inputs of a norm, which second derivatives lead back to, were not kept."""
    if save in ("output", "copy"):
        raise RuntimeError(
            f'second derivatives of a norm need its input: do not pass save="{save}"'
        )


def norm_gradients(input: Tensor, norm: NormArguments, grad_out: Tensor) -> list[Tensor | None]:
    """Differentiable gradients of a layer norm's (input, weight, bias)."""
    inputs = (input, norm.weight, norm.bias)
    return differentiable_gradients(
        lambda *x: in_pytorch.layer_norm_composite(*x, norm), inputs, grad_out
    )
