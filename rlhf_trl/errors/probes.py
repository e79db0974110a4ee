"""Probes of a reward model: what happens to its score when an answer is changed in a way whose effect is known.

No labels are needed, only a function that scores texts. Works on values in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML

from rlhf_trl.stats.pairs import average, correct, gap, share

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
    """Run every probe on the first `PAIRS` pairs, whose scores are finite, (N, 2).

    Returns:
        For each probe `n`, `skipped`, `not_finite`, `higher` (how often the changed answer has the higher score, a tie
        as half) and `change` (mean change of the score); for `wrong_prompt`, `accuracy` there, `accuracy_before` under
        the right prompts, and `change`. Without any pair, `n` is 0.
    """
    pairs, scores = pairs[:PAIRS], scores[:PAIRS]
    prompts, texts = ([pair[key] for pair in pairs] for key in ("prompt", "chosen"))
    others = _other_prompts(prompts)
    changed = {name: [edit(text) for text in texts] for name, edit in EDITS.items()}
    changed["swapped"] = ["" if other is None else texts[other] for other in others]
    result = {name: _compare(prompts, texts, scores[:, 0], new, reader) for name, new in changed.items()}
    questions: list[Messages] = [[{"role": "user", "content": item["question"]}] for item in HONESTY]
    honest, invented = ([item[kind] for item in HONESTY] for kind in ("honest", "invented"))
    result["honesty"] = _compare(questions, honest, reader.score(questions, honest), invented, reader)
    result["wrong_prompt"] = _move(pairs, gap(scores), others, reader)
    return result


def _other_prompts(prompts: Sequence[Messages]) -> list[int | None]:
    """For each pair, the next one that has another prompt."""
    n = len(prompts)
    return [
        next(((row + step) % n for step in range(1, n) if prompts[(row + step) % n] != prompts[row]), None)
        for row in range(n)
    ]


def _compare(prompts: Sequence[Messages], before: Sequence[str], scores: np.ndarray, after: Sequence[str],
             reader: Reader) -> Row:  # fmt: skip
    """Compare the scores of answers before and after a change."""
    rows = [row for row, text in enumerate(after) if text and text != before[row] and reader.fits(prompts[row], text)]
    change = reader.score([prompts[row] for row in rows], [after[row] for row in rows]) - scores[rows]
    names, counts, finite = _usable([prompts[row] for row in rows], change, len(after))
    if not counts["n"]:
        return {**counts, "higher": None, "change": None, "why_not": "there is no answer to change"}
    higher = share(correct(change[finite]), names).as_dict()
    return {**counts, "higher": higher, "change": average(change[finite], names).as_dict()}


def _move(pairs: Sequence[Row], margins: np.ndarray, others: Sequence[int | None], reader: Reader) -> Row:
    """Score both answers of each pair under another pair's prompt."""
    usable = [
        (row, pairs[other]["prompt"])
        for row, other in enumerate(others)
        if other is not None
        and all(reader.fits(pairs[other]["prompt"], pairs[row][side]) for side in ("chosen", "rejected"))
    ]
    rows, prompts = [row for row, _ in usable], [prompt for _, prompt in usable]
    chosen, rejected = (reader.score(prompts, [pairs[row][side] for row in rows]) for side in ("chosen", "rejected"))
    names, counts, finite = _usable([pairs[row]["prompt"] for row in rows], chosen - rejected, len(pairs))
    if not counts["n"]:
        return {**counts, "accuracy": None, "why_not": "there is no other prompt to move an answer to"}
    after, before = correct((chosen - rejected)[finite]), correct(margins[rows][finite])
    return {
        **counts,
        "accuracy": share(after, names).as_dict(),
        "accuracy_before": share(before, names).as_dict(),
        "change": average(after - before, names).as_dict(),
    }


def _usable(prompts: Sequence[Messages], values: np.ndarray, tried: int) -> tuple[np.ndarray, Row, np.ndarray]:
    """Count what can be used: the prompts of the finite values, the counts, and which values are finite."""
    finite = np.isfinite(values)
    counts = {"n": int(finite.sum()), "skipped": tried - len(values), "not_finite": int((~finite).sum())}
    return np.array([str(prompt) for prompt in prompts])[finite], counts, finite
