"""The ops of the suite, one small file each; a new file needs its line here and nothing else."""

from __future__ import annotations

from ..cases import Op
from . import (
    attention,
    bias_activation_dropout,
    dropout_add_layer_norm,
    encoder_layer,
    encoder_stack,
    feed_forward,
    layer_norm,
)

OPS: dict[str, Op] = {
    module.OP.name: module.OP
    for module in (
        encoder_layer,
        encoder_stack,
        attention,
        feed_forward,
        bias_activation_dropout,
        layer_norm,
        dropout_add_layer_norm,
    )
}
