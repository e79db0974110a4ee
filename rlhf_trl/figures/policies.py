"""How a figure shows policies: their colours and markers, gain against KL with the front, over-optimisation, and names
that do not cover each other.

Draws on the axes it is given, for a PNG of the evaluation and for an SVG of the report alike; writes only what `save`
is given.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf_trl.figures.training import BLUE, GREEN, GREY, ORANGE

INK, GRID, PAPER = "#1b1f24", "#d9dce0", "#fefefe"
# Trainer -> colour and marker: never colour alone.
POLICY_STYLES = {"dpo": (BLUE, "o"), "grpo": (ORANGE, "s"), "ppo": (GREEN, "^")}
# The stages of one trainer, told apart by their lines.
STAGE_LINES = ("-", "--", ":", "-.")
# Kind of point on the frontier -> size of its marker, in points.
MARKER_SIZES = {"checkpoint": 4.5, "final": 10.0, "reference": 8.0}
# Score of over-optimisation -> colour, marker, line.
SCORE_STYLES = {"proxy": (BLUE, "o", "-"), "gold": (ORANGE, "s", "--")}
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
    "figure.dpi": 72,  # one unit of the drawing is one point, and one pixel of the report's page
    "svg.fonttype": "none",
}
KL_LABEL = "KL to the reference, nats per answer"
# Where a label may stand around its point: direction (columns: right, up), nearest first.
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
DISTANCES = (9.0, 16.0, 26.0, 38.0, 54.0, 72.0)
MARKER = 6.0  # half the size of a marker with a little air
STRIDE = 5.0  # along a line, a label keeps clear of a box at each of these steps


@dataclass(frozen=True)
class Label:
    """A name for a point; `place` is in the units of the axes."""

    text: str
    place: tuple[float, float]
    size: float = 10.5


Line = Sequence[tuple[float, float]]


def root_scale(axes: Axes, left: float, right: float) -> None:
    """Space the horizontal axis by the square root of the KL, along which reward changes about evenly (Gao et al.,
    2022) and which, unlike a logarithm, has a zero; what is below zero is mirrored."""
    axes.set_xscale(
        "function",
        functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)),
    )
    axes.set_xlim(left, right)
    ticks = root_ticks(left, right)
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xlabel(KL_LABEL)


def root_ticks(left: float, right: float) -> list[float]:
    """Choose 0 and round values such as 1, 3, 5, 10 on both sides of it that square-root spacing does not crowd."""
    width = math.sqrt(max(0, -left)) + math.sqrt(right)
    ticks = [0.0]
    for sign, end in ((-1, -left), (1, right)):
        if end <= 0:
            continue
        power = math.floor(math.log10(end))
        series = [digit * 10.0**exponent for exponent in range(power, power - 4, -1) for digit in (7, 5, 3, 2, 1)]
        last = math.inf
        for value in (value for value in series if value <= end):
            room = max(0.13, 0.034 * len(f"{value:g}")) * width
            if min(last - math.sqrt(value), math.sqrt(value)) >= room:
                ticks.append(sign * value)
                last = math.sqrt(value)
    return sorted(ticks)


def stage_lines(trainers: Mapping[str, str]) -> dict[str, str]:
    """Give each stage a line style of its own among the stages of its trainer; from the fifth on they come again."""
    order = {name: sum(trainers[other] == trainers[name] for other in list(trainers)[:index])
             for index, name in enumerate(trainers)}  # fmt: skip
    return {name: STAGE_LINES[place % len(STAGE_LINES)] for name, place in order.items()}


def draw_cross(axes: Axes, x: Mapping[str, float], y: Mapping[str, float], **style: Any) -> list[Line]:
    """Draw the intervals of a point along both axes."""
    lines: list[Line] = [
        ((x["low"], y["mean"]), (x["high"], y["mean"])),
        ((x["mean"], y["low"]), (x["mean"], y["high"])),
    ]
    for line in lines:
        axes.plot(*zip(*line, strict=True), **style)
    return lines


def draw_frontier(axes: Axes, frontier: Mapping[str, Any], level: float = 0.0) -> tuple[list[Label], list[Line]]:
    """Draw gain against KL, one of the axes of `pareto.json` or the one of `winrate.json`.

    Every final policy is a marker with its intervals, hollow where another one dominates it; the front is a line of
    steps, as nothing between two policies was measured; best-of-n is dashed; the checkpoints of a stage are small and
    joined by a thin line.

    Args:
        level: the reference's gain, which is drawn as a line across: 0, or 0.5 for win rates.

    Returns:
        The names still to be placed, and the lines that they are to keep clear of.
    """
    policies: dict[str, list[Mapping[str, Any]]] = {}
    for point in frontier["points"]:
        policies.setdefault(point["policy"], []).append(point)
    right = _set_limits(axes, frontier, level)
    lines: list[Line] = [((0, level), (right, level)), *_draw_front_and_best_of_n(axes, frontier, right)]
    for points in policies.values():
        lines += _draw_policy(axes, points)
    finals = [point for points in policies.values() for point in points if point["step"] is None]
    labels = [Label(point["policy"], _place(point)) for point in finals]
    if frontier["best_of_n"]:
        last = frontier["best_of_n"][-1]
        labels.append(Label(f"best of {last['n']}", (last["kl"], last["gain"]["mean"]), 9.5))
    return labels, lines


def _place(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["kl"]["mean"], point["gain"]["mean"]


def _set_limits(axes: Axes, frontier: Mapping[str, Any], level: float) -> float:
    """Fit both axes to the intervals, draw the reference's gain across, and return the largest KL shown."""
    points, best = frontier["points"], frontier["best_of_n"]
    gains = [p["gain"] for p in [*points, *best]]
    right = 1.12 * max([*(p["kl"]["high"] for p in points), *(p["kl"] for p in best)]) or 1
    low, high = min(level, *(gain["low"] for gain in gains)), max(level, *(gain["high"] for gain in gains))
    room = 0.12 * (high - low) or 1
    root_scale(axes, 0, right)
    axes.set_ylim(low - room, high + room)
    axes.axhline(level, color=GREY, linewidth=1, zorder=1)
    return right


def _draw_front_and_best_of_n(axes: Axes, frontier: Mapping[str, Any], right: float) -> list[Line]:
    lines: list[Line] = []
    front = steps([_place(p) for p in frontier["points"] if p["on_front"]], right)
    if len(front) > 2:
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1.8, alpha=0.7, zorder=2)
        lines.append(front)
    curve = [(p["kl"], p["gain"]["mean"]) for p in frontier["best_of_n"]]
    if curve:
        axes.plot(*zip(*curve, strict=True), color=INK, linewidth=1.2, linestyle=(0, (4, 2)), marker=".", zorder=3)
        lines.append(curve)
    return lines


def _draw_policy(axes: Axes, points: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Draw the checkpoints of one policy, joined by a line, and its final point with intervals; or the reference."""
    trainer = points[0]["trainer"]
    color, marker = POLICY_STYLES[trainer] if trainer else (GREY, "D")
    lines: list[Line] = []
    checkpoints = sorted((p for p in points if p["step"] is not None), key=lambda p: p["step"])
    if checkpoints:
        path = [_place(p) for p in [*checkpoints, *(p for p in points if p["step"] is None)]]
        axes.plot(*zip(*path, strict=True), color=color, linewidth=0.9, zorder=3)
        lines.append(path)
    for point in points:
        kind = "checkpoint" if point["step"] is not None else "final" if trainer else "reference"
        if kind == "final":
            lines += draw_cross(axes, point["kl"], point["gain"], color=color, linewidth=1.6, zorder=4)
        filled = point["on_front"] or not trainer
        face, edge, width = (color, PAPER, 1.0) if filled else (PAPER, color, 1.6)
        marks = axes.plot(*_place(point), marker=marker, markersize=MARKER_SIZES[kind], clip_on=False, zorder=5)
        marks[0].set(markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)
    return lines


def steps(points: Line, right: float) -> Line:
    """Join the points of a front by steps: at each KL, the best gain that is reached with no more."""
    path: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if path:
            path.append((x, path[-1][1]))
        path.append((x, y))
    return [*path, (right, path[-1][1])] if path else []


def draw_over_optimisation(axes: Axes, entry: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Draw proxy and gold score against KL, one of the entries of `over_optimisation.json`, with the fitted curve and
    its peak where there is a fit.

    Args:
        names: what `proxy` and `gold` are called.
    """
    points = entry["points"]
    furthest = max(p["kl"]["high"] for p in points)
    fits = {key: fit for key, fit in entry["fit"].items() if fit}
    peaks = [fit["peak_kl"] for fit in fits.values() if fit["peak_kl"] is not None]
    right = 1.08 * max([furthest, *(peak for peak in peaks if peak <= 2 * furthest)]) or 1
    root_scale(axes, 0, right)
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    axes.plot(0, 0, marker="D", markersize=6, color=GREY, markeredgecolor=PAPER, clip_on=False, zorder=4)
    for key, (color, marker, line) in SCORE_STYLES.items():
        scored = [p for p in points if p[key] is not None]
        if not scored:
            continue
        for point in scored:
            draw_cross(axes, point["kl"], point[key], color=color, linewidth=1.1, alpha=0.6, zorder=2)
        x, y = [p["kl"]["mean"] for p in scored], [p[key]["mean"] for p in scored]
        join = "none" if key in fits else line
        marks = axes.plot(x, y, color=color, marker=marker, markersize=5, linestyle=join, linewidth=1.1, zorder=3)
        marks[0].set(markeredgecolor=PAPER, markeredgewidth=0.6, label=names[key])
        if key in fits:
            kl = np.linspace(0, np.sqrt(right), 200)[1:] ** 2
            axes.plot(kl, curve_of(fits[key], entry["form"], kl), color=color, linestyle=line, linewidth=1.5, zorder=2)
        peak = fits[key]["peak_kl"] if key in fits else None
        if peak is not None and peak <= right:
            top = float(curve_of(fits[key], entry["form"], np.array([peak]))[0])
            axes.plot([peak, peak], [0, top], color=color, linestyle=":", linewidth=1.1, zorder=1)


def curve_of(fit: Mapping[str, float], form: str, kl: np.ndarray) -> np.ndarray:
    """Gao et al. (2022), with d = sqrt(KL): d (alpha - beta log d) for training, d (alpha - beta d) for best-of-n."""
    d = np.sqrt(kl)
    return d * (fit["alpha"] - fit["beta"] * (d if form == "bon" else np.log(d)))


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label], lines: Sequence[Line]) -> None:
    """Name every point where its name covers least of other names, markers and lines, inside the axes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays the axes out
    figure.set_layout_engine("none")
    at = axes.transData.transform
    frame = np.array(axes.get_window_extent(renderer).extents)
    taken = [_around(at(label.place), MARKER, MARKER) for label in labels]
    taken += [box for line in lines for box in _boxes(at(np.array(line, dtype=float)))]
    for label in labels:
        words = _fold(label.text, int((frame[2] - frame[0]) // 24))
        text = axes.annotate(words, label.place, fontsize=label.size, color=INK, zorder=6, parse_math=False)
        box = text.get_window_extent(renderer)
        size, anchor = (box.width / 2, box.height / 2), at(label.place)
        obstacles = np.array(taken)

        def cost(offset: Any, size: Any = size, anchor: Any = anchor, obstacles: Any = obstacles) -> float:
            own = _around(anchor + np.array(offset), size[0] + 2, size[1] + 1)
            covered = float(_overlaps(own, obstacles).sum())
            inner = _around(anchor + np.array(offset), *size)
            outside = 4 * size[0] * size[1] - float(_overlaps(inner, frame[None])[0])
            return covered + 10 * outside + 0.5 * float(np.hypot(*offset))

        offsets = [
            (dx * (distance + size[0]), dy * (distance + size[1]))
            for distance, (dx, dy) in itertools.product(DISTANCES, DIRECTIONS)
        ]
        best = min(offsets, key=cost)
        taken.append(_around(anchor + np.array(best), size[0] + 2, size[1] + 1))
        text.set(position=best, ha="center", va="center_baseline", multialignment="center")
        text.set_anncoords("offset points")
        if not _overlaps(_around(anchor, 22, 22), np.array(taken[-1:])).any():  # too far to be taken for its name
            end = axes.transData.inverted().transform(anchor + np.array(best) - np.sign(best) * np.array(size))
            leader = [label.place, tuple(end)]
            axes.plot(*zip(*leader, strict=True), color=GREY, linewidth=0.7, zorder=2)


def _fold(name: str, longest: int) -> str:
    """Break a long name of a sweep, `grpo-beta=0.05-learning_rate=1e-05`, where one of its options begins."""
    if len(name) <= longest:
        return name
    return re.sub(r"-(?=[a-z_]+=)", "\n", name)


def _around(center: Any, half_width: float, half_height: float) -> np.ndarray:
    x, y = center
    return np.array([x - half_width, y - half_height, x + half_width, y + half_height])


def _boxes(corners: np.ndarray) -> list[np.ndarray]:
    """Small boxes along a line, in points."""
    boxes = []
    for start, end in itertools.pairwise(corners):
        count = max(1, int(np.hypot(*(end - start)) // STRIDE))
        boxes += [_around(start + (end - start) * share, 3, 3) for share in np.linspace(0, 1, count + 1)]
    return boxes


def _overlaps(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that a box shares with others, (4,), (N, 4) -> (N,)."""
    width = np.minimum(one[2], others[:, 2]) - np.maximum(one[0], others[:, 0])
    height = np.minimum(one[3], others[:, 3]) - np.maximum(one[1], others[:, 1])
    return np.maximum(width, 0) * np.maximum(height, 0)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG whole or not at all, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
