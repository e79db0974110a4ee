"""Read a judge's reply: the score of the answer shown first, which is 1, 0 or, for a tie, 0.5; None without a verdict.

A reply is parsed each time it is needed, never stored as a verdict, so that a change here needs no new call.
"""

from __future__ import annotations

import json
import re

# FastChat's tags (lmsys, llm_judge), in which C stands for a tie. Before "if" a judge quotes its instructions.
TAG = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\](?!\W*if\b)", re.IGNORECASE | re.ASCII)
SCORES = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
REASONING, REASONING_END = (re.compile(rf"<{slash}think(ing)?>", re.IGNORECASE) for slash in ("", "/"))
# How many braces are tried: more than any verdict needs, so that a reply made of braces costs no time.
OPENINGS = 100


def parse_verdict(reply: str) -> float | None:
    """Read the tag, `[[A]]`, `[[B]]`, `[[C]]` or `[[tie]]`, in the last line that has words.

    Reasoning up to `</think>` does not count, and reasoning without an end leaves no verdict. Nor do tags that differ,
    or tags in earlier lines alone. A reply without tags may have a JSON object with a `winner`; the last one counts.
    """
    ends = [match.end() for match in REASONING_END.finditer(reply)]
    text = reply[ends[-1] :] if ends else reply
    if REASONING.search(text):
        return None
    if not TAG.search(text):
        return _from_json(text)
    last_line = next(line for line in reversed(text.split("\n")) if re.search(r"\w", line))
    found = {SCORES[tag.lower()] for tag in TAG.findall(last_line)}
    return found.pop() if len(found) == 1 else None


def _from_json(text: str) -> float | None:
    """Read the JSON object that opens last among those that name a winner, whatever stands around it."""
    openings = [match.start() for match in re.finditer(r"\{", text)]
    for opening in reversed(openings[-OPENINGS:]):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, opening)
        except (ValueError, RecursionError):  # not JSON, a number or a nesting that no answer has
            continue
        if "winner" in found:
            return SCORES.get(str(found["winner"]).strip().lower())
    return None
