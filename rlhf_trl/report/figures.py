"""The figures of the page: those of the steps as inline SVG, each with a sentence for those who hear the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from rlhf_trl.compare.figures import draw_differences, draw_seeds, list_differences, measure_of
from rlhf_trl.figures.frontier import draw_frontier, draw_over_optimisation
from rlhf_trl.figures.style import build_figure
from rlhf_trl.figures.svg import to_svg
from rlhf_trl.figures.training import draw_series, logged_panels
from rlhf_trl.text.format import format_estimate

# What the page's style sheet calls the lines of `training.SERIES_STYLES`.
SERIES_COLORS = ("blue", "orange", "green")
# What only the PNG of a stage shows.
TECHNICAL = {"Gradient norm", "Learning rate"}
# Score of `pareto.json`, or the win rate of `winrate.json` -> whose it is.
MAKERS = {"gold": "gold model", "reward": "reward model", "win_rate": "judge"}


def draw_frontiers(
    pareto: Mapping[str, Any], win_rates: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[dict[str, Any]]:
    """Draw gain against KL by each score, and the win rate, the most telling one first.

    Args:
        win_rates: the axis of `winrate.json`, if there is one.
        prefix: keeps the figures of two runs on one page apart.
    """
    frontiers = {**pareto["axes"], **({"win_rate": win_rates} if win_rates else {})}
    drawn = []
    for score, maker in MAKERS.items():
        if score not in frontiers:
            continue
        finals = [p for p in frontiers[score]["points"] if p["trainer"] and p["step"] is None]
        won = score == "win_rate"
        style: dict[str, Any] = {"percent": True} if won else {"sign": "+"}
        what = "Win rate by the judge against" if won else f"Gain by the {maker} over"
        words = [f"{p['policy']}: {format_estimate(p['gain'], **style)} at {format_estimate(p['kl'])} nats."
                 for p in finals]  # fmt: skip
        label = " ".join([f"{what} the reference against KL to the reference.", *words])
        draw = partial(draw_frontier, frontier=frontiers[score], score=score)
        drawn.append({"maker": maker, "svg": draw_panel(draw, (380, 280), f"{prefix}{score}-kl", label, legend=True)})
    return drawn


def draw_courses(over_optimisation: Mapping[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Draw how proxy and gold score went along the checkpoints of each policy, and for best-of-n; nothing without
    checkpoints."""
    stages = over_optimisation["stages"]
    entries = [(name, ["stages", name], stages[name])
               for name in policies if name in stages and len(stages[name]["points"]) > 1]  # fmt: skip
    if entries and over_optimisation["best_of_n"]["points"]:
        entries.append(("best of n", ["best_of_n"], over_optimisation["best_of_n"]))
    drawn = []
    for name, keys, entry in entries:
        last = entry["points"][-1]
        scores = [score for score in ("proxy", "gold") if last[score]]
        words = [f"{score}: {format_estimate(last[score], sign='+')} at the end." for score in scores]
        start = f"Gain of {name} against KL to the reference, from the start to {format_estimate(last['kl'])} nats."
        draw = partial(draw_over_optimisation, entry=entry)
        svg = draw_panel(draw, (264, 190), f"course-{name}", " ".join([start, *words]))
        furthest = max(point["kl"]["mean"] for point in entry["points"])
        peaks = [score for score, fit in entry["fit"].items() if fit and (fit["peak_kl"] or math.inf) <= furthest]
        drawn.append({"name": name, "keys": keys, "scores": scores, "peaks": peaks, "svg": svg})
    return drawn


def draw_comparison(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw the differences of the methods at equal KL, and every seed's gain against KL, where there are any."""
    verdict, measure, drawn = results["verdict"], measure_of(results), []
    if verdict:
        words = [f"{' '.join(name.split())}: {format_estimate(of['difference'], '+')}."
                 for name, of in list_differences(results)]  # fmt: skip
        size, label = (430, 80 + 62 * len(words)), " ".join(["Differences at equal KL and as trained.", *words])
        svg = draw_panel(partial(draw_differences, results=results), size, "differences", label)
        says = "The first less the second; filled where the difference is significant and large enough to matter."
        drawn.append({"title": "Difference at equal KL and as trained", "says": says, "svg": svg})
    if verdict and measure:
        known = {name: stage["quality"] for name, stage in results["stages"].items() if stage["quality"]}
        words = [f"{name}: {format_estimate(of[measure], '+')} at {format_estimate(of['kl'])} nats."
                 for name, of in known.items()]  # fmt: skip
        label = " ".join([f"{measure.replace('_', ' ').capitalize()} against KL of every run.", *words])
        svg = draw_panel(partial(draw_seeds, results=results), (430, 300), "seeds", label)
        drawn.append({"title": "Every run", "says": "One point for each seed, as trained.", "svg": svg})
    return drawn


def draw_panels(stage: str, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the training curves of a stage, one small figure for each of the quantities that say what it learned."""
    panels = []
    for title, labels in logged_panels(history).items():
        if title in TECHNICAL:
            continue
        rows = {key: [index for index, row in enumerate(history) if key in row] for key in labels}
        words = [f"{label or key}: from {history[rows[key][0]][key]:.3g} to {history[rows[key][-1]][key]:.3g}."
                 for key, label in labels.items()]  # fmt: skip
        label = " ".join([f"{title} of {stage} by step, up to step {history[-1]['step']}.", *words])
        draw = partial(draw_series, history=history, series=labels)
        series = [{"key": key, "label": labels[key], "color": color, "first": rows[key][0], "last": rows[key][-1]}
                  for key, color in zip(labels, SERIES_COLORS, strict=False)]  # fmt: skip
        svg = draw_panel(draw, (264, 150), f"{stage}-{next(iter(labels))}", label)
        panels.append({"title": title, "svg": svg, "series": series})
    return panels


def draw_panel(
    draw: Callable[[Axes], None], size: tuple[float, float], key: str, label: str, legend: bool = False
) -> Markup:
    """Draw one panel for the page; `size` is in pixels."""
    return to_svg(build_figure([draw], size=(size[0] / 72, size[1] / 72), legend=legend), key, label)
