"""Figure of a comparison: the verdict, gain against KL, reward against what it took, and compute.

Pure functions from the content of `comparison_results.json` and the histories to axes, for the PNG of the step and for
the SVGs of the report alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_trl.figures.style import BLUE, GREY, INK, ORANGE, PAPER, build_figure, policy_styles, root_scale

Row = dict[str, Any]
# More would cover each other; the largest differences are drawn.
MOST_PAIRS = 12
AXIS = {"gold": "gold gain", "reward": "reward gain", "win_rate": "win rate"}


def plot_comparison(results: Mapping[str, Any], stats: Mapping[str, Row]) -> Figure:
    """Draw what there is: differences at equal KL, gain against KL, reward during training, compute."""
    drawings: dict[str, Callable[[Axes], None]] = {}
    if results["verdict"]:
        drawings["Difference at equal KL and as trained"] = partial(draw_differences, results=results)
    if measure_of(results):
        drawings["Every seed, on held-out prompts"] = partial(draw_seeds, results=results)
    drawings["Reward or loss during training"] = partial(draw_training, results=results, stats=stats)
    drawings["Compute, with the stages built on"] = partial(draw_compute, results=results)
    figure = build_figure([*drawings.values()], columns=2, size=(6.5, 4.6))
    for axes, title in zip(figure.axes, drawings, strict=True):
        axes.set_title(title, loc="left")
    return figure


def measure_of(results: Mapping[str, Any]) -> str | None:
    """The quality that the figures show: gain by the gold model, else by the reward model; None without either."""
    known = [stage["quality"] for stage in results["stages"].values() if stage["quality"]]
    return next((key for key in ("gold_gain", "reward_gain") if known and all(key in of for of in known)), None)


def draw_differences(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draw the first method less the second with its 95 % interval, a line for each pair and question; filled where it
    is significant and large enough to matter."""
    measure = results["verdict"]["measure"]
    found = list_differences(results)
    axes.axvline(0, color=GREY, linewidth=1)
    for place, (_, result) in enumerate(found):
        difference = result["difference"]
        clear = result["outcome"] in ("better", "worse")
        axes.plot([difference["low"], difference["high"]], [place, place], color=INK, linewidth=1.6)
        axes.plot(difference["mean"], place, marker="o", markersize=8, color=INK,
                  markerfacecolor=INK if clear else PAPER)  # fmt: skip
    axes.set_yticks(range(len(found)), [label for label, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(f"difference in {AXIS[measure]} (filled: significant, and large enough to matter)")
    axes.grid(axis="y", visible=False)


def list_differences(results: Mapping[str, Any]) -> list[tuple[str, Row]]:
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


def draw_seeds(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draw each policy's gain against its KL, every seed a point."""
    measure = str(measure_of(results))
    furthest = 0.0
    drawn = {name: group for name, group in results["groups"].items()
             if all(results["stages"][stage]["quality"] for stage in group["stages"])}  # fmt: skip
    styles = policy_styles({name: group["trainer"] for name, group in drawn.items()})
    for name, group in drawn.items():
        qualities = [results["stages"][stage]["quality"] for stage in group["stages"]]
        x, y = [of["kl"]["mean"] for of in qualities], [of[measure]["mean"] for of in qualities]
        style: Row = {**styles[name], "linestyle": "none"}
        axes.plot(x, y, markersize=8, markeredgecolor=PAPER, label=name, **style)
        furthest = max(furthest, *x)
    axes.axhline(0, color=GREY, linewidth=1)
    root_scale(axes, 0, 1.1 * furthest or 1)
    axes.set_ylabel(measure.replace("_", " "))
    axes.legend()


def draw_training(axes: Axes, results: Mapping[str, Any], stats: Mapping[str, Row]) -> None:
    """Draw the logged reward by seconds, of the most runs in which it means the same; without any reward, the loss."""
    quantity = "reward" if results["comparable"]["reward"] else "loss"
    names: Sequence[str] = max((of["stages"] for of in results["comparable"][quantity]), key=len, default=[])
    others = sum(len(of["stages"]) for of in results["comparable"][quantity]) - len(names)
    styles = policy_styles({name: results["stages"][name]["trainer"] for name in names})
    for name in names:
        points = [(row["seconds"], row[quantity]) for row in stats[name]["history"] if quantity in row]
        style: Row = {**styles[name], "markersize": 4}
        axes.plot(*zip(*points, strict=True), linewidth=1.5, label=name, **style)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"{quantity}, where it means the same" + (f" ({others} runs left out)" if others else ""))
    if names:
        axes.legend()


def draw_compute(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draw device seconds, the run's own and those of the stages it builds on."""
    stages = results["stages"]
    for place, stage in enumerate(stages.values()):
        own, all_ = (stage["efficiency"][key] for key in ("device_seconds", "device_seconds_with_inputs"))
        axes.barh(place, own, color=BLUE, height=0.6, label="its own" if place == 0 else None)
        axes.barh(place, all_ - own, left=own, color=ORANGE, alpha=0.45, height=0.6, hatch="//", edgecolor=PAPER,
                  label="the stages it builds on" if place == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlabel("device seconds")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
