"""The tiles of the attention kernels: by architecture, element size, head dimension and mask.

Each entry is the one of several that needs the fewest instructions a score and spills no register,
counted in machine code: `make kernel-report` has the usual masks; under others a dozen may be
spilled. In fp32 beyond 128 features every tile spills. None has been timed yet. Nothing is tried
out at run time: two runs on one machine take the same tiles.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
from torch.torch_version import TorchVersion

from fastattn.kernels.device import capability

SHORT = 64  # queries of a short forward pass: half a tile of the usual one

#: Whether what an asynchronous copy wrote is fenced before wgmma or tcgen05.mma reads it. They read
#: shared memory through the async proxy, cp.async writes it through the generic one, and the memory
#: model of PTX orders the two by fence.proxy.async alone. Triton emits it from 3.7.1 on (triton
#: #9610 and #10537, for pytorch #181248).
COPIES_ARE_FENCED = TorchVersion(triton.__version__) >= (3, 7, 1)


class Config(NamedTuple):
    """The tile of one program."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """Tiles for calls without a mask of pairs (causal or attn_mask), and with one.

    A head dimension that is padded in registers counts as such a mask.
    """

    plain: Config
    pairs: Config | None = None  # None: the same


class WholePass(NamedTuple):
    """Tiles of the backward pass in one kernel, up to a length; None: in two."""

    length: int
    plain: Config | None
    pairs: Config | None


class Call(Protocol):
    """What of a call its tiles depend on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    has_pair_mask: bool  # causal or attn_mask


def choose(kernel: str, call: Call) -> Config:
    """The tile of ``kernel`` for a call."""
    entry = _entry(call)
    if kernel == "forward" and call.seqlen_q <= SHORT and "short forward" in entry:
        kernel = "short forward"
    plain, pairs = entry[kernel]
    config = pairs if _is_crowded(call) and pairs is not None else plain
    if not COPIES_ARE_FENCED and capability(call.device)[0] in (9, 10):
        return config._replace(num_stages=1)  # no copies: threads write what they have loaded
    return config


def choose_whole_pass(call: Call) -> Config | None:
    """The tile of a backward pass in one kernel, None where it does not fit into registers."""
    longest = max(call.seqlen_q, call.seqlen_k)
    for length, plain, pairs in _entry(call).get("whole pass", ()):
        if longest <= length:
            return pairs if _is_crowded(call) else plain
    return None


def _is_crowded(call: Call) -> bool:
    """Whether masks of pairs, or of columns past the head dimension, take up registers."""
    return call.has_pair_mask or call.head_dim != triton.next_power_of_2(call.head_dim)


def _entry(call: Call) -> dict:
    bits = 32 if call.dtype == torch.float32 else 16
    by_head_dim = CONFIGS[_family(call.device)][bits]
    return next(entry for limit, entry in by_head_dim.items() if call.head_dim <= limit)


def _family(device: torch.device) -> int:
    """The architecture whose table fits: 90 and 100 have tensor-core instructions of their own."""
    major = capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


#: By architecture, bits of an element, largest head dimension and kernel.
CONFIGS: dict[int, dict[int, dict[int, dict]]] = {
    80: {
        16: {
            64: {
                "forward": Choice(Config(128, 64, 8, 2)),
                "query gradient": Choice(Config(128, 32, 8, 2)),
                "key gradient": Choice(Config(32, 128, 8, 2), Config(16, 128, 8, 2)),
                "mask gradient": Choice(Config(128, 32, 8, 2)),
                "short forward": Choice(Config(64, 64, 4, 2)),
                "whole pass": (
                    WholePass(64, Config(32, 64, 4, 1), Config(32, 64, 4, 1)),
                    WholePass(128, Config(32, 128, 8, 1), Config(32, 128, 8, 1)),
                ),
            },
            128: {
                "forward": Choice(Config(128, 32, 8, 2)),
                "query gradient": Choice(Config(64, 32, 4, 2), Config(128, 32, 8, 2)),
                "key gradient": Choice(Config(16, 128, 8, 1)),
                "mask gradient": Choice(Config(64, 16, 4, 1)),
                "short forward": Choice(Config(64, 32, 4, 2)),
            },
            256: {
                "forward": Choice(Config(64, 32, 8, 1)),
                "query gradient": Choice(Config(64, 16, 8, 1)),
                "key gradient": Choice(Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
                "mask gradient": Choice(Config(16, 32, 4, 1)),
            },
        },
        32: {
            64: {
                "forward": Choice(Config(32, 32, 4, 1)),
                "query gradient": Choice(Config(16, 32, 4, 1)),
                "key gradient": Choice(Config(32, 16, 4, 1)),
                "mask gradient": Choice(Config(16, 32, 4, 1)),
            },
            128: {
                "forward": Choice(Config(16, 32, 4, 1)),
                "query gradient": Choice(Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
            256: {
                "forward": Choice(Config(16, 16, 4, 1)),
                "query gradient": Choice(Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
        },
    },
    90: {
        16: {
            64: {
                "forward": Choice(Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
                "query gradient": Choice(Config(128, 64, 8, 2)),
                "key gradient": Choice(Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
                "mask gradient": Choice(Config(128, 64, 8, 2)),
                "short forward": Choice(Config(64, 64, 4, 2)),
                "whole pass": (
                    WholePass(64, Config(32, 64, 4, 1), Config(32, 64, 4, 1)),
                    WholePass(128, Config(32, 128, 8, 1), Config(32, 128, 8, 1)),
                    WholePass(256, Config(16, 256, 8, 1), None),
                ),
            },
            128: {
                "forward": Choice(Config(128, 64, 8, 2)),
                "query gradient": Choice(Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
                "key gradient": Choice(Config(32, 128, 8, 2), Config(16, 128, 8, 2)),
                "mask gradient": Choice(Config(64, 64, 8, 1)),
                "short forward": Choice(Config(64, 32, 4, 2)),
                "whole pass": (WholePass(128, Config(16, 128, 8, 1), Config(16, 128, 8, 1)),),
            },
            256: {
                "forward": Choice(Config(128, 32, 8, 2)),
                "query gradient": Choice(Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
                "key gradient": Choice(Config(32, 32, 8, 1)),
                "mask gradient": Choice(Config(64, 32, 8, 1)),
            },
        },
        32: {
            64: {
                "forward": Choice(Config(128, 32, 8, 2)),
                "query gradient": Choice(Config(64, 32, 4, 1), Config(16, 32, 4, 1)),
                "key gradient": Choice(Config(16, 64, 4, 1), Config(32, 16, 4, 1)),
                "mask gradient": Choice(Config(16, 32, 4, 1)),
            },
            128: {
                "forward": Choice(Config(16, 32, 4, 1)),
                "query gradient": Choice(Config(16, 32, 4, 1), Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
            256: {
                "forward": Choice(Config(16, 16, 4, 1)),
                "query gradient": Choice(Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
        },
    },
    100: {
        16: {
            64: {
                "forward": Choice(Config(128, 64, 8, 2), Config(128, 64, 8, 1)),
                "query gradient": Choice(Config(128, 64, 8, 1)),
                "key gradient": Choice(Config(32, 128, 8, 2)),
                "mask gradient": Choice(Config(64, 64, 4, 2)),
                "short forward": Choice(Config(64, 32, 4, 2), Config(64, 32, 4, 1)),
                "whole pass": (
                    WholePass(64, Config(16, 64, 4, 1), Config(32, 64, 4, 1)),
                    WholePass(128, Config(32, 128, 8, 1), Config(32, 128, 8, 1)),
                    WholePass(256, Config(16, 256, 8, 1), None),
                ),
            },
            128: {
                "forward": Choice(Config(128, 32, 8, 2)),
                "query gradient": Choice(Config(128, 32, 8, 2), Config(64, 32, 4, 1)),
                "key gradient": Choice(Config(32, 128, 8, 2)),
                "mask gradient": Choice(Config(64, 64, 8, 1)),
                "short forward": Choice(Config(64, 32, 4, 2), Config(64, 16, 4, 2)),
                "whole pass": (WholePass(128, Config(32, 128, 8, 1), Config(32, 128, 8, 1)),),
            },
            256: {
                "forward": Choice(Config(64, 32, 8, 1)),
                "query gradient": Choice(Config(64, 32, 8, 1), Config(64, 16, 8, 1)),
                "key gradient": Choice(Config(32, 64, 8, 1), Config(16, 64, 8, 1)),
                "mask gradient": Choice(Config(64, 16, 8, 1)),
            },
        },
        32: {
            64: {
                "forward": Choice(Config(32, 32, 4, 1)),
                "query gradient": Choice(Config(16, 32, 4, 1)),
                "key gradient": Choice(Config(16, 64, 8, 1), Config(32, 16, 4, 1)),
                "mask gradient": Choice(Config(16, 32, 4, 1), Config(64, 32, 8, 1)),
            },
            128: {
                "forward": Choice(Config(16, 32, 4, 1)),
                "query gradient": Choice(Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
            256: {
                "forward": Choice(Config(16, 16, 4, 1)),
                "query gradient": Choice(Config(16, 16, 4, 1)),
                "key gradient": Choice(Config(16, 16, 8, 1)),
                "mask gradient": Choice(Config(16, 16, 4, 1)),
            },
        },
    },
}
