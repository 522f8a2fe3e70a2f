"""FusedEncoderLayer against torch's: construction, state, values, gradients, dropout, dtypes."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import FusedEncoderLayer, FusedLayerNorm, dropout_add_layer_norm
from fastattn.layers import encoder_layer
from fastattn.pytorch import feed_forward as in_pytorch
from tests import helpers
from tests.layers.pairs import (
    HEADS,
    HIDDEN,
    WIDTH,
    assert_equal_runs,
    gradients,
    name_of,
    pair,
    tokens,
)
from tests.reference import ReplayEncoderLayer

BOTH = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
ORDERS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "sequence"])

# ------------------------------------------------------------------------- construction and state


@pytest.mark.parametrize(
    ("method", "added"), [("__init__", ["save", "chunk_tokens"]), ("forward", ["seed"])]
)
def test_signatures_extend_torchs(method, added):
    theirs = inspect.signature(getattr(nn.TransformerEncoderLayer, method)).parameters
    ours = list(inspect.signature(getattr(FusedEncoderLayer, method)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: -len(added)]] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert [p.name for p in ours[-len(added) :]] == added
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[-len(added) :])


def test_every_constructor_argument_by_position_and_by_keyword():
    values = (16, 2, 24, 0.3, "gelu", 1e-4, True, True, False, "cpu", torch.float64)
    names = list(inspect.signature(nn.TransformerEncoderLayer).parameters)
    assert len(names) == len(values)
    positional = FusedEncoderLayer(*values)
    keyword = FusedEncoderLayer(**dict(zip(names, values, strict=True)))
    assert repr(positional) == repr(keyword)
    for layer in (positional, keyword):
        assert layer.linear1.weight.shape == (24, 16)
        assert layer.linear1.weight.dtype == torch.float64
        assert layer.self_attn.num_heads == 2 and layer.self_attn.batch_first
        assert layer.activation is F.gelu and layer.norm_first
        assert layer.norm1.eps == layer.norm2.eps == 1e-4
        assert layer.self_attn.dropout == layer.dropout.p == layer.dropout1.p == 0.3
        assert layer.linear1.bias is None and layer.norm1.bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", nn.PReLU(3)], ids=["function", "parameters"])
def test_state_dict_keys_their_order_and_equal_initial_weights(bias, activation):
    states = []
    for kind in (nn.TransformerEncoderLayer, FusedEncoderLayer):
        torch.manual_seed(3)
        states.append(kind(16, 2, 24, activation=activation, bias=bias).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert ("activation.weight" in states[1]) == isinstance(activation, nn.Module)
    assert ("norm1.bias" in states[1]) == bias


def test_state_dict_loads_both_ways():
    stock, fused = nn.TransformerEncoderLayer(16, 2, 24), FusedEncoderLayer(16, 2, 24)
    src = torch.randn(5, 2, 16)
    fused.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(fused.eval()(src), stock.eval()(src))
    fresh = nn.TransformerEncoderLayer(16, 2, 24).eval()
    fresh.load_state_dict(FusedEncoderLayer(16, 2, 24).state_dict(), strict=True)
    fresh.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(fresh(src), stock(src))


def test_torch_saves_and_loads_the_state(tmp_path):
    layer = FusedEncoderLayer(16, 2, 24)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = FusedEncoderLayer(16, 2, 24)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    src = torch.randn(5, 2, 16)
    assert torch.equal(other.eval()(src), layer.eval()(src))


def test_repr_is_torchs_but_for_the_name():
    options = {"activation": nn.GELU(), "bias": False, "norm_first": True}
    ours = repr(FusedEncoderLayer(16, 2, 24, 0.2, **options))
    theirs = repr(nn.TransformerEncoderLayer(16, 2, 24, 0.2, **options))
    assert ours == theirs.replace("TransformerEncoderLayer", "FusedEncoderLayer")


def test_attributes_that_other_code_reads():
    stock, fused = pair(activation="gelu", layer_norm_eps=1e-6)
    for name in ("batch_first", "num_heads", "embed_dim", "head_dim", "_qkv_same_embed_dim"):
        assert getattr(fused.self_attn, name) == getattr(stock.self_attn, name), name
    assert torch.equal(fused.self_attn.in_proj_weight, stock.self_attn.in_proj_weight)
    assert fused.activation is stock.activation
    assert fused.activation_relu_or_gelu == stock.activation_relu_or_gelu == 2
    assert fused.norm1.eps == fused.norm2.eps == 1e-6
    assert fused.norm_first is False
    children = [(name, type(child)) for name, child in stock.named_modules() if name]
    assert [(name, type(child)) for name, child in fused.named_modules() if name] == children
    assert isinstance(fused, nn.TransformerEncoderLayer)


def test_deepcopy_is_independent():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()
    src = torch.randn(2, 5, WIDTH)
    before = layer(src)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(src), before)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    clone.train()
    assert torch.equal(layer(src), before)
    assert not layer.training and not layer.dropout1.training


def test_pickle_keeps_the_layer():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, activation=nn.SiLU(), batch_first=True).eval()
    layer.layer_index = 3
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    src = torch.randn(2, 5, WIDTH)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(src), layer(src))
        assert other.layer_index == 3


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation": "swish"},
        {"nhead": 5},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"d_model": 0},
        {"nhead": 0},
        {"nosuch": 1},
    ],
    ids=str,
)
def test_constructor_errors_are_torchs(arguments):
    arguments = {"d_model": 16, "nhead": 2, "dim_feedforward": 8, **arguments}
    with pytest.raises(Exception) as theirs:
        nn.TransformerEncoderLayer(**arguments)
    with pytest.raises(theirs.type) as ours:
        FusedEncoderLayer(**arguments)
    expected = str(theirs.value).replace("TransformerEncoderLayer", "FusedEncoderLayer")
    assert str(ours.value).replace("TransformerEncoderLayer", "FusedEncoderLayer") == expected


def test_unknown_activation_is_named():
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        FusedEncoderLayer(16, 2, activation="swish")


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (5, TypeError),
        (torch.tensor([1.0]), ValueError),
        (torch.tensor([1, 2]), ValueError),
        (torch.tensor([1], dtype=torch.int32), ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_a_bad_seed_is_named(seed, error, training):
    layer = FusedEncoderLayer(16, 2, 24).train(training)
    with pytest.raises(error, match="seed"):
        layer(torch.randn(5, 2, 16), seed=seed)


def test_a_bad_dropout_probability_set_later_raises():
    layer = FusedEncoderLayer(16, 2, 24)
    layer.dropout2.p = 1.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer(torch.randn(5, 2, 16))


# ------------------------------------------------------------------------------ values, gradients


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
    for name, value in expected.items():
        assert ours[name].dtype == dtype
        assert ours[name].isfinite().all()
        error, stock_error = ((x[name].double() - value).norm() for x in (ours, theirs))
        assert error <= (2 if name == "output" else 3) * stock_error, name


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
    for name, value in expected.items():
        error, stock_error = ((x[name].double() - value).norm() for x in (ours, theirs))
        assert error <= (2 if name == "output" else 3) * stock_error, name


def test_a_wrong_input_dtype_raises_as_in_torch():
    stock, fused = pair(dtype=torch.float32)
    for layer in (stock, fused):
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(tokens(2, 5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------- dropout


def given(seed: int) -> Tensor:
    return torch.tensor([seed])


@BOTH
@ORDERS
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.Identity(), torch.tanh], ids=name_of)
def test_dropout_is_the_contracts(norm_first, batch_first, activation, contract_seeds):
    replay, fused = pair(
        dropout=0.3,
        norm_first=norm_first,
        batch_first=batch_first,
        activation=activation,
        stock=ReplayEncoderLayer,
    )
    replay.layer_index = fused.layer_index = 2
    src = tokens(3, 17)
    torch.manual_seed(9)
    expected = gradients(replay, src)
    torch.manual_seed(9)
    assert_equal_runs(gradients(fused, src), expected)
    replay.forced_seed = 11
    assert_equal_runs(gradients(fused, src, seed=given(11)), gradients(replay, src))


def test_decisions_do_not_depend_on_the_order_of_batch_and_sequence():
    first, second = (
        pair(dropout=0.3, batch_first=batch_first, dtype=torch.float32)[1]
        for batch_first in (True, False)
    )
    second.load_state_dict(first.state_dict())
    src = tokens(3, 17, dtype=torch.float32)
    out = second(src.transpose(0, 1), seed=given(4)).transpose(0, 1)
    torch.testing.assert_close(out, first(src, seed=given(4)))


SITES = {"attention": 0.5, "activation": 0.5, "first residual": 0.5, "second residual": 0.5}


def set_probabilities(layer: nn.TransformerEncoderLayer, probabilities: dict[str, float]) -> None:
    layer.self_attn.dropout = probabilities["attention"]
    layer.dropout.p = probabilities["activation"]
    layer.dropout1.p = probabilities["first residual"]
    layer.dropout2.p = probabilities["second residual"]


@BOTH
def test_each_site_reads_its_own_probability_at_every_call(norm_first):
    replay, fused = pair(dropout=0.1, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    src = tokens(2, 9)
    seen = []
    for site in SITES:
        probabilities = dict.fromkeys(SITES, 0.0) | {site: SITES[site]}
        for layer in (replay, fused):
            set_probabilities(layer, probabilities)
        ours = gradients(fused, src, seed=given(5))
        assert_equal_runs(ours, gradients(replay, src))
        seen.append(ours["output"])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@BOTH
@pytest.mark.parametrize("name", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_one_submodule_in_eval_does_not_drop(norm_first, name):
    replay, fused = pair(dropout=0.4, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    if name == "self_attn":
        replay.self_attn.dropout = 0.0
    else:
        getattr(replay, name).p = 0.0
    getattr(fused, name).eval()
    src = tokens(2, 9)
    assert_equal_runs(gradients(fused, src, seed=given(5)), gradients(replay, src))


@BOTH
@pytest.mark.parametrize("name", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_one_submodule_in_training_drops(norm_first, name):
    """As in stock (Monte Carlo dropout): the submodule's own mode counts, not the layer's."""
    replay, fused = pair(dropout=0.4, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    kept = {"self_attn": "attention", "dropout": "activation", "dropout1": "first residual"}
    site = kept.get(name, "second residual")
    set_probabilities(replay, dict.fromkeys(SITES, 0.0) | {site: 0.4})
    fused.eval()
    getattr(fused, name).train()
    src = tokens(2, 9)
    assert_equal_runs(gradients(fused, src, seed=given(5)), gradients(replay, src))


@BOTH
def test_everything_may_drop(norm_first):
    _, fused = pair(dropout=1.0, norm_first=norm_first)
    src = tokens(2, 9)
    found = gradients(fused, src)
    norms = (lambda x: x) if norm_first else (lambda x: fused.norm2(fused.norm1(x)))
    torch.testing.assert_close(found["output"], norms(src))
    for name in ("linear1.weight", "linear2.bias", "self_attn.in_proj_weight"):
        assert not found[name].any()


class SeedReads(TorchDispatchMode):
    """Counts draws from generators and refuses to read a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(
            word in name for word in ("_local_scalar_dense", "nonzero", "aten::equal", "is_nonzero")
        ), f"{name} waits for the device"
        self.draws += "rand" in name or "bernoulli" in name
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_one_draw_for_each_training_call_and_no_wait_for_the_device(norm_first, masked):
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, norm_first=norm_first, batch_first=True)
    src = torch.randn(2, 5, WIDTH, requires_grad=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 5)
    for arguments in ((None, None), (causal, padding), (causal, None, True)) if masked else ((),):
        with SeedReads() as mode:
            layer(src, *arguments).sum().backward()
        assert mode.draws == 1
        with SeedReads() as mode, torch.no_grad():
            layer.eval()(src, *arguments)
        assert mode.draws == 0
        layer.train()
        with SeedReads() as mode:
            layer(src, *arguments, seed=given(1))
        assert mode.draws == 0


def test_seeds_follow_torchs_generator():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    src = torch.randn(2, 5, WIDTH)
    first, second = layer(src), layer(src)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = layer(src)
    torch.manual_seed(1)
    assert torch.equal(layer(src), third)
    assert torch.equal(layer(src, seed=given(7)), layer(src, seed=given(7)))
    assert not torch.equal(layer(src, seed=given(7)), layer(src, seed=given(8)))
    other = copy.deepcopy(layer)
    other.layer_index = 1
    assert not torch.equal(layer(src, seed=given(7)), other(src, seed=given(7)))


def test_evaluation_leaves_the_generator_alone():
    for layer in (
        FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.5).eval(),
        FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0),
    ):
        state = torch.get_rng_state()
        layer(torch.randn(5, 2, WIDTH))
        torch.set_rng_state(state)
        torch.randn(5, 2, WIDTH)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        src = torch.randn(5, 2, WIDTH)
        layer(src)
        assert torch.equal(torch.get_rng_state(), after)


# --------------------------------------------------------------------- derivatives of all orders


@BOTH
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh], ids=name_of)
def test_gradcheck_with_dropout(norm_first, activation):
    layer = FusedEncoderLayer(
        4, 2, 6, 0.3, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    names = list(dict(layer.named_parameters()))
    src = tokens(2, 3, width=4).requires_grad_()
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[0.0, 0.5, float("-inf")], [0.1, 0.0, 0.3]], dtype=torch.float64)

    def run(src: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (src, mask, padding), {"seed": given(3)})

    assert torch.autograd.gradcheck(run, (src, mask, *layer.parameters()))


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradgradcheck(norm_first, dropout):
    layer = FusedEncoderLayer(
        4, 2, 6, dropout, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    names = list(dict(layer.named_parameters()))
    src = tokens(1, 3, width=4).requires_grad_()
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(src: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (src, mask), {"seed": given(3)})

    inputs = (src, mask, *layer.parameters())
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@BOTH
def test_gradient_penalty_is_torchs(norm_first):
    """Second derivatives of the whole layer; of torch's attention kernels only MATH has them."""
    stock, fused = pair(norm_first=norm_first, activation="gelu")
    src = tokens(2, 4)
    results = []
    for layer in (fused, stock):
        leaf = src.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
            gradient.square().sum().backward()
        results.append({name: p.grad for name, p in layer.named_parameters()})
    assert_equal_runs(*results, tolerance=1e-9)


# ------------------------------------------------------------------------------ what it keeps


@BOTH
def test_lean_layers_keep_results_of_norms_and_give_the_same(norm_first):
    stock, layer = pair(norm_first=norm_first)
    with torch.no_grad():
        for each in (stock, layer):
            for norm in (each.norm1, each.norm2):
                norm.weight.fill_(1.5)
                norm.bias.fill_(-0.5)
    src = tokens(3, 9)
    default = helpers.saved_bytes(lambda: layer(src))
    expected = gradients(layer, src)
    layer.save = "lean"
    assert layer._from_output == {"norm1", "norm2"}
    assert_equal_runs(gradients(layer, src), expected)
    assert_equal_runs(gradients(layer, src), gradients(stock, src))
    kept = []  # the result itself counts: the next layer keeps it

    def run():
        kept.append(layer(src))

    rows = 3 * 9 * src.itemsize
    saved = helpers.saved_bytes(run)
    if norm_first:  # x and the sum of x and the first branch, no more; two means
        assert saved == default - 2 * rows * WIDTH - 2 * rows
    else:  # two sums, of which the result takes the place of one
        assert saved == default - rows * WIDTH - 2 * rows


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@BOTH
def test_recomputing_layers_keep_no_hidden_features_and_give_the_same(norm_first, activation):
    _, layer = pair(norm_first=norm_first, activation=activation)
    src = tokens(3, 9)
    layer.save = "lean"
    lean, expected = helpers.saved_bytes(lambda: layer(src)), gradients(layer, src)
    layer.save = "recompute"
    hidden = 3 * 9 * layer.linear1.out_features * src.itemsize
    assert helpers.saved_bytes(lambda: layer(src)) == lean - hidden
    assert_equal_runs(gradients(layer, src), expected)
    for tokens_at_a_time in (4, 27, None):
        layer.chunk_tokens = tokens_at_a_time
        assert_equal_runs(gradients(layer, src), expected)
    twin = pickle.loads(pickle.dumps(layer))
    assert (twin.save, twin.chunk_tokens) == ("recompute", None)


def test_inference_in_chunks_has_no_more_rows_at_once(monkeypatch):
    _, layer = pair()
    layer.eval()
    src, rows = tokens(3, 9), []
    with torch.no_grad():
        expected = layer(src)
        layer.chunk_tokens = 4
        forward = in_pytorch.feed_forward_forward

        def counting(x: Tensor, *rest: object) -> None:
            rows.append(x.shape[0])
            forward(x, *rest)

        monkeypatch.setattr(in_pytorch, "feed_forward_forward", counting)
        torch.testing.assert_close(layer(src), expected)
    assert rows == [4, 4, 4, 4, 4, 4, 3]


def test_wrong_chunks_are_named():
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="chunk_tokens"):
            FusedEncoderLayer(16, 2, chunk_tokens=wrong)
    layer = FusedEncoderLayer(16, 2, chunk_tokens=3)
    with pytest.raises(ValueError, match="chunk_tokens"):
        layer.chunk_tokens = 0
    assert layer.chunk_tokens == 3


def test_what_norms_keep_under_autocast(monkeypatch):
    """A copy if the layer is asked to be lean; a norm that is asked to keeps its whole result."""
    kept = []

    def spy(*args, save, **kwargs):
        kept.append(save)
        return dropout_add_layer_norm(*args, save=save, **kwargs)

    monkeypatch.setattr(encoder_layer, "dropout_add_layer_norm", spy)
    layer = FusedEncoderLayer(16, 2, 24, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        for save in ("default", "lean"):
            layer.save = save
            layer(torch.randn(2, 5, 16))
        layer.save = "default"
        layer.norm1 = layer.norm2 = FusedLayerNorm(16, save="output")
        layer(torch.randn(2, 5, 16))
    assert kept == ["sum", "sum", "copy", "copy", "output", "output"]


def test_norms_whose_weights_forbid_it_keep_their_sum():
    layer = FusedEncoderLayer(16, 2, 24, batch_first=True, save="lean")
    state = {name: x.clone() for name, x in layer.state_dict().items()}
    state["norm1.weight"][3] = 0
    with pytest.warns(UserWarning, match="norm1 keeps its sum.*weight is smaller"):
        layer.load_state_dict(state)
    assert layer._from_output == {"norm2"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    layer(torch.randn(2, 5, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.save, twin._from_output) == ("lean", {"norm2"})
        twin.load_state_dict(FusedEncoderLayer(16, 2, 24).state_dict())
        assert twin._from_output == {"norm1", "norm2"}
    layer.save = "default"
    assert not layer._from_output
    with pytest.raises(ValueError, match="save must be one of"):
        layer.save = "output"
    with pytest.raises(ValueError, match="save must be one of"):
        FusedEncoderLayer(16, 2, save="sum")


@BOTH
@pytest.mark.parametrize("save", ["default", "lean"])
def test_autocast_casts_no_result_of_a_norm_again(norm_first, save):
    """Products get their input from the norm itself, rounded as autocast would round it."""
    stock, layer = pair(norm_first=norm_first, dtype=torch.float32, activation="gelu")
    layer.save = save
    src = tokens(3, 9, dtype=torch.float32)

    def casts(run):
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
            run(src)
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts.get("aten::_to_copy", 0)

    exact = gradients(copy.deepcopy(stock).double(), src.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(layer, src), gradients(stock, src)
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype, name
        error, allowed = ((y[name] - exact[name]).abs().max() for y in (ours, theirs))
        assert error <= 3 * allowed + 1e-2 * exact[name].abs().max(), name
    layer.linear1.register_forward_hook(lambda *_: None)  # then a module makes the cast
    called = casts(layer)
    layer.linear1._forward_hooks.clear()
    assert casts(layer) < called


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_mask_that_16_bits_do_not_hold_means_the_same_in_training(
    low: torch.dtype, autocast: bool
) -> None:
    """Of 16384 decisions one drops, so that training computes the probabilities by themselves."""
    torch.manual_seed(0)
    options = {"dim_feedforward": 32, "batch_first": True}
    layer = FusedEncoderLayer(16, 2, dropout=1 / 16384, **options)
    stock = nn.TransformerEncoderLayer(16, 2, dropout=0.0, **options)
    stock.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 5, 16), torch.full((5, 5), torch.finfo(torch.float32).min)
    expected = stock(x, mask)
    if not autocast:
        layer, x = layer.to(low), x.to(low)
    results = []
    for training in (True, False):
        with torch.autocast("cpu", low, enabled=autocast), torch.set_grad_enabled(training):
            results.append(layer.train(training)(x, mask, seed=torch.tensor([5])))
    for found in results:
        torch.testing.assert_close(found.float(), expected, atol=16 * torch.finfo(low).eps, rtol=0)
