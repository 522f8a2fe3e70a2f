"""Speedup, memory and roofline of a results file, each as a PNG."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import report
from .cases import MODES

DPI = 140
#: Inches.
LINE, LABELS, PLOT, FIGURES, EDGE, GAP = 0.135, 1.4, 2.0, 1.3, 0.15, 0.25
PANEL_TOP, PANEL_BOTTOM = 0.42, 0.36
SMALL, NORMAL, LARGE = 6, 7, 9  # points

#: Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "fastattn": "#0072B2",
    "fastattn compiled": "#E69F00",
    "fastattn max-autotune": "#009E73",
}
PEER, BASELINE = "#8c8c8c", "#D55E00"
OUR_MARKERS = dict(zip(COLOURS, "osD", strict=True))
PEER_MARKERS = "^v<>PXph*d8"
MODE_MARKERS = {
    "eval forward": "s",
    "forward": ">",
    "backward": "<",
    "forward+backward": "D",
}
#: The mode that stands for an op: the first of these that was measured.
HEADLINES = ("training step", "forward+backward", "forward", "backward", "eval forward")
CELL = 5.2, 3.4  # inches, of one roofline with its legend
Point = tuple[float, float, dict]
PASSES = {mode.name: mode.passes for mode in MODES}


def draw(results: dict, stem: Path) -> list[Path]:
    """Writes `<stem>-speedup.png`, `<stem>-memory.png` and `<stem>-roofline.png`.

    What has no data is not drawn. All are made beside their places before the first is renamed, so
    that a failure leaves nothing behind.

    Args:
        results: as `report.load` returns them.
        stem: the files' common path, without an ending.

    Returns:
        The paths that were written.
    """
    makers = {"speedup": speedup_figure, "memory": memory_figure, "roofline": roofline_figure}
    figures = {name: make(results) for name, make in makers.items()}
    places = {}
    try:
        for name, figure in figures.items():
            if figure is not None:
                path = stem.with_name(f"{stem.name}-{name}.png")
                places[path] = path.with_name(f".{os.getpid()}-{path.name}")
                figure.savefig(places[path], format="png", dpi=DPI)
        for path, part in places.items():
            part.replace(path)
    finally:
        for part in places.values():
            part.unlink(missing_ok=True)
    return list(places)


# What is drawn on lines: an op is a section, a case a block, and a block has labelled lines.


@dataclass(frozen=True)
class Block:
    """A case: its name on a line of its own, then labelled lines, each with a value a column."""

    name: str
    lines: Sequence[tuple[str, Sequence]]

    @property
    def height(self) -> int:
        return 1 + len(self.lines)


@dataclass(frozen=True)
class Section:
    """An op: its blocks and the range that its axes show."""

    title: str
    blocks: Sequence[Block]
    limits: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """The part of a section that fits into one column of the page; `top` in inches."""

    title: str
    section: Section
    blocks: Sequence[Block]
    column: int
    top: float

    @property
    def lines(self) -> int:
        return sum(block.height for block in self.blocks)

    @property
    def bottom(self) -> float:
        return self.top + PANEL_TOP + self.lines * LINE + PANEL_BOTTOM


DrawValues = Callable[[Axes, Sequence[float], Sequence], None]


def flowed(sections: Sequence[Section], width: float) -> list[Panel]:
    """The sections in as many columns as make a page of panels about as wide as it is high."""
    heights = (block.height for section in sections for block in section.blocks)
    total = sum(heights) * LINE + len(sections) * (PANEL_TOP + PANEL_BOTTOM)
    columns = max(1, round(math.sqrt(total / width)))
    limit = total / columns
    while True:
        panels = list(panels_of(sections, limit))
        if panels[-1].column < columns:
            return panels
        limit *= 1.05


def panels_of(sections: Sequence[Section], limit: float) -> Iterator[Panel]:
    """The sections' panels, in columns no higher than `limit` inches where a block allows it."""
    column, top = 0, 0.0
    for section in sections:
        title, waiting = section.title, list(section.blocks)
        while waiting:
            taken, bottom = 0, top + PANEL_TOP + PANEL_BOTTOM
            for block in waiting:
                bottom += block.height * LINE
                if bottom > limit and (taken or top):
                    break
                taken += 1
            if taken:
                panel = Panel(title, section, waiting[:taken], column, top)
                yield panel
                title, top = f"{section.title}, continued", panel.bottom
                waiting = waiting[taken:]
            if waiting:
                column, top = column + 1, 0.0


def page(
    heading: str,
    notes: Sequence[str],
    legend: Sequence[Artist],
    columns: Sequence[str],
    axis_label: str,
    sections: Sequence[Section],
    draw_values: DrawValues,
) -> Figure:
    """A figure of all sections; `draw_values(axes, heights, values)` fills one column of lines."""
    width = LABELS + len(columns) * (PLOT + FIGURES)
    panels = flowed(sections, width)
    page_width = max(7.5, 2 * EDGE + (1 + panels[-1].column) * (width + GAP) - GAP)
    text = wrapped(notes, page_width)
    legend_columns = max(1, min(len(legend), int(page_width / 1.6)))
    legend_lines = math.ceil(len(legend) / legend_columns)
    head = EDGE + 0.25 + LINE * (len(text) + legend_lines) + 0.2
    page_height = head + max(panel.bottom for panel in panels) + EDGE
    figure = Figure(figsize=(page_width, page_height))
    write_head(figure, heading, text)
    below = head - 0.15 - LINE * legend_lines
    place = {"loc": "upper left", "bbox_to_anchor": (EDGE / page_width, 1 - below / page_height)}
    tight = {"frameon": False, "borderpad": 0, "borderaxespad": 0, "labelspacing": 0.25}
    figure.legend(handles=legend, ncols=legend_columns, fontsize=NORMAL, **place, **tight)
    for panel in panels:
        left = EDGE + panel.column * (width + GAP)
        y = page_height - head - panel.top - (0.1 if any(columns) else 0.28)
        title = figure.text(left / page_width, y / page_height, panel.title, size=LARGE - 1)
        title.set(weight="bold", va="center")
        for number, column in enumerate(columns):
            x = left + LABELS + number * (PLOT + FIGURES)
            height = panel.lines * LINE
            y = page_height - head - panel.top - PANEL_TOP - height
            axes = figure.add_axes(
                (x / page_width, y / page_height, PLOT / page_width, height / page_height)
            )
            fill(axes, panel, number, draw_values)
            axes.set_title(column, size=NORMAL, pad=3)
            axes.set_xlabel(axis_label, size=SMALL, labelpad=1)
    return figure


def fill(axes: Axes, panel: Panel, number: int, draw_values: DrawValues) -> None:
    """One column of a panel: the frame, and beside the first one the names."""
    axes.set_ylim(panel.lines - 0.5, -0.5)
    log_axis(axes, panel.section.limits)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    style = {"transform": axes.get_yaxis_transform(), "va": "center"}
    heights, values, line = [], [], 0
    for block in panel.blocks:
        if number == 0:
            name = axes.text(-LABELS / PLOT, line, block.name, size=NORMAL, **style)
            name.set(weight="bold", bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
        for height, (label, of_columns) in enumerate(block.lines, start=line + 1):
            if number == 0:
                axes.text(-0.03, height, label, size=SMALL, ha="right", **style)
            heights.append(height)
            values.append(of_columns[number])
        line += block.height
    draw_values(axes, heights, values)


def beside(axes: Axes, height: float, text: str, muted: bool = False) -> None:
    """Text in the column of figures, right of the axes."""
    style = {"color": "#666666", "style": "italic"} if muted else {}
    transform = axes.get_yaxis_transform()
    axes.text(1.03, height, text, transform=transform, size=SMALL, va="center", **style)


def log_axis(axes: Axes, limits: tuple[float, float], name: str = "x") -> None:
    """A log axis with ticks at 1, 2 and 5, or at powers of ten where the range is wide."""
    axes.set(**{f"{name}scale": "log", f"{name}lim": limits})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    subs = (1.0,) if limits[1] / limits[0] > 200 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axes.tick_params(axis=name, labelsize=SMALL, length=2, pad=1.5)


def wrapped(texts: Iterable[str], width: float) -> list[str]:
    """The texts in lines that fit into so many inches."""
    return [line for text in texts for line in textwrap.wrap(text, int(width / 0.061))]


def write_head(figure: Figure, title: str, lines: Sequence[str]) -> None:
    """The title and, below it, the lines."""
    width, height = figure.get_size_inches()
    figure.text(EDGE / width, 1 - (EDGE + 0.1) / height, title, size=LARGE + 1, va="center")
    for number, line in enumerate(lines):
        y = 1 - (EDGE + 0.3 + number * LINE) / height
        figure.text(EDGE / width, y, line, size=NORMAL, va="center", color="#333333")


# What the rows say.


def by_op(results: dict) -> Iterator[tuple[str, str, dict[str, list[dict]]]]:
    """`(op, its headline mode, its rows by case)`, in the order of the run."""
    for op, rows in groupby(results["rows"], key=lambda row: row["op"]):
        cases: dict[str, list[dict]] = {}
        for row in rows:
            cases.setdefault(row["case"], []).append(row)
        measured = {row["mode"] for of_case in cases.values() for row in of_case}
        yield op, next(mode for mode in HEADLINES if mode in measured), cases


def is_ours(row: dict) -> bool:
    return row["provider"].startswith("fastattn")


def padded(low: float, high: float, least: float) -> tuple[float, float]:
    """Limits of a log axis around a range, `least` times as large as its lower end or more."""
    middle, half = math.sqrt(low * high), max(high / low, least) ** 0.53
    return middle / half, middle * half


def speedup_figure(results: dict) -> Figure | None:
    """How many times as fast fastattn is as each peer; None where no peer was timed beside it."""
    launches = list(dict.fromkeys(row["launch"] for row in results["rows"]))
    sections, headlines = [], {}
    for op, mode, cases in by_op(results):
        section = speedup_section(op, mode, cases, launches)
        if section is not None:
            sections.append(section)
            headlines[op] = mode
    if not sections:
        return None
    rows = [row for row in results["rows"] if "fastattn_speedup" in row]
    ours = dict.fromkeys(row["fastattn_speedup"]["provider"] for row in rows)
    others = dict.fromkeys(row["mode"] for row in rows if row["mode"] != headlines[row["op"]])
    legend = [Patch(color=COLOURS[name], label=name) for name in COLOURS if name in ours]
    legend += [
        Line2D([], [], label=mode, **small_marker(mode)) for mode in MODE_MARKERS if mode in others
    ]
    return page(
        "fastattn's speedup over its peers",
        [
            f"{report.headline(results)}.",
            "Bars: how many times as fast fastattn is as the peer named at the left, in the mode "
            "named above, run the same way: median of the per-round ratios over "
            f"{results['method']['rounds']} interleaved rounds, whiskers their 95 % bootstrap "
            "interval. Left of 1, fastattn is slower. Colours: which fastattn the peer is held "
            "against, compiled as it is. Small marks: medians of the other modes.",
        ],
        legend,
        [f"{launch} launches" for launch in launches],
        "times as fast as the peer",
        sections,
        draw_speedups,
    )


def speedup_section(
    op: str, headline: str, cases: dict[str, list[dict]], launches: Sequence[str]
) -> Section | None:
    """A block per case with a line per peer; its values are (headline mode, rows by mode)."""
    rows = [row for of_case in cases.values() for row in of_case if not is_ours(row)]
    ratios = [row["fastattn_speedup"] for row in rows if "fastattn_speedup" in row]
    if not ratios:
        return None
    peers = dict.fromkeys(row["provider"] for row in rows if row["status"] != "skipped")
    blocks = []
    for name, of_case in cases.items():
        by_key = {(row["provider"], row["launch"], row["mode"]): row for row in of_case}
        lines = []
        for peer in peers:
            values = []
            for launch in launches:
                found = {mode: by_key.get((peer, launch, mode)) for mode in PASSES}
                found = {mode: row for mode, row in found.items() if row is not None}
                values.append((headline, found))
            if any(found for _, found in values):
                lines.append((peer, values))
        blocks.append(Block(name, lines))
    low = min(0.5, *(ratio["low"] for ratio in ratios))
    high = max(2.0, *(ratio["high"] for ratio in ratios))
    return Section(f"{op}: {headline}", blocks, padded(low, high, 4))


def small_marker(mode: str) -> dict:
    return {
        **{"marker": MODE_MARKERS[mode], "markersize": 2.6, "markeredgewidth": 0.5},
        **{"color": "none", "markeredgecolor": "#444444", "markerfacecolor": "white"},
    }


def draw_speedups(axes: Axes, heights: Sequence[float], values: Sequence) -> None:
    bars, marks = [], {}
    for height, (headline, rows) in zip(heights, values, strict=True):
        for mode, row in rows.items():
            ratio = row.get("fastattn_speedup")
            if mode == headline:
                beside(axes, height, *speedup_text(row))
                if ratio:
                    bars.append((height, ratio))
            elif ratio:
                marks.setdefault(mode, []).append((ratio["median"], height))
    axes.axvline(1, color="black", linewidth=0.8)
    if bars:
        at = [height for height, _ in bars]
        medians = [ratio["median"] for _, ratio in bars]
        colours = [COLOURS[ratio["provider"]] for _, ratio in bars]
        axes.barh(at, [m - 1 for m in medians], left=1, height=0.66, color=colours, alpha=0.8)
        for height, ratio in bars:
            ends = (ratio["low"], ratio["high"])
            axes.plot(ends, (height, height), color="black", linewidth=0.8)
    for mode, points in marks.items():
        axes.plot(*zip(*points, strict=True), **small_marker(mode) | {"linestyle": "none"})


def speedup_text(row: dict) -> tuple[str, bool]:
    """The figures of a row, or why there are none, and whether it is the latter."""
    if row["status"] == "skipped":
        return "skipped", True
    if row["status"] != "ok":
        return f"withheld: {row['status']}", True
    if "fastattn_speedup" not in row:
        return "fastattn withheld", True
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["fastattn_speedup"]), False


MEMORY = {"peak_bytes": "peak", "saved_bytes": "saved for backward"}
MEMORY_MARKERS = {  # a ring is still seen where both are equal
    "baseline": {
        **{"linestyle": "none", "marker": "o", "markersize": 6, "color": BASELINE},
        "markerfacecolor": "white",
    },
    "fastattn": {
        **{"linestyle": "none", "marker": "o", "markersize": 3.5, "color": COLOURS["fastattn"]},
    },
}


def memory_figure(results: dict) -> Figure | None:
    """Peak and saved bytes, of the baseline and of fastattn; None where none were measured."""
    sections = [
        section
        for op, mode, cases in by_op(results)
        if (section := memory_section(op, mode, cases)) is not None
    ]
    if not sections:
        return None
    legend = [Line2D([], [], label=name, **style) for name, style in MEMORY_MARKERS.items()]
    return page(
        "Memory of fastattn and of the baseline",
        [
            f"{report.headline(results)}.",
            "In the mode named above, both run eagerly: MB of the baseline → of fastattn. "
            f"Peak: {results['method']['peak_bytes']}. Saved for backward: "
            f"{results['method']['saved_bytes']}.",
        ],
        legend,
        [""],
        "MB",
        sections,
        draw_memory,
    )


def memory_section(op: str, mode: str, cases: dict[str, list[dict]]) -> Section | None:
    """A block per case, a line per kind of memory; values: the baseline's and ours, or why not."""
    baseline = next(iter(cases.values()))[0]["provider"]  # the first of an op
    blocks = []
    for name, rows in cases.items():
        found = {
            row["provider"]: row for row in rows if row["mode"] == mode and row["launch"] == "eager"
        }
        pair = [found[provider] for provider in (baseline, "fastattn") if provider in found]
        if len(pair) < 2:
            continue
        sizes = {label: [row.get(key) for row in pair] for key, label in MEMORY.items()}
        lines = [(label, [pair]) for label, pair in sizes.items() if None not in pair]
        wrong = [f"{row['provider']}: {row['status']}" for row in pair if row["status"] != "ok"]
        if wrong:
            lines = [("withheld", [", ".join(wrong)])]
        if lines:
            blocks.append(Block(name, lines))
    pairs = [pair for block in blocks for _, [pair] in block.lines if not isinstance(pair, str)]
    sizes = [size for pair in pairs for size in pair if size > 0]
    if not sizes:
        return None
    limits = padded(min(sizes) / 1e6, max(sizes) / 1e6, 10)
    return Section(f"{op}: {mode}", blocks, limits)


def draw_memory(axes: Axes, heights: Sequence[float], values: Sequence) -> None:
    for height, value in zip(heights, values, strict=True):
        if isinstance(value, str):
            beside(axes, height, value, muted=True)
            continue
        pair = before, after = [size / 1e6 for size in value]
        ratio = f" (x {after / before:.2f})" if before else ""
        beside(axes, height, f"{before:,.1f} → {after:,.1f}{ratio}")
        if before and after:
            axes.plot(pair, (height, height), color=PEER, linewidth=1.2, zorder=1)
        for size, style in zip(pair, MEMORY_MARKERS.values(), strict=True):
            axes.plot(size or math.nan, height, **style)


def roofline_figure(results: dict) -> Figure | None:
    """Measured FLOP/s over the FLOPs per byte that are needed; None where no bytes are counted."""
    ops = roofline_points(results)
    if not ops:
        return None
    points = [point for of_op in ops.values() for point in of_op]
    modes, launches = (
        " and ".join(dict.fromkeys(row[name] for _, _, row in points))
        for name in ("mode", "launch")
    )
    columns = min(3, 1 + len(ops))
    width = 2 * EDGE + columns * CELL[0]
    notes = wrapped(
        [
            f"{report.headline(results)}; {report.ceilings(results)}.",
            f"A point is a size in one mode ({modes}; {launches} launches): the operations and "
            "bytes that the pass needs at least, over its median time. Hollow points: backward. "
            "Lines: the ceilings, sloped the copy's and flat the product's; above the sloped one, "
            "data comes from a cache. Each op has axes of its own.",
        ],
        width,
    )
    head = EDGE + 0.25 + LINE * len(notes) + 0.15
    height = head + math.ceil((1 + len(ops)) / columns) * CELL[1]
    figure = Figure(figsize=(width, height))
    write_head(figure, "Roofline", notes)
    ceilings = [
        results["ceilings"][name] / 1e12 for name in ("copy_bytes_per_s", "matmul_flops_per_s")
    ]
    for number, (title, shown) in enumerate({"all ops": points, **ops}.items()):
        left = EDGE + 0.45 + number % columns * CELL[0]
        below = head + (1 + number // columns) * CELL[1] - 0.4
        axes = figure.add_axes(
            (left / width, 1 - below / height, 3.1 / width, (CELL[1] - 0.7) / height)
        )
        draw_roofline(axes, shown, *ceilings, overview=number == 0)
        axes.set_title(title, size=LARGE - 1, weight="bold", loc="left", pad=4)
    return figure


def roofline_points(results: dict) -> dict[str, list[Point]]:
    """(FLOPs per byte, TFLOP/s, row) by op; of forward and backward, replayed where they were."""
    costs = {(case["op"], case["name"]): case["cost"] for case in results["cases"]}
    ops: dict[str, list[Point]] = {}
    for row in results["rows"]:
        passes = [costs[row["op"], row["case"]][name] for name in PASSES[row["mode"]]]
        if row["status"] == "ok" and all(cost["bytes"] for cost in passes):
            flops, moved = (sum(cost[kind] for cost in passes) for kind in ("flops", "bytes"))
            ops.setdefault(row["op"], []).append((flops / moved, row["tflops"], row))
    for op, points in ops.items():
        for name, wanted in (("launch", {"graph"}), ("mode", {"forward", "backward"})):
            points = [point for point in points if point[2][name] in wanted] or points
        ops[op] = points
    return ops


def draw_roofline(
    axes: Axes, points: Sequence[Point], copy: float, product: float, overview: bool
) -> None:
    """Points by provider, ours in colours, and the ceilings in TB/s and TFLOP/s.

    The overview reaches to where the ceilings meet and makes one provider of all peers.
    """
    intensities, rates = ([point[which] for point in points] for which in (0, 1))
    meeting = [product / copy] if overview else []
    low, high = min(intensities + meeting) / 3, max(intensities + meeting) * 3
    roof = [min(x * copy, product) for x in (low, high)]
    log_axis(axes, (low, high), "x")
    log_axis(axes, (min(*rates, roof[0]) / 1.5, max(*rates, roof[1]) * 2), "y")
    ridge = min(max(product / copy, low), high)
    ceiling = [min(x * copy, product) for x in (low, ridge, high)]
    axes.plot((low, ridge, high), ceiling, color="black", linewidth=1)
    by_name: dict[str, list[Point]] = {}
    for point in points:
        name = "peers" if overview and not is_ours(point[2]) else point[2]["provider"]
        by_name.setdefault(name, []).append(point)
    peer_markers = cycle(PEER_MARKERS)
    for name, own in by_name.items():
        marker = OUR_MARKERS.get(name) or next(peer_markers)
        colour, front = (COLOURS[name], 3) if name in COLOURS else (PEER, 2)
        style = {"linestyle": "none", "marker": marker, "markersize": 4, "color": colour}
        for hollow in (False, True):
            chosen = [(x, y) for x, y, row in own if (row["mode"] == "backward") == hollow]
            inside = {"markerfacecolor": "white"} if hollow else {}
            if chosen:
                axes.plot(*zip(*chosen, strict=True), **style, **inside, zorder=front, alpha=0.8)
        axes.plot([], [], **style, label=name)
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
    axes.legend(**place, fontsize=SMALL, frameon=False)
    axes.grid(color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("FLOPs per byte", size=SMALL, labelpad=1)
    axes.set_ylabel("TFLOP/s", size=SMALL, labelpad=1)
