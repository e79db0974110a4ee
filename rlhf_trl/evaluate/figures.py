"""The figures of `evaluate`: from its JSON, and from the stages' `training_stats.json`; None where nothing is to draw.

Policies have the colour and marker of their trainer; intervals are 95 %.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_trl.figures import style
from rlhf_trl.figures.frontier import draw_frontier, draw_over_optimisation
from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE, PAPER, STYLE, build_figure, with_errors
from rlhf_trl.run.layout import REFERENCE

# Score -> the reward model that gives it.
SCORERS = {"reward": "reward model", "gold": "gold model"}
# Estimate of the KL -> colour, marker, name.
ESTIMATORS = {"kl": (BLUE, "o", "exact"), "kl_k1": (ORANGE, "s", "sampled, k1"), "kl_k3": (GREEN, "^", "sampled, k3")}
# A training run with more logged steps is drawn as the means of this many blocks.
BLOCKS = 40


@matplotlib.rc_context(STYLE)
def plot_distributions(metrics: Mapping[str, Any]) -> Figure | None:
    """Draw how each policy's scores are spread, a row for each, with the reference's outline behind and the medians;
    a column for the reward model and one for the gold model."""
    columns = [key for key in SCORERS if key in metrics["histogram_edges"]]
    rows = sorted(metrics["policies"], key=lambda name: name != REFERENCE)
    if not columns or not rows:
        return None
    figure = Figure(figsize=(2 + 4.6 * len(columns), 1.1 + 0.85 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="col")
    for column, key in zip(grid.T, columns, strict=True):
        for axes, name in zip(column, rows, strict=True):
            color = GREY if name == REFERENCE else BLUE if key == "reward" else ORANGE
            _draw_distribution(axes, metrics, key, name, color)
        column[-1].set_xlabel(f"score by the {SCORERS[key]}, {metrics[f'{key}_stage']}")
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(textwrap.fill(name, 18), rotation=0, ha="right", va="center")
    figure.supylabel("share of the answers", fontsize=10)
    style.add_legend(figure)
    return figure


def _draw_distribution(axes: Axes, metrics: Mapping[str, Any], key: str, name: str, color: str) -> None:
    edges = metrics["histogram_edges"][key]
    own, reference = (metrics["policies"][policy]["distributions"][key] for policy in (name, REFERENCE))
    shares, behind = (np.array(of["counts"]) / max(1, sum(of["counts"])) for of in (own, reference))
    axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
    axes.stairs(shares, edges, color=color, linewidth=1.2)
    if name != REFERENCE:
        axes.stairs(behind, edges, color=GREY, linestyle="--", label="outline of the reference")
    median = own["quantiles"]["0.5"]
    axes.axvline(median, color=color, linewidth=1.8)
    note = f"median {round(median, 2) + 0.0:.2f}".replace("-", "−")
    axes.text(0.99, 0.96, note, ha="right", va="top", fontsize=9, transform=axes.transAxes)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.35 * max(shares.max(), behind.max())))
    axes.set_yticks([])
    axes.spines.left.set_visible(False)


def plot_kl(metrics: Mapping[str, Any]) -> Figure | None:
    """Draw the KL of every policy, exact and by the two sampled estimators, and along the checkpoints."""
    policies = {name: summary for name, summary in metrics["policies"].items() if name != REFERENCE}
    by_step = [
        partial(_draw_kl_by_step, stage=stage, rows=rows)
        for stage, rows in metrics["checkpoints"].items()
        if len(rows) > 1
    ]
    if not policies:
        return None
    return build_figure(
        [partial(_draw_kl, policies=policies), *by_step], columns=2, size=(5.4, max(2.8, 0.9 + 0.45 * len(policies)))
    )


def _draw_kl(axes: Axes, policies: Mapping[str, Any]) -> None:
    limit = _reach([*policies.values()])
    for offset, (key, (color, marker, label)) in zip((-0.22, 0, 0.22), ESTIMATORS.items(), strict=True):
        means, errors = with_errors([summary[key] for summary in policies.values()])
        y = np.arange(len(policies)) + offset
        look: dict[str, Any] = {"color": color, "zorder": 3}
        inside = means <= limit
        axes.errorbar(means[inside], y[inside], xerr=errors[:, inside], fmt="none", elinewidth=1.6, **look)
        axes.plot(means[inside], y[inside], marker, markersize=7, markeredgecolor=PAPER, label=label, **look)
        for mean, place in zip(means[~inside], y[~inside], strict=True):
            axes.plot(limit, place, ">", markersize=7, clip_on=False, **look)
            axes.annotate(f"{mean:.3g}", (limit, place), (-7, 0), textcoords="offset points", ha="right", va="center")
    style.root_scale(
        axes, min(0, *(summary[key]["low"] for summary in policies.values() for key in ESTIMATORS)), limit
    )
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_yticks(range(len(policies)), [textwrap.fill(name, 22) for name in policies])
    axes.grid(axis="y", visible=False)


def _reach(summaries: Sequence[Mapping[str, Any]]) -> float:
    """The end of a KL axis: k3 can be very large, and must not flatten the others."""
    others = max(summary[key]["high"] for summary in summaries for key in ("kl", "kl_k1"))
    furthest = max(summary["kl_k3"]["high"] for summary in summaries)
    return 1.05 * max(others, min(furthest, 1.5 * others)) or 1


def _draw_kl_by_step(axes: Axes, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    for order, (key, (color, marker, _)) in enumerate(ESTIMATORS.items()):
        means, errors = with_errors([row[key] for row in rows])
        size, above = (6, 5) if key == "kl" else (4.5, 4 - order)  # the exact one is seen where they agree
        axes.plot(steps, means, color=color, marker=marker, markersize=size, linewidth=1.3, zorder=above)
        if key == "kl":
            axes.fill_between(steps, means - errors[0], means + errors[1], color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(min(0, *(row["kl_k1"]["mean"] for row in rows)), _reach(rows))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(f"KL of {textwrap.fill(stage, 22)}\nnats per answer")


def plot_pareto(pareto: Mapping[str, Any]) -> Figure | None:
    """Draw gain against KL, a panel for each score: the policies, the front, best-of-n, the checkpoints."""
    panels = [partial(draw_frontier, frontier=pareto["axes"][score], score=score)
              for score in SCORERS if score in pareto["axes"]]  # fmt: skip
    return build_figure(panels, size=(6.6, 5)) if panels else None


def plot_over_optimisation(over_optimisation: Mapping[str, Any]) -> Figure | None:
    """Draw proxy and gold score against KL, a panel for each stage with checkpoints and one for best-of-n, with fits
    and peaks."""
    entries = {**over_optimisation["stages"], "best of n": over_optimisation["best_of_n"]}
    entries = {name: entry for name, entry in entries.items() if len(entry["points"]) > 1}
    if not entries:
        return None
    figure = build_figure(
        [partial(draw_over_optimisation, entry=entry) for entry in entries.values()], size=(4.2, 3.2)
    )
    for axes, (name, entry) in zip(figure.axes, entries.items(), strict=True):
        axes.set_ylabel(f"gain of {textwrap.fill(name, 22)}")
        axes.set_title("\n".join(_name_peaks(entry)), fontsize=9)
    return figure


def _name_peaks(entry: Mapping[str, Any]) -> list[str]:
    furthest = max(point["kl"]["mean"] for point in entry["points"])
    notes = []
    for key, fit in sorted(entry["fit"].items(), reverse=True):
        if fit:
            peak = fit["peak_kl"]
            where = "none" if peak is None else f"KL {peak:.2g}" if peak <= furthest else "beyond the data"
            notes.append(f"{key} peak: {where}")
    return notes


@matplotlib.rc_context(STYLE)
def plot_reward_kl_tradeoff(stats: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Draw the logged reward of the online stages against their logged KL, from the first step to the last.

    Each trainer has a panel of its own, because what TRL logs as KL is another quantity in each of them.
    """
    logged = {
        stage: [(row["kl"], row["reward"], row["step"]) for row in entry["history"] if {"kl", "reward"} <= row.keys()]
        for stage, entry in stats.items()
    }
    logged = {stage: rows for stage, rows in logged.items() if rows}
    stages: dict[str, list[str]] = {}
    for stage in logged:
        stages.setdefault(stats[stage]["trainer"], []).append(stage)
    if not stages:
        return None
    styles = style.policy_styles({stage: stats[stage]["trainer"] for stage in logged})
    figure = Figure(figsize=(0.8 + 5.6 * len(stages), 5), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    last = max(row[2] for rows in logged.values() for row in rows)
    for axes, (trainer, names) in zip(panels, stages.items(), strict=True):
        for stage in names:
            kl, reward, step = _blocks(logged[stage]).T
            line: dict[str, Any] = {key: styles[stage][key] for key in ("color", "linestyle")}
            axes.plot(kl, reward, linewidth=1, alpha=0.7, label=stage, zorder=2, **line)
            color_map: dict[str, Any] = {"c": step, "cmap": "cividis", "vmin": 0, "vmax": last}
            dots = axes.scatter(kl, reward, marker=styles[stage]["marker"], s=26, linewidths=0, zorder=3, **color_map)
        definition = stats[names[0]]["definitions"]["kl"]
        axes.set_xlabel(textwrap.fill(f"KL as {trainer} logs it: {definition}", 62))
        axes.set_ylabel(f"reward as {trainer} logs it")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.legend()
    bar = figure.colorbar(dots, ax=panels, pad=0.02, aspect=30)
    bar.locator = MaxNLocator(6, integer=True)
    size = -(-max(map(len, logged.values())) // BLOCKS)
    bar.set_label("training step" + (f"\n(a mark: mean of up to {size} logs)" if size > 1 else ""))
    return figure


def _blocks(rows: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Average neighbouring rows until there are at most `BLOCKS`, (N, 3) -> (at most BLOCKS, 3)."""
    size = -(-len(rows) // BLOCKS)
    return np.array([np.mean(rows[start : start + size], axis=0) for start in range(0, len(rows), size)])
