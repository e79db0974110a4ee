"""Figures of the run that more than one step draws. Pure functions from JSON to a PNG or an SVG text; no global
state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"

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
    panels = {
        title: series for title, series in PANELS.items() if any(key in row for row in history for key in series)
    }
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for index, (title, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for color, (key, label) in zip((BLUE, ORANGE, GREEN), series.items(), strict=False):
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=color, label=label, marker="o" if len(points) < 12 else "", ms=3
                )
        axes.set_title(title, fontsize=10)
        if title.startswith("KL"):
            axes.set_ylabel("nats per token" if stats["trainer"] == "grpo" else "nats per answer")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if sum(key in row for key in series for row in history[-5:]) and len(series) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(f"{stats['stage']} ({stats['trainer']})", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
