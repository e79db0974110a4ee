"""Gain against KL as the page shows it: every policy is named, and the axes fit what is drawn."""

import itertools
from functools import partial
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from rlhf_trl.figures.frontier import draw_frontier
from rlhf_trl.figures.style import build_figure
from rlhf_trl.figures.svg import to_svg

WIDTH = 380


def frontier(*places: tuple[str, float, float], origin: float = 0.0) -> dict[str, Any]:
    points = [("reference", None, 0, origin), *((name, "dpo", kl, gain) for name, kl, gain in places)]
    rows = [{"policy": name, "trainer": trainer, "step": None, "on_front": True,
             "kl": around(kl, 0.3 if trainer else 0),
             "gain": around(gain, 0.1 if trainer else 0)} for name, trainer, kl, gain in points]  # fmt: skip
    return {"points": rows, "best_of_n": []}


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def draw(drawn: dict[str, Any], score: str) -> dict[str, dict[str, str]]:
    """The texts of the SVG with their attributes."""
    figure = build_figure([partial(draw_frontier, frontier=drawn, score=score)], size=(WIDTH / 72, 4), legend=True)
    svg = ElementTree.fromstring(to_svg(figure, "key", "label"))
    return {element.text or "": element.attrib for element in svg.iter("text")}


def test_every_policy_is_named_inside_the_figure() -> None:
    names = [f"dpo-beta=0.0{place}" for place in range(1, 9)]
    labels = draw(frontier(*((name, place / 9, place / 9) for place, name in enumerate(names))), "reward")
    boxes = [(float(labels[name]["x"]), float(labels[name]["y"]), 6 * len(name)) for name in ("reference", *names)]
    assert all(0 < x < x + size < WIDTH for x, _, size in boxes)
    for (x, y, size), (other_x, other_y, other_size) in itertools.combinations(boxes, 2):
        assert x + size <= other_x or other_x + other_size <= x or abs(y - other_y) >= 9


def test_the_figure_of_win_rates_is_about_half() -> None:
    drawn = frontier(("dpo", 4.0, 0.93), ("ppo", 9.0, 0.52), origin=0.5)
    texts = draw(drawn, "win_rate")
    ticks = [float(text.removesuffix(" %")) for text in texts if text.endswith(" %")]
    assert len(ticks) > 2 and min(ticks) >= 0 and max(ticks) <= 100
    assert "win rate against the reference" in texts
    axes = Figure().add_subplot()
    draw_frontier(axes, drawn, "win_rate")
    assert list(axes.get_lines()[0].get_ydata()) == [0.5, 0.5]
    assert 0.3 < axes.get_ylim()[0] < 0.42  # the lowest interval ends at 0.42
