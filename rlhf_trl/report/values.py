"""Print values on the report's pages: each by its address, a number as a link to its file, all text made inert.

Works on the documents that the report has read; reads only the templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

from rlhf_trl.text.display import visible
from rlhf_trl.text.format import STYLES, pointer, resolve

# A text longer than this is cut for display, and the page says so; longer than PREVIEW, it is folded.
MAX_CHARACTERS = 20_000
PREVIEW = 420
TEMPLATES = Path(__file__).parent / "templates"


def build_environment(documents: Mapping[str, Any]) -> Environment:
    """Build the jinja2 environment for a page of these documents; it refuses a number without an address."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"value": partial(show_value, documents), "source": partial(show_source, documents)}
    return environment


def show_value(documents: Mapping[str, Any], style: str, file: str, *keys: str | int) -> Markup:
    """Print the value at an address, marked with that address, a number as a link to its file; null prints a dash, an
    estimate that could not be computed a dash and the reason."""
    value = resolve(documents, file, keys)
    if isinstance(value, dict) and value["mean"] is None:
        dash = show_value(documents, style, file, *keys, "mean")
        return dash + Markup(' <span class="why">{}</span>').format(
            show_value(documents, "text", file, *keys, "why_not")
        )
    text = printable(STYLES[style](value)) if value is not None else "–"
    if isinstance(value, dict):
        mean, bracket, interval = text.partition(" [")
        text = Markup('<b>{}</b><span class="ci">{}</span>').format(mean, bracket + interval)
    address = printable(pointer(file, keys))
    if style == "text":
        return Markup('<span class="text" data-source="{0}" title="{0}">{1}</span>').format(address, text)
    # Thousands of stops would be in the way of the keyboard, which has the link to the file below each section.
    link = '<a class="number" href="{0}" data-source="{1}" title="{1}" tabindex="-1">{2}</a>'
    return Markup(link).format(quote(address, safe="/#"), address, text)


def show_source(documents: Mapping[str, Any], file: str, *keys: str | int) -> Markup:
    """Print where the numbers of a section come from."""
    resolve(documents, file, keys)
    place = Markup(" › <code>{}</code>").format(printable(".".join(str(key) for key in keys))) if keys else ""
    return Markup('<span class="from" data-path="{}"><a href="{}"><code>{}</code></a>{}</span>').format(
        printable(pointer(file, keys)), quote(file), printable(file), place
    )


def printable(value: Any) -> Any:
    """Make a string safe to look at: no control, direction-changing or invisible character acts, and none is hidden.

    The template's last step before escaping. Refuses numbers, which must come through `show_value` with their address.
    """
    if isinstance(value, (Markup, Undefined)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is printed without its source")
    shown = visible(value[:MAX_CHARACTERS])
    if len(value) > MAX_CHARACTERS:
        shown += f" […] (cut here for display: {len(value):,} characters in all)"
    return shown
