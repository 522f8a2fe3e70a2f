"""Whoever records, rewrites or counts torch's calls sees all of a layer, and gets it right."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import FusedEncoderLayer, FusedLayerNorm, explain, tracing
from fastattn.models import SequenceEncoder
from fastattn.ops.attention import attention, attention_packed
from fastattn.ops.bias_activation_dropout import bias_activation_dropout
from fastattn.ops.dropout_add import dropout_add
from fastattn.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.layer_norm import layer_norm
from tests.layers.pairs import assert_as_exact, gradients

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

SIZES = [(3, 5), (3, 5), (1, 5), (4, 17)]  # (batch, length): traced with the first
PATHS = {
    "post-norm": dict(batch_first=True),
    "sequence-first": dict(batch_first=False),
    "pre-norm": dict(batch_first=True, norm_first=True, activation="gelu"),
}


def layer_of(**options) -> FusedEncoderLayer:
    return FusedEncoderLayer(16, 2, 32, **{"dropout": 0.2, **PATHS["post-norm"], **options})


class Call(nn.Module):
    """``function(module, *inputs)``: what torch.jit.trace takes with the module's parameters."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.module, *inputs)


def saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_trace_is_right(function: Callable, inputs: Callable, tolerance: float = 1e-5) -> None:
    """Traced on one input, saved and loaded: right on others, and on other batches."""
    example, *others = (inputs(*size) for size in SIZES)
    traced = saved_and_loaded(torch.jit.trace(function, example, check_trace=False))
    assert "fastattn::" not in str(traced.inlined_graph)
    for arguments in others:
        expected = function(*arguments)
        with torch.jit.optimized_execution(False):
            found = traced(*arguments)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------- torch.jit.trace


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_traced_layer_in_evaluation(path, masked, grad) -> None:
    layer = layer_of(**PATHS[path]).eval()

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        shape = (batch, length) if layer.self_attn.batch_first else (length, batch)
        ends = torch.randint(1, length + 1, (batch, 1))
        return torch.randn(*shape, 16), torch.arange(length) >= ends

    def run(layer: nn.Module, src: Tensor, padding: Tensor) -> Tensor:
        return layer(src, src_key_padding_mask=padding if masked else None)

    with torch.set_grad_enabled(grad):
        assert_trace_is_right(Call(layer, run).eval(), inputs)


@pytest.mark.parametrize("path", PATHS)
def test_a_traced_layer_in_training(path) -> None:
    """The decisions of a given seed, and with the generator's state those of a drawn one."""
    layer = layer_of(**PATHS[path])

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        shape = (batch, length) if layer.self_attn.batch_first else (length, batch)
        return torch.randn(*shape, 16), torch.randint(2**63 - 1, (1,))

    assert_trace_is_right(Call(layer, lambda layer, src, seed: layer(src, seed=seed)), inputs)
    src, _ = inputs(2, 5)
    traced = torch.jit.trace(layer, src, check_trace=False)
    assert not torch.equal(traced(src), traced(src))


def test_a_traced_layer_draws_what_the_layer_draws(contract_seeds) -> None:
    layer, src = layer_of(), torch.randn(2, 5, 16)
    traced = torch.jit.trace(layer, src, check_trace=False)
    found = []
    for function in (traced, layer):
        torch.manual_seed(1)
        found.append(function(src))
    torch.testing.assert_close(*found)


def test_gradients_of_a_traced_layer() -> None:
    src, seed = torch.randn(2, 5, 16), torch.tensor([3])
    module = Call(layer_of(), lambda layer, src: layer(src, seed=seed))
    traced = torch.jit.trace(module, src.clone().requires_grad_(), check_trace=False)
    exact = gradients(copy.deepcopy(module).double(), src.double())
    assert_as_exact(gradients(module, src, call=traced), gradients(module, src), exact)


def op_cases() -> Iterator[tuple[str, Callable, Callable]]:
    weight1, bias1, weight2 = torch.randn(24, 16) / 4, torch.randn(24), torch.randn(16, 24) / 5
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)

    def qkv(batch: int, length: int) -> tuple[Tensor]:
        return (torch.randn(batch, length, 3, 2, 8),)

    def rows(batch: int, length: int) -> tuple[Tensor]:
        return (torch.randn(batch, length, 16),)

    def pair(batch: int, length: int) -> tuple[Tensor, Tensor]:
        return *rows(batch, length), *rows(batch, length)

    for p in (0.0, 0.25):
        drops = {"dropout_p": p, "seed": torch.tensor([7])}
        yield f"attention {p}", lambda x, d=drops: attention(*x.unbind(2), **d), qkv
        yield (
            f"attention_packed {p}",
            lambda x, d=drops: attention_packed(x, is_causal=True, **d),
            qkv,
        )
        for chunk in (None, 4):
            yield (
                f"feed_forward {p} {chunk}",
                lambda x, d=drops, c=chunk: feed_forward(
                    x, weight1, bias1, weight2, chunk_tokens=c, **d
                ),
                rows,
            )
        yield (
            f"bias_activation_dropout {p}",
            lambda x, d=drops: bias_activation_dropout(x, bias, activation="gelu", **d),
            rows,
        )
        yield (
            f"dropout_add {p}",
            lambda x, y, d=drops: dropout_add(x, y, input_bias=bias, batch_first=False, **d),
            pair,
        )
        for save in ("sum", "output", "copy"):
            yield (
                f"dropout_add_layer_norm {save} {p}",
                lambda x, y, d=drops, s=save: dropout_add_layer_norm(
                    x, y, weight, bias, copy_dtype=torch.float64, return_sum=True, save=s, **d
                ),
                pair,
            )
    yield "layer_norm", lambda x: layer_norm(x, weight, bias, save="output"), rows
    yield "layer_norm, half", lambda x: layer_norm(x.bfloat16(), out_dtype=torch.float32), rows
    norm = FusedLayerNorm(16, save="output")
    yield "FusedLayerNorm", norm, rows


@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_of_each_op_alone(grad) -> None:
    """Its dropout decisions too."""
    for name, function, inputs in op_cases():

        def leaves(batch: int, length: int, inputs=inputs) -> tuple[Tensor, ...]:
            return tuple(x.requires_grad_(grad) for x in inputs(batch, length))

        try:
            with torch.set_grad_enabled(grad):
                assert_trace_is_right(function, leaves)
        except Exception as error:
            raise AssertionError(name) from error


def test_a_traced_model() -> None:
    model = SequenceEncoder(20, 16, 2, 32, 2, max_len=20).eval()
    assert_trace_is_right(model, lambda batch, length: (torch.randint(20, (length, batch)),))


@pytest.mark.parametrize("options", [{}, {"dynamic_axes": {"x": [0, 1]}}], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("path", PATHS)
def test_onnx_by_the_traced_export(path, options, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    file = tmp_path / "layer.onnx"
    # in a model: the export passes its root all arguments by position, keyword-only ones too
    layer = nn.Sequential(layer_of(**PATHS[path])).eval()
    src = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.onnx.export(layer, (src,), file, dynamo=False, input_names=["x"], **options)
        run = ReferenceEvaluator(onnx.load(file))
        for sizes in [(3, 5), *([(2, 7)] if options else [])]:
            src = torch.randn(*sizes, 16)
            (found,) = run.run(None, {"x": src.numpy()})
            torch.testing.assert_close(torch.tensor(found), layer(src), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------- modes, transforms, exports


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


class RecordingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("mode", [Recording, RecordingFunctions])
@pytest.mark.parametrize("path", PATHS)
def test_a_mode_sees_every_part(mode, path) -> None:
    layer, src = layer_of(**PATHS[path]).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(src)
        with mode() as watcher:
            found = layer(src)
            assert len(explain(layer, src)) > 1  # op by op
    torch.testing.assert_close(found, expected)
    activation = "gelu" if layer.norm_first else "relu"
    for part in (activation, "norm", "scaled_dot_product"):
        assert any(part in name for name in watcher.seen), part


def by_make_fx(layer: nn.Module, src: Tensor) -> Callable:
    return make_fx(layer)(src)


def by_make_fx_before_dispatch(layer: nn.Module, src: Tensor) -> Callable:
    return make_fx(layer, pre_dispatch=True)(src)


def by_export(layer: nn.Module, src: Tensor) -> Callable:
    return torch.export.export(layer, (src,), strict=False).module()


def by_functionalize(layer: nn.Module, src: Tensor) -> Callable:
    return make_fx(torch.func.functionalize(layer))(src)


def by_vmap(layer: nn.Module, src: Tensor) -> Callable:
    return torch.vmap(lambda row: layer(row[None])[0])


@pytest.mark.parametrize(
    "record", [by_make_fx, by_make_fx_before_dispatch, by_export, by_functionalize, by_vmap]
)
@pytest.mark.parametrize("path", ["post-norm", "pre-norm"])
def test_recorded_graphs_are_right(record, path) -> None:
    layer = layer_of(**PATHS[path]).eval()
    with torch.no_grad():
        graph = record(layer, torch.randn(3, 5, 16))
        src = torch.randn(3, 5, 16)
        torch.testing.assert_close(graph(src), layer(src))


@pytest.mark.parametrize("path", PATHS)
def test_memory_that_is_not_the_tensor(path) -> None:
    """A lazily negated tensor holds its negative, a functional one nothing."""
    layer, src = layer_of(**PATHS[path]).eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = layer(src)
        torch.testing.assert_close(layer(torch._neg_view(-src)), expected)
        found = layer(torch._to_functional_tensor(src))
        torch._sync(found)
        torch.testing.assert_close(torch._from_functional_tensor(found), expected)
        for module in (layer.linear1, layer.linear2, layer.norm1, layer.self_attn.out_proj):
            negated = torch._neg_view(-module.bias.detach())
            module.bias = torch.nn.Parameter(negated, requires_grad=False)
            torch.testing.assert_close(layer(src), expected)


def test_watchers_are_known() -> None:
    def watched(x: Tensor) -> Tensor:
        assert tracing.watched()
        return x * 2

    x = torch.randn(3)
    assert not tracing.watched() and not tracing.traced()
    for mode in (Recording(), RecordingFunctions(), torch.device("cpu")):
        with mode:
            watched(x)
    for transform in (torch.vmap, torch.func.functionalize, torch.func.grad):
        transform(lambda x: watched(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        watched(x)
    torch.jit.trace(watched, x, check_trace=False)
    make_fx(watched)(x)
    for quiet in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with quiet:
            assert not tracing.watched()


@pytest.mark.parametrize("part", ["norm1.weight", "norm2.bias", "linear2.bias"])
def test_parameters_of_another_size_are_refused_without_gradients_too(part) -> None:
    """They would be read past their end."""
    layer = layer_of().eval()
    module, name = part.split(".")
    setattr(getattr(layer, module), name, nn.Parameter(torch.ones(8)))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises((ValueError, RuntimeError), match="shape|size"),
        ):
            layer(torch.randn(2, 5, 16))


def test_blocks_of_another_width_are_refused_without_gradients_too() -> None:
    layer = layer_of().eval()
    layer.linear2 = nn.Linear(32, 8).eval()
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises((ValueError, RuntimeError), match="shape|size"),
        ):
            layer(torch.randn(2, 5, 16))
