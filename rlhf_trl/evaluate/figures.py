"""The figures of `evaluate`: from its JSON, and from the stages' `training_stats.json`; None where nothing is to draw.

Policies have the colour and marker of their trainer; intervals are 95 %.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_trl.figures import style
from rlhf_trl.figures.frontier import draw_frontier, draw_over_optimisation
from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE, PAPER, build_figure, with_errors
from rlhf_trl.run.layout import REFERENCE

Row = Mapping[str, Any]
# Score -> the reward model that gives it.
SCORERS = {"reward": "reward model", "gold": "gold model"}
# Estimate of the KL -> colour, marker, name.
ESTIMATORS = {"kl": (BLUE, "o", "exact"), "kl_k1": (ORANGE, "s", "sampled, k1"), "kl_k3": (GREEN, "^", "sampled, k3")}
# A training run with more logged steps is drawn as the means of this many blocks.
BLOCKS = 40


def plot_distributions(metrics: Row) -> Figure | None:
    """Draw how each policy's scores are spread, the reference first: the middle half, the median, and all but the
    outer twentieths; a panel for the reward model and one for the gold model."""
    names = sorted(metrics["policies"], key=lambda name: name != REFERENCE)
    scored = [key for key in SCORERS if names and key in metrics["policies"][names[0]]["distributions"]]
    panels = [partial(_draw_distributions, metrics=metrics, names=names, key=key) for key in scored]
    return build_figure(panels, size=(5.6, 1.2 + 0.5 * len(names))) if panels else None


def _draw_distributions(axes: Axes, metrics: Row, names: Sequence[str], key: str) -> None:
    color = BLUE if key == "reward" else ORANGE
    for place, name in enumerate(names):
        low, start, median, end, high = metrics["policies"][name]["distributions"][key].values()
        own = GREY if name == REFERENCE else color
        axes.plot([low, high], [place, place], color=own, linewidth=1.4)
        axes.barh(place, end - start, left=start, height=0.6, color=own, alpha=0.4)
        axes.plot([median, median], [place - 0.3, place + 0.3], color=own, linewidth=2.2)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"score by the {SCORERS[key]}, {metrics[f'{key}_stage']}")
    axes.grid(axis="y", visible=False)


def plot_kl(metrics: Row) -> Figure | None:
    """Draw the KL of every policy, exact and by the two sampled estimators."""
    policies = {name: summary for name, summary in metrics["policies"].items() if name != REFERENCE}
    if not policies:
        return None
    return build_figure([partial(_draw_kl, policies=policies)], size=(5.4, max(2.8, 0.9 + 0.45 * len(policies))))


def _draw_kl(axes: Axes, policies: Row) -> None:
    ends = {key: [summary[key]["high"] for summary in policies.values()] for key in ESTIMATORS}
    # k3 can be very large, and must not flatten the others: it is written out beyond the axis.
    others = max(*ends["kl"], *ends["kl_k1"])
    limit = 1.05 * max(others, min(max(ends["kl_k3"]), 1.5 * others)) or 1
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
    left = min(0, *(summary[key]["low"] for summary in policies.values() for key in ESTIMATORS))
    style.root_scale(axes, max(left, -limit), limit)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_yticks(range(len(policies)), [textwrap.fill(name, 22) for name in policies])
    axes.grid(axis="y", visible=False)


def plot_pareto(pareto: Row) -> Figure | None:
    """Draw gain against KL, a panel for each score: the policies, the front, best-of-n, the checkpoints."""
    panels = [partial(draw_frontier, frontier=pareto["axes"][score], score=score)
              for score in SCORERS if score in pareto["axes"]]  # fmt: skip
    return build_figure(panels, size=(6.6, 5)) if panels else None


def plot_over_optimisation(over_optimisation: Row) -> Figure | None:
    """Draw proxy and gold score against KL, a panel for each stage with checkpoints and one for best-of-n, with fits
    and peaks."""
    entries = {**over_optimisation["stages"], "best of n": over_optimisation["best_of_n"]}
    entries = {name: entry for name, entry in entries.items() if len(entry["points"]) > 1}
    if not entries:
        return None
    figure = build_figure([partial(draw_over_optimisation, entry=of) for of in entries.values()], size=(4.2, 3.2))
    for axes, name in zip(figure.axes, entries, strict=True):
        axes.set_ylabel(f"gain of {textwrap.fill(name, 22)}")
    return figure


def plot_reward_kl_tradeoff(stats: Mapping[str, Row]) -> Figure | None:
    """Draw the logged reward of the online stages against their logged KL, from the first step to the last, which is
    the mark. Each trainer has a panel of its own, because what TRL logs as KL is another quantity in each of them."""
    trainers: dict[str, list[str]] = {}
    for stage, entry in stats.items():
        if any({"kl", "reward"} <= row.keys() for row in entry["history"]):
            trainers.setdefault(entry["trainer"], []).append(stage)
    panels = [partial(_draw_tradeoff, stages={name: stats[name] for name in names}) for names in trainers.values()]
    return build_figure(panels, size=(5.6, 5)) if panels else None


def _draw_tradeoff(axes: Axes, stages: Mapping[str, Row]) -> None:
    trainers = {name: entry["trainer"] for name, entry in stages.items()}
    for name, own in style.policy_styles(trainers).items():
        rows = [(row["kl"], row["reward"]) for row in stages[name]["history"] if {"kl", "reward"} <= row.keys()]
        size = -(-len(rows) // BLOCKS)
        kl, reward = np.array([np.mean(rows[at : at + size], axis=0) for at in range(0, len(rows), size)]).T
        look: dict[str, Any] = {**own, "linewidth": 1.2, "markersize": 8, "markevery": [-1]}
        axes.plot(kl, reward, label=name, **look)
    trainer, definition = next((entry["trainer"], entry["definitions"]["kl"]) for entry in stages.values())
    axes.set_xlabel(textwrap.fill(f"KL as {trainer} logs it: {definition}", 62))
    axes.set_ylabel(f"reward as {trainer} logs it")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend()
