"""The figures of `explore`: one page of panels for each question, a column or row for each subset.

Chosen is blue and solid, rejected vermilion and dashed, subsets have other colours and markers; every title says what
is to be seen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from rlhf_trl.data.summary import TERMS
from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, add_legend, save, with_errors

SIDES: dict[str, dict[str, Any]] = {
    "chosen": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "rejected": {"color": ORANGE, "linestyle": "--", "marker": "s"},
}
SUBSETS = ((GREEN, "o"), (PURPLE, "s"), ("#56B4E9", "^"), ("#E69F00", "D"))
DEEPEST = 9
FEW = 10
LEVELS = np.linspace(0, 1, 1001)
Statistics = dict[str, Any]


@matplotlib.rc_context(STYLE)
def draw(folder: Path, statistics: Statistics, pairs: dict[str, np.ndarray]) -> None:
    """Draw every figure, of the largest subsets where there are more than fit on a page.

    Args:
        folder: where the files go.
        statistics: what `explore` writes to `statistics.json`.
        pairs: of each subset, the lengths of the answers in each unit, shape (pairs, 2): chosen, rejected.
    """
    all_subsets = statistics["subsets"]
    largest = sorted(all_subsets, key=lambda name: (-all_subsets[name]["pairs"], name))[: len(SUBSETS)]
    if not largest:
        return
    subsets = {name: all_subsets[name] for name in sorted(largest)}
    count = len(subsets)
    units = [*all_subsets[largest[0]]["lengths"]]
    pages: dict[str, tuple[Callable[[Figure, Statistics], None], float, float]] = {
        "lengths": (lambda page, some: _draw_lengths(page, some, pairs), 4.2 * len(units), 0.9 + 2.7 * count),
        "length_bias": (_draw_length_bias, 11, 4.8),
        "conversations": (_draw_conversations, 10.5, 0.9 + 2.5 * count),
        "refusals": (_draw_refusals, 11, 4.8),
        "words": (_draw_words, 1 + 4.8 * min(count, 2), 0.6 + 6 * -(-count // 2)),
    }
    for name, (draw_page, width, height) in pages.items():
        figure = Figure(figsize=(width, height), layout="constrained")
        finding = Template(TERMS["findings"][name])
        title = [f"In {_short(subset)}, {finding.render(stats)}" for subset, stats in subsets.items()]
        if len(all_subsets) > count:
            title.append(f"({count} of {len(all_subsets)} subsets; statistics.json has all)")
        figure.suptitle("\n".join(title), fontsize=11, fontweight="bold")
        draw_page(figure, subsets)
        add_legend(figure)
        save(figure, folder / f"{name}.png")


# --- pages -----------------------------------------------------------------------------------------------------------


def _draw_lengths(figure: Figure, subsets: Statistics, pairs: dict[str, np.ndarray]) -> None:
    units = [*next(iter(subsets.values()))["lengths"]]
    panels = figure.subplots(len(subsets), len(units), squeeze=False, sharex="col", sharey=True)
    for column, unit in zip(panels.T, units, strict=True):
        low, high = np.quantile(np.concatenate([pairs[name][unit].ravel() for name in subsets]), (0.002, 0.998))
        low, high = max(1, low), max(2, high)
        wide = high > 10 * low
        for axes, (name, stats) in zip(column, subsets.items(), strict=True):
            for index, (side, style) in enumerate(SIDES.items()):
                line = {**style, "marker": ""}
                median = stats["lengths"][unit][side]["p50"]
                up_to = np.quantile(pairs[name][unit][:, index], LEVELS, method="inverted_cdf")
                axes.step(up_to, LEVELS, linewidth=1.8, where="post", label=f"{side}, median {median:,.0f}", **line)
                axes.vlines(median, 0, 0.5, color=style["color"], linestyle=style["linestyle"], linewidth=1)
            axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
            axes.set_title(f"{_short(name)}: {unit}")
            axes.legend(loc="upper left")
            axes.set_xscale("log" if wide else "linear")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(integer=True))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_xlim(low * 0.9, high * 1.1)
        column[-1].set_xlabel(f"length [{unit}{', log scale' if wide else ''}]")
    for axes in panels[:, 0]:
        _label_shares(axes, "answers up to this length")


def _draw_length_bias(figure: Figure, subsets: Statistics) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4), sharey=True)
    any_subset = next(iter(subsets.values()))
    units, bins = list(any_subset["chosen_longer"]), any_subset["verbosity"]
    for index, ((name, stats), (color, marker)) in enumerate(zip(subsets.items(), SUBSETS, strict=False)):
        shift = (index - (len(subsets) - 1) / 2) * 0.16
        style = {"color": color, "marker": marker, "label": _short(name)}
        _intervals(left, shift, [stats["chosen_longer"][unit] for unit in units], **style)
        by_ratio = [part["longer_is_chosen"] for part in stats["verbosity"]]
        many = [share if share and share["n"] >= FEW else None for share in by_ratio]
        _intervals(right, shift, many, **{**style, "linestyle": "-"})
    left.set_xlabel("unit of length")
    left.set_title("How often the longer answer is chosen (ties half)")
    right.set_xlabel("words of the longer answer ÷ words of the shorter one")
    right.set_title(f"… by how much longer it is (bins of {FEW} pairs or more)")
    _label_places(left, units)
    ranges = [f"{part['from']:g} – {part['to']:g}" if part["to"] else f"over {part['from']:g}" for part in bins]
    _label_places(right, ranges)
    _label_shares(left, "share of the pairs, 95 % interval")
    for axes in (left, right):
        _mark_chance(axes)


def _draw_conversations(figure: Figure, subsets: Statistics) -> None:
    panels = figure.subplots(len(subsets), 2, squeeze=False, sharex="col", sharey="col", width_ratios=(2, 1))
    for (left, right), (name, stats) in zip(panels, subsets.items(), strict=True):
        shares = [0.0] * DEEPEST
        for turns, count in stats["depth"]["counts"].items():
            shares[min(int(turns), DEEPEST) - 1] += count / stats["pairs"]
        left.bar(range(DEEPEST), shares, color=GREY)
        left.set_title(f"{_short(name)}: depth of the conversation")
        alike = [stats["shared_prefix"]["first_word"], stats["shared_prefix"]["first_three_words"]]
        _intervals(right, 0, alike, color=GREY, marker="o")
        right.set_title(f"{_short(name)}: answers that begin alike")
        _label_places(left, [*map(str, range(1, DEEPEST)), f"{DEEPEST}+"])
        _label_places(right, ["first word", "first three words"])
        _label_shares(left, "share of the pairs")
        _label_shares(right, "share, 95 % interval")
    panels[0, 1].set_ylim(0, None)
    panels[-1, 0].set_xlabel("turns of the user in the prompt")


def _draw_refusals(figure: Figure, subsets: Statistics) -> None:
    left, right = figure.subplots(1, 2)
    for shift, (side, style) in zip((-0.1, 0.1), SIDES.items(), strict=True):
        shares = [stats["refusals"][side] for stats in subsets.values()]
        _intervals(left, shift, shares, **{**style, "linestyle": "none", "label": side})
    alone = [stats["refusals"]["refusal_is_chosen"] for stats in subsets.values()]
    _intervals(right, 0, alone, color=GREY, marker="o")
    for place, share in enumerate(alone):
        text, height = (f"{share['n']:,} pairs", share["mean"]) if share else ("no such\npair", 0.05)
        right.annotate(text, (place, height), (8, 0), textcoords="offset points", va="center")
    left.set_title("Answers with a plain refusal")
    right.set_title("One of two answers refuses: how often it is chosen")
    _label_shares(left, "share of the answers, 95 % interval", decimals=1)
    _label_shares(right, "share of these pairs, 95 % interval")
    top = max(left.get_ylim()[1], 0.01)
    left.set_ylim(-0.03 * top, top)
    right.set_ylim(-0.03, 1.03)
    _mark_chance(right)
    for axes in (left, right):
        _label_places(axes, [textwrap.fill(_short(name), 14) for name in subsets])


def _draw_words(figure: Figure, subsets: Statistics) -> None:
    columns = min(len(subsets), 2)
    for place, (name, stats) in enumerate(subsets.items(), start=1):
        axes = figure.add_subplot(-(-len(subsets) // columns), columns, place)
        # The strongest word of the chosen answers stands at the top, that of the rejected ones at the bottom.
        words = [*stats["words"]["rejected"], *stats["words"]["chosen"][::-1]]
        colors = [SIDES["chosen" if item["z"] > 0 else "rejected"]["color"] for item in words]
        axes.barh(range(len(words)), [item["z"] for item in words], color=colors)
        axes.set_yticks(range(len(words)), [_short(item["word"], 14) for item in words])
        axes.axvline(0, color="black", linewidth=0.8)
        for limit in (-stats["words"]["threshold"], stats["words"]["threshold"]):
            axes.axvline(limit, color="black", linestyle=":", linewidth=1)
        axes.set_xlabel("← rejected      z of the log-odds ratio      chosen →")
        axes.set_title(f"{_short(name)}\ndotted: the limit of chance for {stats['words']['tested']:,} words")


# --- parts -----------------------------------------------------------------------------------------------------------


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _intervals(axes: Axes, shift: float, estimates: list[dict[str, float] | None], **style: Any) -> None:
    """Draw estimates with their intervals at 0, 1, 2, ... plus a shift; there may be none for lack of pairs."""
    drawn = {place + shift: estimate for place, estimate in enumerate(estimates) if estimate}
    if drawn:
        means, errors = with_errors([*drawn.values()])
        axes.errorbar([*drawn], means, errors, **{"linestyle": "none", "linewidth": 1.4, "capsize": 3, **style})


def _label_places(axes: Axes, labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.grid(axis="x", visible=False)


def _label_shares(axes: Axes, label: str, decimals: int = 0) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def _mark_chance(axes: Axes) -> None:
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("chance", (1, 0.5), (-3, 3), fontsize=8, ha="right", **where)
