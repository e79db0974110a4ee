"""The model card of an exported adapter: every number in it comes from the export's own JSON, and says from where.

Works on `lineage.json` and `evidence.json`; writes `README.md` beside them. A number gets into the card by its
address, and carries it as a comment that no reader of the rendered page sees; the template prints none otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined

from rlhf_trl.adapters.files import CARD, EVIDENCE, FIGURE, LINEAGE
from rlhf_trl.adapters.verify import loading_lines
from rlhf_trl.run.files import write_text
from rlhf_trl.text.display import fence, inline, visible
from rlhf_trl.text.format import STYLES, pointer, resolve

# Characters that mean something in Markdown or HTML.
ACTIVE = re.compile(r"([\\`*_{}\[\]<>|#~$&])")
PIPELINES = {"policy": "text-generation", "reward": "text-classification"}


class Written(str):
    """Markdown that is ready to stand in the card."""


def write_card(folder: Path, lineage: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """Write the card of an export."""
    write_text(folder / CARD, render_card(lineage, evidence, (folder / FIGURE).exists()))


def render_card(lineage: Mapping[str, Any], evidence: Mapping[str, Any], has_figure: bool) -> str:
    """Render the card."""
    documents = {LINEAGE: lineage, EVIDENCE: evidence}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.globals |= {
        "measured": partial(_show, documents, EVIDENCE),
        "recorded": partial(_show, documents, LINEAGE),
        "fence": lambda text: Written(fence(text)),
        "code": lambda text: Written(inline(str(text))),
        "yaml": lambda text: Written(_quote(text)),
    }
    source = str(lineage["data"]["source"])
    return environment.get_template("card.md.j2").render(
        lineage=lineage,
        evidence=evidence,
        has_figure=has_figure,
        pipeline=PIPELINES[lineage["kind"]],
        dataset=source if not source.startswith(("local:", "builtin:")) else None,
        lines=Written(loading_lines(lineage["kind"], lineage["base"]["shipped"])),
        unjudged=[place for place, alarm in enumerate(evidence.get("alarms") or ()) if alarm["value"] is None],
        raised=[place for place, alarm in enumerate(evidence.get("alarms") or ()) if alarm["raised"]],
    )


def _show(documents: Mapping[str, Any], file: str, style: str, *keys: str | int) -> Written:
    """Print the value at an address, with that address in a comment; null prints a dash."""
    value = resolve(documents, file, keys)
    if value is None or (isinstance(value, dict) and value["mean"] is None):
        return Written(f"–<!-- {pointer(file, keys)} -->")
    text = STYLES[style](value)
    return Written(f"{_escape(text) if style == 'text' else text}<!-- {pointer(file, keys)} -->")


def _printable(value: Any) -> Any:
    """Let Markdown that is ready through, and make a text of a name harmless.

    Raises:
        TypeError: a number is to be printed without its address.
    """
    if isinstance(value, (Written, Undefined)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is printed without its source")
    return _escape(value)


def _escape(text: str) -> str:
    return ACTIVE.sub(r"\\\1", visible(text)).replace("\n", " ")


def _quote(text: str) -> str:
    """Write a YAML text in single quotes."""
    return "'" + visible(text).replace("'", "''").replace("\n", " ") + "'"
