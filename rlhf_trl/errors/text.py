"""How the error analysis writes: the formats of numbers and tables, for the findings and for the text report.

The texts of the pairs are hostile by design: control characters are spelt out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_trl.errors.analysis import TERMS
from rlhf_trl.errors.calibration import confidence
from rlhf_trl.errors.probes import DESCRIPTIONS
from rlhf_trl.text.display import visible

WIDTH = 110
# Between the cells of a table in report.txt.j2.
CELL = "¦"


def percent(estimate: dict[str, float], sign: str = "", unit: str = " %") -> str:
    """Write a share with its interval: `67.5 % [64.7, 70.3]`."""
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} [{low}, {high}]"


def points(estimate: dict[str, float], unit: str = " points") -> str:
    """Write a difference of shares with its interval: `+2.0 points [-0.5, +4.5]`."""
    return percent(estimate, "+", unit)


def number(estimate: dict[str, float] | None) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format_map(estimate) if estimate else "-"


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Fill lines with the words of a text, whatever its own lines are."""
    return _wrap(" ".join(text.split()), first, rest) + "\n"


def quote(text: str, indent: str) -> str:
    """Indent the lines of a text, each of which is wrapped by itself."""
    return "".join(_wrap(line, indent, indent) + "\n" for line in visible(text).split("\n"))


def _wrap(text: str, first: str, rest: str) -> str:
    options: dict[str, Any] = {"replace_whitespace": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, **options)
    return "\n".join(lines) or first.rstrip()


def table(text: str) -> str:
    """Align cells that `CELL` separates: the first column on the left, the others on the right."""
    lines = [line.split(CELL) for line in text.strip("\n").split("\n")]
    rows = [[first.rstrip(), *map(str.strip, rest)] for first, *rest in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "".join("  ".join(row).rstrip() + "\n" for row in aligned)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters |= {
    "percent": percent,
    "points": points,
    # In a table, without the unit, and "-" where there is nothing.
    "plain": lambda estimate: percent(estimate, unit="") if estimate else "-",
    "signed": lambda estimate: points(estimate, unit="") if estimate else "-",
    "number": number,
    "fixed": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:,}",
    "paragraph": paragraph,
    "quote": quote,
    "table": table,
    "cell": lambda name: " ".join(visible(name).replace(CELL, "|").split()),
    "short": lambda text: textwrap.shorten(visible(text), 160, placeholder=" …"),
    "visible": visible,
    "confidence": confidence,
    "name_of": lambda row: f"row {row['row']} of {visible(row['subset'])}",
}


def render(stage: str, analysis: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """Write the text report.

    Args:
        analysis: content of `error_analysis.json`.
        examples: the lines of `error_examples.jsonl`.
    """
    template = ENVIRONMENT.get_template("report.txt.j2")
    return template.render(stage=stage, analysis=analysis, examples=examples, terms=TERMS, probes=DESCRIPTIONS)
