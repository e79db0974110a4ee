"""`score`: what a reward adapter makes of pairs, or of single answers.

Reads JSON lines: pairs of any shape that `prepare` takes (`chosen` and `rejected`), or rows of `prompt` and
`completion`. Gives a row for each line, in the same order, with what could not be scored and why.

    rlhf-trl score shared/demo-rm pairs.jsonl > scores.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.data.hh import Pair, Reason, RowError, normalise
from rlhf_trl.models import encode
from rlhf_trl.recipe import UserError
from rlhf_trl.rewards import RewardModel
from rlhf_trl.stats import wilson


def score_file(model: RewardModel, path: Path, batch_size: int = 16) -> list[dict[str, Any]]:
    """Score every line of a file.

    Returns:
        For a pair `line`, `chosen`, `rejected` and `margin`; for a completion `line` and `score`; else `line` and
        `why_not`. Lines count from 1.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
    """
    rows = [_read(number, text, path) for number, text in enumerate(_lines(path), start=1) if text.strip()]
    texts = [(row["pair"].prompt, answer) for row in rows if row["pair"] for answer in row["answers"]]
    limit = model.model.config.max_position_embeddings
    lengths = [sum(map(len, encode(model.tokenizer, prompt, answer))) for prompt, answer in texts]
    fit = [place for place, length in enumerate(lengths) if length <= limit]
    found = model.score([texts[place][0] for place in fit], [texts[place][1] for place in fit], [True] * len(fit),
                        batch_size).tolist()  # fmt: skip
    scores: dict[int, float] = dict(zip(fit, found, strict=True))
    place, results = 0, []
    for row in rows:
        places = range(place, place := place + (len(row["answers"]) if row["pair"] else 0))
        too_long = [lengths[one] for one in places if one not in scores]
        if too_long:
            row["why_not"] = f"too_long: {max(too_long)} tokens, and the model reads {limit}"
        results.append(_result(row, [scores[one] for one in places if one in scores]))
    return results


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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"the file cannot be read: {error}", "give a file of JSON lines in UTF-8"
        ) from error


def _read(number: int, text: str, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}", "the line is not JSON", "write one JSON object a line") from error
    single = isinstance(raw, dict) and "completion" in raw
    if single:  # a pair of one answer with itself
        raw = {**raw, "chosen": raw["completion"], "rejected": raw["completion"]}
    row: dict[str, Any] = {"line": number, "pair": None, "single": single, "why_not": None, "answers": []}
    try:
        row["pair"] = normalise(raw)
    except RowError as error:
        row["why_not"] = error.reasons[0].value
        if error.reasons == [Reason.IDENTICAL]:
            row |= {"pair": error.pair, "why_not": None}
    pair: Pair | None = row["pair"]
    if pair:
        row["answers"] = [pair.chosen] if single else [pair.chosen, pair.rejected]
    return row


def _result(row: dict[str, Any], scores: list[float]) -> dict[str, Any]:
    if row["why_not"]:
        return {"line": row["line"], "why_not": row["why_not"]}
    if row["single"]:
        return {"line": row["line"], "score": scores[0]}
    chosen, rejected = scores
    return {"line": row["line"], "chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
