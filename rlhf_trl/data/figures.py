"""The figures of `explore`: one page of panels for each question, a column or row for each subset.

Reads the statistics in memory; writes PNG files. Chosen is blue and solid, rejected vermilion and dashed, subsets have
other colours (Okabe and Ito's, which every eye tells apart) and markers; every title says what is to be seen.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullLocator, PercentFormatter

from rlhf_trl.figures.policies import save
from rlhf_trl.figures.training import BLUE, GREEN, GREY, ORANGE, PURPLE

SIDES = {"chosen": (BLUE, "-", "o"), "rejected": (ORANGE, "--", "s")}
SUBSETS = ((GREEN, "o"), (PURPLE, "s"), ("#56B4E9", "^"), ("#E69F00", "D"))
TITLE: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "parse_math": False}
DEEPEST = 9
FEW = 10


def draw(folder: Path, statistics: dict[str, Any], lengths: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw every figure, of the largest subsets where there are more than fit on a page.

    Args:
        folder: where the files go.
        statistics: what `explore` writes to `statistics.json`.
        lengths: for each subset and unit, the lengths of the answers, shape (pairs, 2): chosen, rejected.
    """
    all_subsets = statistics["subsets"]
    largest = sorted(all_subsets, key=lambda name: (-all_subsets[name]["pairs"], name))[: len(SUBSETS)]
    if not largest:
        return
    subsets = {name: all_subsets[name] for name in sorted(largest)}
    figures = {
        "lengths": _draw_lengths(subsets, lengths),
        "length_bias": _draw_length_bias(subsets),
        "conversations": _draw_conversations(subsets),
        "refusals": _draw_refusals(subsets),
        "words": _draw_words(subsets),
    }
    for name, figure in figures.items():
        if len(all_subsets) > len(subsets):
            note = f"({len(subsets)} of {len(all_subsets)} subsets; statistics.json has all)"
            figure.suptitle(f"{figure.get_suptitle()}\n{note}", **TITLE)
        with warnings.catch_warnings():
            # A word that the font has no letters for is drawn as boxes; statistics.json has it.
            warnings.filterwarnings("ignore", message="Glyph")
            save(figure, folder / f"{name}.png", dpi=130)


def _draw_lengths(subsets: dict[str, Any], lengths: dict[str, dict[str, np.ndarray]]) -> Figure:
    units = list(lengths[next(iter(subsets))])
    figure = _page(subsets, _length_finding, 4.2 * len(units), 0.9 + 2.7 * len(subsets))
    panels = figure.subplots(len(subsets), len(units), squeeze=False, sharex="col", sharey=True)
    for column, unit in zip(panels.T, units, strict=True):
        low, high = np.quantile(np.concatenate([lengths[name][unit].ravel() for name in subsets]), (0.002, 0.998))
        low, high = max(1, low), max(2, high)
        wide = high > 10 * low
        for axes, (name, stats) in zip(column, subsets.items(), strict=True):
            for index, (side, (colour, line, _)) in enumerate(SIDES.items()):
                median = stats["lengths"][unit][side]["p50"]
                label = f"{side}, median {median:,.0f}"
                axes.ecdf(lengths[name][unit][:, index], color=colour, linestyle=line, linewidth=1.8, label=label)
                axes.vlines(median, 0, 0.5, color=colour, linestyle=line, linewidth=1)
            axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
            axes.set_title(f"{_short(name)}: {unit}", fontsize=10, parse_math=False)
            axes.legend(fontsize=8, frameon=False, loc="upper left")
            if wide:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_xlim(low * 0.9, high * 1.1)
        column[-1].set_xlabel(f"length [{unit}{', log scale' if wide else ''}]")
    for axes in panels[:, 0]:
        axes.set_ylabel("answers up to this length")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _length_finding(stats: dict[str, Any]) -> str:
    words = stats["lengths"]["words"]
    chosen, rejected = words["chosen"]["p50"], words["rejected"]["p50"]
    verdict = "longer" if chosen > rejected else "shorter" if chosen < rejected else "as long"
    return f"chosen answers are {verdict} (median {chosen:.0f} words, rejected {rejected:.0f})"


def _draw_length_bias(subsets: dict[str, Any]) -> Figure:
    figure = _page(subsets, _bias_finding, 11, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4), sharey=True)
    any_subset = next(iter(subsets.values()))
    units, bins = list(any_subset["chosen_longer"]), any_subset["verbosity"]
    for index, (name, stats) in enumerate(subsets.items()):
        colour, marker = SUBSETS[index]
        spread = (index - (len(subsets) - 1) / 2) * 0.16
        for axes, line, estimates in (
            (left, "none", [stats["chosen_longer"][unit] for unit in units]),
            (right, "-", [_if_many(part["longer_is_chosen"]) for part in stats["verbosity"]]),
        ):
            places = np.arange(len(estimates)) + spread
            _intervals(axes, places, estimates, color=colour, marker=marker, linestyle=line, label=_short(name))
    left.set_xticks(range(len(units)), units)
    left.set_xlim(-0.5, len(units) - 0.5)
    left.set_xlabel("unit of length")
    left.set_ylabel("share of the pairs, 95 % interval")
    left.set_title("How often the longer answer is chosen (ties half)", fontsize=10)
    right.set_xticks(range(len(bins)), [_ratio_label(part) for part in bins])
    right.set_xlim(-0.5, len(bins) - 0.5)
    right.set_xlabel("words of the longer answer ÷ words of the shorter one")
    right.set_title(f"… by how much longer it is (bins of {FEW} pairs or more)", fontsize=10)
    low, high = left.get_ylim()
    left.yaxis.set_major_locator(MultipleLocator(0.05 if high - low < 0.5 else 0.1))
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _mark_chance(axes)
    _legend(figure, left)
    return figure


def _bias_finding(stats: dict[str, Any]) -> str:
    share = stats["chosen_longer"]["words"]
    verdict = " (long preferred)" if share["low"] > 0.5 else " (short preferred)" if share["high"] < 0.5 else ""
    return f"the longer answer is chosen {share['mean']:.0%} of the time{verdict}"


def _if_many(share: dict[str, float] | None) -> dict[str, float] | None:
    return share if share and share["n"] >= FEW else None


def _ratio_label(part: dict[str, Any]) -> str:
    return f"over {part['from']:g}" if part["to"] is None else f"{part['from']:g} – {part['to']:g}"


def _draw_conversations(subsets: dict[str, Any]) -> Figure:
    figure = _page(subsets, _conversation_finding, 10.5, 0.9 + 2.5 * len(subsets))
    panels = figure.subplots(len(subsets), 2, squeeze=False, sharey="col", width_ratios=(2, 1))
    for (left, right), (name, stats) in zip(panels, subsets.items(), strict=True):
        shares = [0.0] * DEEPEST
        for turns, count in stats["depth"]["counts"].items():
            shares[min(int(turns), DEEPEST) - 1] += count / stats["pairs"]
        left.bar(range(1, DEEPEST + 1), shares, color=GREY)
        left.set_xticks(range(1, DEEPEST + 1), [*map(str, range(1, DEEPEST)), f"{DEEPEST}+"])
        left.set_title(f"{_short(name)}: depth of the conversation", fontsize=10, parse_math=False)
        alike = [stats["shared_prefix"]["first_word"], stats["shared_prefix"]["first_three_words"]]
        _intervals(right, np.arange(2), alike, color=GREY, marker="o")
        right.set_xticks(range(2), ["first word", "first three words"])
        right.set_xlim(-0.6, 1.6)
        right.set_title(f"{_short(name)}: answers that begin alike", fontsize=10, parse_math=False)
        for axes, label in ((left, "share of the pairs"), (right, "share, 95 % interval")):
            axes.set_ylabel(label)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0, 1].set_ylim(0, None)
    panels[-1, 0].set_xlabel("turns of the user in the prompt")
    return figure


def _conversation_finding(stats: dict[str, Any]) -> str:
    several = 1 - stats["depth"]["counts"].get("1", 0) / stats["pairs"]
    alike = stats["shared_prefix"]["first_word"]["mean"]
    return f"{several:.0%} of the prompts have several turns and {alike:.0%} of the pairs share the first word"


def _draw_refusals(subsets: dict[str, Any]) -> Figure:
    figure = _page(subsets, _refusal_finding, 11, 4.8)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(subsets))
    for offset, (side, (colour, _, marker)) in zip((-0.1, 0.1), SIDES.items(), strict=True):
        shares = [stats["refusals"][side] for stats in subsets.values()]
        _intervals(left, places + offset, shares, color=colour, marker=marker, label=side)
    alone = [stats["refusals"]["refusal_is_chosen"] for stats in subsets.values()]
    _intervals(right, places, alone, color=GREY, marker="o")
    for place, share in zip(places, alone, strict=True):
        if share:
            where = (place, share["mean"])
            right.annotate(f"{share['n']:,} pairs", where, (8, 0), textcoords="offset points", fontsize=8, va="center")
        else:
            right.text(place, 0.05, "no such\npair", fontsize=8, ha="center")
    left.set_title("Answers with a plain refusal", fontsize=10)
    left.set_ylabel("share of the answers, 95 % interval")
    top = max(left.get_ylim()[1], 0.01)
    left.set_ylim(-0.03 * top, top)
    _legend(figure, left)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_title("Where exactly one answer refuses: how often it is the chosen one", fontsize=10)
    right.set_ylabel("share of these pairs, 95 % interval")
    right.set_ylim(-0.03, 1.03)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _mark_chance(right)
    for axes in (left, right):
        axes.set_xticks(places, [textwrap.fill(_short(name), 14) for name in subsets], parse_math=False)
        axes.set_xlim(-0.5, len(places) - 0.5)
    return figure


def _refusal_finding(stats: dict[str, Any]) -> str:
    share = stats["refusals"]["refusal_is_chosen"]
    if share is None:
        return "no pair has just one refusal"
    verdict = "mostly wins" if share["low"] > 0.5 else "mostly loses" if share["high"] < 0.5 else "may win or lose"
    return f"a plain refusal {verdict} ({share['mean']:.0%} of {share['n']:,} pairs)"


def _draw_words(subsets: dict[str, Any]) -> Figure:
    columns = min(len(subsets), 2)
    rows = -(-len(subsets) // columns)
    figure = _page(subsets, _word_finding, 1 + 4.8 * columns, 0.6 + 6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(subsets) :]:
        axes.set_visible(False)
    for axes, (name, stats) in zip(panels, subsets.items(), strict=False):
        # The strongest word of the chosen answers stands at the top, that of the rejected ones at the bottom.
        words = [*stats["words"]["rejected"], *stats["words"]["chosen"][::-1]]
        colours = [SIDES["chosen" if item["z"] > 0 else "rejected"][0] for item in words]
        axes.barh(range(len(words)), [item["z"] for item in words], color=colours)
        axes.set_yticks(range(len(words)), [_short(item["word"], 14) for item in words], fontsize=9, parse_math=False)
        axes.axvline(0, color="black", linewidth=0.8)
        for place in (-stats["words"]["threshold"], stats["words"]["threshold"]):
            axes.axvline(place, color="black", linestyle=":", linewidth=1)
        axes.set_xlabel("← rejected      z of the log-odds ratio      chosen →")
        note = f"dotted: the limit of chance for {stats['words']['tested']:,} words"
        axes.set_title(f"{_short(name)}\n{note}", fontsize=10, parse_math=False)
    return figure


def _word_finding(stats: dict[str, Any]) -> str:
    words = stats["words"]
    parts = []
    for side in SIDES:
        marked = [_short(item["word"]) for item in words[side] if abs(item["z"]) > words["threshold"]][:3]
        if marked:
            parts.append(f"{side} answers say “{'”, “'.join(marked)}”")
    return " and ".join(parts) or "no word sets the chosen answers apart"


# --- parts -----------------------------------------------------------------------------------------------------------


def _page(subsets: dict[str, Any], finding: Callable[[dict[str, Any]], str], width: float, height: float) -> Figure:
    """A page whose title says what there is to see in each subset."""
    text = "\n".join(f"In {_short(name)}, {finding(stats)}" for name, stats in subsets.items())
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(text, **TITLE)
    return figure


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _intervals(axes: Axes, places: np.ndarray, estimates: list[dict[str, float] | None], **style: Any) -> None:
    """Draw estimates with their intervals; there may be none for lack of pairs."""
    drawn = [(place, estimate) for place, estimate in zip(places, estimates, strict=True) if estimate]
    if drawn:
        means = np.array([estimate["mean"] for _, estimate in drawn])
        below = means - [estimate["low"] for _, estimate in drawn]
        above = [estimate["high"] for _, estimate in drawn] - means
        style = {"linestyle": "none", "linewidth": 1.4, "markersize": 6, "capsize": 3, **style}
        axes.errorbar([place for place, _ in drawn], means, np.maximum([below, above], 0), **style)


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name is not a formula


def _mark_chance(axes: Axes) -> None:
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("chance", (1, 0.5), (-3, 3), fontsize=8, ha="right", **where)
