"""Gain against KL with the front and best-of-n, and over-optimisation: for the PNGs of the evaluation and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf_trl.figures.style import BLUE, GREY, INK, ORANGE, PAPER, policy_styles, root_scale, with_errors

# Score -> colour, marker, line, and what the legend calls it.
SCORES = {"proxy": (BLUE, "o", "-", "reward model (proxy)"), "gold": (ORANGE, "s", "--", "gold model")}
Point = Mapping[str, Any]


def draw_frontier(axes: Axes, frontier: Mapping[str, Any], score: str) -> None:
    """Draw gain against KL: one of the axes of `pareto.json`, or the one of `winrate.json`.

    Every final policy is a marker with its intervals, hollow where another one dominates it; the front is a line of
    steps, as nothing between two policies was measured; best-of-n is dashed; the checkpoints of a stage are small and
    joined by a thin line.
    """
    points, best, level = frontier["points"], frontier["best_of_n"], 0.5 if score == "win_rate" else 0.0
    right = 1.12 * max([*(point["kl"]["high"] for point in points), *(point["kl"] for point in best)]) or 1
    root_scale(axes, 0, right)
    gains = [point["gain"] for point in [*points, *best]]
    low, high = min(level, *(gain["low"] for gain in gains)), max(level, *(gain["high"] for gain in gains))
    margin = 0.12 * (high - low) or 1
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(f"{score} gain over the reference")
    if score == "win_rate":
        axes.set_ylim(max(low - margin, -0.05), min(high + margin, 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_ylabel("win rate against the reference")
    axes.axhline(level, color=GREY, linewidth=1, zorder=1)
    policies: dict[str, list[Point]] = {}
    for point in points:
        policies.setdefault(point["policy"], []).append(point)
    styles = policy_styles({name: of[0]["trainer"] for name, of in policies.items() if of[0]["trainer"]})
    for name, of in policies.items():
        _draw_policy(axes, name, of, styles.get(name, {"color": GREY, "marker": "D"}))
    front = sorted(_place(point) for point in points if point["on_front"])
    if len(front) > 1:
        x, y = zip(*front, (right, front[-1][1]), strict=True)
        axes.step(x, y, where="post", color=GREY, linewidth=1.8, alpha=0.7, zorder=2, label="front")
    if best:
        curve, label = [(point["kl"], point["gain"]["mean"]) for point in best], f"best of n, up to {best[-1]['n']}"
        axes.plot(*zip(*curve, strict=True), color=INK, linewidth=1.2, linestyle="--", marker=".", label=label)
    if any(point["trainer"] and not point["on_front"] for point in points):
        axes.plot([], [], "o", color=GREY, markerfacecolor=PAPER, label="hollow: dominated")
    if any(point["step"] is not None for point in points):
        axes.plot([], [], "o-", color=GREY, linewidth=0.9, markersize=4, label="checkpoints")


def _place(point: Point) -> tuple[float, float]:
    return point["kl"]["mean"], point["gain"]["mean"]


def _draw_policy(axes: Axes, name: str, points: Sequence[Point], style: Mapping[str, str]) -> None:
    """Draw the checkpoints of one policy, joined by a line, and its final point with intervals; or the reference."""
    color, marker = style["color"], style["marker"]
    path = sorted(points, key=lambda point: (point["step"] is None, point["step"] or 0))
    if len(path) > 1:
        axes.plot(*zip(*map(_place, path), strict=True), color=color, linewidth=0.9, zorder=3)
    for point in path:
        final, filled = point is path[-1], point["on_front"] or not point["trainer"]
        face, edge, width = (color, PAPER, 1.0) if filled else (PAPER, color, 1.6)
        size, label = (9.0, name) if final else (4.5, None)
        marks = axes.plot(*_place(point), marker, markersize=size, clip_on=False, zorder=5, label=label)
        marks[0].set(markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)
        if final and point["trainer"]:
            (x, x_errors), (y, y_errors) = with_errors([point["kl"]]), with_errors([point["gain"]])
            axes.errorbar(x, y, y_errors, x_errors, fmt="none", ecolor=color, elinewidth=1.6, zorder=4)


def draw_over_optimisation(axes: Axes, entry: Mapping[str, Any]) -> None:
    """Draw proxy and gold score against KL, one of the entries of `over_optimisation.json`, with the fitted curve and
    its peak where there is a fit."""
    points = entry["points"]
    furthest = max(point["kl"]["high"] for point in points)
    peaks = {key: fit["peak_kl"] for key, fit in entry["fit"].items() if fit and fit["peak_kl"] is not None}
    right = 1.08 * max([furthest, *(peak for peak in peaks.values() if peak <= 2 * furthest)]) or 1
    root_scale(axes, 0, right)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    axes.plot(0, 0, "D", markersize=6, color=GREY, markeredgecolor=PAPER, clip_on=False, zorder=4)
    for key, (color, marker, line, label) in SCORES.items():
        scored = [point for point in points if point[key] is not None]
        if not scored:
            continue
        (x, x_errors), (y, y_errors) = (with_errors([point[name] for point in scored]) for name in ("kl", key))
        axes.errorbar(x, y, y_errors, x_errors, fmt="none", ecolor=color, elinewidth=1.1, alpha=0.6, zorder=2)
        fit = entry["fit"][key]
        axes.plot(x, y, color=color, marker=marker, markersize=5, linestyle="none" if fit else line, linewidth=1.1,
                  markeredgecolor=PAPER, markeredgewidth=0.6, label=label)  # fmt: skip
        if fit:
            kl = np.linspace(0, np.sqrt(right), 200)[1:] ** 2
            label = f"fitted to the {key} (Gao et al., 2022)"
            axes.plot(kl, curve_of(fit, entry["form"], kl), color=color, linestyle=line, linewidth=1.5, label=label)
        if peaks.get(key, np.inf) <= right:
            top = float(curve_of(fit, entry["form"], np.array([peaks[key]]))[0])
            axes.plot([peaks[key]] * 2, [0, top], ":", color=color, linewidth=1.1, zorder=1, label="its peak")


def curve_of(fit: Mapping[str, float], form: str, kl: np.ndarray) -> np.ndarray:
    """Gao et al. (2022), with d = sqrt(KL): d (alpha - beta log d) for training, d (alpha - beta d) for best-of-n."""
    d = np.sqrt(kl)
    return d * (fit["alpha"] - fit["beta"] * (d if form == "bon" else np.log(d)))
