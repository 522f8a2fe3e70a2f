"""Oracles, independent of the library: the ops in float64 and the dropout contract in NumPy.

Everything is written element by element from ``docs/dropout.md`` and the papers' formulas, with no
thought for speed. ``ReplayEncoderLayer`` is torch's own encoder layer with its dropout replaced by
the contract's decisions.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORD = np.uint64(0xFFFFFFFF)


def philox4x32_7(key: int, counter: list[np.ndarray]) -> list[np.ndarray]:
    """Four 32-bit words (in uint64) of every counter."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(7):
        product0 = c0 * np.uint64(0xD2511F53)
        product2 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product2 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product2 & WORD,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _keep(seed: int, counter: list[np.ndarray], lane: np.ndarray, p: float) -> Tensor:
    counter = np.broadcast_arrays(*counter, lane)
    words = np.stack(philox4x32_7(seed, list(counter[:4])))
    lane = counter[4].astype(np.int64)
    word = np.take_along_axis(words, (lane // 2)[None], axis=0)[0]
    value = (word >> (np.uint64(16) * (lane % 2).astype(np.uint64))) & np.uint64(0x3FFF)
    return torch.from_numpy(value >= round(p * 16384))


def attention_keep(
    seed: int, site: int, p: float, shape: tuple[int, ...], head_offset: int = 0
) -> Tensor:
    """(B, H, Sq, Sk) bool: the kept attention probabilities."""
    b, h, m, n = np.ogrid[tuple(slice(size) for size in shape)]
    counter = [
        m // 16 * 8 + m % 8,
        n // 16 * 4 + n % 8 // 2,
        b,
        site * 65536 + h + head_offset,
    ]
    return _keep(seed, counter, 4 * (m // 8 % 2) + 2 * (n // 8 % 2) + n % 2, p)


def activation_keep(
    seed: int, site: int, p: float, position: Tensor, sequence: Tensor, columns: Tensor
) -> Tensor:
    """(rows, columns) bool from each row's position and sequence and each column's number."""
    t, b, n = position.numpy()[:, None], sequence.numpy()[:, None], columns.numpy()[None]
    counter = [t, n // 64 * 8 + n % 8, b, np.full_like(b, site * 65536)]
    return _keep(seed, counter, n % 64 // 8, p)


def residual_keep(
    seed: int, site: int, p: float, position: Tensor, sequence: Tensor, columns: Tensor
) -> Tensor:
    """(rows, columns) bool, as :func:`activation_keep`."""
    t, b, n = position.numpy()[:, None], sequence.numpy()[:, None], columns.numpy()[None]
    counter = [t, n // 8, b, np.full_like(b, site * 65536)]
    return _keep(seed, counter, n % 8, p)


def coordinates(shape: tuple[int, ...], batch_first: bool = True) -> tuple[Tensor, Tensor]:
    """(position, sequence) of every row of a token tensor (B, S) or (S, B), or (S,)."""
    if len(shape) == 1:
        return torch.arange(shape[0]), torch.zeros(shape[0], dtype=torch.int64)
    outer, inner = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    return (inner, outer) if batch_first else (outer, inner)


def factor(keep: Tensor, p: float) -> Tensor:
    """float64 multiplier: 1 / (realised keep probability) where kept."""
    kept = 16384 - round(p * 16384)
    return keep.double() * (16384 / kept if kept else 0.0)


# ------------------------------------------------------------------------------------- the ops


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """(B, S, H, D) attention in float64, differentiable; rows without a key give zeros."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if key_padding_mask is not None:
        scores = scores + additive(key_padding_mask)[:, None, None, :]
    if attn_mask is not None:
        scores = scores + additive(attn_mask)
    if is_causal:
        later = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None]
        scores = scores + additive(later)
    alive = (scores > float("-inf")).any(-1, keepdim=True)
    probabilities = torch.softmax(torch.where(alive, scores, 0.0), -1) * alive
    if multiplier is not None:
        probabilities = probabilities * multiplier
    return torch.einsum("bhmn,bhnd->bmhd", probabilities, v)


def additive(mask: Tensor) -> Tensor:
    """A mask as float64 to add: -inf where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))
    return mask.double()


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    multiplier: Tensor | None = None,
) -> Tensor:
    """act(x W1^T + b1), times ``multiplier``, W2^T + b2, in float64."""
    hidden = input.double() @ weight1.double().T
    hidden = ACTIVATIONS[activation](hidden if bias1 is None else hidden + bias1.double())
    hidden = hidden if multiplier is None else hidden * multiplier.view(hidden.shape)
    out = hidden @ weight2.double().T
    return out if bias2 is None else out + bias2.double()


def layer_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    x = input.double()
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight.double()
    return out if bias is None else out + bias.double()


def dropout_add(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    branch = input.double() if input_bias is None else input.double() + input_bias.double()
    branch = branch if multiplier is None else branch * multiplier.view(branch.shape)
    return branch if residual is None else residual.double() + branch


# ------------------------------------------------------------------------------------ the layer


class ReplayEncoderLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer with dropout by the contract, in plain differentiable PyTorch.

    It draws its seed from torch's generator exactly as ``FusedEncoderLayer`` does (one
    ``torch.randint`` per training call with dropout on), or takes it from ``forced_seed``.
    """

    layer_index = 0
    forced_seed: int | None = None

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self._seed = self.forced_seed
        if self._seed is None and self.training and self.dropout.p > 0:
            self._seed = int(torch.randint(2**63 - 1, (1,)))
        x = src
        if self.norm_first:
            x = x + self._attend(self.norm1(x), src_mask, src_key_padding_mask)
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x, src_mask, src_key_padding_mask))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        attn = self.self_attn
        batched = x if attn.batch_first else x.transpose(0, 1)
        batch, length, width = batched.shape
        qkv = F.linear(batched, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // attn.num_heads) ** 0.5
        if mask is not None:
            mask = additive(mask).to(x.dtype)  # (L, L) or (N * heads, L, L)
            scores = scores + (mask if mask.dim() == 2 else mask.view(scores.shape))
        if padding is not None:
            scores = scores + additive(padding).to(x.dtype)[:, None, None, :]
        probabilities = torch.softmax(scores, -1)
        if self._seed is not None:
            keep = attention_keep(self._seed, self._site(0), attn.dropout, probabilities.shape)
            probabilities = probabilities * factor(keep, attn.dropout).to(x.dtype)
        out = (probabilities @ v).transpose(1, 2).reshape(batch, length, width)
        out = attn.out_proj(out if attn.batch_first else out.transpose(0, 1))
        return self._drop(out, 2, self.dropout1.p)

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.linear1(x))
        return self._drop(self.linear2(self._drop(hidden, 1, self.dropout.p)), 3, self.dropout2.p)

    def _drop(self, x: Tensor, kind: int, p: float) -> Tensor:
        if self._seed is None:
            return x
        decide = activation_keep if kind == 1 else residual_keep
        where = coordinates(x.shape[:-1], self.self_attn.batch_first)
        keep = decide(self._seed, self._site(kind), p, *where, torch.arange(x.shape[-1]))
        return x * factor(keep, p).to(x.dtype).view(x.shape)

    def _site(self, kind: int) -> int:
        return 4 * self.layer_index + kind
