"""`score`: what a reward adapter makes of pairs, of single answers, or of the rows of a benchmark.

Reads JSON lines: pairs of any shape that `prepare` takes, rows of `prompt` and `completion`, or those of `benchmarks`.

    rlhf-trl score shared/demo-rm pairs.jsonl > scores.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.benchmarks import LISTS, Row, figures, read_row
from rlhf_trl.data.pair import RowError
from rlhf_trl.models.base import positions
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.tokenizer import encode
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.stats.intervals import wilson
from rlhf_trl.text.display import visible


def score_file(model: RewardModel, path: Path, batch_size: int = 16) -> list[dict[str, Any]]:
    """Score every line of a file, in its order; a UserError names what cannot be read.

    Returns:
        `line` (from 1), and of a completion its `score`; of a pair `chosen`, `rejected` and `margin`; of a row with
        more answers lists of scores, `chosen` and `rejected`; of a benchmark's row also `benchmark` and `subset`; else
        `why_not`.
    """
    rows = [(number, *_read(raw, model)) for number, raw in read_lines(path)]
    texts = [(row.prompt, answer) for _, row, _ in rows for answer in row.answers]
    prompts, completions = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    scores = iter(model.score(prompts, completions, [True] * len(texts), batch_size).tolist())
    return [
        {"line": number, **_result(row, [next(scores) for _ in row.answers], why_not)} for number, row, why_not in rows
    ]


def _result(row: Row, scores: list[float], why_not: str) -> dict[str, Any]:
    if why_not:
        return {"why_not": why_not}
    if len(scores) == 1:
        return {"score": scores[0]}
    if row.more.get("benchmark") not in LISTS:
        return {"chosen": scores[0], "rejected": scores[1], "margin": scores[0] - scores[1], **row.more}
    return {"chosen": scores[: row.right], "rejected": scores[row.right :], **row.more}


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """Say what the scores of a file come to: in a line, and in another one for each benchmark."""
    margins = [row["margin"] for row in rows if "margin" in row]
    text = f"{sum('why_not' not in row for row in rows)} of {len(rows)} lines scored"
    if margins:
        share = wilson(sum((margin > 0) + 0.5 * (margin == 0) for margin in margins), len(margins))
        text += f"; the chosen answer has the higher score in {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
    for benchmark, found in figures(rows).items():
        text += f"\n{benchmark}: " + ", ".join(f"{visible(name)} {value:.1%}" for name, value in found.items())
    return text


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read JSON lines, each with its number from 1; a UserError names what is none."""
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


def _read(raw: Any, model: RewardModel) -> tuple[Row, str]:
    """Return a row, and why its answers are not scored, of which it then has none."""
    try:
        row = read_row(raw)
    except RowError as error:
        return Row([], []), error.reasons[0].value
    limit = positions(model.model)
    longest = max(sum(map(len, encode(model.tokenizer, row.prompt, answer))) for answer in row.answers)
    if limit is not None and longest > limit:
        return Row([], []), f"too_long: {longest} tokens, and the model reads {limit}"
    return row, ""
