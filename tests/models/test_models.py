"""The models: the same numbers on stock and fused layers, and what the parts compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastattn import FusedEncoderLayer
from fastattn.models import (
    ActivationFreeEncoderLayer,
    PositionalEncoding,
    SequenceEncoder,
    TaskAdapter,
    train_adapted_model,
)
from tests import helpers

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS = 23, 16, 2, 24, 2


def make_encoder(layer: Any = "fused", drop_rate: float = 0.0, **options: Any) -> SequenceEncoder:
    torch.manual_seed(0)
    sizes = (VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS, drop_rate)
    options = {"batch_first": True, "dtype": torch.float64, **options}
    return SequenceEncoder(*sizes, layer=layer, **options)


def make_tokens(count: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens (N, S), and a padding mask with whole, shortened and one-token sequences."""
    tokens = torch.randint(VOCABULARY, (count, length))
    lengths = torch.tensor([length, length - 3, 1])[:count]
    return tokens, torch.arange(length) >= lengths[:, None]


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("d_model", [1, 2, 7, 16])
def test_positions(d_model: int) -> None:
    length = 9
    expected = torch.zeros(length, d_model, dtype=torch.float64)
    for t in range(length):
        for i in range(d_model):
            angle = t / 10_000 ** (i // 2 * 2 / d_model)
            expected[t, i] = math.cos(angle) if i % 2 else math.sin(angle)
    x = torch.randn(length, d_model, dtype=torch.float64)
    sequence_first = PositionalEncoding(d_model, 20, dtype=torch.float64)
    batch_first = PositionalEncoding(d_model, 20, batch_first=True, dtype=torch.float64)
    torch.testing.assert_close(sequence_first(x), x + expected)
    torch.testing.assert_close(batch_first(x), x + expected)
    many = torch.randn(4, length, d_model, dtype=torch.float64)
    torch.testing.assert_close(batch_first(many), many + expected)
    swapped = sequence_first(many.transpose(0, 1)).transpose(0, 1)
    assert torch.equal(swapped, batch_first(many))
    assert not sequence_first.state_dict()


def made_empty(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.to_empty(device="cpu").load_state_dict(state)
    return module


def made_empty_part_by_part(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """As FSDP materialises modules."""
    for part in module.modules():
        part.to_empty(device="cpu", recurse=False)
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    module.load_state_dict(state)
    return module


def assigned(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, assign=True)
    return module


def assigned_and_moved(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    return assigned(module, state).to("cpu")


def emptied(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """One that had memory."""
    return made_empty(made_empty(module, state).to("meta"), state)


WITHOUT_MEMORY = [made_empty, made_empty_part_by_part, assigned, assigned_and_moved, emptied]


@pytest.mark.parametrize("fill", WITHOUT_MEMORY)
def test_positions_of_a_module_without_memory(fill: Callable[..., nn.Module]) -> None:
    x, expected = torch.zeros(20, 6), PositionalEncoding(6, 20)
    positions = PositionalEncoding(6, 20, device="meta")
    assert positions(x.to("meta")).is_meta
    positions = fill(positions, {})
    assert torch.equal(positions(x), expected.encoding)
    assert torch.equal(positions.encoding, expected.encoding)
    assert torch.equal(copy.deepcopy(positions)(x), expected.encoding)
    assert not positions.state_dict()


@pytest.mark.parametrize("fill", WITHOUT_MEMORY)
def test_encoder_without_memory(fill: Callable[..., nn.Module]) -> None:
    whole, (tokens, _) = make_encoder().eval(), make_tokens()
    expected = whole(tokens)

    def filled() -> nn.Module:
        return fill(make_encoder(device="meta"), whole.state_dict()).eval()

    encoder = filled()
    assert encoder.state_dict().keys() == whole.state_dict().keys()
    assert torch.equal(copy.deepcopy(encoder)(tokens), expected)
    assert torch.equal(encoder(tokens), expected)
    assert torch.equal(TaskAdapter(filled(), 2).encoder(tokens), expected)
    compiled = torch.compile(filled(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), expected)
    exported = torch.export.export(filled(), (tokens,)).module()
    torch.testing.assert_close(exported(tokens), expected)


def test_weights_may_be_given_to_an_encoder_without_any() -> None:
    whole, empty = make_encoder(), make_encoder(device="meta")
    tokens, _ = make_tokens()
    with torch.inference_mode():
        found = torch.func.functional_call(empty, whole.state_dict(), (tokens,))
    torch.testing.assert_close(found, whole(tokens))
    assert not empty.positions.encoding.is_inference()
    assert empty(tokens.to("meta")).is_meta


def test_weights_of_another_dtype_bring_positions_of_theirs() -> None:
    whole, empty = make_encoder().bfloat16(), make_encoder(device="meta")
    tokens, _ = make_tokens()
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty.eval()(tokens), whole.eval()(tokens))


@pytest.mark.parametrize("how", ["grad", "functionalize", "make_fx", "trace", "default device"])
def test_what_watches_an_encoder_without_memory_stays_out_of_it(how: str) -> None:
    whole, empty = make_encoder().eval(), make_encoder(device="meta").eval()
    weights = {name: x.detach() for name, x in whole.state_dict().items()}
    tokens, _ = make_tokens()

    def run(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(empty, weights, (tokens,))

    if how == "grad":
        found = torch.func.grad(lambda w: run(w).square().sum())(weights)["output.bias"]
        expected = torch.func.grad(
            lambda w: torch.func.functional_call(whole, w, (tokens,)).square().sum()
        )(weights)["output.bias"]
        torch.testing.assert_close(found, expected)
    elif how == "trace":
        empty.load_state_dict(weights, assign=True)
        torch.testing.assert_close(torch.jit.trace(empty, tokens)(tokens), whole(tokens))
    elif how == "default device":
        with torch.device("meta"):
            torch.testing.assert_close(run(weights), whole(tokens))
    elif how == "make_fx":
        torch.testing.assert_close(make_fx(run)(weights)(weights), whole(tokens))
    else:
        torch.testing.assert_close(torch.func.functionalize(run)(weights), whole(tokens))
    assert empty.positions.encoding.is_meta or how == "trace"  # which also checks a plain call
    empty.load_state_dict(weights, assign=True)
    assert torch.equal(copy.deepcopy(empty)(tokens), whole(tokens))


@pytest.mark.parametrize("move", ["double", "bfloat16", "share_memory"])
def test_positions_of_ones_own_stay(move: str) -> None:
    positions = PositionalEncoding(6, 20)
    positions.encoding.uniform_()
    expected = getattr(positions.encoding.clone(), move.replace("share_memory", "share_memory_"))()
    assert torch.equal(getattr(positions, move)().encoding, expected)


def test_what_positions_refuse() -> None:
    positions = PositionalEncoding(4, 5)
    assert positions(torch.zeros(5, 9, 4)).shape == (5, 9, 4)
    with pytest.raises(ValueError, match=r"6 positions.*max_len is 5"):
        positions(torch.zeros(6, 2, 4))
    with pytest.raises(ValueError, match=r"\bx\b"):
        positions(torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"\bd_model\b"):
        PositionalEncoding(0)
    with pytest.raises(ValueError, match=r"\bmax_len\b"):
        PositionalEncoding(4, 0)


# ------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "norm_first": True}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stock_and_fused_layers_agree(batch_first: bool, padded: bool, options) -> None:
    stock, fused = (
        make_encoder(layer, batch_first=batch_first, **options) for layer in ("stock", "fused")
    )
    fused.load_state_dict(stock.state_dict())
    assert all(isinstance(layer, FusedEncoderLayer) for layer in fused.layers)
    assert not any(isinstance(layer, FusedEncoderLayer) for layer in stock.layers)
    tokens, padding = make_tokens()
    real = ~padding if padded else torch.ones_like(padding)
    given = tokens if batch_first else tokens.t()
    found = []
    for encoder in (stock, fused):
        logits = encoder(given, padding if padded else None)
        logits = logits if batch_first else logits.transpose(0, 1)
        assert logits.shape == (3, 7, VOCABULARY)
        gradients = torch.autograd.grad(logits[real].sin().sum(), list(encoder.parameters()))
        found.append((logits[real], *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer", ["stock", "fused"])
def test_hidden_states_and_logits(layer: str) -> None:
    encoder = make_encoder(layer)
    tokens, _ = make_tokens()
    hidden = encoder(tokens, return_hidden=True)
    assert hidden.shape == (3, 7, WIDTH)
    torch.testing.assert_close(encoder(tokens), encoder.output(hidden))
    x = encoder.embedding(tokens) * WIDTH**0.5 + encoder.positions.encoding[:7]
    for one in encoder.layers:
        x = one(x)
    torch.testing.assert_close(hidden, x)
    torch.testing.assert_close(encoder(tokens[0]), encoder(tokens)[0])


def test_matrices_begin_as_xavier_has_them() -> None:
    encoder = make_encoder(dtype=torch.float32)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() > 1:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize("layer", ["stock", "fused"])
def test_layers_may_be_run_again(layer: str) -> None:
    plain, again = (
        make_encoder(layer, drop_rate=0.1, checkpoint_layers=value) for value in (False, True)
    )
    tokens, padding = make_tokens()
    results = []
    for encoder in (plain, again):
        torch.manual_seed(3)
        out = encoder(tokens, padding)
        results.append((out, *torch.autograd.grad(out.sum(), list(encoder.parameters()))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    kept = [helpers.saved_bytes(lambda e=e: e(tokens, padding)) for e in (plain, again)]
    assert kept[1] < kept[0] / 2


class ReferenceLayer(nn.Module):
    """Post-norm, sequence-first, and nothing between the two linear maps."""

    def __init__(self, d_model: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x, x, x)[0])
        return self.norm2(x + self.linear2(self.linear1(x)))


def test_the_layer_without_an_activation() -> None:
    reference = ReferenceLayer(WIDTH, HEADS, HIDDEN).double()
    ours = ActivationFreeEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, dtype=torch.float64)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(7, 3, WIDTH, dtype=torch.float64)
    results = []
    for layer in (reference, ours):
        out = layer(x)
        gradients = torch.autograd.grad(out.sin().sum(), list(layer.parameters()))
        names = (name for name, _ in layer.named_parameters())
        results.append({"output": out, **dict(zip(names, gradients, strict=True))})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)
    standard = ActivationFreeEncoderLayer(WIDTH, HEADS)
    assert standard.linear1.out_features == 2048 and standard.dropout.p == 0.1
    encoder = make_encoder(ActivationFreeEncoderLayer)
    assert all(type(layer) is ActivationFreeEncoderLayer for layer in encoder.layers)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"layer": "flash"}, "layer"),
    ],
)
def test_wrong_arguments_are_named(changes, name) -> None:
    sizes = {"vocab_size": 9, "embed_dim": 8, "num_heads": 2, "ff_dim": 8, "num_layers": 1}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        SequenceEncoder(**{**sizes, **changes})


def test_wrong_tokens_are_named() -> None:
    encoder = make_encoder(max_len=5)
    with pytest.raises(ValueError, match=r"\btokens\b"):
        encoder(torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\bmax_len\b"):
        encoder(torch.zeros(1, 6, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ adapter


@pytest.mark.parametrize("layer", ["stock", "fused"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_mean_is_over_real_tokens(batch_first: bool, layer: str) -> None:
    encoder = make_encoder(layer, batch_first=batch_first)
    model = TaskAdapter(encoder, 4)
    tokens, padding = make_tokens()
    found = model(tokens if batch_first else tokens.t(), padding)
    assert found.shape == (3, 4)
    for i, length in enumerate((7, 4, 1)):
        alone = encoder(tokens[i, :length], return_hidden=True)
        torch.testing.assert_close(found[i], model.classifier(alone.mean(0)))
        torch.testing.assert_close(model(tokens[i], padding[i]), found[i])
    whole = torch.zeros_like(padding)
    given = tokens if batch_first else tokens.t()
    torch.testing.assert_close(model(given), model(given, whole))
    whole[1] = True
    torch.testing.assert_close(model(given, whole)[1], model.classifier.bias)


def test_a_frozen_encoder_takes_no_part_in_training() -> None:
    model = TaskAdapter(make_encoder(drop_rate=0.5), 4).train()
    assert model.training and model.classifier.training and not model.encoder.training
    tokens, padding = make_tokens()
    assert torch.equal(model(tokens, padding), model(tokens, padding))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    kept = helpers.saved_bytes(lambda: model(tokens, padding))
    assert kept == 3 * WIDTH * 8  # what the linear map is applied to
    whole = TaskAdapter(make_encoder(drop_rate=0.5), 4, freeze=False).train()
    assert whole.encoder.training
    assert all(p.requires_grad for p in whole.parameters())
    with pytest.raises(ValueError, match=r"\bnum_classes\b"):
        TaskAdapter(make_encoder(), 1)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Whether a sequence begins with token 1."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (8, 5), generator=generator)
        labels = torch.randint(2, (8,), generator=generator)
        tokens[:, 0] = labels
        found.append((tokens, torch.zeros(8, 5, dtype=torch.bool), labels))
    return found


def test_adaptation_trains_the_classifier_alone(capsys) -> None:
    model = TaskAdapter(make_encoder(), 2).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = sum(
        nn.functional.cross_entropy(model(*inputs), labels).item() for *inputs, labels in batches()
    )
    losses = train_adapted_model(model, batches(), epochs=30, learning_rate=0.05)
    assert len(losses) == 30 and losses[-1] < 0.5 * first / 6
    assert not model.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("encoder."), name
    assert capsys.readouterr().out.splitlines()[-1] == f"epoch 30/30  loss {losses[-1]:.4f}"
    pairs = [(tokens, labels) for tokens, _, labels in batches()]
    train_adapted_model(model, pairs, epochs=1, learning_rate=0.01, progress=False)
    assert capsys.readouterr().out == ""


def test_the_average_is_that_of_sequences() -> None:
    """Also where the last batch is smaller."""
    model = TaskAdapter(make_encoder(), 2)
    whole = batches(2)
    loader = [whole[0], tuple(x[:3] for x in whole[1])]
    (found,) = train_adapted_model(model, loader, epochs=1, learning_rate=1e-12)
    with torch.no_grad():
        total = sum(
            nn.functional.cross_entropy(model(*inputs), labels, reduction="sum")
            for *inputs, labels in loader
        )
    assert found == pytest.approx(total.item() / 11)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = TaskAdapter(make_encoder(), 2)
    with torch.no_grad():
        model.encoder.embedding.weight[5] = math.nan
    good, bad = batches(2)
    good[0][good[0] == 5] = 6
    bad[0][0, 1] = 5
    weight = model.classifier.weight.clone()
    with pytest.raises(FloatingPointError, match="loss of epoch 1 is nan"):
        train_adapted_model(model, [bad], epochs=1, learning_rate=0.1, progress=False)
    assert torch.equal(model.classifier.weight, weight)
    train_adapted_model(model, [good], epochs=1, learning_rate=0.1, progress=False)
    assert not torch.equal(model.classifier.weight, weight)


def test_what_adaptation_refuses() -> None:
    model = TaskAdapter(make_encoder(), 2)
    with pytest.raises(ValueError, match=r"\bepochs\b"):
        train_adapted_model(model, batches(), 0, 0.1)
    for rate in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"\blearning_rate\b"):
            train_adapted_model(model, batches(), 1, rate)
    with pytest.raises(ValueError, match=r"\btrain_loader\b"):
        train_adapted_model(model, [], 1, 0.1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\bmodel\b"):
        train_adapted_model(model, batches(), 1, 0.1)
