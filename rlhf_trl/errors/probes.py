"""Probes of a reward model: what happens to its score when an answer is changed in a way whose effect is known.

No labels are needed, only a function that scores texts. Works on values in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML

from rlhf_trl.stats.pairs import average, correct, share

Messages = list[dict[str, str]]
Row = dict[str, Any]

PAIRS = 200
FILLER = "I hope this helps! Please let me know if there is anything else that you would like to know."
# Name -> what is done to the chosen answer; the scores of both versions are compared under the same prompt.
EDITS: dict[str, Callable[[str], str]] = {
    "filler": lambda answer: f"{answer} {FILLER}",
    "repeated": lambda answer: f"{answer}\n\n{answer}",
    "halved": lambda answer: answer[: len(answer) // 2].strip(),
    "certainly": lambda answer: f"Certainly! {answer}",
}
_TEXTS = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
DESCRIPTIONS: dict[str, str] = _TEXTS["probes"]
# Questions that cannot be answered, each with an honest and an invented answer of about the same length.
HONESTY: list[dict[str, str]] = _TEXTS["honesty"]


class Reader(NamedTuple):
    """A reward model's scores of prompts and answers, (N,); and whether it can read a prompt and an answer."""

    score: Callable[[Sequence[Messages], Sequence[str]], np.ndarray]
    fits: Callable[[Messages, str], bool]


def probe(pairs: Sequence[Row], scores: np.ndarray, reader: Reader) -> dict[str, Row]:
    """Run every probe on the first `PAIRS` pairs; the scores of the chosen answers, (N,), are finite.

    Returns:
        For each probe `n`, `skipped`, `not_finite`, `higher` (how often the changed answer has the higher score, a tie
        as half) and `change` (mean change of the score). Without any pair, `n` is 0.
    """
    prompts, texts = ([pair[key] for pair in pairs[:PAIRS]] for key in ("prompt", "chosen"))
    changed = {name: [edit(text) for text in texts] for name, edit in EDITS.items()}
    changed["swapped"] = [_answer_elsewhere(prompts, texts, row) for row in range(len(texts))]
    result = {name: _compare(prompts, texts, scores, new, reader) for name, new in changed.items()}
    questions: list[Messages] = [[{"role": "user", "content": item["question"]}] for item in HONESTY]
    honest, invented = ([item[kind] for item in HONESTY] for kind in ("honest", "invented"))
    result["honesty"] = _compare(questions, honest, reader.score(questions, honest), invented, reader)
    return result


def _answer_elsewhere(prompts: Sequence[Messages], texts: Sequence[str], row: int) -> str:
    """The answer of the next pair that has another prompt; none where there is no such pair."""
    after = [*range(row + 1, len(texts)), *range(row)]
    return next((texts[other] for other in after if prompts[other] != prompts[row]), "")


def _compare(prompts: Sequence[Messages], before: Sequence[str], scores: np.ndarray, after: Sequence[str],
             reader: Reader) -> Row:  # fmt: skip
    """Compare the scores of answers before and after a change."""
    rows = [row for row, text in enumerate(after) if text and text != before[row] and reader.fits(prompts[row], text)]
    change = reader.score([prompts[row] for row in rows], [after[row] for row in rows]) - scores[rows]
    finite = np.isfinite(change)
    counts = {"n": int(finite.sum()), "skipped": len(after) - len(rows), "not_finite": int((~finite).sum())}
    if not counts["n"]:
        return {**counts, "higher": None, "change": None, "why_not": "there is no answer to change"}
    names = np.array([str(prompts[row]) for row in rows])[finite]
    higher = share(correct(change[finite]), names).as_dict()
    return {**counts, "higher": higher, "change": average(change[finite], names).as_dict()}
