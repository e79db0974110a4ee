"""`score`: what a reward adapter makes of pairs, or of single answers.

Reads JSON lines: pairs of any shape that `prepare` takes (`chosen` and `rejected`), or rows of `prompt` and
`completion`. Gives a row for each line, in the same order, with what could not be scored and why.

    rlhf-trl score shared/demo-rm pairs.jsonl > scores.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.load import positions
from rlhf_trl.data.hh import Reason, RowError, normalise
from rlhf_trl.models.base import encode
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.stats.intervals import wilson


@dataclass(frozen=True)
class _Row:
    line: int
    prompt: list[dict[str, str]]
    answers: list[str]
    """Two of a pair, one of a completion, none where `why_not` says what is wrong."""
    why_not: str | None = None


def score_file(model: RewardModel, path: Path, batch_size: int = 16) -> list[dict[str, Any]]:
    """Score every line of a file.

    Returns:
        For a pair `line`, `chosen`, `rejected` and `margin`; for a completion `line` and `score`; else `line` and
        `why_not`. Lines count from 1.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
    """
    limit = positions(model.model)
    rows = [_fit(row, model, limit) for row in _read(path)]
    texts = [(row.prompt, answer) for row in rows for answer in row.answers]
    prompts, answers = [text[0] for text in texts], [text[1] for text in texts]
    scores = iter(model.score(prompts, answers, [True] * len(texts), batch_size).tolist())
    return [_result(row, [next(scores) for _ in row.answers]) for row in rows]


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a line what the scores of a file come to."""
    margins = [row["margin"] for row in rows if "margin" in row]
    skipped = sum("why_not" in row for row in rows)
    text = f"{len(rows) - skipped} of {len(rows)} lines scored"
    if margins:
        right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
        share = wilson(right, len(margins))
        text += f"; the chosen answer has the higher score in {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
    return text


def _read(path: Path) -> Iterator[_Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"the file cannot be read: {error}", "give a file of JSON lines in UTF-8"
        ) from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}", "the line is not JSON", "write one JSON object a line") from error
        yield _read_row(number, raw)


def _read_row(number: int, raw: Any) -> _Row:
    single = isinstance(raw, dict) and "completion" in raw
    if single:  # read as a pair of that answer with itself, which is then the one thing that is wrong with it
        raw = {**raw, "chosen": raw["completion"], "rejected": raw["completion"]}
    try:
        pair = normalise(raw)
    except RowError as error:
        if single and error.reasons == [Reason.IDENTICAL] and error.pair:
            return _Row(number, error.pair.prompt, [error.pair.chosen])
        return _Row(number, [], [], error.reasons[0].value)
    return _Row(number, pair.prompt, [pair.chosen, pair.rejected])


def _fit(row: _Row, model: RewardModel, limit: int | None) -> _Row:
    """Leave out a row with more tokens than the model has positions for."""
    longest = max((sum(map(len, encode(model.tokenizer, row.prompt, answer))) for answer in row.answers), default=0)
    if limit is None or longest <= limit:
        return row
    return _Row(row.line, [], [], f"too_long: {longest} tokens, and the model reads {limit}")


def _result(row: _Row, scores: list[float]) -> dict[str, Any]:
    if row.why_not:
        return {"line": row.line, "why_not": row.why_not}
    if len(scores) == 1:
        return {"line": row.line, "score": scores[0]}
    chosen, rejected = scores
    return {"line": row.line, "chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
