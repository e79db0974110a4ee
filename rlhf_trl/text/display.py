"""Texts of models and data for people to look at: chosen without looking at them, and shown so that they cannot act.

Reads and writes nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Characters that act or cannot be seen: controls, format marks (such as those that turn the direction of text), lone
# surrogates, separators; all but line ends, tabs and the joiners that scripts and emoji need.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
HARMLESS = "\n\t\u200c\u200d"


def take_turns(groups: Sequence[str], count: int) -> list[int]:
    """Choose the first row of each group in turn, then the second of each, until there are `count`: their indices.

    Args:
        groups: the group of each row, in an order that does not depend on what is to be shown.
    """
    seen: Counter[str] = Counter()
    order = []
    for index, group in enumerate(groups):
        order.append((seen[group], index))
        seen[group] += 1
    return [index for _, index in sorted(order)[:count]]


def visible(text: str) -> str:
    """Spell out every character that acts or hides, as ⟨U+202E⟩."""
    hidden = {char for char in set(text) if unicodedata.category(char) in HIDDEN and char not in HARMLESS}
    return "".join(f"⟨U+{ord(char):04X}⟩" if char in hidden else char for char in text)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a character, which no UTF-8 file can."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def first_line(error: Exception) -> str:
    """Say in a line what an error says; an error without words is named by its type."""
    return visible(str(error).strip() or type(error).__name__).splitlines()[0]


def fence(text: str) -> str:
    """Write a Markdown code block that no run of backticks in the text ends."""
    marks = _longer_than_any(text, 3)
    return f"{marks}text\n{visible(text)}\n{marks}\n"


def inline(text: str) -> str:
    """Write a Markdown code span, on one line."""
    marks = _longer_than_any(text, 1)
    # A space at each end is dropped by Markdown, and keeps a backtick or a space of the text apart from the marks.
    pad = " " if not text or "`" in text or text.strip(" ") != text else ""
    return f"{marks}{pad}{visible(text.replace(chr(10), ' '))}{pad}{marks}"


def _longer_than_any(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
