"""`score`: what a reward adapter makes of pairs, or of single answers.

Reads JSON lines: pairs of any shape that `prepare` takes, or rows of `prompt` and `completion`.

    rlhf-trl score shared/demo-rm pairs.jsonl > scores.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.data.hh import normalise, read_completion
from rlhf_trl.data.pair import RowError
from rlhf_trl.models.base import positions
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.tokenizer import Messages, encode
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.stats.intervals import wilson


def score_file(model: RewardModel, path: Path, batch_size: int = 16) -> list[dict[str, Any]]:
    """Score every line of a file, in its order; a UserError names what cannot be read.

    Returns:
        For a pair `line` (from 1), `chosen`, `rejected` and `margin`; for a completion `line` and `score`; else `line`
        and `why_not`.
    """
    rows = [(number, *_read_row(raw, model)) for number, raw in _read_lines(path)]
    texts = [(prompt, answer) for _, prompt, answers, _ in rows for answer in answers]
    prompts, completions = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    scores = iter(model.score(prompts, completions, [True] * len(texts), batch_size).tolist())
    results = []
    for number, _, answers, why_not in rows:
        own: dict[str, Any] = dict(zip(("chosen", "rejected"), [next(scores) for _ in answers], strict=False))
        if why_not:
            own = {"why_not": why_not}
        elif len(own) == 2:
            own["margin"] = own["chosen"] - own["rejected"]
        else:
            own = {"score": own["chosen"]}
        results.append({"line": number, **own})
    return results


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a line what the scores of a file come to."""
    margins = [row["margin"] for row in rows if "margin" in row]
    text = f"{sum('why_not' not in row for row in rows)} of {len(rows)} lines scored"
    if margins:
        share = wilson(sum((margin > 0) + 0.5 * (margin == 0) for margin in margins), len(margins))
        text += f"; the chosen answer has the higher score in {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
    return text


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the file cannot be read: {error}"
        raise UserError(str(path), problem, "give a file of JSON lines in UTF-8") from error
    for number, text in enumerate(lines, start=1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}", "the line is not JSON", "write one JSON object a line") from error


def _read_row(raw: Any, model: RewardModel) -> tuple[Messages, list[str], str]:
    """Return a prompt, the answers to score (two of a pair, one of a completion), and why there are none."""
    try:
        if isinstance(raw, dict) and "completion" in raw:
            prompt, answer = read_completion(raw)
            answers = [answer]
        else:
            pair = normalise(raw)
            prompt, answers = pair.prompt, [pair.chosen, pair.rejected]
    except RowError as error:
        return [], [], error.reasons[0].value
    limit = positions(model.model)
    longest = max(sum(map(len, encode(model.tokenizer, prompt, answer))) for answer in answers)
    if limit is not None and longest > limit:
        return [], [], f"too_long: {longest} tokens, and the model reads {limit}"
    return prompt, answers, ""
