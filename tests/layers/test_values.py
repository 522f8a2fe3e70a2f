"""Values, gradients and dtypes are those of torch's encoder layer."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import FusedEncoderLayer
from tests.layers.pairs import (
    BOTH,
    HEADS,
    HIDDEN,
    ORDERS,
    WIDTH,
    assert_as_exact,
    assert_equal_runs,
    given,
    gradients,
    pair,
    tokens,
)
from tests.reference import ReplayEncoderLayer


class Doubled:
    """A callable that is neither a function nor hashable."""

    __hash__ = None

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x.sigmoid()


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "F.silu": F.silu,
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "GELU": nn.GELU(),
    "tanh GELU": nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "Identity": nn.Identity(),
    "PReLU": nn.PReLU(dtype=torch.float64),
    "torch.tanh": torch.tanh,
    "lambda": lambda x: x * x,
    "partial": functools.partial(F.leaky_relu, negative_slope=0.3),
    "unhashable": Doubled(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_any_activation(activation):
    stock, fused = pair(activation=activation)
    src = tokens(2, 5)
    assert_equal_runs(gradients(fused, src), gradients(stock, src))
    src.requires_grad_()
    torch.testing.assert_close(fused.eval()(src), stock(src), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fused(src), stock(src), rtol=1e-10, atol=1e-10)


@BOTH
@ORDERS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 63), (5,), (0, 4), (4, 0), (0,)], ids=str)
def test_values_and_gradients(norm_first, batch_first, bias, shape):
    stock, fused = pair(
        norm_first=norm_first, batch_first=batch_first, bias=bias, activation="gelu"
    )
    src = tokens(*shape)
    expected = gradients(stock, src)
    assert expected["output"].shape == src.shape
    assert_equal_runs(gradients(fused, src), expected)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            torch.testing.assert_close(
                fused.eval()(src), expected["output"], rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize(
    ("width", "heads", "length"), [(8, 1, 9), (40, 5, 16), (96, 1, 33), (160, 2, 3), (6, 6, 4)]
)
def test_head_dims_and_odd_head_counts(width, heads, length):
    stock, fused = pair(width=width, heads=heads)
    src = tokens(2, length, width=width)
    assert_equal_runs(gradients(fused, src), gradients(stock, src))


def test_strided_input():
    stock, fused = pair()
    wide = tokens(7, 3, width=2 * WIDTH)
    for src in (wide.transpose(0, 1)[..., ::2], wide[1:6, :, 3 : 3 + WIDTH], wide[:1, :, :WIDTH]):
        assert_equal_runs(gradients(fused, src), gradients(stock, src))
    expanded = tokens(1, 4).expand(3, 4, WIDTH)
    torch.testing.assert_close(fused(expanded), stock(expanded))


def test_meta_and_fake_tensors():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.1, device="meta")
    src = torch.empty(5, 2, WIDTH, device="meta", requires_grad=True)
    out = layer(src)
    assert out.device.type == "meta" and out.shape == src.shape
    out.sum().backward()
    assert src.grad.shape == src.shape
    with torch._subclasses.FakeTensorMode():
        fake = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.1)
        assert fake(torch.empty(5, 2, WIDTH)).shape == (5, 2, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BOTH
@pytest.mark.parametrize("length", [16, 192], ids=["short", "length % 128 == 64"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_errors_against_float64_are_torchs_own(dtype, norm_first, length, dropout):
    """Output within twice, gradients within three times the stock layer's error in its dtype.

    With dropout on, stock has the contract's decisions.
    """
    options = {"norm_first": norm_first, "activation": "gelu", "dropout": dropout}
    if dropout:
        options["stock"] = ReplayEncoderLayer
    exact, _ = pair(**options)
    src = tokens(2, length)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[0, length // 2 :] = True
    stock, fused = pair(dtype=dtype, **options)
    for layer in (stock, fused):
        layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(stock.state_dict())  # the rounded weights
    stock.forced_seed = exact.forced_seed = 11
    src = src.to(dtype)
    expected = gradients(exact, src.double(), None, padding)
    theirs = gradients(stock, src, None, padding)
    ours = gradients(fused, src, None, padding, seed=given(11))
    assert all(x.dtype == dtype for x in ours.values())
    assert_as_exact(ours, theirs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("activation", ["gelu", torch.tanh], ids=["fused", "module"])
@BOTH
def test_autocast_gives_torchs_dtypes(dtype, dropout, activation, norm_first):
    """fp32 stays fp32 and bf16 stays bf16; parameters get fp32 gradients."""
    stock, fused = pair(
        dtype=torch.float32, dropout=dropout, activation=activation, norm_first=norm_first
    )
    src = tokens(2, 6, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = fused(src, None, mask), stock(src, None, mask)
        with torch.no_grad():
            assert fused.eval()(src, None, mask).dtype == expected.dtype
    assert out.dtype == expected.dtype == dtype
    out.backward(torch.ones_like(out))
    assert src.grad.dtype == dtype and src.grad.isfinite().all()
    for parameter in fused.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("save", ["default", "lean", "recompute"])
def test_autocast_is_as_exact_as_torchs(norm_first, save):
    exact, _ = pair(norm_first=norm_first, activation="gelu")
    stock, fused = pair(norm_first=norm_first, activation="gelu", dtype=torch.float32)
    for layer in (stock, fused):
        layer.load_state_dict(exact.state_dict())
    fused.save = save
    src = tokens(4, 16)
    expected = gradients(exact, src)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (gradients(layer, src.float()) for layer in (stock, fused))
    assert_as_exact(ours, theirs, expected)


def test_a_wrong_input_dtype_raises_as_in_torch():
    stock, fused = pair(dtype=torch.float32)
    for layer in (stock, fused):
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(tokens(2, 5, dtype=torch.float64))
