"""What all figures share: colours, markers and fonts, the grid of panels, intervals, the legend, and saving as PNG."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
INK, GRID, PAPER = "#1b1f24", "#d9dce0", "#fefefe"
# Trainer -> colour and marker: never colour alone.
TRAINERS = {"dpo": (BLUE, "o"), "grpo": (ORANGE, "s"), "ppo": (GREEN, "^"), "sft": (GREY, "D"),
            "reward": (PURPLE, "v")}  # fmt: skip
# Markers and lines of the further policies of one trainer.
MARKERS, LINES = "PX*<>pvd", ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that text is measured alike everywhere
    "font.size": 10,
    "text.parse_math": False,  # a name is not a formula
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10.5,
    "axes.formatter.useoffset": False,  # ticks in full: a common factor or offset would stand above the axis
    "axes.formatter.limits": [-5, 6],
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 72,  # one unit of the drawing is one point, and one pixel of the report's page
    "svg.fonttype": "none",
}


def policy_styles(trainers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Give each policy the colour of its trainer, and a marker and line that differ among the trainer's policies."""
    seen: Counter[str] = Counter()
    styles = {}
    for name, trainer in trainers.items():
        color, first = TRAINERS[trainer]
        markers, place = first + MARKERS.replace(first, ""), seen[trainer]
        marker, line = markers[place % len(markers)], LINES[place % len(LINES)]
        styles[name] = {"color": color, "marker": marker, "linestyle": line}
        seen[trainer] += 1
    return styles


@matplotlib.rc_context(STYLE)
def build_figure(
    panels: Sequence[Callable[[Axes], None]],
    columns: int = 3,
    size: tuple[float, float] = (4.2, 3.1),
    title: str = "",
    legend: bool = True,
) -> Figure:
    """Draw each panel onto axes of its own, row by row, above one legend of all of them; `size` is that of a panel, in
    inches."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    for place, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, columns, place))
    if legend:
        add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Put one legend of all panels below them, where it covers nothing, and make room for it; each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if not axes.get_legend():
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
    if entries:
        width, height = figure.get_size_inches()
        columns = max(1, int(72 * width / (50 + 6 * max(map(len, entries)))))
        figure.set_size_inches(width, height + 0.2 * -(-len(entries) // columns))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def with_errors(estimates: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and distances to the ends of their intervals, as `Axes.errorbar` takes them: (N,), (2, N)."""
    mean, low, high = (np.array([estimate[part] for estimate in estimates]) for part in ("mean", "low", "high"))
    return mean, np.maximum([mean - low, high - mean], 0)


def root_scale(axes: Axes, left: float, right: float) -> None:
    """Space the horizontal axis by the square root of the KL, along which reward changes about evenly (Gao et al.,
    2022) and which, unlike a logarithm, has a zero; what is below zero is mirrored."""
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    axes.set_xlim(left, right)
    # 0 and values of one digit that lie about evenly on the square-root scale.
    reach = max(-left, right)
    ticks = [float(f"{share * abs(share) * reach:.0e}") for share in (-0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9)]
    ticks = [tick for tick in ticks if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xlabel("KL to the reference, nats per answer")


@matplotlib.rc_context(STYLE)
def save(figure: Figure | None, path: Path) -> None:
    """Write a PNG whole or not at all, the same bytes for the same figure; nothing where there is nothing to draw."""
    if figure is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # boxes stand for letters that the font lacks
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
