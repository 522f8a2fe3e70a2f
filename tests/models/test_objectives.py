"""Masked tokens and the order of segments: what is drawn, and what the losses are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.objectives import (
    mask_tokens,
    masked_language_model_loss,
    sentence_order_loss,
    sentence_order_pairs,
)

VOCABULARY, PAD, CLS, SEP, MASK = 40, 0, 1, 2, 3
SPECIAL = (PAD, CLS, SEP)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------- masked tokens


def test_what_is_chosen_and_what_becomes_of_it() -> None:
    tokens = torch.randint(4, VOCABULARY, (400, 500), generator=seeded(1))
    tokens[:, 0], tokens[:, -1], tokens[:, 100:120] = CLS, SEP, PAD
    before = tokens.clone()
    found = mask_tokens(tokens, VOCABULARY, MASK, special_ids=SPECIAL, generator=seeded())
    assert torch.equal(tokens, before)
    assert torch.equal(tokens.flatten()[found.chosen], found.targets)
    assert not torch.isin(found.targets, torch.tensor([*SPECIAL, MASK])).any()
    untouched = torch.ones(tokens.numel(), dtype=torch.bool)
    untouched[found.chosen] = False
    assert torch.equal(found.tokens.flatten()[untouched], tokens.flatten()[untouched])
    ordinary = int((tokens >= 4).sum())
    became = found.tokens.flatten()[found.chosen]
    # A random token is the old one in one of 36 cases.
    expected = {
        "chosen": (len(found.chosen), ordinary, 0.15),
        "masked": (int((became == MASK).sum()), len(became), 0.8),
        "kept": (int((became == found.targets).sum()), len(became), 0.1 + 0.1 / 36),
    }
    for name, (count, of, p) in expected.items():
        assert abs(count - of * p) < 5 * math.sqrt(of * p * (1 - p)), name
    other = became[(became != MASK) & (became != found.targets)]
    assert not torch.isin(other, torch.tensor([*SPECIAL, MASK])).any()
    assert len(other.unique()) == 36


def test_decisions_are_those_of_the_generator() -> None:
    tokens = torch.randint(4, VOCABULARY, (3, 50))
    one, two, other = (
        mask_tokens(tokens, VOCABULARY, MASK, generator=seeded(seed)) for seed in (5, 5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_shares(dtype: torch.dtype) -> None:
    tokens = torch.randint(4, VOCABULARY, (7, 11), dtype=dtype)
    none = mask_tokens(tokens, VOCABULARY, MASK, probability=0.0)
    assert torch.equal(none.tokens, tokens) and none.tokens.dtype == dtype
    assert len(none.chosen) == len(none.targets) == 0
    everything = mask_tokens(tokens, VOCABULARY, MASK, probability=1.0, masked=1.0, replaced=0.0)
    assert (everything.tokens == MASK).all() and everything.tokens.dtype == dtype
    assert torch.equal(everything.targets, tokens.flatten().long())
    kept = mask_tokens(tokens, VOCABULARY, MASK, probability=1.0, masked=0.0, replaced=0.0)
    assert torch.equal(kept.tokens, tokens)
    empty = mask_tokens(tokens[:0], VOCABULARY, MASK)
    assert empty.tokens.shape == (0, 11)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"probability": 1.5}, "probability"),
        ({"masked": -0.1}, "masked"),
        ({"replaced": math.nan}, "replaced"),
        ({"masked": 0.8, "replaced": 0.3}, "replaced"),
        ({"mask_id": VOCABULARY}, "mask_id"),
        ({"special_ids": [-1]}, "special_ids"),
        ({"special_ids": range(VOCABULARY)}, "special_ids"),
    ],
)
def test_wrong_arguments_are_named(changes, name) -> None:
    arguments = {"tokens": torch.full((2, 3), 5), "vocab_size": VOCABULARY, "mask_id": MASK}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        mask_tokens(**{**arguments, **changes})
    with pytest.raises(TypeError, match=r"\btokens\b"):
        mask_tokens(**{**arguments, "tokens": torch.zeros(2, 3)})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_chosen_places(reduction: str) -> None:
    tokens = torch.randint(4, VOCABULARY, (5, 9))
    masked = mask_tokens(tokens, VOCABULARY, MASK, probability=0.4, generator=seeded())
    hidden = torch.randn(5, 9, 6, dtype=torch.float64, requires_grad=True)
    output = nn.Linear(6, VOCABULARY, dtype=torch.float64)
    seen = []

    def count(states):
        seen.append(states.shape)
        return output(states)

    loss = masked_language_model_loss(hidden, masked, count, reduction=reduction)
    assert seen == [(len(masked.chosen), 6)]
    chances = output(hidden).log_softmax(-1)
    chosen = torch.zeros(45, dtype=torch.bool)
    chosen[masked.chosen] = True
    per_token = -chances.gather(-1, tokens.unsqueeze(-1)).flatten()[chosen]
    expected = per_token.sum() if reduction == "sum" else per_token.mean()
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden)[0])


def test_a_loss_without_predictions() -> None:
    tokens = torch.full((2, 3), 5)
    masked = mask_tokens(tokens, VOCABULARY, MASK, probability=0.0)
    hidden = torch.randn(2, 3, 6, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_language_model_loss(hidden, masked, nn.Linear(6, VOCABULARY).bfloat16())
    assert loss == 0 and loss.dtype == torch.float32
    loss.backward()
    assert (hidden.grad == 0).all()


def test_wrong_states_are_named() -> None:
    masked = mask_tokens(torch.full((2, 3), 5), VOCABULARY, MASK)
    with pytest.raises(ValueError, match=r"\bhidden\b"):
        masked_language_model_loss(torch.randn(3, 2, 6), masked, nn.Linear(6, VOCABULARY))
    with pytest.raises(ValueError, match=r"\breduction\b"):
        masked_language_model_loss(
            torch.randn(2, 3, 6), masked, nn.Linear(6, VOCABULARY), reduction="none"
        )


# --------------------------------------------------------------------------------- sentence order

IDS = {"cls_id": CLS, "sep_id": SEP, "pad_id": PAD}


def test_pairs_are_marked_and_padded() -> None:
    first = [torch.tensor([10, 11]), torch.tensor([12]), torch.tensor([], dtype=torch.int64)]
    second = [torch.tensor([20]), torch.tensor([21, 22, 23]), torch.tensor([24])]
    pairs = sentence_order_pairs(first, second, **IDS, length=9, generator=seeded())
    assert pairs.tokens.shape == pairs.key_padding_mask.shape == (3, 9)
    for i, swapped in enumerate(pairs.labels.tolist()):
        one, other = (second[i], first[i]) if swapped else (first[i], second[i])
        row = [CLS, *one.tolist(), SEP, *other.tolist(), SEP]
        assert pairs.tokens[i].tolist() == row + [PAD] * (9 - len(row))
        assert pairs.key_padding_mask[i].tolist() == [False] * len(row) + [True] * (9 - len(row))
    assert sentence_order_pairs(first, second, **IDS).tokens.shape == (3, 7)


def test_both_orders_are_as_likely() -> None:
    segments = [torch.tensor([5])] * 4000
    labels = sentence_order_pairs(segments, segments, **IDS, generator=seeded()).labels
    assert abs(int(labels.sum()) - 2000) < 5 * math.sqrt(1000)
    again = sentence_order_pairs(segments, segments, **IDS, generator=seeded()).labels
    assert torch.equal(labels, again)


def test_wrong_segments_are_named() -> None:
    one = [torch.tensor([5, 6])]
    with pytest.raises(ValueError, match=r"\bsecond\b"):
        sentence_order_pairs(one, one * 2, **IDS)
    with pytest.raises(ValueError, match=r"\blength\b"):
        sentence_order_pairs(one, one, **IDS, length=6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_loss_is_that_of_the_first_token(batch_first: bool) -> None:
    hidden, labels = torch.randn(4, 7, 6), torch.tensor([0, 1, 1, 0])
    head = nn.Linear(6, 2)
    given = hidden if batch_first else hidden.transpose(0, 1)
    loss = sentence_order_loss(given, labels, head, batch_first=batch_first)
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden[:, 0]), labels))
    with pytest.raises(ValueError, match=r"\blabels\b"):
        sentence_order_loss(given, labels, head, batch_first=not batch_first)
