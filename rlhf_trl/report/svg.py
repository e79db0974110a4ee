"""Figures of the report: pure functions from JSON to inline SVG that follows the page's light or dark colours.

Reads and writes no file. Every figure says in words what it shows, for those who hear the page. Text stays text, so
that it can be searched; colours become the CSS variables of `templates/report.css`; the same numbers give the same
bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf_trl.compare.figures import draw_differences, draw_seeds, list_differences, measure_of
from rlhf_trl.figures.policies import GRID, INK, PAPER, STYLE, draw_frontier, draw_over_optimisation, place_labels
from rlhf_trl.figures.training import BLUE, GREEN, GREY, ORANGE, PANELS
from rlhf_trl.text.format import format_estimate

# What a figure is drawn with -> what the page's style sheet calls it.
THEME = {INK: "ink", GRID: "grid", PAPER: "paper", GREY: "muted", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
LINE_STYLES = ((BLUE, "-", "blue"), (ORANGE, "--", "orange"), (GREEN, ":", "green"))
# Score of `pareto.json`, or the win rate of `winrate.json` -> whose it is.
MAKERS = {"reward": "reward model", "gold": "gold model", "win_rate": "judge"}


def draw_frontiers(
    pareto: Mapping[str, Any], win_rates: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[dict[str, Any]]:
    """Draw gain against KL by each score, and the win rate, for a wide page and for a phone.

    Args:
        win_rates: the axis of `winrate.json`, if there is one.
        prefix: keeps the figures of two runs on one page apart.
    """
    frontiers = {**pareto["axes"], **({"win_rate": win_rates} if win_rates else {})}
    drawn = []
    for score, maker in MAKERS.items():
        if score not in frontiers:
            continue
        frontier = frontiers[score]
        finals = [point for point in frontier["points"] if point["trainer"] and point["step"] is None]
        won = score == "win_rate"
        style: dict[str, Any] = {"percent": True} if won else {"sign": "+"}
        label = (
            f"{'Win rate' if won else 'Gain'} by the {maker} {'against' if won else 'over'} the reference against KL "
        )
        label += "to the reference. " + " ".join(
            f"{p['policy']}: {format_estimate(p['gain'], **style)} at {format_estimate(p['kl'])} nats." for p in finals
        )
        more = max(0, len(finals) - 6)  # names need room
        sizes = {"wide": (900, 380 + 14 * more), "narrow": (360, 380 + 32 * more)}
        svgs = {
            name: Markup(plot_frontier(frontier, score, *size, f"{prefix}{score}-kl-{name}", label))
            for name, size in sizes.items()
        }
        drawn.append({"score": score, "maker": maker, **svgs})
    return drawn


def draw_courses(over_optimisation: Mapping[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Draw how proxy and gold score went along the checkpoints of each policy, and for best-of-n; nothing without
    checkpoints."""
    entries: list[tuple[str, list[str], Mapping[str, Any]]] = [
        (name, ["stages", name], over_optimisation["stages"][name])
        for name in policies
        if name in over_optimisation["stages"]
    ]
    entries = [entry for entry in entries if len(entry[2]["points"]) > 1]
    if entries and over_optimisation["best_of_n"]["points"]:
        entries.append(("best of n", ["best_of_n"], over_optimisation["best_of_n"]))
    drawn = []
    for name, keys, entry in entries:
        last = entry["points"][-1]
        scores = [score for score in ("proxy", "gold") if last[score]]
        label = f"Gain of {name} against KL to the reference, from the start to {format_estimate(last['kl'])} nats. "
        label += " ".join(f"{score}: {format_estimate(last[score], sign='+')} at the end." for score in scores)
        svg = Markup(plot_over_optimisation(entry, f"course-{name}", label))
        drawn.append({"name": name, "keys": keys, "scores": scores, "peaks": _find_peaks(entry), "svg": svg})
    return drawn


def _find_peaks(entry: Mapping[str, Any]) -> dict[str, str]:
    """Say of each fitted curve whether its peak lies `inside` the measured KL or `beyond` it."""
    furthest = max(point["kl"]["mean"] for point in entry["points"])
    peaks = {score: fit["peak_kl"] for score, fit in entry["fit"].items() if fit}
    return {score: "inside" if peak is not None and peak <= furthest else "beyond" for score, peak in peaks.items()}


def draw_comparison(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw the differences of the methods at equal KL, and every seed's gain against KL, where there are any."""
    verdict, drawn = results["verdict"], []
    if verdict:
        words = [f"{' '.join(label.split())}: {format_estimate(of['difference'], '+')}."
                 for label, of in list_differences(results)]  # fmt: skip
        label = "Differences at equal KL and as trained. " + " ".join(words)
        svg = _draw(
            lambda axes: draw_differences(axes, results),
            (430, 80 + 62 * len(words)),
            "differences",
            label,
        )
        says = "The first less the second; filled where the difference is significant and large enough to matter."
        drawn.append({"title": "Difference at equal KL and as trained", "says": says, "svg": svg})
    measure = measure_of(results)
    if verdict and measure:
        known = {name: stage["quality"] for name, stage in results["stages"].items() if stage["quality"]}
        words = [f"{name}: {format_estimate(of[measure], '+')} at {format_estimate(of['kl'])} nats."
                 for name, of in known.items()]  # fmt: skip
        label = f"{measure.replace('_', ' ').capitalize()} against KL of every run. " + " ".join(words)
        svg = _draw(lambda axes: draw_seeds(axes, results), (430, 300), "seeds", label)
        drawn.append({"title": "Every run", "says": "One point for each seed, as trained.", "svg": svg})
    return drawn


def _draw(draw: Callable[[Axes], None], size: tuple[int, int], key: str, label: str) -> Markup:
    with matplotlib.rc_context({**STYLE, "font.size": 10, "axes.labelsize": 10}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure.add_subplot())
        return Markup(to_svg(figure, key, label))


def draw_panels(stage: str, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the training curves of a stage, one small figure for each quantity that was logged."""
    panels = []
    for title, labels in PANELS.items():
        rows = {key: [i for i, row in enumerate(history) if key in row] for key in labels}
        series = [key for key in labels if rows[key]]
        if not series:
            continue
        ends = {key: (history[rows[key][0]][key], history[rows[key][-1]][key]) for key in series}
        words = [f"{labels[key] or key}: from {first:.3g} to {last:.3g}." for key, (first, last) in ends.items()]
        label = f"{title} of {stage} by step, up to step {history[-1]['step']}. {' '.join(words)}"
        panels.append({
            "title": title,
            "svg": Markup(plot_curves(history, series, f"{stage}-{series[0]}", label)),
            "series": [{"key": key, "label": labels[key], "color": color, "first": rows[key][0], "last": rows[key][-1]}
                       for key, (_, _, color) in zip(series, LINE_STYLES, strict=False)],
        })  # fmt: skip
    return panels


def plot_frontier(frontier: Mapping[str, Any], score: str, width: int, height: int, key: str, label: str) -> str:
    """Draw the gain in a score, or the win rate, against KL: policies with their intervals and names, front,
    best-of-n, checkpoints.

    Args:
        frontier: one of the axes of `pareto.json`, or the one of `winrate.json`.
        score: `win_rate`, or the score that is gained.
        width: in pixels, as `height`.
        key: names the figure; it keeps the ids of the page's figures apart.
        label: says in words what the figure shows.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        if score == "win_rate":
            labels, lines = draw_frontier(axes, frontier, 0.5)
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.05), min(high, 1.05))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            axes.set_ylabel("win rate against the reference")
        else:
            labels, lines = draw_frontier(axes, frontier)
            axes.set_ylabel(f"{score} gain over the reference")
        place_labels(figure, axes, labels, lines)
        return to_svg(figure, key, label)


def plot_over_optimisation(entry: Mapping[str, Any], key: str, label: str) -> str:
    """Draw proxy and gold score against KL, one of the entries of `over_optimisation.json`."""
    with matplotlib.rc_context({**STYLE, "font.size": 10, "axes.labelsize": 10}):
        figure = Figure(figsize=(264 / 72, 190 / 72), layout="constrained")
        axes = figure.add_subplot()
        draw_over_optimisation(axes, entry, {"proxy": "", "gold": ""})
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(figure, key, label)


def plot_curves(history: Sequence[Mapping[str, Any]], series: Sequence[str], key: str, label: str) -> str:
    """Draw quantities of one training run by step, in the order of `LINE_STYLES`."""
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(264 / 72, 150 / 72), layout="constrained")
        axes = figure.add_subplot()
        for name, (color, line, _) in zip(series, LINE_STYLES, strict=False):
            steps, values = zip(*((row["step"], row[name]) for row in history if name in row), strict=True)
            marker = "o" if len(steps) < 12 else ""
            axes.plot(steps, values, color=color, linestyle=line, linewidth=1.6, marker=marker, markersize=3.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("step", fontsize=10)
        return to_svg(figure, key, label)


def to_svg(figure: Figure, key: str, label: str) -> str:
    """Write a figure as an SVG element to stand inside an HTML page.

    Ids that nothing refers to are dropped: matplotlib calls the parts of every figure alike, and a page has many.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its `*` selector would reach the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        for name, text in list(element.attrib.items()):
            del element.attrib[name]
            if name != "id" or text in used:
                element.set(name.rpartition("}")[2], _for_page(text))
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(text: str) -> str:
    """Put the page's colours in, and leave coordinates at a hundredth of a pixel."""
    for color, variable in THEME.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)
