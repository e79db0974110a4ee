"""The figures of `evaluate`: pure functions from its JSON, and from the stages' `training_stats.json`, to a PNG.

A figure without anything to draw is not written. Policies have the colour and marker of their trainer; intervals are
95 %.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rlhf_trl.figures.policies import (
    INK,
    PAPER,
    POLICY_STYLES,
    STYLE,
    draw_frontier,
    draw_over_optimisation,
    place_labels,
    root_scale,
    save,
    stage_lines,
)
from rlhf_trl.figures.training import BLUE, GREEN, GREY, ORANGE, draw_series, format_tick, logged_panels
from rlhf_trl.run.layout import REFERENCE

# Score -> the reward model that gives it.
SCORERS = {"reward": "reward model", "gold": "gold model"}
# Estimate of the KL -> colour, marker, name.
ESTIMATORS = {"kl": (BLUE, "o", "exact"), "kl_k1": (ORANGE, "s", "sampled, k1"), "kl_k3": (GREEN, "^", "sampled, k3")}
# A training run with more logged steps is drawn as the means of this many blocks.
BLOCKS = 40


@matplotlib.rc_context(STYLE)
def plot_distributions(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw how each policy's scores are spread, a row for each, with the reference's outline behind and the medians;
    a column for the reward model and one for the gold model."""
    columns = [key for key in SCORERS if key in metrics["histogram_edges"]]
    rows = sorted(metrics["policies"], key=lambda name: name != REFERENCE)
    if not columns or not rows:
        return
    figure = Figure(figsize=(2 + 4.6 * len(columns), 1.1 + 0.85 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="col")
    for column, key in zip(grid.T, columns, strict=True):
        edges = metrics["histogram_edges"][key]
        color = BLUE if key == "reward" else ORANGE
        shares = {name: _shares(metrics["policies"][name]["distributions"][key]["counts"]) for name in rows}
        for axes, name in zip(column, rows, strict=True):
            median = metrics["policies"][name]["distributions"][key]["quantiles"]["0.5"]
            own = GREY if name == REFERENCE else color
            axes.stairs(shares[name], edges, fill=True, color=own, alpha=0.35)
            axes.stairs(shares[name], edges, color=own, linewidth=1.2)
            if name != REFERENCE:
                axes.stairs(shares[REFERENCE], edges, color=GREY, linewidth=1, linestyle="--")
            axes.axvline(median, color=own, linewidth=1.8)
            axes.text(
                0.99,
                0.93,
                f"median {round(median, 2) + 0.0:.2f}".replace("-", "−"),
                ha="right",
                va="top",
                fontsize=9.5,
                transform=axes.transAxes,
            )
            axes.set_yticks([])
            axes.grid(axis="y", visible=False)
            axes.spines.left.set_visible(False)
        column[0].set_ylim(0, 1.3 * max(share.max() for share in shares.values()))
        column[-1].set_xlabel(f"score by the {SCORERS[key]}, {metrics[f'{key}_stage']}", parse_math=False)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        label = textwrap.fill(name, 18, break_on_hyphens=True)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10.5, parse_math=False)
    figure.supylabel("share of the answers", fontsize=11)
    if len(rows) > 1:
        outline = Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="outline of the reference")
        median_line = Line2D([], [], color=GREY, linewidth=1.8, label="median")
        figure.legend(handles=[outline, median_line], loc="outside upper right", ncols=2, fontsize=10, frameon=False)
    save(figure, path)


def _shares(counts: Sequence[int]) -> np.ndarray:
    return np.array(counts) / max(1, sum(counts))


@matplotlib.rc_context(STYLE)
def plot_kl(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw the KL of every policy, exact and by the two sampled estimators, and along the checkpoints."""
    measured = {name: summary for name, summary in metrics["policies"].items() if name != REFERENCE}
    if not measured:
        return
    checkpoints = {stage: rows for stage, rows in metrics["checkpoints"].items() if len(rows) > 1}
    columns = min(3, len(checkpoints)) or 1
    lines = -(-len(checkpoints) // columns)
    top, bottom = 1.3 + 0.55 * len(measured), 2.6 * lines
    figure = Figure(figsize=(9.5, top + bottom), layout="constrained")
    parts = figure.subfigures(1 + bool(lines), 1, squeeze=False, height_ratios=[top, bottom][: 1 + bool(lines)])[:, 0]

    axes = parts[0].subplots()
    limit = _reach([*measured.values()])
    least = min(0, *(s[key]["low"] for s in measured.values() for key in ESTIMATORS))
    for row, summary in enumerate(measured.values()):
        for offset, (key, (color, marker, _)) in zip((-0.22, 0, 0.22), ESTIMATORS.items(), strict=True):
            _draw_estimate(axes, summary[key], row + offset, limit, color, marker)
    root_scale(axes, least, limit)
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_yticks(range(len(measured)), [textwrap.fill(name, 30) for name in measured], parse_math=False)
    axes.grid(axis="y", visible=False)
    handles = [Line2D([], [], color=color, marker=marker, label=name) for color, marker, name in ESTIMATORS.values()]
    parts[0].legend(handles=handles, loc="outside upper right", ncols=3, fontsize=10, frameon=False)
    if lines:
        grid = parts[1].subplots(lines, columns, squeeze=False).ravel()
        for panel in grid[len(checkpoints) :]:
            panel.set_visible(False)
        for panel, (stage, rows) in zip(grid, checkpoints.items(), strict=False):
            _draw_kl_by_step(panel, stage, rows)
    save(figure, path)


def _reach(summaries: Sequence[Mapping[str, Any]]) -> float:
    """How far a KL axis goes: k3 grows without bound where the reference is likely and the policy is not, and must
    not flatten the others."""
    others = max(summary[key]["high"] for summary in summaries for key in ("kl", "kl_k1"))
    furthest = max(summary["kl_k3"]["high"] for summary in summaries)
    return 1.05 * max(others, min(furthest, 1.5 * others)) or 1


def _draw_estimate(axes: Axes, estimate: Mapping[str, float], y: float, limit: float, color: str, marker: str) -> None:
    style: dict[str, Any] = {"color": color, "zorder": 3}
    if estimate["mean"] > limit:
        axes.plot(limit, y, marker=">", markersize=7, clip_on=False, **style)
        text = f"{estimate['mean']:.3g}"
        axes.annotate(text, (limit, y), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=9)
        return
    axes.plot([estimate["low"], min(estimate["high"], limit)], [y, y], linewidth=1.6, **style)
    axes.plot(estimate["mean"], y, marker=marker, markersize=7, markeredgecolor=PAPER, **style)


def _draw_kl_by_step(axes: Axes, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    for order, (key, (color, marker, _)) in enumerate(ESTIMATORS.items()):
        low, mean, high = (np.array([row[key][part] for row in rows]) for part in ("low", "mean", "high"))
        size, above = (6, 5) if key == "kl" else (4.5, 4 - order)  # the exact one is seen where they agree
        axes.plot(steps, mean, color=color, marker=marker, markersize=size, linewidth=1.3, zorder=above)
        if key == "kl":
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(min(0, *(row["kl_k1"]["mean"] for row in rows)), _reach(rows))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(f"KL of {_folded(stage)}\nnats per answer", parse_math=False, fontsize=10)


def _folded(name: str) -> str:
    return textwrap.fill(name, 22)


@matplotlib.rc_context(STYLE)
def plot_pareto(pareto: Mapping[str, Any], path: Path) -> None:
    """Draw gain against KL, a panel for each score: the policies, the front, best-of-n, the checkpoints."""
    axes_of = dict(sorted(pareto["axes"].items(), key=lambda item: [*SCORERS, item[0]].index(item[0])))
    if not axes_of:
        return
    more = max(0, len({p["policy"] for frontier in axes_of.values() for p in frontier["points"]}) - 6)  # names
    figure = Figure(figsize=(6.6 * len(axes_of), 5.2 + 0.25 * more), layout="constrained")
    panels = figure.subplots(1, len(axes_of), squeeze=False)[0]
    drawn = {}
    for axes, (score, frontier) in zip(panels, axes_of.items(), strict=True):
        axes.set_ylabel(f"{score.replace('_', ' ')} gain over the reference")
        drawn[axes] = draw_frontier(axes, frontier)
    columns = 3 * len(axes_of)
    handles = _frontier_legend(axes_of)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    for axes, (labels, lines) in drawn.items():
        place_labels(figure, axes, labels, lines)
    save(figure, path)


def _frontier_legend(axes_of: Mapping[str, Any]) -> list[Line2D]:
    points = [p for frontier in axes_of.values() for p in frontier["points"]]
    trainers = [trainer for trainer in POLICY_STYLES if any(p["trainer"] == trainer for p in points)]
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=8, linestyle="none", label=trainer.upper())
        for trainer, (color, marker) in ((trainer, POLICY_STYLES[trainer]) for trainer in trainers)
    ]
    if any(p["trainer"] and not p["on_front"] for p in points):
        style: dict[str, Any] = {"markerfacecolor": PAPER, "markeredgecolor": GREY, "linestyle": "none"}
        handles.append(Line2D([], [], marker="o", markersize=8, label="hollow: dominated", **style))
    handles.append(Line2D([], [], color=GREY, linewidth=1.8, alpha=0.7, label="front"))
    if any(frontier["best_of_n"] for frontier in axes_of.values()):
        handles.append(Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), marker=".", label="best of n"))
    if any(p["step"] is not None for p in points):
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, marker="o", markersize=4, label="checkpoints"))
    return handles


@matplotlib.rc_context(STYLE)
def plot_over_optimisation(over_optimisation: Mapping[str, Any], path: Path) -> None:
    """Draw proxy and gold score against KL, a panel for each stage with checkpoints and one for best-of-n, with fits
    and peaks."""
    entries = {**over_optimisation["stages"], "best of n": over_optimisation["best_of_n"]}
    entries = {name: entry for name, entry in entries.items() if len(entry["points"]) > 1}
    if not entries:
        return
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 0.5 + 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(entries) :]:
        axes.set_visible(False)
    names = {"proxy": "reward model (proxy)", "gold": "gold model"}
    handles: dict[str, Any] = {}
    for axes, (name, entry) in zip(grid, entries.items(), strict=False):
        draw_over_optimisation(axes, entry, names)
        axes.set_ylabel(f"gain of {_folded(name)}", parse_math=False)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        _note_peaks(axes, entry)
    legend = [
        Line2D([], [], color=handle.get_color(), marker=handle.get_marker(), markersize=6, label=label)
        for label, handle in handles.items()
    ]
    if any(fit for entry in entries.values() for fit in entry["fit"].values()):
        legend.append(Line2D([], [], color=GREY, label="fitted curve (Gao et al., 2022)"))
        legend.append(Line2D([], [], color=GREY, linestyle=":", label="its peak"))
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    save(figure, path)


def _note_peaks(axes: Axes, entry: Mapping[str, Any]) -> None:
    """Say where the fitted curves peak, below the axis' label: there nothing is covered."""
    notes = []
    furthest = max(point["kl"]["mean"] for point in entry["points"])
    for key, fit in sorted(entry["fit"].items(), reverse=True):
        if fit:
            peak = fit["peak_kl"]
            where = "none" if peak is None else f"KL {peak:.2g}" if peak <= furthest else "beyond the data"
            notes.append(f"{key} peak: {where}")
    if notes:
        axes.set_xlabel("\n".join([axes.get_xlabel(), *notes]), fontsize=10)


@matplotlib.rc_context(STYLE)
def plot_training_curves(stats: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw what every stage logged, a row for each stage and a panel for each quantity."""
    panels = {stage: logged_panels(entry["history"]) for stage, entry in stats.items()}
    panels = {stage: series for stage, series in panels.items() if series}
    if not panels:
        return
    columns = max(len(series) for series in panels.values())
    figure = Figure(figsize=(1 + 2.75 * columns, 0.3 + 2.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for row, (stage, series) in zip(grid, panels.items(), strict=True):
        for axes in row[len(series) :]:
            axes.set_visible(False)
        for axes, (title, keys) in zip(row, series.items(), strict=False):
            draw_series(axes, stats[stage]["history"], keys)
            unit = {"grpo": " (nats per token)", "ppo": " (nats per answer)"}.get(stats[stage]["trainer"], "")
            words = f"{title}{unit}" if title.startswith("KL") else title
            axes.text(0, 1.03, words, fontsize=9.5, transform=axes.transAxes, va="bottom")
            axes.set_xlabel("step", fontsize=9)
        name = f"{_folded(stage)}\n({stats[stage]['trainer']})"
        row[0].set_ylabel(name, fontsize=10.5, parse_math=False)
    save(figure, path)


@matplotlib.rc_context(STYLE)
def plot_reward_kl_tradeoff(stats: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the logged reward of the online stages against their logged KL, from the first step to the last.

    Each trainer has a panel of its own, because what TRL logs as KL is another quantity in each of them.
    """
    paths = {
        stage: [(row["kl"], row["reward"], row["step"]) for row in entry["history"] if {"kl", "reward"} <= set(row)]
        for stage, entry in stats.items()
    }
    paths = {stage: rows for stage, rows in paths.items() if rows}
    trainers = list(dict.fromkeys(stats[stage]["trainer"] for stage in paths))
    if not trainers:
        return
    lines = stage_lines({stage: stats[stage]["trainer"] for stage in paths})
    figure = Figure(figsize=(0.8 + 5.6 * len(trainers), 5), layout="constrained")
    panels = figure.subplots(1, len(trainers), squeeze=False)[0]
    last = max(row[2] for rows in paths.values() for row in rows)
    for axes, trainer in zip(panels, trainers, strict=True):
        color, marker = POLICY_STYLES[trainer]
        own = [stage for stage in paths if stats[stage]["trainer"] == trainer]
        for stage in own:
            kl, reward, step = _blocks(paths[stage]).T
            axes.plot(kl, reward, color=color, linestyle=lines[stage], linewidth=1, alpha=0.7, label=stage, zorder=2)
            dots = axes.scatter(
                kl, reward, c=step, cmap="cividis", vmin=0, vmax=last, marker=marker, s=26, linewidths=0, zorder=3
            )
        definition = stats[own[0]]["definitions"]["kl"]
        axes.set_xlabel(textwrap.fill(f"KL as {trainer} logs it: {definition}", 62), fontsize=9.5, parse_math=False)
        axes.set_ylabel(f"reward as {trainer} logs it")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(format_tick)
        axes.yaxis.set_major_formatter(format_tick)
        legend = axes.legend(fontsize=9, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    bar = figure.colorbar(dots, ax=panels, pad=0.02, aspect=30)
    bar.locator = MaxNLocator(6, integer=True)
    size = -(-max(map(len, paths.values())) // BLOCKS)
    bar.set_label(f"training step\n(a mark: mean of up to {size} logs)" if size > 1 else "training step")
    save(figure, path)


def _blocks(rows: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Average neighbouring rows until there are at most `BLOCKS`, (N, 3) -> (at most BLOCKS, 3)."""
    size = -(-len(rows) // BLOCKS)
    return np.array([np.mean(rows[start : start + size], axis=0) for start in range(0, len(rows), size)])
