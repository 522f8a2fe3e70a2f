"""The encoder layer, post-norm as stock has it: stock, hand-written, compiled and fastattn's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import FusedEncoderLayer

from ..cases import Case, Cost, Op, Provider, with_compiled


class HandWrittenLayer(nn.TransformerEncoderLayer):
    """What one would write instead of the stock layer: no packed-QKV plumbing, no mask checks."""

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        p = self.dropout.p
        x = self.norm1(src + F.dropout(self._attend(src, src_key_padding_mask), p, self.training))
        hidden = F.dropout(self.activation(self.linear1(x)), p, self.training)
        return self.norm2(x + F.dropout(self.linear2(hidden), p, self.training))

    def _attend(self, src: Tensor, padding: Tensor | None) -> Tensor:
        attention = self.self_attn
        qkv = F.linear(src, attention.in_proj_weight, attention.in_proj_bias)
        heads = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, S, D]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if padding is None else ~padding[:, None, None],
            dropout_p=attention.dropout if self.training else 0.0,
        )
        return attention.out_proj(out.transpose(1, 2).flatten(2))


def build(layer_class: type[nn.TransformerEncoderLayer], case: Case) -> nn.Module:
    return layer_class(
        case.d_model,
        case.nhead,
        case.dim_feedforward,
        case.dropout,
        activation=case.activation,
        batch_first=True,
    )


def masks(case: Case, device: str) -> dict[str, Tensor]:
    mask = case.padding_mask(device)
    return {} if mask is None else {"src_key_padding_mask": mask}


def cost(case: Case) -> dict[str, Cost]:
    """FLOPs of the matrix products alone, of tokens that are no padding.

    2 · tokens · (4 d² + 2 d d_ff) for the four projections of attention and the two of the
    feed-forward block, 4 · length² · d for the scores and their product with the values; backward
    twice the former and 2.5 times the latter, since it makes the scores again.
    """
    d = case.d_model
    products = 2 * case.tokens * (4 * d * d + 2 * d * case.dim_feedforward)
    scores = 4 * d * sum(length**2 for length in case.lengths)
    return {
        "forward": Cost(case.layers * (products + scores)),
        "backward": Cost(case.layers * (2 * products + 2.5 * scores)),
    }


def inputs(case: Case) -> dict[str, tuple[int, ...]]:
    return {"src": (case.batch, case.sequence, case.d_model)}


def providers(build_layer) -> tuple[Provider, ...]:
    """The peers of a module that is made of layers of one class."""
    stock, hand_written, ours = (
        Provider(name, functools.partial(build_layer, layer_class))
        for name, layer_class in (
            ("stock", nn.TransformerEncoderLayer),
            ("hand-written", HandWrittenLayer),
            ("fastattn", FusedEncoderLayer),
        )
    )
    levels = (
        Provider(
            f"fastattn {save}",
            functools.partial(build_level, build_layer, save),
            why_not=why_not_level,
            quick=False,
        )
        for save in ("lean", "recompute")
    )
    return (*with_compiled(stock), hand_written, *with_compiled(ours), *levels)


def build_level(
    build_layer: Callable[[type[nn.TransformerEncoderLayer], Case], nn.Module],
    save: str,
    case: Case,
) -> nn.Module:
    """Ours, keeping less for backward."""
    module = build_layer(FusedEncoderLayer, case)
    for layer in module.modules():
        if isinstance(layer, FusedEncoderLayer):
            layer.save = save
    return module


def why_not_level(case: Case, device: str) -> str | None:
    return "levels of what is kept are compared on GPUs only" if device == "cpu" else None


OP = Op(
    name="encoder_layer",
    cases={
        "cpu": (
            Case(16, 128, 128, 4, quick=True),
            Case(8, 128, 384, 12, quick=True),
            Case(8, 128, 768, 12, quick=True),
            Case(8, 128, 384, 12, padding=0.5),
            Case(8, 128, 384, 12, activation="gelu"),
        ),
        "cuda": (
            Case(32, 512, 768, 12, "bf16", quick=True),  # BERT-base
            Case(16, 512, 1024, 16, "bf16"),  # BERT-large
            Case(8, 1024, 2048, 16, "bf16"),
            Case(4, 1024, 4096, 32, "bf16"),
            Case(128, 128, 768, 12, "bf16"),
            Case(4, 4096, 768, 12, "bf16"),
            Case(32, 512, 768, 12, "bf16", padding=0.25),
            Case(32, 512, 768, 12, "bf16", padding=0.5, quick=True),
            Case(32, 512, 768, 12, "autocast"),
            Case(16, 512, 1024, 16, "autocast"),
            Case(8, 128, 768, 12, "bf16", quick=True),  # small: where launches count
            Case(1, 128, 768, 12, "bf16"),
        ),
    },
    providers=providers(build),
    inputs=inputs,
    cost=cost,
    masks=masks,
    trains=True,
)
