"""A figure as SVG inside an HTML page: it follows the page's light or dark colours, and its text can be searched."""

import io
import re
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from rlhf_trl.figures.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, PAPER, STYLE

# What a figure is drawn with -> what the page's style sheet calls it.
THEME = {INK: "ink", GRID: "grid", PAPER: "paper", GREY: "muted", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
# What the page's style sheet says of all elements.
COMMON = ("font-size: 10px; ", "font-family: 'DejaVu Sans'; ", "; stroke-linecap: square", "; stroke-linejoin: miter")


def to_svg(figure: Figure, key: str, label: str) -> Markup:
    """Write a figure as an SVG element, the same bytes for the same figure.

    `key` keeps the ids of a page's figures apart; those that nothing refers to are dropped. `label` says what it
    shows, for those who hear the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', buffer.getvalue()))
    for element in root.iter():
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text if element.tag == "text" else None
        attributes = {name.rpartition("}")[2]: _for_page(text) for name, text in element.attrib.items()
                      if name != "id" or text in used}  # fmt: skip
        if element.tag == "text":
            attributes["style"] = attributes.get("style", "").replace("; fill: var(--ink)", "")
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        element.attrib.clear()
        element.attrib |= attributes
    _thin(root)
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _thin(parent: ElementTree.Element) -> None:
    """Drop groups without an attribute, shapes without fill and stroke, and the style sheet, whose `*` would reach the
    whole page."""
    children = list(parent)
    parent[:] = []
    for child in children:
        _thin(child)
        if child.tag == "g" and not child.attrib:
            parent.extend(child)
        elif child.get("style") != "fill: none" and child.tag not in ("metadata", "style"):
            parent.append(child)


def _for_page(text: str) -> str:
    """Put the page's colours in, leave to its style sheet what most elements share, and keep tenths of a pixel."""
    for color, variable in THEME.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    for common in COMMON:
        text = text.replace(common, "")
    return re.sub(r"(\d\.\d)\d+", r"\1", " ".join(text.split()))
