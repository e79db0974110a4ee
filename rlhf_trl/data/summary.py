"""What `prepare` tells about the data: the content of `data/summary.json`.

Works on values in memory; every row of the source is in exactly one of `rows_kept` and the `dropped` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_trl.data.pair import Pair, Reason
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.stats.intervals import wilson

NOTES = ("contradictory", "multi_turn", "repeated_prompt", "score_not_higher", "truncated", "turns_dropped")
TOKENIZER_KEYS = ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "chat_template")
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
DEFINITIONS = {
    "dropped": "rows whose first reason it is, in the order of `Reason` in rlhf_trl/data/pair.py; rows_in = "
    "rows_kept + the sum",
    "found": "rows in which it holds, whatever they are dropped for; too_short to near_duplicate are looked for in "
    "the rows with none of the earlier reasons, too_long in the rows with no other",
    "longer_is_chosen": "share of the pairs whose chosen answer is longer, a tie as half, with its 95 % Wilson "
    "interval: what a judge scores who looks at nothing but length. An answer is the last turn without the whitespace "
    "around it. At the top and in `subsets`: characters, over all rows of the source with two last turns, dropped "
    "ones and empty answers included; in `splits`: over the pairs of the split",
    "contradictory": "kept rows whose answers an earlier kept row has the other way round; both stay, as two votes",
    "multi_turn": "rows of the source, dropped ones included, whose user speaks more than once",
    "repeated_prompt": "kept rows whose prompt an earlier kept row has",
    "truncated": "kept rows whose last user turn lost its beginning",
    "score_not_higher": "kept rows whose own scores do not put the chosen answer above the rejected one",
    "columns_not_read": "columns of the source that no step reads, and in how many rows they say something",
    "turns_dropped": "kept rows that lost whole turns, the oldest first",
    "prompts": "different prompts, letter case and whitespace apart. None is in both splits, and no prompt of one "
    "split continues one of the other",
    "tokens": "prompt up to where the answer begins, answers with their end token, total with the longer answer",
}


@dataclass
class Tally:
    """What became of the rows of one subset."""

    rows: int = 0
    found: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    chosen_longer: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Kept:
    """A pair that fits the length limit."""

    row: int
    subset: str
    pair: Pair
    keys: tuple[bytes, ...]
    """`prompt_keys` of the prompt as it was and as it is kept; those of the whole prompts come last."""
    tokens: tuple[int, int, int]
    """Of the prompt, the chosen and the rejected answer."""

    @property
    def length(self) -> int:
        return self.tokens[0] + max(self.tokens[1:])


def longer(chosen: int, rejected: int) -> float:
    """1 if the chosen answer is longer, 0.5 for a tie, else 0."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def summarise(
    recipe: Recipe, tokenizer: Any, tallies: dict[str, Tally], splits: dict[str, list[Kept]], not_read: Counter[str]
) -> dict[str, Any]:
    return {
        **_describe_tally(sum(tallies.values(), Tally())),
        "subsets": {subset: _describe_tally(tally) for subset, tally in tallies.items()},
        "columns_not_read": dict(not_read),
        "splits": {name: _describe_split(items) for name, items in splits.items()},
        "settings": {"seed": recipe.seed, **recipe.data.model_dump()},
        "tokenizer": {
            "model": recipe.model["model_name_or_path"],
            "vocabulary": len(tokenizer),
            **{key: getattr(tokenizer, key) for key in TOKENIZER_KEYS},
        },
        "definitions": DEFINITIONS,
    }


def _describe_tally(tally: Tally) -> dict[str, Any]:
    dropped = tally.dropped.total()
    return {
        "rows_in": tally.rows,
        "rows_kept": tally.rows - dropped,
        "rows_dropped": dropped,
        "reasons": {r.value: {"found": tally.found[r.value], "dropped": tally.dropped[r.value]} for r in Reason},
        "notes": {note: tally.notes[note] for note in NOTES},
        "longer_is_chosen": _baseline(tally.chosen_longer, tally.compared),
    }


def _describe_split(items: Sequence[Kept]) -> dict[str, Any]:
    subsets: dict[str, list[Kept]] = {}
    for item in items:
        subsets.setdefault(item.subset, []).append(item)
    columns = zip(*((*item.tokens, item.length) for item in items), strict=True)
    return {
        **_describe_pairs(items),
        "subsets": {s: {**_describe_pairs(part), "share": len(part) / len(items)} for s, part in subsets.items()},
        "tokens": {
            part: {name: float(np.quantile(counts, level)) for name, level in QUANTILES.items()}
            for part, counts in zip(("prompt", "chosen", "rejected", "total"), columns, strict=True)
        },
    }


def _describe_pairs(items: Sequence[Kept]) -> dict[str, Any]:
    characters = sum(longer(len(item.pair.chosen), len(item.pair.rejected)) for item in items)
    tokens = sum(longer(item.tokens[1], item.tokens[2]) for item in items)
    return {
        "pairs": len(items),
        "prompts": len({item.keys[-1] for item in items}),
        "longer_is_chosen": {"characters": _baseline(characters, len(items)), "tokens": _baseline(tokens, len(items))},
    }


def _baseline(chosen_longer: float, pairs: int) -> dict[str, float] | None:
    return wilson(chosen_longer, pairs).as_dict() if pairs else None
