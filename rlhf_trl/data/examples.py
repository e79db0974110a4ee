"""Pairs to read: the content of `exploration/samples.md`, the same for the same rows in any order.

Works on values in memory. The texts are hostile by design, so each stands in a fence that it cannot close, with
control characters spelt out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rapidfuzz.distance import Indel

from rlhf_trl.data.pair import Pair, RowError
from rlhf_trl.data.sources import Row, seeded_hash
from rlhf_trl.text.display import fence, inline

RANDOM = "Drawn by hash"
RANDOM_PAIRS = 3
MAX_CHARACTERS = 1200
UNUSABLE = "## Rows that `prepare` drops\n\nOne for each reason (see `data/quarantine.jsonl`).\n"


class _Example(NamedTuple):
    rank: float
    key: str
    row: Row
    content: Pair | Any


@dataclass
class Examples:
    """The best examples so far, as rows go by: by the heading that they stand under, and their title."""

    seed: int
    best: dict[tuple[bool, str, str], list[_Example]] = field(default_factory=dict)

    def add(self, row: Row, pair: Pair, refuses: tuple[bool, bool]) -> None:
        ratio = (1 + len(pair.chosen)) / (1 + len(pair.rejected))
        alike = Indel.normalized_similarity(pair.chosen, pair.rejected, score_cutoff=0.8)
        ranks = {
            RANDOM: 0.0,
            "The chosen answer is the longest beside its rejected one": -ratio,
            "The chosen answer is the shortest beside its rejected one": ratio,
            "The two answers are nearly the same": -alike if alike else None,
            "Only the chosen answer refuses": 0.0 if refuses == (True, False) else None,
            "Only the rejected answer refuses": 0.0 if refuses == (False, True) else None,
        }
        key, heading = seeded_hash(self.seed, row), f"## {inline(row[1][:60])}\n"
        for title in [title for title, rank in ranks.items() if rank is not None]:
            self._keep((False, heading, title), [_Example(ranks[title] or 0.0, key, row, pair)])

    def add_unusable(self, row: Row, error: RowError) -> None:
        reasons = ", ".join(reason.value for reason in error.reasons)
        example = _Example(0.0, seeded_hash(self.seed, row), row, error.pair or row[2])
        self._keep((True, UNUSABLE, reasons), [example])

    def merge(self, other: Examples) -> None:
        """Take over what is better in the examples of other rows."""
        for place, examples in other.best.items():
            self._keep(place, examples)

    def _keep(self, place: tuple[bool, str, str], examples: Iterable[_Example]) -> None:
        ranked = sorted([*self.best.get(place, []), *examples], key=lambda example: example[:2])
        self.best[place] = ranked[: RANDOM_PAIRS if place[2] == RANDOM else 1]

    def render(self, source: str) -> str:
        """Write the page."""
        note = "Pairs as they stand in the data; some may offend. Row numbers count from 0 over the source."
        parts = [f"# Samples of {inline(source[:60])}\n\n{note}\n"]
        for heading, places in itertools.groupby(sorted(self.best), key=lambda place: place[1]):
            parts.append(heading)
            parts += [_render(place[2], example) for place in places for example in self.best[place]]
        return "\n".join(parts)


def _render(title: str, example: _Example) -> str:
    number, subset, _ = example.row
    heading = f"### {title} (row {number} of {inline(subset[:60])})\n\n"
    pair = example.content
    if not isinstance(pair, Pair):
        return heading + _cut(json.dumps(pair, default=str, indent=1, ensure_ascii=False))
    earlier = len(pair.prompt) - 1
    asked = pair.prompt[-1]["content"] if pair.prompt else ""
    return (
        f"{heading}**User**{f', after {earlier} earlier turns' if earlier > 0 else ''}\n\n{_cut(asked)}\n"
        f"**Chosen**, {len(pair.chosen)} characters\n\n{_cut(pair.chosen)}\n"
        f"**Rejected**, {len(pair.rejected)} characters\n\n{_cut(pair.rejected)}"
    )


def _cut(text: str) -> str:
    """A Markdown code block of a text's beginning."""
    more = len(text) - MAX_CHARACTERS
    return fence(text[:MAX_CHARACTERS].replace("\r\n", "\n") + (f"\n[… {more} more characters]" if more > 0 else ""))
