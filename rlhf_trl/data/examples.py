"""Pairs to read: the content of `exploration/samples.md`, the same for the same rows in any order.

Works on values in memory. The texts are hostile by design, so each stands in a fence that it cannot close, with
control characters spelt out.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Indel

from rlhf_trl.data.pair import Pair, RowError
from rlhf_trl.data.sources import Row, seeded_hash
from rlhf_trl.text.display import fence, inline

RANDOM = "Drawn by hash"
RANDOM_PAIRS = 3
MAX_CHARACTERS = 1200


@dataclass(frozen=True)
class _Example:
    rank: tuple[float, str]
    row: int
    subset: str
    content: Pair | Any
    title: str


@dataclass
class Examples:
    """The best examples so far, as rows go by: by subset and title, or by the reason against a row."""

    seed: int
    usable: dict[tuple[str, str], list[_Example]] = field(default_factory=dict)
    unusable: dict[str, list[_Example]] = field(default_factory=dict)

    def add(self, row: Row, pair: Pair, refuses: tuple[bool, bool]) -> None:
        number, subset, _ = row
        key = seeded_hash(self.seed, row)
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
        for title, rank in ranks.items():
            if rank is not None:
                _keep_best(self.usable, (subset, title), [_Example((rank, key), number, subset, pair, title)])

    def add_unusable(self, row: Row, error: RowError) -> None:
        number, subset, raw = row
        reasons = ", ".join(reason.value for reason in error.reasons)
        example = _Example((0, seeded_hash(self.seed, row)), number, subset, error.pair or raw, reasons)
        _keep_best(self.unusable, error.reasons[0].value, [example])

    def merge(self, other: Examples) -> None:
        """Take over what is better in the examples of other rows."""
        for mine, others in ((self.usable, other.usable), (self.unusable, other.unusable)):
            for place, examples in others.items():
                _keep_best(mine, place, examples)

    def render(self, source: str) -> str:
        """Write the page."""
        note = "Pairs as they stand in the data; some may offend. Row numbers count from 0 over the source."
        parts = [f"# Samples of {inline(source[:60])}\n\n{note}\n"]
        for subset, places in itertools.groupby(sorted(self.usable), key=lambda place: place[0]):
            parts.append(f"## {inline(subset[:60])}\n")
            parts += [_render_pair(example) for place in places for example in self.usable[place]]
        if self.unusable:
            parts.append("## Rows that `prepare` drops\n\nOne for each reason (see `data/quarantine.jsonl`).\n")
        parts += [_render_pair(example) for _, examples in sorted(self.unusable.items()) for example in examples]
        return "\n".join(parts)


def _keep_best(best: dict[Any, list[_Example]], place: Any, examples: list[_Example]) -> None:
    ranked = sorted([*best.get(place, []), *examples], key=lambda example: example.rank)
    best[place] = ranked[: RANDOM_PAIRS if examples[0].title == RANDOM else 1]


def _render_pair(example: _Example) -> str:
    heading = f"### {example.title} (row {example.row} of {inline(example.subset[:60])})\n\n"
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
