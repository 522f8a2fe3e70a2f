"""What of a layer is no more than its plain weights, and may be fused; why the rest is called."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastattn import dispatch, tracing
from fastattn.arguments import autocast_dtype
from fastattn.layers.layer_norm import FusedLayerNorm


def why_module(module: nn.Module, *kinds: type) -> str | None:
    """Why ``module`` must be called rather than read for its weights; None if it is plain."""
    if type(module) not in kinds:
        return f"it is a {kind_of(module)}"
    state = module.__dict__
    if "forward" in state:
        return "its forward is patched"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if _has_any_global_hook():
        return "there are global module hooks"
    for weight in state["_parameters"].values():
        if type(weight) is not nn.Parameter and weight is not None and not is_plain(weight):
            return f"its weights are {kind_of(weight)}s"
    return None


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is no subclass of its own, such as a sharded or a quantised one."""
    return type(weight) in (Tensor, nn.Parameter) or isinstance(weight, FakeTensor)


def kind_of(x: object) -> str:
    """The name of its class, for a reason."""
    return type(x).__name__


#: The ops of a layer, and its parts besides attention and activation where nothing wraps them.
_OPS = ("attention_packed", "dropout_add_layer_norm", "dropout_add", "feed_forward", "layer_norm")
_PARTS = {
    "linear1": (nn.Linear,),
    "dropout": (nn.Dropout,),
    "linear2": (nn.Linear,),
    "norm1": (nn.LayerNorm, FusedLayerNorm),
    "norm2": (nn.LayerNorm, FusedLayerNorm),
    "dropout1": (nn.Dropout,),
    "dropout2": (nn.Dropout,),
}


def is_plain_inference(layer: nn.TransformerEncoderLayer, src: Tensor) -> bool:
    """Whether the layer is plain throughout, on plain PyTorch, and only its output is asked for."""
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling():
        return False
    parts = layer._modules
    return (
        type(src) is Tensor
        and not (src.is_neg() or torch._is_functional_tensor(src))  # their memory is not they
        and layer.chunk_tokens is None
        and src.dtype in (torch.float32, torch.float64)
        and autocast_dtype(src) is None
        and not tracing.watched()
        and dispatch.has_no_gpu_kernels(src.device.type, _OPS)
        and not (overrides(layer, "_sa_block") or overrides(layer, "_ff_block"))
        and all(why_module(parts[name], *kinds) is None for name, kinds in _PARTS.items())
        and why_norm_is_module(layer, parts["norm1"]) is None
        and why_norm_is_module(layer, parts["norm2"]) is None
        and not drops(layer)
        and why_attention_is_module(layer) is None
        and why_module(layer.self_attn.out_proj, NonDynamicallyQuantizableLinear) is None
        and fused_activation(layer.activation)[0] is not None
        and all(
            weight is None or (weight.dtype == src.dtype and not weight.is_neg())
            for module in (layer.self_attn, layer.self_attn.out_proj, *map(parts.get, _PARTS))
            for weight in module._parameters.values()
        )
    )


def why_norm_is_module(layer: nn.TransformerEncoderLayer, norm: nn.Module) -> str | None:
    """Why a norm must be called; None if it is a plain one over the features of the layer."""
    reason = why_module(norm, nn.LayerNorm, FusedLayerNorm)
    if reason is None and norm.normalized_shape != (layer.self_attn.embed_dim,):
        return f"it normalises over {tuple(norm.normalized_shape)}"
    return reason


def why_attention_is_module(layer: nn.TransformerEncoderLayer) -> str | None:
    """Why self-attention must be called; None if it is plain, with one projection of its input."""
    attn = layer.self_attn
    reason = why_module(attn, nn.MultiheadAttention)
    if reason is not None:
        return reason
    if not attn._qkv_same_embed_dim or attn.in_proj_weight is None:
        return "query, key and value have projections of their own"
    if attn.bias_k is not None or attn.add_zero_attn:
        return "it adds keys of its own"
    return None


def why_attention_called(layer: nn.TransformerEncoderLayer) -> str | None:
    """Why the attention block gets its input as a module does, in its own dtype."""
    if overrides(layer, "_sa_block"):
        return "the layer overrides _sa_block"
    return why_attention_is_module(layer)


def why_feed_forward_called(layer: nn.TransformerEncoderLayer) -> str | None:
    """Why the feed-forward block gets its input as a module does, in its own dtype."""
    if overrides(layer, "_ff_block"):
        return "the layer overrides _ff_block"
    return why_module(layer.linear1, nn.Linear)


def overrides(layer: nn.TransformerEncoderLayer, method: str) -> bool:
    """Whether a layer has another ``method`` than torch's."""
    stock = getattr(nn.TransformerEncoderLayer, method)
    return method in layer.__dict__ or getattr(type(layer), method) is not stock


def why_padded(layer: nn.TransformerEncoderLayer) -> str | None:
    """Why sequences must not be run as packed tokens: a block expects a batch of them."""
    for method in ("_sa_block", "_ff_block"):
        if overrides(layer, method):
            return f"the layer overrides {method}"
    return why_attention_is_module(layer)


def drops(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether any dropout site of the layer is on."""
    attn = layer.self_attn
    if attn.training and getattr(attn, "dropout", 0.0) > 0.0:
        return True
    return any(
        type(module) is nn.Dropout and module.training and module.p > 0.0
        for module in (layer.dropout, layer.dropout1, layer.dropout2)
    )


_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
_MODULES = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Identity: "identity"}


def fused_activation(activation: Callable[[Tensor], Tensor]) -> tuple[str | None, str | None]:
    """The name of the fused activation that computes the same, or None and why there is none."""
    name = None
    if not isinstance(activation, nn.Module):
        name = next((name for function, name in _FUNCTIONS if activation is function), None)
    elif type(activation) in _MODULES:
        reason = why_module(activation, *_MODULES)
        if reason is not None:
            return None, reason
        name = _MODULES[type(activation)]
        if name == "gelu" and activation.approximate == "tanh":
            name = "gelu_tanh"
    return name, None if name else "there is no fused kernel for this activation"
