"""Which backend runs, why not the others, and what ``explain`` says about a layer."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

import fastattn
from fastattn import FusedEncoderLayer, available_backends, dispatch, explain, use_backend
from fastattn.pytorch import attention as in_pytorch
from tests.layers.pairs import HEADS, HIDDEN, WIDTH, tokens

CPU = torch.device("cpu")


def layer_of(**options) -> FusedEncoderLayer:
    return FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, **options)


def src(*shape: int) -> torch.Tensor:
    return tokens(*(shape or (2, 5)), dtype=torch.float32)


# -------------------------------------------------------------------------- backends and reasons


@pytest.mark.parametrize("op", dispatch.BACKENDS)
def test_every_op_runs_on_the_cpu_and_gives_reasons_for_the_rest(op):
    backends = available_backends(op, "cpu")
    assert "pytorch" in backends
    assert set(backends) <= set(dispatch.BACKENDS[op])
    reasons = dispatch.reasons_of(op, "cpu")
    assert tuple(reasons) == dispatch.BACKENDS[op]
    for name, reason in reasons.items():
        assert (reason is None) == (name in backends)
        if name in ("triton", "cuda"):
            assert reason and (reason == "runs on cuda, not on cpu" or "no " in reason)


@pytest.mark.parametrize("op", dispatch.BACKENDS)
def test_public_functions_have_an_op_and_the_pytorch_backend_always_runs(op):
    for device in ("cpu", "cuda"):
        assert dispatch.reasons_of(op, device)["pytorch"] is None
    assert "cpu" not in available_backends(op, "cuda")


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="op must be one of .*'nosuch'"):
        available_backends("nosuch")
    with pytest.raises(ValueError, match="backend must be one of .*not 'nosuch'"):
        with use_backend("nosuch"):
            pass
    with pytest.raises(ValueError, match="op must be one of .*'nosuch'"):
        with use_backend(nosuch="pytorch"):
            pass
    with pytest.raises(ValueError, match="backend of attention must be one of .*'cuda'"):
        with use_backend(attention="cuda"):
            pass
    with pytest.raises(ValueError, match="backend of attention must be one of .*'nosuch'"):
        fastattn.attention(*(torch.randn(1, 2, 1, 4),) * 3, backend="nosuch")


def test_backends_are_as_good_as_they_are_early(monkeypatch):
    """An op is known from its first backend on; one that is registered again keeps its place."""
    for name in ("BACKENDS", "_registry", "_always"):
        monkeypatch.setattr(dispatch, name, {})
    for backend in ("cpu", "pytorch", "cpu"):
        dispatch.register("new", backend, object())
    assert dispatch.BACKENDS == {"new": ("cpu", "pytorch")}
    assert available_backends("new", "cpu") == ("cpu", "pytorch")
    assert dispatch.choose("new", torch.empty(1)) == "cpu"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_asked_for_is_never_replaced(name):
    op = {"triton": "attention_packed", "cuda": "dropout_add_layer_norm"}[name]
    reason = dispatch.why_not(op, name, CPU)
    with use_backend(name), pytest.raises(RuntimeError) as error:
        layer_of().eval()(src())
    assert str(error.value) == f"backend={name!r} cannot run {op}: {reason}"
    with pytest.raises(RuntimeError, match=f"backend={name!r} cannot run {op}"):
        dispatch.choose(op, torch.empty(1), name)


def test_a_failed_request_leaves_nothing_behind():
    before = dict(dispatch._requested)
    for arguments in (("nosuch",), ()):
        with pytest.raises(ValueError):
            with use_backend(*arguments, nosuch="pytorch"):
                pass
        assert dispatch._requested == before
    with pytest.raises(KeyError):
        with use_backend("pytorch"):
            raise KeyError
    assert dispatch._requested == before


def test_requests_nest_and_end():
    facts = {"head_dim": 8, "arguments": None}
    x = torch.empty(1)
    with use_backend("pytorch"):
        with use_backend(attention="triton"):
            with pytest.raises(RuntimeError, match="cannot run attention"):
                dispatch.choose("attention", x, **facts)
            assert dispatch.choose("feed_forward", x, activation="relu") == "pytorch"
            # a call's own argument comes first
            assert dispatch.choose("attention", x, "pytorch", **facts) == "pytorch"
        assert dispatch.choose("attention", x, **facts) == "pytorch"
    assert dispatch._requested == {}


def test_the_best_backend_that_can_run_is_taken(monkeypatch):
    """A second backend of one op: used where it has no reason against it, in its place."""
    registry = {op: dict(entries) for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.setitem(dispatch._DEVICES, "triton", "cpu")
    for op in ("feed_forward", "layer_norm", "dropout_add", "dropout_add_layer_norm"):
        registry[op] = {"pytorch": registry[op]["pytorch"]}
    limit = "only head dims up to 8"

    def why_not(device: torch.device, head_dim: int = 0, **facts: object) -> str | None:
        return limit if head_dim > 8 else None

    for op in ("attention", "attention_packed"):
        dispatch.register(op, "triton", in_pytorch, why_not)
    assert available_backends("attention_packed", "cpu") == ("triton", "pytorch")
    small, large = layer_of(), FusedEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
    assert choices(explain(small, src()))["attention_packed"].taken == "triton"
    choice = choices(explain(large, src()))["attention_packed"]
    assert choice.taken == "pytorch" and choice.why_not == {"triton": limit}
    with use_backend("triton"), pytest.raises(RuntimeError, match=limit):
        large(src())
    with use_backend("pytorch"):
        choice = choices(explain(small, src()))["attention_packed"]
    assert choice.taken == "pytorch" and choice.why_not == {"triton": "pytorch was asked for"}


def test_a_module_given_by_name_is_imported_when_it_first_runs(monkeypatch, tmp_path):
    registry = {op: dict(entries) for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", registry)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernels_of_a_test.py").write_text("loaded = True\n")
    dispatch.register("attention", "triton", "kernels_of_a_test")
    dispatch.why_not("attention", "triton", CPU)
    assert "kernels_of_a_test" not in sys.modules
    assert dispatch.functions("attention", "triton").loaded
    assert dispatch.functions("attention", "triton") is sys.modules.pop("kernels_of_a_test")


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of compute capability 8.0, as far as dispatch asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    dispatch._why_not_triton.cache_clear()
    yield
    dispatch._why_not_triton.cache_clear()


def why_not_the_kernel(**facts: object) -> str | None:
    cuda = torch.device("cuda", 0)
    return dispatch.why_not("bias_activation_dropout", "triton", cuda, **facts)


def test_triton_runs_on_ampere(gpu):
    assert why_not_the_kernel() is None
    assert why_not_the_kernel(dtypes=(torch.bfloat16, torch.float32)) is None
    assert "not torch.float8_e5m2" in why_not_the_kernel(dtypes=(torch.float8_e5m2,))


def test_triton_says_what_the_machine_lacks(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_the_kernel() == "needs compute capability 8.0 or higher, not 7.5"
    dispatch._why_not_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_the_kernel() == "torch sees no CUDA device"
    dispatch._why_not_triton.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert why_not_the_kernel() == "triton is not installed"


# ------------------------------------------------------------------------------------------ explain


def choices(explanation: dispatch.Explanation) -> dict[str, dispatch.Choice]:
    return {choice.part: choice for choice in explanation}


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_plain_layer_is_fused_throughout(norm_first):
    explanation = explain(layer_of(norm_first=norm_first, dropout=0.0), src())
    parts = [choice.part for choice in explanation]
    post = ["attention_packed", "dropout_add_layer_norm", "feed_forward", "dropout_add_layer_norm"]
    pre = [
        "layer_norm",
        "attention_packed",
        "dropout_add_layer_norm",
        "feed_forward",
        "dropout_add",
    ]
    assert parts == (pre if norm_first else post)
    for choice in explanation:
        better = dispatch.BACKENDS[choice.part]
        assert list(choice.why_not) == list(better[: better.index(choice.taken)])
        assert all(choice.why_not.values())
    assert str(explanation).startswith(f"{parts[0]}: pytorch")
    assert "    not triton: " in str(explanation)


def hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(lambda *_: None)


def patch(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    module.forward = module.forward


def replace(layer: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    module = layer.get_submodule(name)
    subclass = type("Wrapped", (type(module),), {})
    module.__class__ = subclass
    setattr(layer.get_submodule(parent), child, module)


def parametrize(layer: nn.Module, name: str) -> None:
    tensor = "in_proj_weight" if name == "self_attn" else "weight"
    module = layer.get_submodule(name)
    nn.utils.parametrize.register_parametrization(module, tensor, nn.Identity(), unsafe=True)


REASONS = {
    hook: "it has hooks",
    patch: "its forward is patched",
    replace: "it is a Wrapped",
    parametrize: "it is a Parametrized",
}
WEIGHTED = ("self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
DROPOUTS = ("dropout", "dropout1", "dropout2")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", WEIGHTED + DROPOUTS)
def test_explain_names_the_part_that_runs_as_a_module_and_why(norm_first, change, name):
    if change is parametrize and name in DROPOUTS:
        name = "activation"  # dropout has no weights; an activation may
    layer = layer_of(
        norm_first=norm_first, activation=nn.PReLU() if name == "activation" else "relu"
    )
    if name == "activation":
        expected = "there is no fused kernel for this activation"
    else:
        change(layer, name)
        expected = REASONS[change]
    modules = {c.part: c.why_not for c in explain(layer, src()) if c.taken == "module"}
    assert list(modules) == [name]
    assert list(modules[name]) == ["fused"] and modules[name]["fused"].startswith(expected)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (torch.tanh, "there is no fused kernel"),
        (nn.ReLU(), "it has hooks"),
        (nn.Tanh(), "there is"),
    ],
    ids=["function", "hooked", "module"],
)
def test_explain_names_an_activation_without_kernel(activation, reason):
    layer = layer_of(activation=activation)
    if isinstance(activation, nn.ReLU):
        hook(layer, "activation")
    choice = choices(explain(layer, src()))["activation"]
    assert choice.taken == "module" and choice.why_not["fused"].startswith(reason)


def test_explain_names_overridden_blocks():
    class Overriding(FusedEncoderLayer):
        def _sa_block(self, *args, **kwargs):
            return super()._sa_block(*args, **kwargs)

        def _ff_block(self, x):
            return super()._ff_block(x)

    found = choices(explain(Overriding(WIDTH, HEADS, HIDDEN), src()))
    for name in ("_sa_block", "_ff_block"):
        assert found[name].taken == "module"
        assert found[name].why_not == {"fused": "the layer overrides it"}


def test_explain_names_global_hooks():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = choices(explain(layer_of(), src()))
    finally:
        handle.remove()
    reason = {"fused": "there are global module hooks"}
    for name in ("self_attn", "linear1", "linear2", "norm1", "norm2", *DROPOUTS):
        assert found[name].taken == "module" and found[name].why_not == reason
    assert all(c.taken != "module" for c in explain(layer_of(), src()))


def test_what_remains_is_fused():
    """A wrapped linear1 leaves attention, the norms and the middle of the block fused."""
    layer = layer_of()
    hook(layer, "linear1")
    parts = [choice.part for choice in explain(layer, src()) if choice.part != "dropout_factor"]
    assert parts == [
        "attention_packed",
        "dropout_add_layer_norm",
        "linear1",
        "bias_activation_dropout",
        "dropout_add_layer_norm",
    ]


def test_nothing_is_recorded_outside():
    layer = layer_of()
    first = explain(layer, src())
    count = len(first)
    layer(src())
    dispatch.choose("layer_norm", torch.empty(1))
    assert len(first) == count and dispatch._record is None
    outer = []
    layer.register_forward_hook(lambda *_: outer.append(explain(layer_of(), src())))
    explanation = explain(layer, src())
    assert len(explanation) == count and len(outer[0]) == count  # explanations may nest


def test_explain_leaves_the_random_state_and_gradients_alone():
    layer, x = layer_of(dropout=0.5), src()
    state = torch.get_rng_state()
    explain(layer, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_explain_ends_when_the_layer_raises():
    with pytest.raises(AssertionError, match="query should be"):
        explain(layer_of(), torch.randn(1, 1, 2, WIDTH))
    assert dispatch._record is None


def test_explain_passes_masks_and_keywords_and_takes_whole_models():
    encoder = nn.TransformerEncoder(layer_of(), 2, enable_nested_tensor=False)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    with torch.no_grad():
        explanation = explain(encoder.eval(), src(), src_key_padding_mask=padding)
    assert [c.part for c in explanation] == ["encoder_layer", "encoder_layer"]


def test_requests_hold_for_every_thread():
    """Backward runs in other threads; a request is one for the process, as documented."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            layer_of()(src())
            found.append(None)
        except RuntimeError as error:
            found.append(error)

    with use_backend("triton"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert isinstance(found[0], RuntimeError) and "cannot run" in str(found[0])
