"""What is called a regression: on results whose true change is known."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.compare import change_of_median, compare, print_comparison
from benchmarks.environment import environment

MARGIN = 0.05
PROVIDERS = ("eager", "eager compiled", "fastattn", "fastattn compiled")
CASES = ("d384 S128 B8 fp32", "d768 S128 B8 fp32")
MODES = ("forward", "backward")


@pytest.fixture(scope="module")
def make():
    """`make(seed, ...)` returns synthetic results of layer_norm, ours twice as fast as eager.

    The machine's speed wanders from round to round, by `drift` in all, and each sample has `noise`
    of its own. `scale` multiplies the true times of a provider.
    """
    here = environment("cpu")

    def results(seed, rounds=11, noise=0.03, drift=1.0, scale=None, providers=PROVIDERS):
        generator = np.random.default_rng(seed)
        rows = []
        for case in CASES:
            for mode in MODES:
                machine = drift * np.exp(generator.normal(0, 0.05, rounds).cumsum())
                for provider in providers:
                    true = (1.0 if "fastattn" in provider else 2.0) * (scale or {}).get(provider, 1)
                    samples = true * machine * (1 + noise * generator.standard_normal(rounds))
                    rows.append(row(case, mode, provider, samples))
        return {
            "environment": copy.deepcopy(here),
            "method": {"rounds": rounds},
            "cases": [],
            "rows": rows,
        }

    return results


def row(case: str, mode: str, provider: str, samples: np.ndarray) -> dict:
    return {
        **{"op": "layer_norm", "case": case, "mode": mode, "launch": "eager"},
        **{"provider": provider, "status": "ok", "reason": None},
        **{"peak_bytes": 1_000_000, "saved_bytes": 400_000, "launches": 5},
        **{"median_ms": float(np.median(samples)), "samples_ms": samples.tolist()},
    }


def verdicts(comparison) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for change in comparison.changes:
        found.setdefault(change.new["provider"], set()).add(change.verdict)
    return found


def ours(results: dict, **changes) -> dict:
    """The first row of fastattn's, with some values changed."""
    found = next(row for row in results["rows"] if row["provider"] == "fastattn")
    found.update(changes)
    return found


def printed(comparison, width: int = 200) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=width))
    return stream.getvalue()


def test_noise_and_a_machine_half_as_fast_are_no_regression(make):
    quiet = 0
    for seed in range(100):
        comparison = compare(make(seed), make(1000 + seed, drift=2.0), MARGIN)
        assert len(comparison.changes) == 8
        quiet += not comparison.regressions
    assert quiet >= 95


def test_a_true_loss_of_15_percent_is_found(make):
    found = 0
    for seed in range(20):
        slower = make(1000 + seed, drift=0.5, scale={"fastattn": 1 / 0.85})
        changes = compare(make(seed), slower, MARGIN).changes
        found += sum(c.verdict == "regression" for c in changes if c.new["provider"] == "fastattn")
    assert found >= 0.9 * 20 * 4


def test_a_loss_within_the_margin_is_none(make):
    loss_of_3_percent = {"fastattn": 1 / 0.97}
    old = make(0, rounds=41, noise=0.005)
    new = make(1, rounds=41, noise=0.005, scale=loss_of_3_percent)
    assert verdicts(compare(old, new, MARGIN))["fastattn"] == {"same"}
    assert verdicts(compare(old, new, 0.01))["fastattn"] == {"regression"}


def test_an_improvement_is_no_regression(make):
    new = make(1, noise=0.01, scale={"fastattn": 0.7})
    comparison = compare(make(0, noise=0.01), new, MARGIN)
    assert verdicts(comparison) == {"fastattn": {"improvement"}, "fastattn compiled": {"same"}}
    assert not comparison.regressions
    assert all(c.reasons == ("faster",) for c in comparison.with_verdict("improvement"))


def test_like_is_compared_with_like(make):
    """A compiler that makes the compiled baseline faster touches our compiled rows alone."""
    new = make(1, noise=0.01, scale={"eager compiled": 0.7})
    comparison = compare(make(0, noise=0.01), new, MARGIN)
    assert verdicts(comparison) == {"fastattn": {"same"}, "fastattn compiled": {"regression"}}
    assert {(c.new["provider"], c.baseline) for c in comparison.changes} == {
        ("fastattn", "eager"),
        ("fastattn compiled", "eager compiled"),
    }


def test_without_its_twin_the_eager_baseline_is_taken(make):
    providers = [name for name in PROVIDERS if name != "eager compiled"]
    new = make(1, noise=0.01, providers=providers)
    comparison = compare(make(0, noise=0.01), new, MARGIN)
    assert {c.baseline for c in comparison.changes} == {"eager"}
    assert verdicts(comparison)["fastattn compiled"] == {"same"}
    assert {row["provider"] for row in comparison.only_old} == {"eager compiled"}


def test_without_a_baseline_speed_is_not_judged_but_counts_are(make):
    old, new = (make(seed, providers=("fastattn",)) for seed in (0, 1))
    ours(new, launches=6)
    comparison = compare(old, new, MARGIN)
    assert [c.verdict for c in comparison.changes] == ["regression", *["no verdict"] * 3]
    assert "no baseline in both files" in printed(comparison)


def test_intervals_cover_the_true_change_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        before, after = generator.normal(2.0, 0.1, 21), generator.normal(1.8, 0.09, 31)
        ratio = change_of_median(before, after)
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        covered += ratio["low"] <= 0.9 <= ratio["high"]
    assert 0.90 <= covered / 300 <= 0.99


def test_the_interval_is_that_of_both_files():
    """The noise of either file alone widens it."""
    generator = np.random.default_rng(0)
    calm, noisy = np.full(11, 2.0), generator.normal(2.0, 0.2, 11)
    for before, after in ((calm, noisy), (noisy, calm)):
        ratio = change_of_median(before, after)
        assert ratio["high"] - ratio["low"] > 0.05
    assert change_of_median(calm, 2 * calm) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_too_few_rounds_and_too_much_noise_give_no_verdict(make):
    short = compare(make(0), make(1, rounds=5, scale={"fastattn": 2.0}), MARGIN)
    assert {c.verdict for c in short.changes} == {"no verdict"}
    assert {c.unjudged for c in short.changes} == {"fewer than 6 rounds"}
    assert all(c.old_speedup and c.new_speedup for c in short.changes)
    noisy = compare(make(0, noise=0.2), make(1, noise=0.2), MARGIN)
    assert {c.unjudged for c in noisy.changes} == {"too noisy"}
    assert printed(noisy).splitlines()[-1] == (
        "0 regressions, 0 improvements in 0 comparisons, 8 rows without verdict"
    )


def test_numbers_of_rounds_may_differ(make):
    old, new = make(0, noise=0.01, rounds=7), make(1, noise=0.01, rounds=21)
    assert {c.verdict for c in compare(old, new, MARGIN).changes} == {"same"}


@pytest.mark.parametrize(
    ("counts", "verdict", "reason"),
    [
        ({"launches": 6}, "regression", "launches 5 → 6"),
        ({"launches": 4}, "improvement", "launches 5 → 4"),
        ({"launches": None}, "same", None),
        ({"saved_bytes": 400_001}, "regression", "saved_bytes 400,000 → 400,001"),
        ({"saved_bytes": 399_999}, "improvement", "saved_bytes 400,000 → 399,999"),
        ({"peak_bytes": 1_050_001}, "regression", "peak_bytes 1,000,000 → 1,050,001"),
        ({"peak_bytes": 1_050_000}, "same", None),
        ({"peak_bytes": 949_999}, "improvement", "peak_bytes 1,000,000 → 949,999"),
        ({"launches": 4, "saved_bytes": 500_000}, "regression", "saved_bytes 400,000 → 500,000"),
    ],
)
def test_counts_are_judged_without_noise(make, counts, verdict, reason):
    old, new = make(0, noise=0.005), make(1, noise=0.005)
    changed = ours(new, **counts)
    comparison = compare(old, new, MARGIN)
    by_verdict = {id(c.new): c for c in comparison.changes}
    change = by_verdict.pop(id(changed))
    assert change.verdict == verdict
    assert change.reasons[:1] == ((reason,) if reason else ())
    assert {c.verdict for c in by_verdict.values()} == {"same"}


def test_counts_of_the_peers_are_not_judged(make):
    old, new = make(0, noise=0.005), make(1, noise=0.005)
    for row in new["rows"]:
        if "fastattn" not in row["provider"]:
            row["saved_bytes"] *= 2
    assert {c.verdict for c in compare(old, new, MARGIN).changes} == {"same"}


@pytest.mark.parametrize("status", ["mismatch", "failed"])
def test_what_was_ok_and_is_wrong_now_is_a_regression(make, status):
    old, new = make(0, noise=0.005), make(1, noise=0.005)
    wrong = ours(new, status=status, reason="output: error [1.0e-01]")
    del wrong["samples_ms"], wrong["median_ms"]
    comparison = compare(old, new, MARGIN)
    (regression,) = comparison.regressions
    assert regression.new is wrong
    assert f"was ok, now {status}: output: error [1.0e-01]" in printed(comparison, width=300)
    assert {c.verdict for c in compare(new, old, MARGIN).changes} == {"improvement", "same"}
    assert {c.verdict for c in compare(new, new, MARGIN).changes} == {"no verdict", "same"}


def test_a_skipped_row_has_no_verdict(make):
    old, new = make(0, noise=0.005), make(1, noise=0.005)
    ours(new, status="skipped", reason="needs a GPU")
    change = compare(old, new, MARGIN).changes[0]
    assert (change.verdict, change.unjudged) == ("no verdict", "was ok, now skipped: needs a GPU")


def test_rows_of_one_file_only_are_listed_and_not_judged(make):
    old, new = make(0, noise=0.005), make(1, noise=0.005)
    gone = [row for row in new["rows"] if row["case"] == CASES[1]]
    new["rows"] = [row for row in new["rows"] if row["case"] == CASES[0]]
    comparison = compare(old, new, MARGIN)
    assert len(comparison.changes) == 4 and not comparison.regressions
    assert (len(comparison.only_old), len(comparison.only_new)) == (len(gone), 0)
    assert (
        "only in the old result, not judged: layer_norm, 8 rows (sizes: d768 S128 B8 fp32; "
        "modes: forward, backward; providers: eager, eager compiled, fastattn, fastattn compiled)"
    ) in printed(comparison)


def test_nothing_in_common_is_an_error(make):
    old, new = make(0), make(1)
    for row in new["rows"]:
        row["case"] = "another"
    with pytest.raises(report.ResultsError, match=r"no row of fastattn in common.*layer_norm"):
        compare(old, new, MARGIN)
    new["rows"] = []
    with pytest.raises(report.ResultsError, match=r"the new one 0 rows \(no op\)"):
        compare(old, new, MARGIN)


@pytest.mark.parametrize(
    ("name", "value"), [("device", "cuda"), ("device_name", "Another CPU"), ("threads", 999)]
)
def test_different_hardware_is_refused(make, name, value):
    old, new = make(0), make(1)
    new["environment"][name] = value
    with pytest.raises(report.ResultsError, match=f"hardware.*{name} is .* {value!r} in the new"):
        compare(old, new, MARGIN)


def test_threads_of_the_host_do_not_matter_on_a_gpu(make):
    old, new = make(0), make(1)
    for results, threads in ((old, 8), (new, 16)):
        results["environment"] |= {"device": "cuda", "device_name": "GPU", "threads": threads}
    assert compare(old, new, MARGIN).changes


def test_other_software_is_allowed_and_named(make):
    old, new = make(0), make(1)
    new["environment"] |= {"torch": "9.9", "triton": "8.8", "dropout_contract": 77}
    text = printed(compare(old, new, MARGIN), width=400)
    environment = old["environment"]
    for name, value in (("torch", "9.9"), ("triton", "8.8"), ("dropout contract", "77")):
        assert f"{name} {environment[name.replace(' ', '_')]} → {value}" in text
    assert "the same software and commit" in printed(compare(old, old, MARGIN))


def test_the_table_shows_times_speedups_and_the_count(make):
    old, new = make(0, noise=0.005), make(1, noise=0.005, drift=2.0, scale={"fastattn": 1.25})
    comparison = compare(old, new, MARGIN)
    text = printed(comparison)
    lines = text.splitlines()
    assert lines[-1] == "4 regressions, 0 improvements in 8 comparisons"
    first = next(line for line in lines if "│ d384 S128 B8 fp32" in line)
    change = comparison.changes[0]
    assert f"{change.old['median_ms']:.4g} │" in first and "over eager" in first
    assert f"{change.new['median_ms'] / change.old['median_ms']:.2f}) │" in first
    assert "{median:.3f} [{low:.3f}, {high:.3f}]".format(**change.ratio) in first
    assert first.endswith("regression: slower │")
    assert "the peers took" in text


def test_the_same_files_give_the_same_words(make):
    texts = {printed(compare(make(3), make(4), MARGIN)) for _ in range(2)}
    assert len(texts) == 1
