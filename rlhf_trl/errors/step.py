"""Step `errors`: where each reward model is wrong, what it looks at, and how far its confidence can be believed.

Reads the held-out pairs of `data/` and the reward stages' models. Writes for each stage `<stage>/evaluation/`:
`error_analysis.json`, `error_analysis_report.txt` (to be read first), `error_analysis_plots.png`,
`error_examples.jsonl` and `scores.jsonl`; and `errors/comparison.json`, the reward models beside each other.

    rlhf-trl errors RECIPE
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.errors.analysis import SIDES, analyse, tabulate
from rlhf_trl.errors.figures import draw
from rlhf_trl.errors.findings import find, points
from rlhf_trl.errors.pair_statistics import average, correct, share
from rlhf_trl.errors.probes import Messages, Score, probe
from rlhf_trl.errors.text_report import render
from rlhf_trl.models.base import encode
from rlhf_trl.models.rewards import RewardModel, load_reward_model
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_jsonl, write_json, write_jsonl, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import holm

logger = logging.getLogger(__name__)

Pair = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Examined:
    """What is found out about one reward model."""

    rows: list[Row]
    """For `scores.jsonl`, in the order of the pairs."""
    analysis: dict[str, Any]
    examples: list[Row]


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
    write_json(run.reward_comparison, compare(tables, recipe.seed))


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Choose pairs by a seeded hash of their content, so that their order in the file does not matter."""

    def rank(pair: Pair) -> str:
        content = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True)
        return hashlib.sha256(f"{seed} {content}".encode()).hexdigest()

    return sorted(pairs, key=rank)[:count]


def _analyse_stage(recipe: Recipe, run: RunDir, stage: str, pairs: Sequence[Pair]) -> list[Row]:
    model = load_reward_model(recipe, run, stage)
    batch = recipe.evaluation.score_batch_size
    progress = tqdm(desc=f"{stage}: scores", unit=" texts", leave=False)

    def score(prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        scores = model.score(prompts, answers, [True] * len(answers), batch).double().numpy()
        progress.update(len(answers))
        return scores

    def fits(prompt: Messages, answer: str) -> bool:
        return sum(map(len, encode(model.tokenizer, prompt, answer))) <= recipe.data.max_length

    with progress:
        found = examine(pairs, score, _count_tokens(model, pairs), fits, recipe.errors.examples, recipe.seed, stage)
    write_jsonl(run.scores(stage), found.rows)
    write_jsonl(run.error_examples(stage), found.examples)
    write_json(run.error_analysis(stage), {"stage": stage, **found.analysis})
    write_text(run.error_report(stage), render(stage, found.analysis, found.examples))
    draw(stage, found.analysis, run.error_plots(stage))
    for finding in found.analysis["findings"]:
        if finding["alarm"]:
            logger.warning("%s: %s", stage, finding["says"])
    return found.rows


def _count_tokens(model: RewardModel, pairs: Sequence[Pair]) -> np.ndarray:
    """Count the tokens of prompt, chosen and rejected answer, the end token included. -> (N, 3)."""
    counts = []
    for pair in pairs:
        prompt, chosen = encode(model.tokenizer, pair["prompt"], pair["chosen"])
        counts.append((len(prompt), len(chosen), len(encode(model.tokenizer, pair["prompt"], pair["rejected"])[1])))
    return np.array(counts)


def examine(
    pairs: Sequence[Pair],
    score: Score,
    tokens: np.ndarray,
    fits: Callable[[Messages, str], bool],
    examples: int,
    seed: int,
    where: str,
) -> Examined:
    """Score the pairs and their probes, and analyse the scores.

    Args:
        pairs: `prompt`, `chosen`, `rejected`, `subset`, `row`; at least one.
        score: the reward model.
        tokens: of the prompt, the chosen and the rejected answer, shape (N, 3).
        fits: whether the model can read a prompt and an answer.
        examples: number of pairs of each kind to show.
        seed: of the bootstrap.
        where: what is examined, for messages.

    Raises:
        UserError: no pair has two finite scores.
    """
    prompts = [pair["prompt"] for pair in pairs]
    scores = np.column_stack([score(prompts, [pair[side] for pair in pairs]) for side in SIDES])
    finite = np.isfinite(scores).all(axis=1)
    if not finite.any():
        remedy = "train it again with a smaller learning rate, and look at its training_curves.png"
        raise UserError(where, "no held-out pair has two finite scores", remedy)
    rows = tabulate(pairs, scores[:, 0].tolist(), scores[:, 1].tolist(), tokens)
    analysis = analyse(rows, seed)
    usable = [pair for pair, good in zip(pairs, finite, strict=True) if good]
    analysis["probes"] = probe(usable, scores[finite], score, fits, seed)
    analysis["findings"] = find(analysis)
    analysis["examples_asked"] = examples
    return Examined(rows, analysis, choose_examples(pairs, rows, examples))


def choose_examples(pairs: Sequence[Pair], rows: Sequence[Row], count: int) -> list[Row]:
    """Take the most confident errors, the nearest ties and the most confident right ones, each with its texts."""
    both = [(pair, row) for pair, row in zip(pairs, rows, strict=True) if row["margin"] is not None]
    kinds = {
        "confident_error": ([item for item in both if item[1]["margin"] < 0], 1),
        "near_tie": (both, 0),
        "confident_right": ([item for item in both if item[1]["margin"] > 0], -1),
    }
    found = []
    for kind, (items, sign) in kinds.items():
        # By the margin, or by its size; then by content.
        items.sort(key=lambda item: (sign * item[1]["margin"] if sign else abs(item[1]["margin"]), _names(item[1])))
        for rank, (pair, row) in enumerate(items[:count], start=1):
            texts = {key: pair[key] for key in ("prompt", *SIDES)}
            found.append({**row, **texts, "kind": kind, "rank": rank})
    return found


def _names(row: Row) -> tuple[str, ...]:
    return row["prompt_id"], row["chosen_id"], row["rejected_id"]


# --- several reward models -------------------------------------------------------------------------------------------


def compare(tables: dict[str, list[Row]], seed: int) -> dict[str, Any]:
    """Compare every two reward models on the pairs that both have finite scores for.

    McNemar's exact test asks whether the pairs that only one of the two gets right fall to one side more often than
    a fair coin would. It takes one pair of each prompt, and counts a tie as wrong. Its p values are corrected for the
    number of comparisons (Holm 1979).

    Args:
        tables: stage -> rows of `scores.jsonl`, the same pairs in the same order.
        seed: of the bootstrap.
    """
    comparisons = [
        {"first": first, "second": second, **_compare(tables[first], tables[second], seed)}
        for first, second in itertools.combinations(tables, 2)
    ]
    tests = [found["mcnemar"] for found in comparisons if found["mcnemar"]]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    for found in comparisons:
        found["says"] = _say(found, len(tests))
    why = {} if comparisons else {"why_empty": "the recipe has one reward stage"}
    return {"stages": list(tables), "comparisons": comparisons, **why}


def _compare(first: Sequence[Row], second: Sequence[Row], seed: int) -> dict[str, Any]:
    both = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a["margin"], b["margin"])]
    if not both:
        return {"pairs": 0, "mcnemar": None, "difference": None, "why_not": "no pair has finite scores from both"}
    both.sort(key=lambda pair: (_names(pair[0]), pair[0]["row"]))
    prompts = np.array([row["prompt_id"] for row, _ in both])
    margins = np.array([[row["margin"] for row in pair] for pair in both])
    right = correct(margins)
    once = np.unique(prompts, return_index=True)[1]
    return {
        "pairs": len(both),
        "not_finite": len(first) - len(both),
        "accuracy": [share(right[:, side], prompts).as_dict() for side in (0, 1)],
        "difference": average(right[:, 0] - right[:, 1], prompts, seed).as_dict(),
        "agreement": share(np.sign(margins[:, 0]) == np.sign(margins[:, 1]), prompts).as_dict(),
        "mcnemar": mcnemar(margins[once, 0] > 0, margins[once, 1] > 0),
    }


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Test exactly whether two models are right equally often on the same pairs (McNemar 1947).

    Args:
        first, second: whether each is right, shape (N,).

    Returns:
        The pairs that only the first and only the second gets right, and the two-sided p.
    """
    from scipy.stats import binomtest

    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    differ = only_first + only_second
    p = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return {"pairs": len(first), "only_first_right": only_first, "only_second_right": only_second, "p": p}


def _say(found: dict[str, Any], tests: int) -> str:
    if not found["mcnemar"]:
        return f"{found['first']} and {found['second']} cannot be compared: {found['why_not']}."
    corrected = f", corrected for {tests} comparisons" if tests > 1 else ""
    numbers = f"{points(found['difference'])}, p = {found['mcnemar']['p_holm']:.3g}{corrected}"
    if found["mcnemar"]["p_holm"] >= 0.05:
        return f"No difference is seen between {found['first']} and {found['second']}: {numbers}."
    ahead = found["mcnemar"]["only_first_right"] > found["mcnemar"]["only_second_right"]
    better, worse = ("first", "second") if ahead else ("second", "first")
    return (
        f"{found[better]} is right more often than {found[worse]}: {found['first']} minus {found['second']} is "
        f"{numbers}."
    )
