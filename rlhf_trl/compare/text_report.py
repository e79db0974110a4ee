"""The text report of a comparison, from `comparison_results.json` and the template `report.txt.j2`.

Numbers that mean different things never share a table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_trl.text.format import format_bytes

Row = Mapping[str, Any]
WIDTH = 110
CLOCKS = ("steps", "seconds", "tokens")


def render(name: str, results: Row) -> str:
    """Write the report from the content of `comparison_results.json`."""
    stages = {run: {**stage, "convergence": _until(stage["convergence"])} for run, stage in results["stages"].items()}

    def pick(names: Sequence[str], part: str, quantity: str | None = None) -> dict[str, Row]:
        """Take one part of each named stage that has it, the quantity's own numbers beside the others."""
        rows = {run: stages[run][part] for run in names if stages[run][part]}
        return {run: {**row, **row[quantity]} for run, row in rows.items()} if quantity else rows

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"wrap": _wrap, "cell": _cell}
    environment.globals |= {"table": _table, "pick": pick}
    return environment.get_template("report.txt.j2").render(results, name=name, stages=stages)


def _until(convergence: Row) -> Row:
    """Write `> n` where the threshold was not reached in n."""
    if convergence["meaning"] is None or convergence["reached"]:
        return convergence
    ends = convergence["censored_at"]
    return {**convergence, **{key: ends[key] and f"> {_cell(ends[key])}" for key in CLOCKS}}


def _wrap(text: str, first: str = "", rest: int | None = None) -> str:
    indent = " " * (len(first) if rest is None else rest)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        if "low" not in value:
            return ", ".join(map(_cell, value.values()))
        mean, low, high = (_cell(value[key]) for key in ("mean", "low", "high"))
        return mean if value["mean"] is None else f"{mean} [{low}, {high}]"
    if isinstance(value, list):
        return ", ".join(map(str, value[:3])) + (" …" if len(value) > 3 else "") if value else "none"
    if isinstance(value, float) or (isinstance(value, int) and value >= 10**6):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _table(rows: Mapping[str, Row], titles: Mapping[str, str] | Sequence[str], first: str = "run") -> str:
    """Print the named rows; `titles` are keys of a row, or keys and what stands above them."""
    titles = titles if isinstance(titles, Mapping) else {key: key for key in titles}
    cells = [[first, *titles.values()]]
    for name, row in rows.items():
        cells.append([name, *(format_bytes(row[k]) if k.endswith("_bytes") else _cell(row.get(k)) for k in titles)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines) + "\n"
