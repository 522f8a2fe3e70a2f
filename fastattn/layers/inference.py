"""A whole plain encoder layer where nothing drops and no derivative can be asked for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import dispatch
from fastattn.arguments import AttentionArguments, NormArguments
from fastattn.extension import inference, loading
from fastattn.layers.masks import Masks
from fastattn.pytorch.activations import ACTIVATE_IN_PLACE
from fastattn.pytorch.attention import attention_without_dropout
from fastattn.pytorch.layer_norm import layer_norm_composite
from fastattn.pytorch.products import linear


def encoder_layer_inference(
    layer: nn.TransformerEncoderLayer, src: Tensor, masks: Masks, activation: str
) -> Tensor:
    """A whole plain encoder layer where nothing drops and no derivative can be asked for.

    What the ops compute, with the residual sums in place and little Python between the products:
    on a CPU that is what inference op by op loses to torch's own fast path.
    """
    attn, norm1, norm2 = layer.self_attn, layer.norm1, layer.norm2
    x = _norm(src, norm1) if layer.norm_first else src
    out = F.linear(_self_attention(x, attn, masks), attn.out_proj.weight)
    if not layer.norm_first:
        x = _add_norm_in_place(out, attn.out_proj.bias, src, norm1)
        out = _feed_forward(x, layer, activation)
        return _add_norm_in_place(out, layer.linear2.bias, x, norm2)
    residual = _add_in_place(out, attn.out_proj.bias, src)
    out = _feed_forward(_norm(residual, norm2), layer, activation)
    return _add_in_place(out, layer.linear2.bias, residual)


def _feed_forward(x: Tensor, layer: nn.TransformerEncoderLayer, activation: str) -> Tensor:
    """Both products, without the second bias."""
    weight1, bias1 = layer.linear1.weight, layer.linear1.bias
    if activation == "relu" and inference.runs_inference(x, weight1, bias1):
        hidden = inference.add_bias_relu_(F.linear(x, weight1), bias1)
    else:
        hidden = ACTIVATE_IN_PLACE[activation](linear(x, weight1, bias1))
    return F.linear(hidden, layer.linear2.weight)


def _self_attention(x: Tensor, attn: nn.MultiheadAttention, masks: Masks) -> Tensor:
    """Heads concatenated, before the output projection; shape and memory order of ``x``."""
    head_dim = attn.embed_dim // attn.num_heads
    qkv = linear(x, attn.in_proj_weight, attn.in_proj_bias)
    qkv = qkv.view(*x.shape[:-1], 3, attn.num_heads, head_dim)
    if x.dim() == 2:
        qkv = qkv[None]
    elif not attn.batch_first:
        qkv = qkv.transpose(0, 1)
    arguments = AttentionArguments(
        masks.key_padding_mask, masks.attn_mask, is_causal=masks.is_causal, scale=head_dim**-0.5
    )
    out = attention_without_dropout(*qkv.unbind(-3), arguments)
    if x.dim() == 3 and not attn.batch_first:
        out = out.transpose(0, 1)
    return out.reshape(x.shape)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    arguments = NormArguments(norm.weight, norm.bias, norm.eps, x.dtype)
    return layer_norm_composite(x, norm.weight, norm.bias, arguments)


def _add_norm_in_place(
    branch: Tensor, bias: Tensor | None, residual: Tensor, norm: nn.LayerNorm
) -> Tensor:
    if loading.available() and branch.device.type == "cpu":
        arguments = NormArguments(norm.weight, norm.bias, norm.eps, branch.dtype)
        kernels = dispatch.functions("dropout_add_layer_norm", "cpu")
        return kernels.add_layer_norm_(branch, bias, residual, arguments)
    return _norm(_add_in_place(branch, bias, residual), norm)


def _add_in_place(branch: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return (branch if bias is None else branch.add_(bias)).add_(residual)
