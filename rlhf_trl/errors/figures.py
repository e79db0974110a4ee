"""The figure of an error analysis: six panels from the JSON to one PNG, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_trl.figures.training import BLUE, GREEN, GREY, ORANGE

CHOSEN, REJECTED, BASELINE = BLUE, ORANGE, GREY
SMALL = 8
FEW = 5


def draw(stage: str, analysis: dict[str, Any], path: Path) -> None:
    """Draw the scores, margins and calibration, and the accuracy by length and by turns."""
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    panels = figure.subplots(2, 3)
    overall, pairs = analysis["overall"], analysis["pairs"]
    _draw_scores(panels[0, 0], analysis["scores"])
    _draw_margins(panels[0, 1], analysis["scores"])
    _draw_reliability(panels[0, 2], analysis["calibration"])
    _draw_lengths(panels[1, 0], analysis["breakdowns"]["length_difference_tokens"])
    _draw_turns(panels[1, 1], analysis["breakdowns"]["turns"])
    _draw_prefers_longer(panels[1, 2], analysis["length"])
    found = overall["accuracy"]
    figure.suptitle(
        f"{stage}: right in {found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}] of {pairs['analysed']:,} "
        f"held-out pairs; the longer answer in {overall['length_baseline']['mean']:.1%}\n"
        f"(bars: 95 % intervals; groups of fewer than {FEW} pairs are not drawn)",
        fontsize=12,
        parse_math=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_scores(axes: Axes, scores: dict[str, Any]) -> None:
    histogram = scores["histogram"]
    for side, color, style in (("chosen", CHOSEN, "-"), ("rejected", REJECTED, "--")):
        label = f"{side}, mean {scores[side]['mean']['mean']:.2f}"
        axes.stairs(histogram[side], histogram["edges"], color=color, linestyle=style, linewidth=1.8, label=label)
        axes.axvline(scores[side]["mean"]["mean"], color=color, linestyle=style, linewidth=1)
    _finish(axes, f"Scores: chosen above rejected in {scores['auc']['mean']:.1%}\nacross prompts", "score", "answers")
    _legend_above(axes)


def _draw_margins(axes: Axes, scores: dict[str, Any]) -> None:
    edges, counts = np.array(scores["margin_histogram"]["edges"]), scores["margin_histogram"]["counts"]
    middles = (edges[:-1] + edges[1:]) / 2
    colors = [CHOSEN if middle > 0 else REJECTED for middle in middles]
    axes.bar(middles, counts, width=np.diff(edges), color=colors)
    axes.axvline(0, color="black", linewidth=1)
    _finish(axes, "Margins: right of 0, the model is right", "score of the chosen minus the rejected answer", "pairs")


def _draw_reliability(axes: Axes, calibration: dict[str, Any]) -> None:
    table = calibration["tables"]["equal_mass"]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", linewidth=1.5, label="calibrated")
    places = [part["predicted"] for part in table]
    _intervals(axes, places, [part["observed"] for part in table], CHOSEN, "o", "measured, bins of equal mass")
    axes.set_xlim(0.48, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    gap = calibration["gap"]
    word = "over-confident" if gap["low"] > 0 else "under-confident" if gap["high"] < 0 else "right on average"
    _finish(axes, f"Calibration: {word}\n(ECE {calibration['errors']['equal_mass']['ece']:.3f})",
            "confidence of the model, sigma(|margin|)", "accuracy")  # fmt: skip
    _percent(axes)
    _legend_above(axes)


def _draw_lengths(axes: Axes, cells: list[dict[str, Any]]) -> None:
    names = [cell["name"].replace("shorter by ", "−").replace("longer by ", "+") for cell in cells]
    for word in (" to ", " or more", " 10%"):
        names = [name.replace(word, f"\n{word.lstrip()}") for name in names]
    _draw_cells(axes, cells, names)
    _finish(axes, "Accuracy by length of the chosen answer\nbeside the rejected one",
            "length difference, share of the longer answer (tokens)", "accuracy")  # fmt: skip
    _percent(axes)
    _legend_above(axes)


def _draw_turns(axes: Axes, cells: list[dict[str, Any]]) -> None:
    _draw_cells(axes, cells, [cell["name"] for cell in cells])
    _finish(axes, "Accuracy by depth of the conversation", "turns of the user in the prompt", "accuracy")
    _percent(axes)
    _legend_above(axes)


def _draw_cells(axes: Axes, cells: list[dict[str, Any]], names: list[str]) -> None:
    """Draw the accuracies of cells with enough pairs beside those of the longer answer."""
    for key, color, marker, shift, label in (
        ("accuracy", CHOSEN, "o", -0.12, "the model"),
        ("length_baseline", BASELINE, "s", 0.12, "taking the longer answer"),
    ):
        used = {place + shift: cell[key] for place, cell in enumerate(cells) if cell["n"] >= FEW}
        _intervals(axes, list(used), list(used.values()), color, marker, label)
    names = [f"{name}\nn={cell['n']:,}" for name, cell in zip(names, cells, strict=True)]
    axes.set_xticks(range(len(cells)), names, fontsize=SMALL - 1)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)


def _draw_prefers_longer(axes: Axes, length: dict[str, Any]) -> None:
    known = {unit: found["prefers_longer"] for unit, found in length.items() if found["prefers_longer"]}
    for key, color, marker, shift, label in (
        ("model", CHOSEN, "o", -0.08, "the model"),
        ("humans", GREEN, "D", 0.08, "the humans"),
    ):
        places = [place + shift for place in range(len(known))]
        _intervals(axes, places, [found[key] for found in known.values()], color, marker, label)
    axes.set_xticks(range(len(known)), [f"in {unit}\nn={found['model']['n']:,}" for unit, found in known.items()])
    axes.set_xlim(-0.6, max(len(known), 1) - 0.4)
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    _finish(axes, "How often the longer answer is preferred", "", "share of the pairs that differ in length")
    _percent(axes)
    _legend_above(axes)


# --- parts -----------------------------------------------------------------------------------------------------------


def _intervals(
    axes: Axes, places: list[float], estimates: list[dict[str, float]], color: str, marker: str, label: str
) -> None:
    if estimates:
        means = np.array([estimate["mean"] for estimate in estimates])
        below = means - [estimate["low"] for estimate in estimates]
        above = [estimate["high"] for estimate in estimates] - means
        axes.errorbar(places, means, [below, above], color=color, marker=marker, markersize=5, linestyle="none",
                      capsize=3, linewidth=1.4, label=label)  # fmt: skip


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, pad=22)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _percent(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend_above(axes: Axes) -> None:
    """Put the legend between title and panel, where it hides no data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=SMALL, frameon=False)
