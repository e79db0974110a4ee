"""The training curves: every quantity that a stage logged, by step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_trl.figures.style import BLUE, GREEN, ORANGE, build_figure

History = Sequence[Mapping[str, Any]]
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


def plot_training(stats: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Draw the training curves of stages, from the content of each one's `training_stats.json`: a panel for each
    quantity that a stage logged."""
    panels, titles = [], []
    for stage, entry in stats.items():
        unit = {"grpo": "\nnats per token", "ppo": "\nnats per answer"}.get(entry["trainer"], "")
        for title, series in logged_panels(entry["history"]).items():
            panels.append(partial(draw_series, history=entry["history"], series=series))
            titles.append(f"{stage} ({entry['trainer']})\n{title}{unit if title.startswith('KL') else ''}")
    if not panels:
        return None
    figure = build_figure(panels, columns=3 if len(stats) == 1 else 5, size=(3.6, 2.5))
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set_title(title)
    return figure


def logged_panels(history: History) -> dict[str, dict[str, str]]:
    """Return the entries of `PANELS` that were logged: panel title -> key of the series -> its label."""
    logged = {key for row in history for key in row}
    panels = [(title, {key: series[key] for key in series if key in logged}) for title, series in PANELS.items()]
    return {title: series for title, series in panels if series}


def draw_series(axes: Axes, history: History, series: Mapping[str, str]) -> None:
    """Draw logged quantities by step; each must have been logged once or more."""
    for (color, line), (key, label) in zip(SERIES_STYLES, series.items(), strict=False):
        steps, values = zip(*((row["step"], row[key]) for row in history if key in row), strict=True)
        style: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o" if len(steps) < 12 else ""}
        axes.plot(steps, values, linewidth=1.5, markersize=3.5, label=label if len(series) > 1 else None, **style)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("step")
