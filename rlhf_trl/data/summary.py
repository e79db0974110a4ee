"""What `prepare` tells about the data: the content of `data/summary.json`.

Works on values in memory; every row of the source is in exactly one of `rows_kept` and the `dropped` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from rlhf_trl.data.pair import Reason
from rlhf_trl.data.split import Split
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.stats.intervals import wilson

SIDES = ("chosen", "rejected")
NOTES = ("contradictory", "multi_turn", "repeated_prompt", "score_not_higher", "truncated", "turns_dropped")
TOKENIZER_KEYS = ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "chat_template")
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))
# What is counted of a pair that is kept: its row, its subset in the order of the tallies, the keys and tokens of its
# prompt, the tokens of its answers, and their characters.
KEPT = np.dtype([(name, "i8") for name in ("row", "subset", "keys", "prompt", *SIDES, "chosen_text", "rejected_text")])


@dataclass
class Tally:
    """What became of the rows of one subset."""

    rows: int = 0
    found: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    chosen_longer: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))


def total_length(kept: np.ndarray) -> np.ndarray:
    """Tokens of the prompt with the longer answer, (pairs,)."""
    return kept["prompt"] + np.maximum(kept["chosen"], kept["rejected"])


def longer(chosen: Any, rejected: Any) -> Any:
    """1 if the chosen answer is longer, 0.5 for a tie, else 0; of two numbers or arrays."""
    return (np.sign(chosen - rejected) + 1) / 2


def summarise(
    recipe: Recipe, tokenizer: Any, tallies: Mapping[str, Tally], kept: np.ndarray, parts: Split
) -> dict[str, Any]:
    """Describe the rows of the source by their tallies, and the pairs that are kept, of dtype `KEPT`, by split."""
    splits = {"train": ~parts.held_out, "test": parts.held_out}
    whole, names = sum(tallies.values(), Tally()), [*tallies]
    own = {"model": recipe.model["model_name_or_path"], "vocabulary": len(tokenizer)}
    return {
        **_describe_tally(whole),
        "columns_not_read": dict(whole.not_read),
        "subsets": {subset: _describe_tally(tally) for subset, tally in tallies.items()},
        "splits": {name: _describe_split(kept[rows], parts.prompts[rows], names) for name, rows in splits.items()},
        "settings": {"seed": recipe.seed, **recipe.data.model_dump()},
        "tokenizer": own | {key: getattr(tokenizer, key) for key in TOKENIZER_KEYS},
        "definitions": TERMS["prepare"],
    }


def _describe_tally(tally: Tally) -> dict[str, Any]:
    dropped = tally.dropped.total()
    return {
        "rows_in": tally.rows,
        "rows_kept": tally.rows - dropped,
        "rows_dropped": dropped,
        "reasons": {r.value: {"found": tally.found[r.value], "dropped": tally.dropped[r.value]} for r in Reason},
        "notes": {note: tally.notes[note] for note in NOTES},
        "longer_is_chosen": wilson(tally.chosen_longer, tally.compared).as_dict() if tally.compared else None,
    }


def _describe_split(kept: np.ndarray, prompts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    inside = {names[number]: kept["subset"] == number for number in np.unique(kept["subset"])}
    lengths = {**{part: kept[part] for part in ("prompt", *SIDES)}, "total": total_length(kept)}
    return {
        **_describe_pairs(kept, prompts),
        "subsets": {
            name: {**_describe_pairs(kept[rows], prompts[rows]), "share": float(rows.mean())}
            for name, rows in inside.items()
        },
        "tokens": {part: quantiles(values) for part, values in lengths.items()},
    }


def _describe_pairs(kept: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    characters = share(longer(kept["chosen_text"], kept["rejected_text"]))
    tokens = share(longer(kept["chosen"], kept["rejected"]))
    longer_is_chosen = {"characters": characters, "tokens": tokens}
    return {"pairs": len(kept), "prompts": len(np.unique(prompts)), "longer_is_chosen": longer_is_chosen}


def share(values: np.ndarray) -> dict[str, float] | None:
    """The mean of scores from 0 to 1, with its interval; None without scores."""
    return wilson(float(values.sum()), len(values)).as_dict() if len(values) else None


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), **{key: float(np.quantile(values, at)) for key, at in QUANTILES.items()}}
