"""How the error analysis writes: the formats of numbers and tables, for the findings and for the text report.

The texts of the pairs are hostile by design: control characters are spelt out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_trl.errors.analysis import TERMS
from rlhf_trl.errors.calibration import confidence
from rlhf_trl.errors.probes import DESCRIPTIONS
from rlhf_trl.text.display import visible
from rlhf_trl.text.format import STYLES

WIDTH = 110
# Between the cells of a table in report.txt.j2.
CELL = "¦"


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


def shown(value: Any, style: str = "estimate") -> str:
    """Write a number in one of `STYLES`, and "-" where there is none."""
    return "-" if value is None else STYLES[style](value)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters |= {
    "shown": shown,
    "percent": STYLES["share"],
    "points": STYLES["difference"],
    "fixed": lambda value: f"{value:.3f}",
    "count": STYLES["count"],
    "paragraph": paragraph,
    "quote": quote,
    "table": table,
    "cell": lambda name: " ".join(visible(name).replace(CELL, "|").split()),
    "short": lambda text: textwrap.shorten(visible(text), 160, placeholder=" …"),
    "visible": visible,
    "confidence": confidence,
    "name_of": lambda row: f"row {row['row']} of {visible(row['subset'])}",
}


def render(stage: str, analysis: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], asked: int) -> str:
    """Write the text report from the analysis and the examples, of which `asked` of each kind were asked for."""
    template = ENVIRONMENT.get_template("report.txt.j2")
    known = {"analysis": analysis, "examples": examples, "terms": TERMS, "probes": DESCRIPTIONS}
    return template.render(stage=stage, asked=asked, **known)
