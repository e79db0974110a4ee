"""A page as a tree of elements, read strictly."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle", "use"}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str]
    children: list[Any] = field(default_factory=list)

    def all(self) -> list["Element"]:
        return [self, *(e for child in self.children if isinstance(child, Element) for e in child.all())]

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)


class Tree(HTMLParser):
    """A strict reader: every element must be closed in its turn."""

    def __init__(self, page: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def words(element: Element) -> str:
    """The text of an element as a reader hears it."""
    if element.attrs.get("role") == "img":
        return f"({element.attrs['aria-label']}) "
    parts = (child if isinstance(child, str) else f" {words(child)} " for child in element.children)
    return " ".join("".join(parts).split()).replace(" ,", ",")
