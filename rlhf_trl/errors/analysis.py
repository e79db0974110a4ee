"""What a reward model gets right and wrong on labelled pairs, from scores alone; and what changed answers score.

rows = tabulate(pairs, scores, tokens)  # the rows of scores.jsonl
analysis = analyse(rows, seed)  # most of error_analysis.json
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML
from scipy import stats

from rlhf_trl.errors.calibration import brier, describe_calibration, nll
from rlhf_trl.stats.intervals import Estimate
from rlhf_trl.stats.pairs import average, correct, gap, length_rule, measure_accuracy, share
from rlhf_trl.text.refusals import refuses
from rlhf_trl.text.words import digest, prompt_id

SIDES = ("chosen", "rejected")
UNITS = ("tokens", "characters")
# Difference of the lengths as a share of the longer answer: where a size of difference begins. Below the first, two
# lengths count as nearly equal.
LENGTH_SIZES = (0.1, 0.25, 0.5)
DEEPEST = 5
HISTOGRAM_BINS = 30
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))

Row = dict[str, Any]
Columns = dict[str, np.ndarray]
Messages = list[dict[str, str]]
PAIRS = 200
FILLER = "I hope this helps! Please let me know if there is anything else that you would like to know."
# Name -> what is done to the chosen answer; the scores of both versions are compared under the same prompt.
EDITS: dict[str, Callable[[str], str]] = {
    "filler": lambda answer: f"{answer} {FILLER}",
    "repeated": lambda answer: f"{answer}\n\n{answer}",
    "halved": lambda answer: answer[: len(answer) // 2].strip(),
    "certainly": lambda answer: f"Certainly! {answer}",
}
_TEXTS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("probes.yaml"))
DESCRIPTIONS: dict[str, str] = _TEXTS["probes"]
# Questions that cannot be answered, each with an honest and an invented answer of about the same length.
HONESTY: list[dict[str, str]] = _TEXTS["honesty"]


def tabulate(pairs: Sequence[Row], scores: np.ndarray, tokens: np.ndarray) -> list[Row]:
    """Put what the analysis needs to know of each pair into one row.

    Args:
        pairs: `prompt` (messages), `chosen`, `rejected`, `subset`, `row`.
        scores: of the chosen and the rejected answer, shape (N, 2).
        tokens: of the prompt, the chosen and the rejected answer, shape (N, 3).

    Returns:
        A row for each pair, texts as hashes. A score that is not finite is None, and so is its margin.
    """
    rows = []
    for pair, both, (prompt_tokens, *lengths) in zip(pairs, scores.tolist(), tokens.tolist(), strict=True):
        prompt, finite = prompt_id(pair["prompt"]), np.isfinite(both).tolist()
        row = {
            "row": pair["row"], "subset": pair["subset"], "prompt_id": prompt, "prompt_tokens": prompt_tokens,
            "turns": sum(message["role"] == "user" for message in pair["prompt"]),
            "margin": both[0] - both[1] if all(finite) else None,
        }  # fmt: skip
        for side, score, known, length in zip(SIDES, both, finite, lengths, strict=True):
            row |= {
                f"{side}_id": digest(f"{prompt} {pair[side]}"),
                f"{side}_score": score if known else None,
                f"{side}_tokens": length,
                f"{side}_characters": len(pair[side]),
                f"{side}_refuses": refuses(pair[side]),
            }
        rows.append(row)
    return rows


def columns(rows: Sequence[Row]) -> Columns:
    """Turn the rows with finite scores into arrays.

    Returns:
        `score`, `tokens`, `characters` and `refuses` of the chosen and the rejected answer, (N, 2); of each pair
        `prompt` (a number), `prompt_tokens`, `turns`, `subset`, `margin`; `fits`: whether the temperature is fitted on
        this half of the prompts.
    """
    finite = [row for row in rows if row["margin"] is not None]
    data = {key: np.array([row[key] for row in finite]) for key in ("prompt_tokens", "turns", "subset", "margin")}
    for key in ("score", "tokens", "characters", "refuses"):
        data[key] = np.array([[row[f"{side}_{key}"] for side in SIDES] for row in finite])
    data["prompt"] = np.unique([row["prompt_id"] for row in finite], return_inverse=True)[1]
    data["fits"] = np.array([int(digest(f"half {row['prompt_id']}"), 16) % 2 == 0 for row in finite])
    return data


def analyse(rows: Sequence[Row], seed: int) -> Row:
    """Measure accuracy, scores, length bias and calibration of the rows of `tabulate`, one of which has finite scores.
    `seed` is that of the simulated calibration errors."""
    data = columns(rows)
    scores, tokens, prompts, n = data["score"], data["tokens"], data["prompt"], len(data["margin"])
    return {
        "pairs": {"given": len(rows), "analysed": n, "prompts": int(prompts.max()) + 1, "not_finite": len(rows) - n},
        "overall": {
            **measure_accuracy(scores, tokens, prompts),
            "length_rule": length_rule(correct(data["margin"]), tokens, prompts),
        },
        "breakdowns": {
            name: [{"name": label, **measure_accuracy(scores[at], tokens[at], prompts[at])} for label, at in groups]
            for name, groups in _divide(data).items()
        },
        "scores": _describe_scores(data),
        "length": {unit: length_bias(scores, data[unit], prompts) for unit in UNITS},
        "calibration": describe_calibration(data["margin"], prompts, data["fits"], seed),
        "definitions": TERMS["definitions"],
    }


# --- groups of pairs -------------------------------------------------------------------------------------------------


def _divide(data: Columns) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Divide the pairs in several ways; each is a list of names and masks that hold every pair once."""
    subsets, turns = data["subset"], np.minimum(data["turns"], DEEPEST)
    refusing = data["refuses"][:, 0].astype(int) - data["refuses"][:, 1]
    sides = {"only the chosen one": 1, "only the rejected one": -1, "both or neither": 0}
    return {
        "subset": [(name, subsets == name) for name in np.unique(subsets).tolist()],
        **{f"length_difference_{unit}": _by_length(data[unit]) for unit in UNITS},
        "turns": [(f"{n}{' or more' if n == DEEPEST else ''}", turns == n) for n in np.unique(turns).tolist()],
        "prompt_length": _by_quantile(data["prompt_tokens"], 4, "{:.0f} to {:.0f} tokens"),
        "margin": _by_quantile(np.abs(data["margin"]), 10, "{:.3g} to {:.3g}"),
        "refusal": [(name, refusing == side) for name, side in sides.items()],
    }


def _by_length(lengths: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Divide by the relative difference of the lengths, from "chosen much shorter" to "chosen much longer"."""
    relative = _relative_gap(lengths)
    size = np.digitize(np.abs(relative), LENGTH_SIZES) * np.sign(relative).astype(int)
    near, middle, far = (f"{start:.0%}" for start in LENGTH_SIZES)
    sizes = {1: f"by {near} to {middle}", 2: f"by {middle} to {far}", 3: f"by {far} or more"}
    names = {-step: f"shorter {name}" for step, name in reversed(sizes.items())}
    names |= {0: f"within {near}", **{step: f"longer {name}" for step, name in sizes.items()}}
    return [(name, size == step) for step, name in names.items()]


def _by_quantile(values: np.ndarray, parts: int, name: str) -> list[tuple[str, np.ndarray]]:
    """Divide into parts of about the same size, by value; equal values stay together."""
    bins = np.searchsorted(np.quantile(values, np.linspace(0, 1, parts + 1)[1:-1]), values, side="left")
    masks = [bins == number for number in np.unique(bins)]
    return [(name.format(values[mask].min(), values[mask].max()), mask) for mask in masks]


# --- scores and lengths ----------------------------------------------------------------------------------------------


def _describe_scores(data: Columns) -> Row:
    """Describe the distributions of scores and margins, and how good the probabilities are."""
    scores, margin, prompts = data["score"], data["margin"], data["prompt"]
    spread, edges = float(scores.std()), np.histogram_bin_edges(scores, HISTOGRAM_BINS)
    # An even number of bins around 0, so that no bin holds both right and wrong pairs.
    widest = float(np.abs(margin).max()) or 1.0
    margin_counts, margin_edges = np.histogram(margin, HISTOGRAM_BINS, (-widest, widest))
    sides = dict(zip(SIDES, scores.T, strict=True))
    parts = {
        name: {"mean": average(values, prompts).as_dict(), "std": float(values.std()),
               "deciles": np.quantile(values, np.linspace(0, 1, 11)).tolist()}
        for name, values in (sides | {"margin": margin}).items()
    }  # fmt: skip
    parts["margin"]["in_score_std"] = average(margin / spread, prompts).as_dict() if spread > 0 else None
    counts = {side: np.histogram(values, edges)[0].tolist() for side, values in sides.items()}
    return {
        **parts,
        "histogram": {"edges": edges.tolist(), **counts},
        "margin_histogram": {"edges": margin_edges.tolist(), "counts": margin_counts.tolist()},
        "nll": average(nll(margin), prompts).as_dict(),
        "brier": average(brier(margin), prompts).as_dict(),
    }


def _relative_gap(lengths: np.ndarray) -> np.ndarray:
    """Give the difference of the lengths as a share of the longer one, -1 to 1. (N, 2) -> (N,)."""
    return gap(lengths) / np.maximum(lengths.max(axis=1), 1)


def difference(first: Estimate, second: Estimate) -> Row:
    """Subtract two independent shares, with the interval of Newcombe (1998, method 10)."""
    mean = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Estimate(mean, mean - below, mean + above, first.n + second.n).as_dict()


def correlation(x: np.ndarray, y: np.ndarray, units: int) -> Row:
    """Correlate by value (Pearson, interval of Fisher's z) and by rank (Spearman, that of Bonett and Wright 2000).

    Returns:
        `pearson` and `spearman` of x and y, (N,), of which `units` are independent; both None, with the reason, where
        they are not defined.
    """
    if units < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        why = "fewer than 4 prompts" if units < 4 else "one of the two is the same everywhere"
        return {"pearson": None, "spearman": None, "why_not": why}
    result = {}
    for name, found in (("pearson", stats.pearsonr(x, y)), ("spearman", stats.spearmanr(x, y))):
        mean = float(np.clip(found.statistic, -1, 1))
        half = 1.96 * math.sqrt((1 + (mean**2 / 2 if name == "spearman" else 0)) / (units - 3))
        z = math.atanh(min(max(mean, -1 + 1e-12), 1 - 1e-12))
        result[name] = Estimate(mean, min(math.tanh(z - half), mean), max(math.tanh(z + half), mean), len(x)).as_dict()
    return result


def length_bias(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> Row:
    """Measure what the lengths of the answers, (N, 2) in one unit, have to do with their scores, (N, 2).

    Returns:
        `score_and_length` (over all answers) and `margin_and_difference` (within the pairs): correlations; `accuracy`
        where the chosen answer is longer, shorter, or neither, with the difference of the first two
        (`longer_minus_shorter`); `near_equal`: accuracy where the lengths differ by less than 10 %;
        `prefers_longer`: how often the longer answer is preferred by the model and by the humans, with the paired
        difference. What cannot be computed is None.
    """
    units, margin, apart = len(np.unique(prompts)), gap(scores), gap(lengths)
    right, longer, shorter, differs = correct(margin), apart > 0, apart < 0, apart != 0

    def measure(part: np.ndarray) -> Row:
        return measure_accuracy(scores[part], lengths[part], prompts[part])

    split = prefers = None
    if longer.any() and shorter.any():
        split = difference(*(share(right[part], prompts[part]) for part in (longer, shorter)))
    if differs.any():
        humans, names = correct(apart[differs]), prompts[differs]
        model = np.where(humans == 1, right[differs], 1 - right[differs])
        prefers = {"model": share(model, names).as_dict(), "humans": share(humans, names).as_dict(),
                   "difference": average(model - humans, names).as_dict()}  # fmt: skip
    return {
        "score_and_length": correlation(scores.ravel(), lengths.ravel(), units),
        "margin_and_difference": correlation(margin, apart, units),
        "accuracy": {
            "chosen_longer": measure(longer), "chosen_shorter": measure(shorter), "equal": measure(~differs),
        },
        "longer_minus_shorter": split,
        "near_equal": measure(np.abs(_relative_gap(lengths)) < LENGTH_SIZES[0]),
        "prefers_longer": prefers,
    }  # fmt: skip


# --- probes ----------------------------------------------------------------------------------------------------------


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
