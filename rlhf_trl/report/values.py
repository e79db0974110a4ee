"""Values on the report's pages: a template reaches them as nodes, which know their address and print as a link to it.

Works on the documents that the report has read; reads only the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

from rlhf_trl.text.display import visible
from rlhf_trl.text.format import STYLES, pointer

# A text longer than this is cut for display, and the page says so; longer than PREVIEW, it is folded.
MAX_CHARACTERS = 20_000
PREVIEW = 420


class Node:
    """A value of a JSON document with its address: the file, and the keys that lead to it.

    Templates test, compare and loop over nodes as over plain values. A node prints through a filter that names its
    format, `{{ policy.kl | estimate }}`; only text prints by itself.
    """

    def __init__(self, value: Any, file: str, keys: tuple[str | int, ...] = ()) -> None:
        self._value, self._file, self._keys = value, file, keys

    def __getitem__(self, key: str | int) -> Node:
        return Node(self._value[key], self._file, (*self._keys, key))

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self))) if isinstance(self._value, list) else iter(self._value)

    def items(self) -> list[tuple[str, Node]]:
        return [(key, self[key]) for key in self._value]

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return bool(self._value == raw(other))

    def __hash__(self) -> int:
        return hash(self._value)

    def __str__(self) -> str:
        raise TypeError(f"{pointer(self._file, self._keys)} is printed without its source")


def raw(node: Any) -> Any:
    """The plain value of a node."""
    return node._value if isinstance(node, Node) else node


def build_environment() -> Environment:
    """Build the jinja2 environment of the pages, with a filter for every format of `STYLES`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        finalize=printable, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {style: partial(show_value, style) for style in STYLES}
    environment.filters |= {"source": show_source, "raw": raw, "rows": list_rows, "columns": list_columns}
    environment.globals |= {"cell": show_cell, "PREVIEW": PREVIEW}
    return environment


def show_value(style: str, node: Node) -> Markup:
    """Print a value, marked with its address, a number as a link to its file. Null prints a dash; an estimate that
    could not be computed, a dash and the reason."""
    value = node._value
    if isinstance(value, dict) and value["mean"] is None:
        reason = Markup(' <span class="why">{}</span>').format(show_value("text", node["why_not"]))
        return show_value(style, node["mean"]) + reason
    text = printable(STYLES[style](value)) if value is not None else "–"
    if isinstance(value, dict):
        mean, bracket, interval = text.partition(" [")
        text = Markup('<b>{}</b><span class="ci">{}</span>').format(mean, bracket + interval)
    address = printable(pointer(node._file, node._keys))
    if style == "text":
        return Markup('<span class="text" data-source="{0}" title="{0}">{1}</span>').format(address, text)
    # Thousands of stops would be in the way of the keyboard, which has the link to the file below each section.
    link = '<a class="number" href="{0}" data-source="{1}" title="{1}" tabindex="-1">{2}</a>'
    return Markup(link).format(quote(address, safe="/#"), address, text)


def show_source(node: Node) -> Markup:
    """Print where the numbers of a section come from."""
    place = Markup(" › <code>{}</code>").format(printable(".".join(map(str, node._keys)))) if node._keys else ""
    return Markup('<span class="from" data-path="{}"><a href="{}"><code>{}</code></a>{}</span>').format(
        printable(pointer(node._file, node._keys)), quote(node._file), printable(node._file), place
    )


def show_cell(row: Node, style: str, path: str | Sequence[str]) -> Markup | str:
    """Print what lies below a table's row; where a path ends in `?` and there is nothing, a dash."""
    keys = path.split(".") if isinstance(path, str) else list(path)
    optional = keys[-1] == "?"
    for key in keys[:-1] if optional else keys:
        if optional and (not row or key not in row):
            return "–"
        row = row[key]
    return show_value(style, row)


def list_columns(
    names: Sequence[str], style: str, *path: str, named: Callable[[str], Markup] | None = None
) -> list[tuple[Any, str, list[str]]]:
    """List a table's columns of one format, one for each name, which stands for `*` in the path."""
    return [(named(name) if named else name, style, [name if key == "*" else key for key in path]) for name in names]


def list_rows(node: Any, names: Sequence[str] = ()) -> list[tuple[Any, Node]]:
    """List the rows of a table: each entry of a list by itself, or a mapping's values by name, `names` or all."""
    if isinstance(raw(node), list):
        return [(entry, entry) for entry in node]
    return [(name, node[name]) for name in names or node if name in node]


def printable(value: Any) -> Any:
    """Make a string safe to look at: no control, direction-changing or invisible character acts, and none is hidden.

    The template's last step before escaping. Refuses a number, which must come as a node, with its format and address.
    """
    if isinstance(value, Node) and (value._value is None or isinstance(value._value, str)):
        return show_value("text", value)
    if isinstance(value, (Markup, Undefined)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is printed without its source")
    shown = visible(value[:MAX_CHARACTERS])
    if len(value) > MAX_CHARACTERS:
        shown += f" […] (cut here for display: {len(value):,} characters in all)"
    return shown
