"""What a judge's reply says: the first answer is better, the second is, neither is, or nothing that can be read.

Reads and writes nothing. A reply is parsed each time it is needed, never stored as a verdict, so that a change here
needs no new call.
"""

from __future__ import annotations

import json
import re
from enum import Enum

# FastChat's tags (lmsys, llm_judge), in which C stands for a tie.
TAG = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE | re.ASCII)


class Verdict(str, Enum):
    """The answer that a judge prefers, by the place in which it was shown."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    INVALID = "invalid"


# How many braces are tried: more than any verdict needs, so that a reply made of braces costs no time.
OPENINGS = 100

MEANINGS = {"a": Verdict.FIRST, "b": Verdict.SECOND, "c": Verdict.TIE, "tie": Verdict.TIE}


def parse_verdict(text: str) -> Verdict:
    """Read the last tag, `[[A]]`, `[[B]]`, `[[C]]` or `[[tie]]`, else the last JSON object with a `winner`.

    The last one counts because a judge may quote a tag, its own instructions or the answers before it decides. If the
    last line that has a tag has tags that differ, nothing was decided.

    Returns:
        INVALID where there is neither, or the winner is none of A, B, C and tie.
    """
    tags = list(TAG.finditer(text))
    if tags:
        line = text.rfind("\n", 0, tags[-1].start())
        found = {MEANINGS[tag.group(1).lower()] for tag in tags if tag.start() > line}
        return found.pop() if len(found) == 1 else Verdict.INVALID
    return _from_json(text)


def _from_json(text: str) -> Verdict:
    """Read the JSON object that opens last among those that name a winner, whatever stands around it."""
    decoder = json.JSONDecoder()
    openings = [match.start() for match in re.finditer(r"\{", text)]
    for opening in reversed(openings[-OPENINGS:]):
        try:
            found, _ = decoder.raw_decode(text, opening)
        except (ValueError, RecursionError):  # not JSON, a number or a nesting that no answer has
            continue
        if "winner" in found:
            return MEANINGS.get(str(found["winner"]).strip().lower(), Verdict.INVALID)
    return Verdict.INVALID
