"""Step `errors`: where each reward model is wrong, what it looks at, and how far its confidence can be believed.

Reads the held-out pairs of `data/` and the reward stages' models. Writes for each stage `<stage>/evaluation/`:
`error_analysis.json`, `error_analysis_report.txt` (to be read first), `error_analysis_plots.png`,
`error_examples.jsonl` and `scores.jsonl`; and `errors/comparison.json`, the reward models beside each other.

    rlhf-trl errors RECIPE
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.errors.analysis import SIDES, Messages, Reader, analyse, probe, tabulate
from rlhf_trl.errors.figures import draw
from rlhf_trl.errors.findings import find, render
from rlhf_trl.figures.style import save
from rlhf_trl.models.rewards import load_reward_model, score_pairs
from rlhf_trl.models.tokenizer import encode
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_jsonl, write_json, write_jsonl, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import holm
from rlhf_trl.stats.pairs import average, correct
from rlhf_trl.text.format import format_estimate

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def errors(recipe: Recipe, run: RunDir) -> None:
    """Analyse every reward stage on the same held-out pairs, and compare them.

    Raises:
        UserError: there is no reward stage, one is not trained yet, there are no held-out pairs, or no finite scores.
    """
    run.require(recipe, "prepare", "prepare RECIPE")
    if not recipe.reward_stages:
        raise UserError("stages", "there is no reward stage to analyse", "add one with `trainer: reward`")
    for stage in recipe.reward_stages:
        run.require(recipe, stage, f"train RECIPE {stage}")
    pairs = choose_pairs(read_jsonl(run.pairs("test")), recipe.errors.pairs, recipe.seed)
    if not pairs:
        remedy = "raise `data.test_fraction` or `data.max_rows`, then run `prepare` again"
        raise UserError(str(run.pairs("test")), "there are no held-out pairs", remedy)
    tables = {stage: _analyse_stage(recipe, run, stage, pairs) for stage in recipe.reward_stages}
    write_json(run.reward_comparison, compare(tables))


def choose_pairs(pairs: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Choose pairs by a seeded hash of their content, so that their order in the file does not matter."""

    def rank(pair: Row) -> str:
        content = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True)
        return hashlib.sha256(f"{seed} {content}".encode()).hexdigest()

    return sorted(pairs, key=rank)[:count]


def _analyse_stage(recipe: Recipe, run: RunDir, stage: str, pairs: Sequence[Row]) -> list[Row]:
    model, batch = load_reward_model(recipe, run, stage), recipe.evaluation.score_batch_size

    def score(prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        progress.update(len(answers))
        return model.score(prompts, answers, [True] * len(answers), batch).double().numpy()

    def fits(prompt: Messages, answer: str) -> bool:
        return sum(map(len, encode(model.tokenizer, prompt, answer))) <= recipe.data.max_length

    with tqdm(desc=f"{stage}: scores", unit=" texts", leave=False) as progress:
        scores, tokens = score_pairs(model, pairs, batch)
        progress.update(scores.size)
        if not np.isfinite(scores).all(axis=1).any():
            remedy = "train it again with a smaller learning rate, and look at its training_curves.png"
            raise UserError(stage, "no held-out pair has two finite scores", remedy)
        rows, analysis = examine(pairs, scores, tokens, Reader(score, fits), recipe.seed)
    examples = choose_examples(pairs, rows, recipe.errors.examples)
    write_jsonl(run.scores(stage), rows)
    write_jsonl(run.error_examples(stage), examples)
    write_json(run.error_analysis(stage), {"stage": stage, **analysis})
    write_text(run.error_report(stage), render(stage, analysis, examples, recipe.errors.examples))
    save(draw(stage, analysis), run.error_plots(stage))
    for finding in analysis["findings"]:
        if finding["alarm"]:
            logger.warning("%s: %s", stage, finding["says"])
    return rows


def examine(
    pairs: Sequence[Row], scores: np.ndarray, tokens: np.ndarray, reader: Reader, seed: int
) -> tuple[list[Row], Row]:
    """Analyse the scores of pairs, (N, 2), of which one pair or more has two finite ones, and probe the reward model:
    the rows of `scores.jsonl`, and the analysis. The arguments are those of `tabulate` and `analyse`."""
    rows, finite = tabulate(pairs, scores, tokens), np.isfinite(scores).all(axis=1)
    analysis = analyse(rows, seed)
    usable = [pair for pair, good in zip(pairs, finite, strict=True) if good]
    analysis["probes"] = probe(usable, scores[finite, 0], reader)
    analysis["findings"] = find(analysis)
    return rows, analysis


def choose_examples(pairs: Sequence[Row], rows: Sequence[Row], count: int) -> list[Row]:
    """Take the most confident errors, the nearest ties and the most confident right ones, each with its texts."""
    texts = ({key: pair[key] for key in ("prompt", *SIDES)} for pair in pairs)
    both = [{**row, **text} for row, text in zip(rows, texts, strict=True) if row["margin"] is not None]
    both.sort(key=_names)  # equal margins stay in this order
    kinds = {
        "confident_error": sorted((row for row in both if row["margin"] < 0), key=lambda row: row["margin"]),
        "near_tie": sorted(both, key=lambda row: abs(row["margin"])),
        "confident_right": sorted((row for row in both if row["margin"] > 0), key=lambda row: -row["margin"]),
    }
    return [{**row, "kind": kind, "rank": rank} for kind, ordered in kinds.items()
            for rank, row in enumerate(ordered[:count], start=1)]  # fmt: skip


def _names(row: Row) -> tuple[str, ...]:
    return row["prompt_id"], row["chosen_id"], row["rejected_id"]


# --- several reward models -------------------------------------------------------------------------------------------


def compare(tables: dict[str, list[Row]]) -> Row:
    """Compare every two reward models on the pairs that both have finite scores for.

    McNemar's (1947) exact test takes one pair of each prompt and counts a tie as wrong; its p values are corrected for
    the number of comparisons (Holm 1979).

    Args:
        tables: stage -> rows of `scores.jsonl`, the same pairs in the same order.
    """
    comparisons = [
        {"first": first, "second": second, **_compare(tables[first], tables[second])}
        for first, second in itertools.combinations(tables, 2)
    ]
    tests = [found["mcnemar"] for found in comparisons if found["mcnemar"]]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    for found in comparisons:
        found["says"] = _say(found, len(tests))
    return {"stages": list(tables), "comparisons": comparisons}


def _compare(first: Sequence[Row], second: Sequence[Row]) -> Row:
    from scipy.stats import binomtest

    both = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a["margin"], b["margin"])]
    if not both:
        return {"pairs": 0, "mcnemar": None, "difference": None}
    both.sort(key=lambda pair: (_names(pair[0]), pair[0]["row"]))
    prompts = np.array([row["prompt_id"] for row, _ in both])
    right = correct(np.array([[row["margin"] for row in pair] for pair in both]))
    alone = np.unique(prompts, return_index=True)[1]
    ahead, behind = right[alone].T == 1
    only_first, only_second = int(np.sum(ahead & ~behind)), int(np.sum(behind & ~ahead))
    p = float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0
    test = {"pairs": len(alone), "only_first_right": only_first, "only_second_right": only_second, "p": p}
    return {"pairs": len(both), "mcnemar": test, "difference": average(right[:, 0] - right[:, 1], prompts).as_dict()}


def _say(found: Row, tests: int) -> str:
    first, second, test = found["first"], found["second"], found["mcnemar"]
    if not test:
        return f"{first} and {second} cannot be compared: no pair has finite scores from both."
    corrected = f", corrected for {tests} comparisons" if tests > 1 else ""
    numbers = f"{format_estimate(found['difference'], '+', percent=True)}, p = {test['p_holm']:.3g}{corrected}"
    ahead = test["only_first_right"] > test["only_second_right"]
    # The test takes one pair of each prompt and a tie as wrong: its side is not always that of the difference.
    agree = found["difference"]["low"] > 0 if ahead else found["difference"]["high"] < 0
    if test["p_holm"] >= 0.05 or not agree:
        return f"No difference is seen between {first} and {second}: {numbers}."
    better, worse = (first, second) if ahead else (second, first)
    return f"{better} is right more often than {worse}: {first} minus {second} is {numbers}."
