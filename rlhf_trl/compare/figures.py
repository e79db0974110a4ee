"""Figure of a comparison: the verdict, and reward during training.

Pure functions from the content of `comparison_results.json` and the histories to axes, for the PNG of the step and for
the SVGs of the report alike.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_trl.figures.style import GREY, INK, PAPER, build_figure, policy_styles

Row = Mapping[str, Any]
# More would cover each other; the largest differences are drawn.
MOST_PAIRS = 12
AXIS = {"gold": "gold gain", "reward": "reward gain", "win_rate": "win rate, in points"}


def plot_comparison(results: Row, stats: Mapping[str, Row]) -> Figure:
    """Draw the differences at equal KL and as trained, where there are any, and reward or loss during training."""
    differences = [partial(draw_differences, results=results)] if results["verdict"] else []
    return build_figure([*differences, partial(draw_training, results=results, stats=stats)], size=(6.5, 4.6))


def draw_differences(axes: Axes, results: Row) -> None:
    """Draw the first method less the second with its 95 % interval, a line for each pair and question; filled where it
    is significant and large enough to matter."""
    found = list_differences(results)
    axes.axvline(0, color=GREY, linewidth=1)
    for place, (_, result) in enumerate(found):
        difference, clear = result["difference"], result["outcome"] in ("better", "worse")
        axes.plot([difference["low"], difference["high"]], [place, place], color=INK, linewidth=1.6)
        face = INK if clear else PAPER
        axes.plot(difference["mean"], place, marker="o", markersize=8, color=INK, markerfacecolor=face)
    axes.set_yticks(range(len(found)), [label for label, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    measure = results["verdict"]["measure"]
    if measure == "win_rate":
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_xlabel(f"difference in {AXIS[measure]} (filled: significant, and large enough to matter)")
    axes.grid(axis="y", visible=False)


def list_differences(results: Row) -> list[tuple[str, Row]]:
    """List the answers by the verdict's measure with their labels, the largest differences first."""
    found: list[tuple[str, Row]] = []
    for pair in results["pairs"]:
        measured = pair["measures"][results["verdict"]["measure"]]
        for question in ("equal_kl", "as_trained") if measured["why_not"] is None else ():
            result = measured[question]
            where = f"at {result['kl']:.2g} nats" if result["kl"] else "as trained"
            if result["why_not"] is None:
                found.append((f"{pair['a']}\nless {pair['b']}\n{where}", result))
    return sorted(found, key=lambda entry: -abs(entry[1]["difference"]["mean"]))[:MOST_PAIRS]


def draw_training(axes: Axes, results: Row, stats: Mapping[str, Row]) -> None:
    """Draw the logged reward by seconds, of the most runs in which it means the same; without any reward, the loss."""
    quantity = "reward" if results["comparable"]["reward"] else "loss"
    alike: list[Sequence[str]] = [of["stages"] for of in results["comparable"][quantity]]
    names = max(alike, key=len, default=[])
    others = sum(map(len, alike)) - len(names)
    for name, style in policy_styles({name: results["stages"][name]["trainer"] for name in names}).items():
        points = [(row["seconds"], row[quantity]) for row in stats[name]["history"] if quantity in row]
        look: dict[str, Any] = {**style, "markersize": 4, "linewidth": 1.5}
        axes.plot(*zip(*points, strict=True), label=name, **look)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"{quantity}, where it means the same" + (f" ({others} runs left out)" if others else ""))
    if names:
        axes.legend()
