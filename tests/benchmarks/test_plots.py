"""The plots of a results file: what is in them, that it can be read, and how they are written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import measure, plots, report, suite
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.ops import OPS

LONG = Case(32, 512, 768, 12, "bf16", padding=0.5, layers=12)  # the longest name of the suite
ONE_OP = {"layer_norm": (Case(8, 128, 384),)}
EVERY_OP = {name: tuple(replace(LONG, batch=b) for b in range(1, 7)) for name in OPS}
FIGURES = (plots.speedup_figure, plots.memory_figure, plots.roofline_figure)


def synthetic(plan: dict[str, tuple[Case, ...]], launches=("eager",), changed=None) -> dict:
    """Results in the form that `suite.run` gives them, with random times, ours the best.

    `changed(row)` may change a row before the speedups are taken.
    """
    generator = np.random.default_rng(0)
    results = {
        "environment": environment("cpu"),
        "method": {"rounds": 7, "peak_bytes": "the peak", "saved_bytes": "what is saved"},
        "ceilings": {
            **{"copy_bytes_per_s": 1e11, "matmul_flops_per_s": 1e12, "matmul": "1 x 1 x 1, fp32"}
        },
        "cases": [],
        "rows": [],
    }
    for name, cases in plan.items():
        op = OPS[name]
        for case in cases:
            results["cases"].append(suite.described(op, case))
            for mode in op.modes:
                for launch in launches:
                    rows = {p: timed(p, op, case, mode, launch, generator) for p in op.providers}
                    for row in rows.values():
                        if changed is not None:
                            changed(row)
                    for provider, row in rows.items():
                        ours = rows.get(op.ours_like(provider))
                        if ours is not None and ours["status"] == row["status"] == "ok":
                            ratio = measure.median_ratio(row["samples_ms"], ours["samples_ms"], 50)
                            named = {"provider": ours["provider"]}
                            row["fastattn_speedup"] = named | ratio
                    results["rows"] += rows.values()
    return results


def timed(provider, op, case, mode, launch, generator) -> dict:
    costs = [op.cost(case)[name] for name in mode.passes]
    milliseconds = sum(cost.flops for cost in costs) / 1e8
    samples = milliseconds * generator.uniform(1.0, 1.2, 7)
    if not provider.is_ours:
        samples *= generator.uniform(1.2, 6.0)
    row = {
        **{"op": op.name, "case": case.name, "mode": mode.name, "launch": launch},
        **{"provider": provider.name, "status": "ok", "reason": None},
        **{"median_ms": float(np.median(samples)), "samples_ms": samples.tolist()},
        "tflops": 0.1 * milliseconds / float(np.median(samples)),
    }
    if launch == "eager":
        size = case.rows * case.d_model * (2 if provider.is_ours else 6)
        row |= {"peak_bytes": 2 * size, "saved_bytes": size}
    return row


@pytest.fixture(scope="module")
def small() -> dict:
    return synthetic(ONE_OP)


@pytest.fixture(scope="module")
def large() -> dict:
    return synthetic(EVERY_OP, launches=("eager", "graph"))


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def extents(figure: Figure) -> tuple[list[str], np.ndarray]:
    """The texts that are drawn and their boxes in pixels: left, bottom, right, top."""
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.canvas.draw()
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    undrawn = {text for axis in axes for text in undrawn_tick_labels(axis)}
    drawn = [text for text in texts(figure) if text not in undrawn]
    boxes = [Text.get_window_extent(text).extents for text in drawn]
    return [text.get_text() for text in drawn], np.array(boxes)


def undrawn_tick_labels(axis: Axis) -> set[Text]:
    """Labels that an axis keeps, of ticks that are unused or beyond its limits."""
    ticks = (*axis.majorTicks, *axis.minorTicks)
    kept = {label for tick in ticks for label in (tick.label1, tick.label2)}
    low, high = sorted(axis.get_view_interval())
    used = axis.get_major_ticks(len(axis.get_majorticklocs()))  # the minor ones are off
    return kept - {tick.label1 for tick in used if low <= tick.get_loc() <= high}


@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_no_text_covers_another_or_leaves_the_page(request, make, size):
    figure = make(request.getfixturevalue(size))
    names, boxes = extents(figure)
    width, height = figure.get_size_inches() * figure.dpi
    left, bottom, right, top = boxes.T
    assert left.min() >= 0 and bottom.min() >= 0 and right.max() <= width and top.max() <= height
    across = np.minimum(right, right[:, None]) - np.maximum(left, left[:, None])
    upwards = np.minimum(top, top[:, None]) - np.maximum(bottom, bottom[:, None])
    covered = (across > 0.5) & (upwards > 2) & ~np.eye(len(names), dtype=bool)
    assert [(names[i], names[j]) for i, j in np.argwhere(covered)] == []


@pytest.mark.parametrize("make", FIGURES)
def test_every_figure_says_where_it_was_measured(small, make):
    said = " ".join(words(make(small)))
    assert f"{report.headline(small)}" in said


def test_speedup_names_every_peer_case_and_figure(large):
    said = words(plots.speedup_figure(large))
    for name in OPS:
        mode = "training step" if OPS[name].trains else "forward+backward"
        assert f"{name}: {mode}" in said
    assert said.count("eager launches") == said.count("graph launches") >= len(OPS)
    names = {case["name"] for case in large["cases"]}
    assert len(names) == 6 and all(said.count(name) == len(OPS) for name in names)
    for row in large["rows"]:
        headline = "training step" if OPS[row["op"]].trains else "forward+backward"
        if "fastattn_speedup" in row and row["mode"] == headline:
            assert row["provider"] in said
            assert "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["fastattn_speedup"]) in said


def test_speedup_bars_start_at_one_and_carry_their_interval(small):
    figure = plots.speedup_figure(small)
    (axes,) = figure.axes
    rows = {row["provider"]: row for row in small["rows"] if row["mode"] == "forward+backward"}
    ratios = [row["fastattn_speedup"] for row in rows.values() if "fastattn_speedup" in row]
    bars = axes.patches
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars] == [
        (1, pytest.approx(ratio["median"])) for ratio in ratios
    ]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [
        plots.COLOURS[ratio["provider"]].lower() for ratio in ratios
    ]
    whiskers = [tuple(line.get_xdata()) for line in axes.lines]
    assert all((ratio["low"], ratio["high"]) in whiskers for ratio in ratios)
    low, high = axes.get_xlim()
    assert low < min(1, *(r["low"] for r in ratios)) and high > max(r["high"] for r in ratios)


@pytest.mark.parametrize(
    ("provider", "status", "said"),
    [
        ("eager compiled", "failed", "withheld: failed"),
        ("eager compiled", "mismatch", "withheld: mismatch"),
        ("fastattn compiled", "failed", "fastattn withheld"),
    ],
)
def test_what_was_withheld_is_named(provider, status, said):
    def withhold(row):
        if row["provider"] == provider:
            row["status"] = status

    results = synthetic(ONE_OP, changed=withhold)
    assert words(plots.speedup_figure(results)).count(said) == 1
    assert said not in words(plots.speedup_figure(synthetic(ONE_OP)))


def test_memory_that_was_withheld_is_named():
    def withhold(row):
        if row["provider"] == "fastattn":
            row["status"] = "mismatch"

    cases = {"layer_norm": (Case(8, 128, 384), Case(8, 128, 768))}
    results = synthetic(cases)
    for row in results["rows"]:
        if row["case"] == results["cases"][0]["name"]:
            withhold(row)
    said = words(plots.memory_figure(results))
    assert "fastattn: mismatch" in said and "withheld" in said and said.count("peak") == 1
    assert plots.memory_figure(synthetic(ONE_OP, changed=withhold)) is None


def test_a_provider_that_never_ran_has_no_line():
    def skip(row):
        if "compiled" in row["provider"]:
            row["status"] = "skipped"

    said = words(plots.speedup_figure(synthetic(ONE_OP, changed=skip)))
    assert "eager" in said and "eager compiled" not in said and "skipped" not in said


def test_without_a_headline_mode_the_next_one_is_taken(small):
    filtered = small | {"rows": [row for row in small["rows"] if row["mode"] == "backward"]}
    assert "layer_norm: backward" in words(plots.speedup_figure(filtered))


def test_memory_shows_the_baseline_and_ours(small):
    size = 8 * 128 * 384
    said = words(plots.memory_figure(small))
    assert f"{12 * size / 1e6:.1f} → {4 * size / 1e6:.1f} (x 0.33)" in said
    assert f"{6 * size / 1e6:.1f} → {2 * size / 1e6:.1f} (x 0.33)" in said


def test_memory_of_nothing_is_shown():
    def nothing(row):
        if row["provider"] == "fastattn":
            row["saved_bytes"] = 0

    said = words(plots.memory_figure(synthetic(ONE_OP, changed=nothing)))
    assert "2.4 → 0.0 (x 0.00)" in said


def test_roofline_points_are_cost_and_rate(small):
    cost = small["cases"][0]["cost"]
    points = plots.roofline_points(small)["layer_norm"]
    rows = [row for row in small["rows"] if row["mode"] in ("forward", "backward")]
    assert len(points) == len(rows)
    for (intensity, rate, row), wanted in zip(points, rows, strict=True):
        of_pass = cost[wanted["mode"]]
        assert row is wanted and rate == wanted["tflops"]
        assert intensity == of_pass["flops"] / of_pass["bytes"]


def test_roofline_of_a_whole_step_sums_the_passes(small):
    whole = small | {"rows": [r for r in small["rows"] if r["mode"] == "forward+backward"]}
    forward, backward = (small["cases"][0]["cost"][name] for name in ("forward", "backward"))
    wanted = (forward["flops"] + backward["flops"]) / (forward["bytes"] + backward["bytes"])
    assert {x for x, _, _ in plots.roofline_points(whole)["layer_norm"]} == {wanted}


def test_roofline_has_the_two_ceilings(small):
    overview, detail = plots.roofline_figure(small).axes
    assert (overview.get_title("left"), detail.get_title("left")) == ("all ops", "layer_norm")
    (ceiling,) = [line for line in overview.lines if line.get_linestyle() == "-"]
    low, high = overview.get_xlim()
    assert ceiling.get_xdata() == pytest.approx([low, 10, high])  # 1e12 FLOP/s over 1e11 bytes/s
    assert ceiling.get_ydata() == pytest.approx([0.1 * low, 1.0, 1.0])


def test_roofline_takes_the_graphs_where_there_are_some(large):
    for op, points in plots.roofline_points(large).items():
        assert {row["launch"] for _, _, row in points} == {"graph"}, op
    assert "encoder_layer" not in plots.roofline_points(large)


def test_draw_writes_what_there_is(tmp_path, small):
    paths = plots.draw(small, tmp_path / "2026-01-01.abc")
    assert [path.name for path in paths] == [
        f"2026-01-01.abc-{name}.png" for name in ("speedup", "memory", "roofline")
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in paths)


def test_draw_leaves_out_what_has_no_data(tmp_path):
    def no_memory(row):
        row.pop("peak_bytes")
        row.pop("saved_bytes")

    results = synthetic({"encoder_layer": (Case(8, 128, 384, 12),)}, changed=no_memory)
    assert [path.name for path in plots.draw(results, tmp_path / "a")] == ["a-speedup.png"]
    results["rows"] = [row for row in results["rows"] if row["provider"] == "fastattn"]
    assert plots.draw(results, tmp_path / "b") == []
    assert plots.draw(results | {"rows": []}, tmp_path / "c") == []
    assert [path.name for path in tmp_path.iterdir()] == ["a-speedup.png"]


def test_a_failure_leaves_earlier_plots_and_nothing_else(tmp_path, small, monkeypatch):
    paths = plots.draw(small, tmp_path / "a")
    before = [path.read_bytes() for path in paths]
    save, saved = Figure.savefig, []

    def fails_at_the_second(figure, path, **options):
        save(figure, path, **options)
        saved.append(path)
        if len(saved) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fails_at_the_second)
    with pytest.raises(OSError, match="no space left"):
        plots.draw(synthetic({"layer_norm": (Case(8, 128, 768),)}), tmp_path / "a")
    assert len(saved) == 2 and not set(saved) & set(paths)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)
