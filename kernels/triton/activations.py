"""Device functions: the activations of the feed-forward block and their derivatives.

They take fp32 or fp64 tiles. NaN and infinity give what they give in PyTorch. Constants stand to
the right of tiles: Triton's interpreter takes a product with a constant on its left for a constant.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastattn.kernels.dropout import INTERPRETED

LOG2E = tl.constexpr(1 / math.log(2))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
NORMAL_PEAK = tl.constexpr(1 / math.sqrt(2 * math.pi))  # density of the standard normal at 0
TANH_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBE = tl.constexpr(0.044715)

# For z >= 0, erfc(z) = (A1 t + A2 t^2 + ... + A5 t^5) exp(-z^2) to 1.5e-7, t = 1 / (1 + ERF_P z):
# Abramowitz and Stegun, Handbook of Mathematical Functions, formula 7.1.26.
ERF_P = tl.constexpr(0.3275911)
A1 = tl.constexpr(0.254829592)
A2 = tl.constexpr(-0.284496736)
A3 = tl.constexpr(1.421413741)
A4 = tl.constexpr(-1.453152027)
A5 = tl.constexpr(1.061405429)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x)"""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        cdf, _ = standard_normal(x)
        return x * cdf
    elif ACTIVATION == "gelu_tanh":
        gate, _ = sigmoid(tanh_argument(x))
        return x * gate
    elif ACTIVATION == "silu":
        gate, _ = sigmoid(x)
        return x * gate
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def activation_backward(grad, x, ACTIVATION: tl.constexpr):
    """grad * act'(x)"""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, grad)
    elif ACTIVATION == "gelu":
        cdf, density = standard_normal(x)
        return grad * (cdf + x * density)
    elif ACTIVATION == "gelu_tanh":
        gate, slope = sigmoid(tanh_argument(x))
        return grad * (gate + x * slope * (x * x * (3 * TANH_CUBE) + 1.0) * TANH_SCALE)
    elif ACTIVATION == "silu":
        gate, slope = sigmoid(x)
        return grad * (gate + x * slope)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return grad


@triton.jit
def sigmoid(x):
    """s = 1 / (1 + exp(-x)) and its derivative s (1 - s), without cancellation or overflow."""
    e = exp2(tl.abs(x) * -LOG2E)
    r = reciprocal(e + 1.0)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def tanh_argument(x):
    """2 u of tanh gelu, x (1 + tanh(u)) / 2 = x sigmoid(2 u)."""
    return (x * x * TANH_CUBE + 1.0) * x * TANH_SCALE


@triton.jit
def standard_normal(x):
    """Distribution function and density of the standard normal distribution.

    In fp32 the smaller tail comes first, so that a negative x loses nothing to cancellation.
    """
    gaussian = exp2(x * x * (-0.5 * LOG2E))
    if x.dtype == tl.float64:
        cdf = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        t = reciprocal(tl.abs(x) * (ERF_P * SQRT_HALF) + 1.0)
        half_erfc = ((((t * (A5 / 2) + A4 / 2) * t + A3 / 2) * t + A2 / 2) * t + A1 / 2) * t
        tail = half_erfc * gaussian
        cdf = tl.where(x < 0.0, tail, 1.0 - tail)
    return cdf, gaussian * NORMAL_PEAK


@triton.jit
def exp2(x):
    """2**x; in fp32 one instruction, with subnormal results as zero."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1; in fp32 one instruction, with subnormal results as zero."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )
