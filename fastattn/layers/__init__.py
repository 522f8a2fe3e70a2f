"""Modules: the fused encoder layer and layer norm, and what they ask of a layer's parts."""

from fastattn.layers.encoder_layer import FusedEncoderLayer as FusedEncoderLayer
