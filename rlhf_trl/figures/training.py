"""Figures of the run that more than one step draws. Pure functions from JSON to a PNG or an SVG text; no global
state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
# The series of one panel: colour and line, never colour alone.
SERIES_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"))

# Panel title -> the series it shows, with their labels.
PANELS: dict[str, dict[str, str]] = {
    "Loss": {"loss": "training", "validation_loss": "held-out", "value_loss": "value"},
    "Reward accuracy": {"reward_accuracy": "training", "validation_reward_accuracy": "held-out"},
    "Reward margin": {"reward_margin": "training", "validation_reward_margin": "held-out"},
    "Reward": {"reward": "training"},
    "KL to the reference": {"kl": "training"},
    "Entropy (nats per token)": {"entropy": "training"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Learning rate": {"learning_rate": ""},
}


def plot_training(stats: dict[str, Any], path: Path) -> None:
    """Draw the training curves of one stage, a panel for each quantity that was logged."""
    history = stats["history"]
    panels = logged_panels(history)
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for index, (title, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        draw_series(axes, history, series)
        axes.set_title(title, fontsize=10)
        if title.startswith("KL"):
            axes.set_ylabel("nats per token" if stats["trainer"] == "grpo" else "nats per answer")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.suptitle(f"{stats['stage']} ({stats['trainer']})", fontsize=11, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def logged_panels(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the entries of `PANELS` that were logged: panel title -> key of the series -> its label."""
    panels = {
        title: {key: label for key, label in series.items() if any(key in row for row in history)}
        for title, series in PANELS.items()
    }
    return {title: series for title, series in panels.items() if series}


def draw_series(axes: Axes, history: Sequence[Mapping[str, Any]], series: Mapping[str, str]) -> None:
    """Draw logged quantities by step, with a legend if there are several; each must have been logged once or more."""
    for (color, line), (key, label) in zip(SERIES_STYLES, series.items(), strict=False):
        steps, values = zip(*((row["step"], row[key]) for row in history if key in row), strict=True)
        marker = "o" if len(steps) < 12 else ""
        axes.plot(steps, values, color=color, linestyle=line, linewidth=1.4, marker=marker, markersize=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(format_tick)
    axes.tick_params(labelsize=9)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def format_tick(value: float, _: float | None) -> str:
    """Write a tick in full: matplotlib would put a common factor or offset above the axis, where the title is."""
    return f"{value:.6g}".replace("-", "−")
