"""The figures of `explore`: a page for each question, the subsets told apart by colour and marker."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from rlhf_trl.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, build_figure, save, with_errors
from rlhf_trl.stats.intervals import wilson

SUBSETS = ((GREEN, "o"), (PURPLE, "s"), ("#56B4E9", "^"), ("#E69F00", "D"))
DEEPEST = 9
LEVELS = np.linspace(0, 1, 1001)
Statistics = Mapping[str, Any]
Shares = Mapping[str, dict[str, float] | None]


def _depths(stats: Statistics) -> Shares:
    counts = {int(turns): count for turns, count in stats["depth"]["counts"].items()}
    deep = {f"{DEEPEST}+": sum(count for turns, count in counts.items() if turns >= DEEPEST)}
    alike = {str(turns): counts.get(turns, 0) for turns in range(1, DEEPEST)}
    return {turns: wilson(count, stats["pairs"]).as_dict() for turns, count in (alike | deep).items()}


# Page -> title of each panel -> what tells its shares apart, where they stand in the statistics, and whether 50 % is
# what chance would give.
PAGES: dict[str, dict[str, tuple[str, Callable[[Statistics], Shares], bool]]] = {
    "length_bias": {
        "How often the longer answer is chosen (ties half)": (
            "unit of length", lambda stats: stats["chosen_longer"], True),
        "… by how much longer it is": (
            "words of the longer answer ÷ words of the shorter one", lambda stats: stats["verbosity"], True),
    },
    "conversations": {
        "Depth of the conversations": ("turns of the user in the prompt", _depths, False),
        "Answers that begin alike": ("what both begin with", lambda stats: stats["shared_prefix"], False),
    },
    "refusals": {
        "Answers with a plain refusal": ("answer", lambda stats: stats["refusals"], False),
        "One of two answers refuses: how often it is chosen": ("", lambda stats: stats["one_refusal"], True),
    },
}  # fmt: skip


def draw(folder: Path, statistics: Statistics, pairs: Mapping[str, np.ndarray]) -> None:
    """Draw every figure, of the largest subsets where there are more than fit on a page.

    Args:
        folder: where the files go.
        statistics: the statistics of each subset.
        pairs: of each subset, the lengths of the answers in each unit, shape (pairs, 2): chosen, rejected.
    """
    largest = sorted(statistics, key=lambda name: (-statistics[name]["pairs"], name))[: len(SUBSETS)]
    if not largest:
        return
    names, units = sorted(largest), [*statistics[largest[0]]["lengths"]]
    title = f"{len(names)} of {len(statistics)} subsets; statistics.json has all"
    title = title if len(names) < len(statistics) else ""
    panels = [partial(_draw_lengths, name, unit, pairs[name][unit]) for name in names for unit in units]
    save(build_figure(panels, len(units), title=title), folder / "lengths.png")
    for page, contents in PAGES.items():
        panels = [
            partial(_draw_shares, {name: of(statistics[name]) for name in names}, panel, label, chance)
            for panel, (label, of, chance) in contents.items()
        ]
        save(build_figure(panels, size=(5.5, 4.5), title=title), folder / f"{page}.png")


def _draw_lengths(name: str, unit: str, pairs: np.ndarray, axes: Axes) -> None:
    """The share of answers up to each length; the outermost 0.2 % lie outside."""
    low, high = np.maximum(np.quantile(pairs, (0.002, 0.998)), (1, 2))
    wide = high > 10 * low
    for side, lengths, color, line in zip(("chosen", "rejected"), pairs.T, (BLUE, ORANGE), ("-", "--"), strict=True):
        label = f"{side}, median {np.median(lengths):,.0f}"
        up_to = np.quantile(lengths, LEVELS, method="inverted_cdf")
        axes.step(up_to, LEVELS, where="post", label=label, color=color, linestyle=line)
    axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    axes.legend(loc="upper left")
    axes.set_title(_short(name))
    axes.set_xscale("log" if wide else "linear")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(integer=True))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(low * 0.9, high * 1.1)
    axes.set_xlabel(f"length [{unit}{', log scale' if wide else ''}]")
    axes.set_ylabel("answers up to this length")
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_shares(shares: Mapping[str, Shares], title: str, label: str, chance: bool, axes: Axes) -> None:
    """The shares of each subset with their intervals, side by side; there may be none for lack of pairs."""
    for index, ((name, values), (color, marker)) in enumerate(zip(shares.items(), SUBSETS, strict=False)):
        shift = (index - (len(shares) - 1) / 2) * 0.16
        drawn = {place + shift: value for place, value in enumerate(values.values()) if value}
        means, errors = with_errors([*drawn.values()])
        axes.errorbar(
            [*drawn], means, errors, label=_short(name), color=color, marker=marker, linestyle="none", capsize=3
        )
    places = [*next(iter(shares.values()))]
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel("share, 95 % interval")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    if chance:
        axes.axhline(0.5, color="black", linestyle=":", linewidth=1, label="chance")


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
