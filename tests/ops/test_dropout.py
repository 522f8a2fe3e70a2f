"""The dropout contract: bit for bit its description, statistically sound, and its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dropout
from fastattn.arguments import AttentionDropout, TokenDropout
from fastattn.dropout import ADJACENT, STRIDED, TokenRows
from fastattn.extension import loading
from fastattn.pytorch.dropout_factor import twister_decisions
from tests import helpers, reference

SEEDS = (0, 1, 2**32 + 5, 2**62, 2**62 + 987654321, 2**63 - 1)
PROBABILITIES = (0.0, 3e-5, 1 / 16384, 0.1, 0.5, 0.999, 1.0)
TOKEN_SITES = {
    "activation": (dropout.activation_decisions, reference.activation_keep, STRIDED),
    "residual": (dropout.residual_decisions, reference.residual_keep, ADJACENT),
}
token_sites = pytest.mark.parametrize("kind", TOKEN_SITES)


def tensor(seed: int) -> Tensor:
    return torch.tensor([seed])


@pytest.fixture(params=["python", "extension"])
def attention(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """(seed, site, p, shape, head_offset) -> decisions, of each implementation."""
    if request.param == "python":
        return lambda seed, *rest: dropout.attention_decisions(tensor(seed), *rest)
    if not loading.available():
        pytest.skip(str(loading.why_not()))

    def decide(seed: int, site: int, p: float, shape: tuple[int, ...], head: int = 0) -> Tensor:
        factor = AttentionDropout(p, tensor(seed), site, head).factor(shape, torch.float64)
        return torch.ones(shape, dtype=torch.bool) if factor is None else factor > 0

    return decide


# ------------------------------------------------------------------- bit for bit the contract


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 63, 127), (1, 2, 17, 1000), (3, 1, 127, 9), (2, 2, 8, 16)]
)
def test_attention(attention: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> None:
    for site, p, head in ((0, 0.1, 0), (4 * 47, 0.5, 5), (65535, 0.3, 65000)):
        expected = reference.attention_keep(seed, site, p, shape, head)
        assert torch.equal(attention(seed, site, p, shape, head), expected)


@token_sites
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 21, 127), (2, 5, 1000), (5, 2, 63), (1, 9, 64)])
def test_tokens(kind: str, shape: tuple[int, int, int], seed: int) -> None:
    decide, keep, _ = TOKEN_SITES[kind]
    rows, columns = shape[0] * shape[1], shape[2]
    for site, p, offset in ((1, 0.1, 0), (65535, 0.5, 77), (5, 0.3, 2**20 + 3)):
        for batch_first in (True, False):
            where = reference.coordinates(shape[:2], batch_first)
            expected = keep(seed, site, p, *where, torch.arange(columns) + offset)
            row_map = TokenRows(None, shape[1], batch_first)
            actual = decide(tensor(seed), site, p, (rows, columns), row_map, offset)
            assert torch.equal(actual, expected)


@token_sites
@pytest.mark.parametrize("p", PROBABILITIES)
def test_probabilities(kind: str, p: float) -> None:
    decide, keep, grouping = TOKEN_SITES[kind]
    expected = keep(3, 1, p, *reference.coordinates((50, 41)), torch.arange(100))
    rows = TokenRows(None, 41)
    assert torch.equal(decide(tensor(3), 1, p, (2050, 100), rows), expected)
    factor = TokenDropout(p, tensor(3), 1, row_period=41).factor(
        torch.empty(2050, 100), grouping, torch.float64
    )
    if factor is None:
        assert expected.all()
    else:
        assert torch.equal(factor, reference.factor(expected, p))


@token_sites
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_no_elements(kind: str, shape: tuple[int, int]) -> None:
    decide, _, grouping = TOKEN_SITES[kind]
    assert decide(tensor(1), 0, 0.5, shape, TokenRows(None, 0)).shape == shape
    factor = TokenDropout(0.5, tensor(1)).factor(torch.empty(shape), grouping, torch.float32)
    assert factor.shape == shape


def test_rows_know_position_and_sequence() -> None:
    position, sequence = TokenRows(None, 3).coordinates(7, torch.device("cpu"))
    assert position.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sequence.tolist() == [0, 0, 0, 1, 1, 1, 2]
    position, sequence = TokenRows(torch.tensor([5, 0, 4]).int(), 3, False).coordinates(
        3, torch.device("cpu")
    )
    assert (position.tolist(), sequence.tolist()) == ([1, 0, 1], [2, 0, 1])


# ------------------------------------------------------- what slicing and packing do not change


def test_attention_depends_on_coordinates_only(attention: Callable[..., Tensor]) -> None:
    whole = attention(7, 0, 0.3, (3, 6, 130, 257), 0)
    assert torch.equal(attention(7, 0, 0.3, (2, 6, 63, 100), 0), whole[:2, :, :63, :100])
    for first in (1, 4):
        part = attention(7, 0, 0.3, (3, 6 - first, 130, 257), first)
        assert torch.equal(part, whole[:, first:])


@token_sites
def test_columns_and_rows_may_be_sliced(kind: str) -> None:
    decide, _, _ = TOKEN_SITES[kind]
    rows = TokenRows(None, 10)
    whole = decide(tensor(7), 1, 0.3, (40, 300), rows)
    for first in (1, 8, 63, 64, 65, 130):
        part = decide(tensor(7), 1, 0.3, (40, 300 - first), rows, first)
        assert torch.equal(part, whole[:, first:])
    assert torch.equal(decide(tensor(7), 1, 0.3, (25, 100), rows), whole[:25, :100])


@token_sites
@pytest.mark.parametrize("batch_first", [True, False])
def test_packing_changes_nothing(kind: str, batch_first: bool) -> None:
    decide, _, _ = TOKEN_SITES[kind]
    real = torch.arange(33) < torch.tensor([7, 0, 33, 1, 12])[:, None]
    real = real if batch_first else real.t()
    index = real.flatten().nonzero().flatten().to(torch.int32)
    period = real.shape[1]
    padded = decide(tensor(7), 1, 0.3, (real.numel(), 127), TokenRows(None, period, batch_first))
    rows = TokenRows(index, period, batch_first)
    packed = decide(tensor(7), 1, 0.3, (len(index), 127), rows)
    assert torch.equal(packed, padded[real.flatten()])


@token_sites
def test_padding_and_transposing_change_nothing(kind: str) -> None:
    decide, _, _ = TOKEN_SITES[kind]
    batch = decide(tensor(7), 1, 0.3, (5 * 33, 127), TokenRows(None, 33)).view(5, 33, 127)
    longer = decide(tensor(7), 1, 0.3, (5 * 50, 127), TokenRows(None, 50)).view(5, 50, 127)
    rows = TokenRows(None, 5, batch_first=False)
    sequence = decide(tensor(7), 1, 0.3, (33 * 5, 127), rows).view(33, 5, 127)
    assert torch.equal(longer[:, :33], batch)
    assert torch.equal(sequence.transpose(0, 1), batch)


# --------------------------------------------------------------------------------- statistics

FALSE_ALARM = 1e-6  # probability that a whole family of tests fails by chance
P = 0.1


def bound(tests: int) -> float:
    """What no standard normal of ``tests`` may exceed in size (Bonferroni)."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * tests))


def assert_binomial(keep: Tensor, dims: tuple[int, ...], p: float = P) -> None:
    """Kept counts over ``dims`` are binomial: each near its mean, and spread as they should be."""
    kept = 1 - dropout.threshold(p) / dropout.RESOLUTION
    trials = math.prod(keep.shape[d] for d in dims)
    counts = keep.sum(dims, dtype=torch.float64).flatten()
    scores = (counts - trials * kept) / math.sqrt(trials * kept * (1 - kept))
    assert scores.abs().max() < bound(len(scores))
    if len(scores) >= 30:  # a chi-squared of len(scores) degrees, by its normal approximation
        spread = (scores.square().sum() - len(scores)) / math.sqrt(2 * len(scores))
        assert abs(spread) < bound(1)


def assert_independent(pairs: Iterator[tuple[Tensor, Tensor]], p: float = P) -> None:
    """The decisions of every pair of tensors are uncorrelated."""
    kept = 1 - dropout.threshold(p) / dropout.RESOLUTION
    pairs = list(pairs)
    for a, b in pairs:
        both, first, second = (x.sum().item() for x in (a & b, a, b))
        covariance = both - kept * (first + second) + a.numel() * kept**2
        score = covariance / (kept * (1 - kept) * math.sqrt(a.numel()))
        assert abs(score) < bound(len(pairs))


def contract_samples() -> dict[str, Callable[[int, int], Tensor]]:
    """(seed, site) -> (sequences, heads, rows, columns) bool, more than a million each."""

    def tokens(decide: Callable[..., Tensor]) -> Callable[[int, int], Tensor]:
        def sample(seed: int, site: int) -> Tensor:
            keep = decide(tensor(seed), site, P, (16 * 128, 520), TokenRows(None, 128))
            return keep.view(16, 1, 128, 520)

        return sample

    def scores(seed: int, site: int) -> Tensor:
        return dropout.attention_decisions(tensor(seed), site, P, (4, 8, 160, 208))

    kinds = {kind: tokens(decide) for kind, (decide, _, _) in TOKEN_SITES.items()}
    return {"attention": scores, **kinds}


contract_kinds = pytest.mark.parametrize("kind", contract_samples())


@contract_kinds
@pytest.mark.parametrize("seed", [0, 2**62 + 11])
def test_decisions_are_binomial(kind: str, seed: int) -> None:
    keep = contract_samples()[kind](seed, 5)
    assert keep.numel() > 1e6
    everything = (0, 1, 2, 3)
    assert_binomial(keep, everything)
    for dim in everything:  # per sequence, head, row and column
        assert_binomial(keep, tuple(d for d in everything if d != dim))
    assert_binomial(keep, (3,))  # each row of each head
    assert_binomial(keep, (2,))


@contract_kinds
def test_decisions_are_independent(kind: str) -> None:
    sample = contract_samples()[kind]
    keep = sample(3, 4)
    others = [sample(3, 5), sample(3, 4 + 65536 // 4), sample(4, 4), sample(3 + 2**32, 4)]
    others += [sample(3, 6), sample(2**62 + 3, 4)]
    assert_independent(combinations([keep, *others], 2))
    assert_independent(combinations(keep.unbind(0)[:6], 2))
    assert_independent(combinations(keep.unbind(1)[:6], 2))
    lags = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 32, 63, 64, 65)
    assert_independent((keep[:, :, lag:], keep[:, :, :-lag]) for lag in lags)
    assert_independent((keep[..., lag:], keep[..., :-lag]) for lag in lags)
    assert_independent((keep[:, :, lag:, lag:], keep[:, :, :-lag, :-lag]) for lag in lags)


def test_kinds_of_site_are_independent() -> None:
    """Sites of different kinds, and head 1 of a site and head 0 of another."""
    samples = [
        sample(3, i).flatten()[: 10**6] for i, sample in enumerate(contract_samples().values())
    ]
    assert_independent(combinations(samples, 2))


@pytest.mark.parametrize("p", [1e-3, 0.1, 1 / 3, 0.5, 0.9])
def test_dropout_is_unbiased(p: float) -> None:
    thr = round(p * 16384)
    assert dropout.threshold(p) == thr
    assert dropout.keep_scale(p) == 16384 / (16384 - thr)
    for decide, _, _ in TOKEN_SITES.values():
        keep = decide(tensor(9), 1, p, (2000, 1000), TokenRows(None, 100))
        assert_binomial(keep, (0, 1), p)
        kept = 1 - thr / 16384
        error = bound(1) * math.sqrt(kept * (1 - kept) / keep.numel())
        assert abs(dropout.keep_scale(p) * keep.double().mean().item() - 1) < error / kept


def test_the_ends_of_the_scale() -> None:
    assert (dropout.threshold(0.0), dropout.keep_scale(0.0)) == (0, 1.0)
    assert (dropout.threshold(3e-5), dropout.keep_scale(3e-5)) == (0, 1.0)
    assert (dropout.threshold(1.0), dropout.keep_scale(1.0)) == (16384, 0.0)


def test_sites_are_numbered_within_a_stack() -> None:
    kinds = (dropout.ATTENTION, dropout.ACTIVATION, dropout.RESIDUAL_1, dropout.RESIDUAL_2)
    sites = [dropout.site_of(layer, kind) for layer in range(3) for kind in kinds]
    assert sites == list(range(12))


# ------------------------------------------------------------- negative seeds: torch's twister


def test_twister_decisions_replay_and_differ_by_seed_and_site() -> None:
    shape = (50, 20, 1001)
    keep = twister_decisions(-5, 3, P, shape)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(twister_decisions(-5, 3, P, shape), keep)
    others = [twister_decisions(*x, P, shape) for x in ((-6, 3), (-5, 4), (-(2**62), 3))]
    assert_independent(combinations([keep, *others], 2))
    assert torch.equal(twister_decisions(-5, 3, 1.0, shape), torch.zeros(shape).bool())
    assert twister_decisions(-5, 3, 3e-5, shape).all()


def test_twister_decisions_are_binomial() -> None:
    keep = twister_decisions(-5, 3, P, (32, 128, 300))
    assert keep.numel() > 1e6
    for dims in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (2,)):
        assert_binomial(keep, dims)
    assert_independent((keep[..., lag:], keep[..., :-lag]) for lag in (1, 2, 3, 4, 5, 8, 16))


def test_twister_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    twister_decisions(-5, 3, P, (10, 10))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (5,), (2, 3)])
def test_twister_of_few_elements(shape: tuple[int, ...]) -> None:
    assert twister_decisions(-1, 0, 0.5, shape).shape == shape


@token_sites
def test_a_negative_seed_means_the_twister(kind: str) -> None:
    grouping = TOKEN_SITES[kind][2]
    expected = reference.factor(twister_decisions(-5, 3, P, (12, 100)), P)
    factor = TokenDropout(P, tensor(-5), 3).factor(torch.empty(3, 4, 100), grouping, torch.float64)
    assert torch.equal(factor.view(12, 100), expected)
    expected = reference.factor(twister_decisions(-5, 3, P, (2, 3, 4, 5)), P)
    factor = AttentionDropout(P, tensor(-5), 3).factor((2, 3, 4, 5), torch.float64)
    assert torch.equal(factor, expected)


# -------------------------------------------------------------------------------------- seeds


@pytest.fixture(params=["with extension", "without extension"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether ``draw_seed`` finds the C++ extension; it asks ``loading.why_not`` alone."""
    built = request.param == "with extension"
    monkeypatch.setattr(loading, "why_not", lambda: None if built else "not built")
    return built


def test_drawn_seeds(built: bool) -> None:
    device = torch.device("cpu")
    torch.manual_seed(5)
    first, second = dropout.draw_seed(device), dropout.draw_seed(device)
    torch.manual_seed(5)
    again = dropout.draw_seed(device)
    assert isinstance(first, Tensor)
    assert first.shape == (1,) and first.dtype == torch.int64 and first.device == device
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert (first >= 0) == built
    torch.manual_seed(5)
    assert torch.equal(fastattn.draw_seed("cpu"), first)
    dropout.check_seed(first)


def test_drawn_seeds_cover_63_bits(built: bool) -> None:
    seeds = torch.cat([dropout.draw_seed(torch.device("cpu")) for _ in range(200)])
    bits = (seeds[:, None] >> torch.arange(63)) & 1
    assert ((bits.sum(0) > 50) & (bits.sum(0) < 150)).all()
    assert len(seeds.unique()) == 200


def test_seeds_are_checked() -> None:
    assert dropout.check_seed(torch.tensor(3)).item() == 3
    for seed in (3, None, "3", 3.0):
        with pytest.raises(TypeError, match=f"seed must be .* not {type(seed).__name__}"):
            dropout.check_seed(seed)
    for seed in (torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([]), tensor(1).int()):
        with pytest.raises(ValueError, match="seed must be .* but got torch"):
            dropout.check_seed(seed)


def test_sites_are_checked() -> None:
    for site in (-1, 2**16):
        with pytest.raises(ValueError, match=f"site must be between 0 and 65535, but got {site}"):
            dropout.check_site(site)
    with pytest.raises(TypeError, match="site must be an integer, not float"):
        dropout.check_site(1.0)
    for site in (0, 2**16 - 1):
        dropout.check_site(site)


# ------------------------------------------------------------------------------- registration


def test_registration() -> None:
    """torch's own checks of the two ops that write dropout's multiplier."""
    index = torch.arange(6).int()
    for seed in (tensor(5), tensor(-5)):
        sample = (0.1, seed, 3, 1, [2, 3, 5, 7], torch.float32)
        helpers.assert_registered("attention_dropout_factor", sample)
        for grouping in (STRIDED, ADJACENT):
            rows = (0.1, seed, 3, index, 2, False)
            samples = (
                (*rows, 5, grouping, 6, 9, torch.bfloat16),
                (*rows, 0, grouping, 6, 64, torch.float32),
            )
            helpers.assert_registered("token_dropout_factor", *samples)


def test_a_seed_for_each_sample() -> None:
    """Under ``vmap`` over seeds every sample drops by its own."""
    seeds = torch.tensor([[3], [2**62 + 3], [-3]])

    def scores(seed: Tensor) -> Tensor:
        return AttentionDropout(P, seed).factor((2, 2, 17, 9), torch.float32)

    together = torch.vmap(scores)(seeds)
    assert torch.equal(together, torch.stack([scores(seed) for seed in seeds]))
