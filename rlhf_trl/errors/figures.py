"""The figure of an error analysis: six panels from the content of `error_analysis.json`."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_trl.errors.findings import judge_confidence
from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE, build_figure, with_errors

Row = Mapping[str, Any]
FEW = 5
PERCENT = PercentFormatter(1, decimals=0)
# Key of an estimate -> colour, marker, shift and label of its points.
Series = dict[str, tuple[str, str, float, str]]
OF_GROUPS: Series = {
    "accuracy": (BLUE, "o", -0.12, "the model"),
    "length_baseline": (GREY, "s", 0.12, "taking the longer answer"),
}
OF_PREFERENCE: Series = {"model": (BLUE, "o", -0.08, "the model"), "humans": (GREEN, "D", 0.08, "the humans")}


def draw(stage: str, analysis: Row) -> Figure:
    """Draw the scores, margins and calibration, and the accuracy by length and by turns."""
    accuracy, longer = analysis["overall"]["accuracy"], analysis["overall"]["length_baseline"]
    lengths, turns = (
        {group["name"]: group for group in analysis["breakdowns"][key]}
        for key in ("length_difference_tokens", "turns")
    )
    short = {name: name.replace("shorter by ", "−").replace("longer by ", "+") for name in lengths}
    by_length = {re.sub(" (?=to |or more|10%)", "\n", short[name]): group for name, group in lengths.items()}
    prefers = {f"in {unit}": found["prefers_longer"] for unit, found in analysis["length"].items()}
    known = {unit: {**found, "n": found["model"]["n"]} for unit, found in prefers.items() if found}
    panels = [
        partial(_draw_scores, scores=analysis["scores"]),
        partial(_draw_margins, histogram=analysis["scores"]["margin_histogram"]),
        partial(_draw_reliability, calibration=analysis["calibration"]),
        partial(_draw_groups, rows=by_length, series=OF_GROUPS, few=FEW,
                title="Accuracy by length of the chosen answer\nbeside the rejected one",
                x="length difference, share of the longer answer (tokens)"),
        partial(_draw_groups, rows=turns, series=OF_GROUPS, few=FEW, title="Accuracy by depth of the conversation",
                x="turns of the user in the prompt"),
        partial(_draw_groups, rows=known, series=OF_PREFERENCE, few=1, x="pairs that differ in length",
                title="How often the longer answer is preferred"),
    ]  # fmt: skip
    title = (
        f"{stage}: right in {accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] of "
        f"{analysis['pairs']['analysed']:,} held-out pairs; the longer answer in {longer['mean']:.1%}\n"
        f"(bars: 95 % intervals; groups of fewer than {FEW} pairs are not drawn)"
    )
    return build_figure(panels, size=(4.7, 4.1), title=title, legend=False)


def _draw_scores(axes: Axes, scores: Row) -> None:
    histogram = scores["histogram"]
    for side, color, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--")):
        mean = scores[side]["mean"]["mean"]
        axes.stairs(histogram[side], histogram["edges"], color=color, linestyle=style, linewidth=1.8,
                    label=f"{side}, mean {mean:.2f}")  # fmt: skip
        axes.axvline(mean, color=color, linestyle=style, linewidth=1)
    _finish(axes, "Scores", "score", "answers")


def _draw_margins(axes: Axes, histogram: Row) -> None:
    edges = np.array(histogram["edges"])
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(middles, histogram["counts"], width=np.diff(edges), color=np.where(middles > 0, BLUE, ORANGE))
    axes.axvline(0, color="black", linewidth=1)
    _finish(axes, "Margins: right of 0, the model is right", "score of the chosen minus the rejected answer", "pairs")


def _draw_reliability(axes: Axes, calibration: Row) -> None:
    table, name = calibration["tables"]["equal_mass"], judge_confidence(calibration)[0]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", linewidth=1.5, label="calibrated")
    places, estimates = [part["predicted"] for part in table], [part["observed"] for part in table]
    _draw_points(axes, places, estimates, BLUE, "o", "measured, bins of equal mass")
    axes.set_xlim(0.48, 1.02)
    axes.xaxis.set_major_formatter(PERCENT)
    word = "no sign of a wrong confidence" if name == "sound" else name.replace("_", "-")
    title = f"Calibration: {word}\n(ECE {calibration['errors']['equal_mass']['ece']:.3f})"
    _finish(axes, title, "confidence of the model, sigma(|margin|)", "accuracy", percent=True)


def _draw_groups(axes: Axes, rows: Mapping[str, Row], series: Series, few: int, title: str, x: str) -> None:
    """Draw estimates of each row side by side, for the rows of enough pairs."""
    for key, (color, marker, shift, label) in series.items():
        used = {place + shift: row[key] for place, row in enumerate(rows.values()) if row["n"] >= few}
        _draw_points(axes, list(used), list(used.values()), color, marker, label)
    axes.set_xticks(range(len(rows)), [f"{name}\nn={row['n']:,}" for name, row in rows.items()])
    axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    _finish(axes, title, x, "share", percent=True)


def _draw_points(axes: Axes, places: Sequence[float], estimates: Sequence[Row], color: str, marker: str, label: str):
    if estimates:
        means, errors = with_errors(estimates)
        axes.errorbar(places, means, errors, color=color, marker=marker, linestyle="none", capsize=3, label=label)


def _finish(axes: Axes, title: str, x: str, y: str, percent: bool = False) -> None:
    """Name the axes, and put a legend between title and panel, where it hides no data."""
    axes.set_title(title, pad=22)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(labelsize=8)
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PERCENT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
