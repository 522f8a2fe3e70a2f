"""Fused kernels for training transformer encoders in PyTorch.

``from fastattn import FusedEncoderLayer`` replaces ``torch.nn.TransformerEncoderLayer``.
"""

from fastattn.dispatch import available_backends, explain, use_backend
from fastattn.dropout import draw_seed
from fastattn.layers.encoder_layer import FusedEncoderLayer
from fastattn.layers.layer_norm import FusedLayerNorm
from fastattn.ops.attention import attention, attention_packed
from fastattn.ops.bias_activation_dropout import bias_activation_dropout
from fastattn.ops.dropout_add import dropout_add
from fastattn.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.layer_norm import layer_norm
from fastattn.tuning import tune
from fastattn.version import __version__ as __version__

__all__ = [
    "FusedEncoderLayer",
    "FusedLayerNorm",
    "attention",
    "attention_packed",
    "available_backends",
    "bias_activation_dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "draw_seed",
    "explain",
    "feed_forward",
    "layer_norm",
    "tune",
    "use_backend",
]

# What pickles name, so that they survive moves of the code.
FusedEncoderLayer.__module__ = FusedLayerNorm.__module__ = __name__
