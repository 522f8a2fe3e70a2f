"""The C++ extension decides exactly as ``fastattn.dropout`` does, and its absence is explained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dropout, dropout_add
from fastattn.arguments import NormArguments
from fastattn.extension import dropout_factor, inference, loading
from fastattn.extension import layer_norm as extension_norms
from tests import reference

needs_extension = pytest.mark.skipif(not loading.available(), reason=str(loading.why_not()))

DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEEDS = (0, 1, 2**32 + 5, 2**62 + 987654321, 2**63 - 1)
PROBABILITIES = (1e-4, 0.1, 0.5, 1.0)
DECISIONS = {
    dropout.STRIDED: dropout.activation_decisions,
    dropout.ADJACENT: dropout.residual_decisions,
}


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in which an element that was never written is seen: neither zero nor a scale."""
    return torch.full(shape, True if dtype == torch.bool else 77.0, dtype=dtype)


def expected(decisions: Tensor, kept: float, dtype: torch.dtype) -> Tensor:
    return torch.where(decisions, torch.tensor(kept, dtype=dtype), torch.tensor(0, dtype=dtype))


def check_attention(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 1234,
    site: int = 8,
    dropout_p: float = 0.1,
    head_offset: int = 0,
) -> None:
    scale = dropout.keep_scale(dropout_p)
    out = poisoned(shape, dtype)
    threshold = dropout.threshold(dropout_p)
    returned = dropout_factor.write_attention_factor(out, scale, seed, site, threshold, head_offset)
    decisions = dropout.attention_decisions(
        torch.tensor([seed]), site, dropout_p, shape, head_offset
    )
    assert returned is out
    assert torch.equal(out, expected(decisions, scale, dtype))


def check_token(
    shape: tuple[int, int],
    grouping: int,
    rows: dropout.TokenRows,
    dtype: torch.dtype = torch.float32,
    seed: int = 1234,
    site: int = 9,
    dropout_p: float = 0.1,
    column_offset: int = 0,
) -> None:
    scale = dropout.keep_scale(dropout_p)
    out = poisoned(shape, dtype)
    threshold = dropout.threshold(dropout_p)
    returned = dropout_factor.write_token_factor(
        out, scale, seed, site, threshold, grouping, *rows, column_offset
    )
    decide = DECISIONS[grouping]
    decisions = decide(torch.tensor([seed]), site, dropout_p, shape, rows, column_offset)
    assert returned is out
    assert torch.equal(out, expected(decisions, scale, dtype))


@needs_extension
@pytest.mark.parametrize("seqlen_k", [1, 7, 63, 127, 256, 257, 1000])
@pytest.mark.parametrize("seqlen_q", [1, 8, 9, 63, 127])
def test_attention_shapes(seqlen_q: int, seqlen_k: int, threads: int) -> None:
    check_attention((2, 3, seqlen_q, seqlen_k))


@needs_extension
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
def test_attention_empty(shape: tuple[int, int, int, int]) -> None:
    check_attention(shape)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", PROBABILITIES)
def test_attention_dtypes(dtype: torch.dtype, dropout_p: float, threads: int) -> None:
    check_attention((2, 2, 100, 150), dtype, dropout_p=dropout_p)


@needs_extension
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("head_offset", [0, 5])
def test_attention_seeds_sites_and_heads(seed: int, head_offset: int) -> None:
    for site in (0, 3, 4 * 47):
        check_attention((3, 2, 33, 65), seed=seed, site=site, head_offset=head_offset)


@needs_extension
@pytest.mark.parametrize("grouping", DECISIONS)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 127, 512, 1000, 3072])
@pytest.mark.parametrize("rows", [1, 63])
def test_token_shapes(grouping: int, rows: int, columns: int, threads: int) -> None:
    check_token((rows, columns), grouping, dropout.TokenRows(None, 21))


@needs_extension
@pytest.mark.parametrize("grouping", DECISIONS)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_token_empty(grouping: int, shape: tuple[int, int]) -> None:
    check_token(shape, grouping, dropout.TokenRows(None, 0))


@needs_extension
@pytest.mark.parametrize("grouping", DECISIONS)
@pytest.mark.parametrize("column_offset", [1, 8, 63, 64, 100, 511, 513])
@pytest.mark.parametrize("columns", [1, 63, 600])
def test_token_column_offsets(grouping: int, columns: int, column_offset: int) -> None:
    check_token((9, columns), grouping, dropout.TokenRows(None, 3), column_offset=column_offset)


@needs_extension
@pytest.mark.parametrize("grouping", DECISIONS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_token_rows(grouping: int, batch_first: bool, packed: bool, threads: int) -> None:
    sequences, positions, columns = 13, 50, 127
    row_index = None
    if packed:
        row_index = torch.randperm(sequences * positions)[:401].to(torch.int32)
    period = positions if batch_first else sequences
    count = 401 if packed else sequences * positions
    rows = dropout.TokenRows(row_index, period, batch_first)
    check_token((count, columns), grouping, rows)


@needs_extension
@pytest.mark.parametrize("grouping", DECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_dtypes_and_seeds(grouping: int, dtype: torch.dtype) -> None:
    rows = dropout.TokenRows(None, 5)
    for seed, dropout_p in product(SEEDS, PROBABILITIES):
        check_token((15, 200), grouping, rows, dtype, seed, dropout_p=dropout_p)


@needs_extension
def test_calls_from_several_threads_agree() -> None:
    """The interpreter's lock is released, so calls overlap."""
    from concurrent.futures import ThreadPoolExecutor

    def factor(seed: int) -> Tensor:
        out = torch.empty(4, 4, 100, 100)
        return dropout_factor.write_attention_factor(out, 2.0, seed, 0, 8192)

    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(factor, range(16)))
    for seed, out in enumerate(concurrent):
        assert torch.equal(out, factor(seed))


@needs_extension
def test_wrong_arguments_are_named() -> None:
    square = torch.empty(4, 4)
    with pytest.raises(ValueError, match="out must be a contiguous tensor on the CPU"):
        dropout_factor.write_token_factor(square.t()[:, :2], 1.0, 0, 0, 5, dropout.ADJACENT)
    with pytest.raises(ValueError, match="out must have 4 dimensions"):
        dropout_factor.write_attention_factor(square, 1.0, 0, 0, 5)
    with pytest.raises(TypeError, match="out must be bool"):
        dropout_factor.write_token_factor(square.int(), 1.0, 0, 0, 5, dropout.ADJACENT)
    with pytest.raises(ValueError, match="grouping must be"):
        dropout_factor.write_token_factor(square, 1.0, 0, 0, 5, 2)
    for row_index in (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"row_index must be int32 of shape \(4,\)"):
            dropout_factor.write_token_factor(square, 1.0, 0, 0, 5, dropout.ADJACENT, row_index)


WITHOUT_EXTENSION = """
import sys
sys.modules["fastattn._C"] = None  # importing it raises ImportError
import torch
from fastattn import dropout
from fastattn.extension import dropout_factor, loading
assert not loading.available()
assert "C++ extension" in loading.why_not(), loading.why_not()
assert dropout.draw_seed(torch.device("cpu")).item() < 0
try:
    dropout_factor.write_attention_factor(torch.empty(1, 1, 1, 1), 1.0, 0, 0, 5)
except RuntimeError as error:
    assert str(error) == loading.why_not()
else:
    raise AssertionError("attention_factor ran without the extension")
"""


def test_absence_is_explained() -> None:
    root = Path(loading.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_extension
def test_extension_of_another_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CONTRACT_VERSION", dropout.CONTRACT_VERSION + 1)
    loaded, reason = loading._load()
    assert loaded is None
    assert "dropout contract" in reason


SHAPES = [(1, 1), (3, 7), (64, 384), (2, 65, 768), (513, 127), (0, 8), (5, 0)]


def vector(size: int, present: bool) -> Tensor | None:
    return torch.randn(size) if present else None


@needs_extension
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_add_layer_norm_is_as_exact_as_torch(shape, affine, threads) -> None:
    x, residual = torch.randn(shape), 3 + torch.randn(shape)
    x_bias, weight, bias = (vector(shape[-1], affine) for _ in range(3))
    branch = x.double() + (0 if x_bias is None else x_bias.double())
    exact = reference.layer_norm(branch + residual.double(), weight, bias)
    total = x + residual if x_bias is None else x + x_bias + residual
    theirs = F.layer_norm(total, shape[-1:], weight, bias)
    norm = NormArguments(weight, bias, 1e-5, torch.float32)
    out = extension_norms.cpu.add_layer_norm_(x, x_bias, residual, norm)
    assert out is x
    if x.numel():
        error, allowed = ((y.double() - exact).abs().max() for y in (out, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@needs_extension
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_add_bias_relu_is_torchs(shape, biased, threads) -> None:
    x, bias = torch.randn(shape), vector(shape[-1], biased)
    if x.numel() > 4:
        x.view(-1)[[0, 2, 3]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    wanted = torch.relu(x if bias is None else x + bias)
    assert inference.add_bias_relu_(x, bias) is x
    torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)


@needs_extension
def test_inference_arguments_are_checked() -> None:
    x = torch.randn(4, 8)
    for wrong in (torch.randn(7), torch.randn(8).double(), torch.randn(16)[::2]):
        with pytest.raises(ValueError, match="bias must be"):
            inference.add_bias_relu_(x, wrong)
    with pytest.raises(ValueError, match="contiguous"):
        inference.add_bias_relu_(torch.randn(8, 4).t(), None)
    assert not inference.runs_inference(x, x.double())


def floats_to_round(dtype: torch.dtype) -> Tensor:
    """fp32 numbers around every value of a 16-bit dtype and halfway between neighbours."""
    every = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    neighbour = (torch.arange(2**16) + 1).to(torch.uint16).view(dtype).float()
    middle = every / 2 + neighbour / 2
    near = [torch.nextafter(x, torch.tensor(y)) for x in (every, middle) for y in (-1e38, 1e38)]
    return torch.cat([every, middle, *near])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.uint16).view(dtype).view(16, 4096)
    again = dropout_add(every, None, backend="cpu")
    torch.testing.assert_close(again, every, rtol=0, atol=0, equal_nan=True)
    residual = torch.zeros(16, 4096)
    widened = dropout_add(every, residual, backend="cpu")
    torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
    grads = floats_to_round(dtype)[None]
    x = torch.zeros_like(grads, dtype=dtype).requires_grad_()
    total = dropout_add(x, torch.zeros_like(grads), backend="cpu")
    (narrowed,) = torch.autograd.grad(total, x, grads)
    torch.testing.assert_close(narrowed, grads.to(dtype), rtol=0, atol=0, equal_nan=True)
