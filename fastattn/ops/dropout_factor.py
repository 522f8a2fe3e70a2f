"""The multiplier that dropout applies: 1 / keep where the contract keeps an element, else 0.

Plain PyTorch paths multiply by it; fused kernels compute the same decisions in registers instead.
Backends: ``cpu`` (the C++ extension) and ``pytorch``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, dropout
from fastattn.arguments import TOKEN_DROPOUT, AttentionDropout, TokenDropout
from fastattn.extension import dropout_factor as in_extension
from fastattn.extension import loading
from fastattn.ops._register import define
from fastattn.pytorch import dropout_factor as in_pytorch

# --------------------------------------------------------------------- why not, per backend


def why_not_cpu(device: torch.device) -> str | None:
    return loading.why_not()


dispatch.register("dropout_factor", "cpu", in_extension, why_not_cpu)
dispatch.register("dropout_factor", "pytorch", in_pytorch)


# ------------------------------------------------------------- schema, fake, implementation


def _functions(seed: Tensor) -> Any:
    replays = dropout.replays_twister(seed)  # as only the pytorch backend can
    backend = "pytorch" if replays else dispatch.choose("dropout_factor", seed)
    return dispatch.functions("dropout_factor", backend)


def _attention_factor(*options):
    *fields, shape, dtype = options
    dropped = AttentionDropout(*fields)
    return _functions(dropped.seed).attention_factor(dropped, shape, dtype)


def _token_factor(*options):
    *fields, grouping, rows, columns, dtype = options
    dropped = TokenDropout(*fields)
    return _functions(dropped.seed).token_factor(dropped, grouping, rows, columns, dtype)


def _attention_fake(dropout_p, seed, site, head_offset, shape, dtype):
    return seed.new_empty(shape, dtype=dtype)


def _token_fake(*options):
    *fields, _, rows, columns, dtype = options
    return TokenDropout(*fields).seed.new_empty((rows, columns), dtype=dtype)


define(
    "attention_dropout_factor(float dropout_p, Tensor seed, int site, SymInt head_offset, "
    "SymInt[] shape, ScalarType dtype) -> Tensor",
    _attention_factor,
    _attention_fake,
)
define(
    f"token_dropout_factor({TOKEN_DROPOUT.replace('Tensor? seed', 'Tensor seed')}, "
    "int grouping, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    _token_factor,
    _token_fake,
)
