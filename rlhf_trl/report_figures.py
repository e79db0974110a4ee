"""Figures of the report: pure functions from numbers to inline SVG that follows the page's light or dark colours.

Reads and writes no file. Text stays text, so that a figure can be read aloud and searched; colours become the CSS
variables of `templates/report.css`; the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from rlhf_trl.figures import BLUE, GREEN, GREY, ORANGE

INK, GRID, PAPER = "#1b1f24", "#d9dce0", "#fefefe"
# What a figure is drawn with -> what the page's style sheet calls it.
THEME = {INK: "ink", GRID: "grid", PAPER: "paper", GREY: "muted", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
# Trainer -> colour and marker: never colour alone.
POLICY_STYLES = {"dpo": (BLUE, "o"), "grpo": (ORANGE, "s"), "ppo": (GREEN, "^")}
LINE_STYLES = ((BLUE, "-", "blue"), (ORANGE, "--", "orange"), (GREEN, ":", "green"))
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that text is measured alike everywhere
    "font.size": 11,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 72,  # one unit of the drawing is one pixel of the page
    "svg.fonttype": "none",
}
# Where a label may stand around its point: direction (columns: right, up), nearest first.
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
DISTANCES = (9.0, 16.0, 26.0, 38.0, 54.0)
MARKER = 6.0  # half the size of a marker with a little air


@dataclass(frozen=True)
class Point:
    """A policy in the plane of KL and reward; both are Estimates as JSON holds them."""

    name: str
    trainer: str
    kl: Mapping[str, float]
    gain: Mapping[str, float]


def plot_reward_kl(points: Sequence[Point], width: int, height: int, key: str, label: str) -> str:
    """Draw reward gain against KL, both with their intervals, the reference in the origin, each point with its name.

    The horizontal axis grows with the square root of the KL, along which reward changes about evenly (Gao et al.,
    2022) and which, unlike a logarithm, has a zero.

    Args:
        width: in pixels, as `height`.
        key: names the figure; it keeps the ids of the page's figures apart.
        label: says in words what the figure shows.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.axhline(0, color=GREY, linewidth=1, zorder=1)
        for point in points:
            color, marker = POLICY_STYLES[point.trainer]
            x, y = point.kl, point.gain
            axes.plot([x["low"], x["high"]], [y["mean"], y["mean"]], color=color, linewidth=1.6, zorder=3)
            axes.plot([x["mean"], x["mean"]], [y["low"], y["high"]], color=color, linewidth=1.6, zorder=3)
            axes.plot(x["mean"], y["mean"], marker=marker, markersize=10, color=color, markeredgecolor=PAPER, zorder=4)
        axes.plot(0, 0, marker="D", markersize=8, color=GREY, markeredgecolor=PAPER, clip_on=False, zorder=4)
        axes.set_xlim(0, 1.12 * max(point.kl["high"] for point in points) or 1)
        low, high = min(0, *(p.gain["low"] for p in points)), max(0, *(p.gain["high"] for p in points))
        room = 0.12 * (high - low) or 1
        axes.set_ylim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < 500 else 8))
        axes.set_xlabel("KL to the reference, nats per answer")
        axes.set_ylabel("reward gain over the reference")
        _place_labels(figure, axes, points)
        return to_svg(figure, key, label)


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Name every point where its name covers least of other names, markers and intervals, inside the axes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays the axes out
    figure.set_layout_engine("none")
    at = axes.transData.transform
    frame = axes.get_window_extent(renderer)
    zero = at((0, 0))[1]
    taken = [_around(at((0, 0)), MARKER, MARKER), Bbox([[frame.x0, zero - 1], [frame.x1, zero + 1]])]
    for point in points:
        (left, bottom), (right, top) = (at((point.kl[end], point.gain[end])) for end in ("low", "high"))
        x, y = at((point.kl["mean"], point.gain["mean"]))
        taken += [_around((x, y), MARKER, MARKER), Bbox([[left, y - 2], [right, y + 2]])]
        taken += [Bbox([[x - 2, bottom], [x + 2, top]])]
    names = [("reference", (0.0, 0.0), GREY)]
    names += [(p.name, (p.kl["mean"], p.gain["mean"]), POLICY_STYLES[p.trainer][0]) for p in points]
    for name, place, color in names:
        text = axes.annotate(_fold(name, int(frame.width // 24)), place, fontsize=10.5, color=INK, zorder=5)
        box = text.get_window_extent(renderer)
        size, anchor = (box.width / 2, box.height / 2), at(place)

        def cost(offset: tuple[float, float], size: Any = size, anchor: Any = anchor) -> float:
            label = _around(anchor + np.array(offset), size[0] + 2, size[1] + 1)
            covered = sum(_overlap(label, other) for other in taken)
            outside = 4 * size[0] * size[1] - _overlap(_around(anchor + np.array(offset), *size), frame)
            return covered + 10 * outside + 0.5 * float(np.hypot(*offset))

        offsets = [
            (dx * (distance + size[0]), dy * (distance + size[1]))
            for distance, (dx, dy) in itertools.product(DISTANCES, DIRECTIONS)
        ]
        best = min(offsets, key=cost)
        taken.append(_around(anchor + np.array(best), size[0] + 2, size[1] + 1))
        text.set(position=best, ha="center", va="center_baseline", multialignment="center")
        text.set_anncoords("offset points")
        if _overlap(_around(anchor, 22, 22), taken[-1]) == 0:  # too far to be taken for this point's name
            end = axes.transData.inverted().transform(anchor + np.array(best) - np.sign(best) * np.array(size))
            axes.plot([place[0], end[0]], [place[1], end[1]], color=color, linewidth=0.8, zorder=2)


def _fold(name: str, longest: int) -> str:
    """Break a long name of a sweep, `grpo-beta=0.05-learning_rate=1e-05`, where one of its options begins."""
    if len(name) <= longest:
        return name
    return re.sub(r"-(?=[a-z_]+=)", "\n", name)


def _around(center: Any, half_width: float, half_height: float) -> Bbox:
    x, y = center
    return Bbox([[x - half_width, y - half_height], [x + half_width, y + half_height]])


def _overlap(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return common.width * common.height if common else 0.0


def plot_curves(history: Sequence[Mapping[str, Any]], series: Sequence[str], key: str, label: str) -> str:
    """Draw quantities of one training run by step, in the order of `LINE_STYLES`."""
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(264 / 72, 150 / 72), layout="constrained")
        axes = figure.add_subplot()
        for name, (color, line, _) in zip(series, LINE_STYLES, strict=False):
            steps, values = zip(*((row["step"], row[name]) for row in history if name in row), strict=True)
            marker = "o" if len(steps) < 12 else ""
            axes.plot(steps, values, color=color, linestyle=line, linewidth=1.6, marker=marker, markersize=3.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("step", fontsize=10)
        return to_svg(figure, key, label)


def to_svg(figure: Figure, key: str, label: str) -> str:
    """Write a figure as an SVG element to stand inside an HTML page.

    Ids that nothing refers to are dropped: matplotlib calls the parts of every figure alike, and a page has many.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its `*` selector would reach the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        for name, text in list(element.attrib.items()):
            del element.attrib[name]
            if name != "id" or text in used:
                element.set(name.rpartition("}")[2], _for_page(text))
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(text: str) -> str:
    """Put the page's colours in, and leave coordinates at a hundredth of a pixel."""
    for color, variable in THEME.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)
