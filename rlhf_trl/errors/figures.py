"""The figure of an error analysis: six panels from the JSON to one PNG, the same bytes for the same numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE

FEW = 5
PERCENT = PercentFormatter(1, decimals=0)
# Key of an estimate -> colour, marker, shift and label of its points.
Series = dict[str, tuple[str, str, float, str]]
OF_GROUPS: Series = {
    "accuracy": (BLUE, "o", -0.12, "the model"),
    "length_baseline": (GREY, "s", 0.12, "taking the longer answer"),
}
OF_PREFERENCE: Series = {"model": (BLUE, "o", -0.08, "the model"), "humans": (GREEN, "D", 0.08, "the humans")}

Row = dict[str, Any]


def draw(stage: str, analysis: Row, path: Path) -> None:
    """Draw the scores, margins and calibration, and the accuracy by length and by turns."""
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    panels = figure.subplots(2, 3)
    accuracy, longer = analysis["overall"]["accuracy"], analysis["overall"]["length_baseline"]
    _draw_scores(panels[0, 0], analysis["scores"])
    _draw_margins(panels[0, 1], analysis["scores"]["margin_histogram"])
    _draw_reliability(panels[0, 2], analysis["calibration"])
    groups, turns = (analysis["breakdowns"][key] for key in ("length_difference_tokens", "turns"))
    names = [group["name"].replace("shorter by ", "−").replace("longer by ", "+") for group in groups]
    names = [re.sub(" (?=to |or more|10%)", "\n", name) for name in names]
    _draw_estimates(panels[1, 0], names, groups, OF_GROUPS)
    _finish(panels[1, 0], "Accuracy by length of the chosen answer\nbeside the rejected one",
            "length difference, share of the longer answer (tokens)", "accuracy", percent=True)  # fmt: skip
    _draw_estimates(panels[1, 1], [group["name"] for group in turns], turns, OF_GROUPS)
    _finish(panels[1, 1], "Accuracy by depth of the conversation", "turns of the user in the prompt", "accuracy",
            percent=True)  # fmt: skip
    prefers = {unit: analysis["length"][unit]["prefers_longer"] for unit in ("tokens", "characters")}
    known = {unit: {**found, "n": found["model"]["n"]} for unit, found in prefers.items() if found}
    _draw_estimates(panels[1, 2], [f"in {unit}" for unit in known], list(known.values()), OF_PREFERENCE, few=1)
    _finish(panels[1, 2], "How often the longer answer is preferred", "", "share of the pairs that differ in length",
            percent=True)  # fmt: skip
    figure.suptitle(
        f"{stage}: right in {accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] of "
        f"{analysis['pairs']['analysed']:,} held-out pairs; the longer answer in {longer['mean']:.1%}\n"
        f"(bars: 95 % intervals; groups of fewer than {FEW} pairs are not drawn)", fontsize=12, parse_math=False,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_scores(axes: Axes, scores: Row) -> None:
    histogram = scores["histogram"]
    for side, color, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--")):
        mean = scores[side]["mean"]["mean"]
        axes.stairs(histogram[side], histogram["edges"], color=color, linestyle=style, linewidth=1.8,
                    label=f"{side}, mean {mean:.2f}")  # fmt: skip
        axes.axvline(mean, color=color, linestyle=style, linewidth=1)
    _finish(axes, f"Scores: chosen above rejected in {scores['auc']['mean']:.1%}\nacross prompts", "score", "answers")


def _draw_margins(axes: Axes, histogram: Row) -> None:
    edges = np.array(histogram["edges"])
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(middles, histogram["counts"], width=np.diff(edges), color=np.where(middles > 0, BLUE, ORANGE))
    axes.axvline(0, color="black", linewidth=1)
    _finish(axes, "Margins: right of 0, the model is right", "score of the chosen minus the rejected answer", "pairs")


def _draw_reliability(axes: Axes, calibration: Row) -> None:
    table, gap = calibration["tables"]["equal_mass"], calibration["gap"]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", linewidth=1.5, label="calibrated")
    places, estimates = [part["predicted"] for part in table], [part["observed"] for part in table]
    _draw_points(axes, places, estimates, BLUE, "o", "measured, bins of equal mass")
    axes.set_xlim(0.48, 1.02)
    axes.xaxis.set_major_formatter(PERCENT)
    word = "over-confident" if gap["low"] > 0 else "under-confident" if gap["high"] < 0 else "right on average"
    title = f"Calibration: {word}\n(ECE {calibration['errors']['equal_mass']['ece']:.3f})"
    _finish(axes, title, "confidence of the model, sigma(|margin|)", "accuracy", percent=True)


def _draw_estimates(axes: Axes, names: Sequence[str], rows: Sequence[Row], series: Series, few: int = FEW) -> None:
    """Draw estimates of each row side by side, for the rows of enough pairs."""
    for key, (color, marker, shift, label) in series.items():
        used = {place + shift: row[key] for place, row in enumerate(rows) if row["n"] >= few}
        _draw_points(axes, list(used), list(used.values()), color, marker, label)
    axes.set_xticks(range(len(rows)), [f"{name}\nn={row['n']:,}" for name, row in zip(names, rows, strict=True)])
    axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)


def _draw_points(axes: Axes, places: list[float], estimates: list[Row], color: str, marker: str, label: str) -> None:
    if estimates:
        means, low, high = (np.array([estimate[key] for estimate in estimates]) for key in ("mean", "low", "high"))
        axes.errorbar(places, means, [means - low, high - means], color=color, marker=marker, markersize=5,
                      linestyle="none", capsize=3, linewidth=1.4, label=label)  # fmt: skip


def _finish(axes: Axes, title: str, x: str, y: str, percent: bool = False) -> None:
    """Name the axes, and put a legend between title and panel, where it hides no data."""
    axes.set_title(title, fontsize=10, pad=22)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PERCENT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
