"""What a reward model gets right and wrong on labelled pairs: numbers from scores alone, without a model.

    rows = tabulate(pairs, chosen_scores, rejected_scores, tokens)  # the rows of scores.jsonl
    analysis = analyse(rows, seed)  # most of error_analysis.json

Works on values in memory. The order of the rows does not matter: they are sorted by the hashes of their texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from scipy.special import expit

from rlhf_trl.errors import calibration
from rlhf_trl.errors.pair_statistics import (
    NEAR,
    accuracy,
    auc,
    average,
    correct,
    gap,
    length_bias,
    relative_gap,
    share,
)
from rlhf_trl.stats.trust import length_rule
from rlhf_trl.text.refusals import refuses

SIDES = ("chosen", "rejected")
UNITS = ("tokens", "characters")
# Difference of the lengths as a share of the longer answer: where a size of difference begins.
LENGTH_SIZES = (NEAR, 0.25, 0.5)
DEEPEST = 5
BINS = 10
HISTOGRAM_BINS = 30
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))


@dataclass(frozen=True)
class Columns:
    """Pairs with finite scores as arrays, sorted."""

    scores: np.ndarray
    """(N, 2): chosen, rejected; so are the lengths and the refusals."""
    tokens: np.ndarray
    characters: np.ndarray
    refuses: np.ndarray
    prompt_tokens: np.ndarray
    turns: np.ndarray
    subset: np.ndarray
    prompt: np.ndarray
    """Number of the prompt."""
    fits: np.ndarray
    """Whether the prompt is in the half that the temperature is fitted on."""
    chosen_first: np.ndarray
    """Whether the chosen answer is the first one in the drawn order."""

    @property
    def margin(self) -> np.ndarray:
        return gap(self.scores)

    def where(self, mask: np.ndarray) -> Columns:
        return Columns(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))


def digest(text: str) -> str:
    """Name a text by its content: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tabulate(
    pairs: Sequence[dict[str, Any]], chosen: Sequence[float], rejected: Sequence[float], tokens: np.ndarray
) -> list[dict[str, Any]]:
    """Put what the analysis needs to know of each pair into one row.

    Args:
        pairs: `prompt` (messages), `chosen`, `rejected`, `subset`, `row`.
        chosen: scores of the chosen answers, shape (N,).
        rejected: scores of the rejected answers, shape (N,).
        tokens: of the prompt, the chosen and the rejected answer, shape (N, 3).

    Returns:
        A row for each pair, texts as hashes. A score that is not finite is None, and so is its margin.
    """
    rows = []
    for pair, *scores, (prompt_tokens, *lengths) in zip(pairs, chosen, rejected, np.asarray(tokens), strict=True):
        prompt = digest(json.dumps(pair["prompt"], sort_keys=True))
        finite = [float(score) if math.isfinite(score) else None for score in scores]
        row = {
            "row": pair["row"],
            "subset": pair["subset"],
            "prompt_id": prompt,
            "turns": sum(message["role"] == "user" for message in pair["prompt"]),
            "prompt_tokens": int(prompt_tokens),
            "margin": None if None in finite else float(scores[0]) - float(scores[1]),
        }
        for side, score, length in zip(SIDES, finite, lengths, strict=True):
            row |= {
                f"{side}_id": digest(f"{prompt} {pair[side]}"),
                f"{side}_score": score,
                f"{side}_tokens": int(length),
                f"{side}_characters": len(pair[side]),
                f"{side}_refuses": refuses(pair[side]),
            }
        rows.append(row)
    return rows


def columns(rows: Sequence[dict[str, Any]]) -> Columns:
    """Turn the rows with finite scores into arrays."""
    finite = [row for row in rows if row["margin"] is not None]
    # By content, and the same with the sides swapped.
    finite.sort(key=lambda row: (row["prompt_id"], sorted(_ids(row)), json.dumps(row, sort_keys=True)))

    def both(key: str, dtype: type) -> np.ndarray:
        return np.array([[row[f"{side}_{key}"] for side in SIDES] for row in finite], dtype=dtype).reshape(-1, 2)

    return Columns(
        scores=both("score", float),
        tokens=both("tokens", int),
        characters=both("characters", int),
        refuses=both("refuses", bool),
        prompt_tokens=np.array([row["prompt_tokens"] for row in finite], dtype=int),
        turns=np.array([row["turns"] for row in finite], dtype=int),
        subset=np.array([row["subset"] for row in finite], dtype=str),
        prompt=np.unique(np.array([row["prompt_id"] for row in finite], dtype=str), return_inverse=True)[1],
        fits=np.array([int(digest(f"half {row['prompt_id']}"), 16) % 2 == 0 for row in finite], dtype=bool),
        chosen_first=np.array([row["chosen_id"] < row["rejected_id"] for row in finite], dtype=bool),
    )


def _ids(row: dict[str, Any]) -> tuple[str, str]:
    return row["chosen_id"], row["rejected_id"]


def analyse(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Measure accuracy, scores, length bias and calibration.

    Args:
        rows: what `tabulate` returns, in any order.
        seed: of the bootstrap.

    Raises:
        ValueError: no row has finite scores.
    """
    data = columns(rows)
    if not len(data.margin):
        raise ValueError("no pair has two finite scores")
    return {
        "pairs": {
            "given": len(rows),
            "analysed": len(data.margin),
            "prompts": len(np.unique(data.prompt)),
            "not_finite": len(rows) - len(data.margin),
        },
        "overall": {
            **_cell(data, seed),
            "length_baseline_characters": share(correct(gap(data.characters)), data.prompt).as_dict(),
            "length_rule": length_rule(
                correct(gap(data.scores)),
                correct(gap(data.tokens)),
                lambda values: share(values, data.prompt),
                lambda values: average(values, data.prompt, seed),
            ),
        },
        "breakdowns": {
            name: [{"name": label, **_cell(data.where(mask), seed)} for label, mask in groups]
            for name, groups in _divide(data).items()
        },
        "scores": _describe_scores(data, seed),
        "length": {unit: length_bias(data.scores, getattr(data, unit), data.prompt, seed) for unit in UNITS},
        "calibration": _describe_calibration(data, seed),
        "definitions": TERMS["definitions"],
    }


def _cell(data: Columns, seed: int) -> dict[str, Any]:
    return accuracy(data.scores, data.tokens, data.prompt, seed)


# --- groups of pairs -------------------------------------------------------------------------------------------------


def _divide(data: Columns) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Divide the pairs in several ways; each is a list of names and masks that hold every pair once."""
    turns = np.minimum(data.turns, DEEPEST)
    refusing = data.refuses[:, 0].astype(int) - data.refuses[:, 1]
    return {
        "subset": [(str(name), data.subset == name) for name in np.unique(data.subset)],
        **{f"length_difference_{unit}": _by_length(getattr(data, unit)) for unit in UNITS},
        "turns": [(f"{n}{' or more' if n == DEEPEST else ''}", turns == n) for n in np.unique(turns).tolist()],
        "prompt_length": _by_quantile(data.prompt_tokens, 4, "{:.0f} to {:.0f} tokens"),
        "margin": _by_quantile(np.abs(data.margin), 10, "{:.3g} to {:.3g}"),
        "refusal": [
            ("only the chosen one", refusing == 1),
            ("only the rejected one", refusing == -1),
            ("both or neither", refusing == 0),
        ],
    }


def _by_length(lengths: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Divide by the relative difference of the lengths, from "chosen much shorter" to "chosen much longer"."""
    relative = relative_gap(lengths)
    size = np.digitize(np.abs(relative), LENGTH_SIZES) * np.sign(relative).astype(int)
    near, middle, far = (f"{start:.0%}" for start in LENGTH_SIZES)
    names = {1: f"by {near} to {middle}", 2: f"by {middle} to {far}", 3: f"by {far} or more"}
    return [
        *((f"shorter {names[step]}", size == -step) for step in (3, 2, 1)),
        (f"within {near}", size == 0),
        *((f"longer {names[step]}", size == step) for step in (1, 2, 3)),
    ]


def _by_quantile(values: np.ndarray, parts: int, name: str) -> list[tuple[str, np.ndarray]]:
    """Divide into parts of about the same size, by value; equal values stay together."""
    bins = np.searchsorted(np.quantile(values, np.linspace(0, 1, parts + 1)[1:-1]), values, side="left")
    masks = [bins == number for number in np.unique(bins)]
    return [(name.format(values[mask].min(), values[mask].max()), mask) for mask in masks]


# --- scores and calibration ------------------------------------------------------------------------------------------


def _describe_scores(data: Columns, seed: int) -> dict[str, Any]:
    """Describe the distributions of scores and margins, and how good the probabilities are."""
    spread, margin = float(data.scores.std()), data.margin
    edges = np.histogram_bin_edges(data.scores, HISTOGRAM_BINS)
    # An even number of bins around 0, so that no bin holds both right and wrong pairs.
    widest = float(np.abs(margin).max()) or 1.0
    margin_counts, margin_edges = np.histogram(margin, HISTOGRAM_BINS, (-widest, widest))

    def describe(values: np.ndarray) -> dict[str, Any]:
        deciles = np.quantile(values, np.linspace(0, 1, 11)).tolist()
        return {
            "mean": average(values, data.prompt, seed).as_dict(),
            "std": float(values.std()),
            "median": deciles[5],
            "deciles": deciles,
        }

    sides = dict(zip(SIDES, data.scores.T, strict=True))
    in_score_std = average(margin / spread, data.prompt, seed).as_dict() if spread > 0 else None
    return {
        **{side: describe(values) for side, values in sides.items()},
        "std": spread,
        "margin": {**describe(margin), "in_score_std": in_score_std},
        "histogram": {
            "edges": edges.tolist(),
            **{side: np.histogram(values, edges)[0].tolist() for side, values in sides.items()},
        },
        "margin_histogram": {"edges": margin_edges.tolist(), "counts": margin_counts.tolist()},
        "auc": auc(data.scores, data.prompt, seed).as_dict(),
        "nll": average(calibration.nll(margin), data.prompt, seed).as_dict(),
        "brier": average(calibration.brier(margin), data.prompt, seed).as_dict(),
    }


def _describe_calibration(data: Columns, seed: int) -> dict[str, Any]:
    """Compare confidence with accuracy, and see what one temperature would mend."""
    margin, prompts = data.margin, data.prompt
    confidence, right = calibration.confidence(margin), correct(margin)
    first_wins = expit(np.where(data.chosen_first, margin, -margin))
    frames = {
        "equal_width": (confidence, right, calibration.equal_width(BINS, 0.5)),
        "equal_mass": (confidence, right, calibration.equal_mass(confidence, BINS)),
        "random_order": (first_wins, data.chosen_first.astype(float), calibration.equal_width(BINS)),
    }
    tables: dict[str, list[dict[str, Any]]] = {}
    errors: dict[str, dict[str, Any]] = {}
    for name, (predicted, outcome, edges) in frames.items():
        bins = calibration.bin_of(predicted, edges)
        tables[name] = [
            {
                "from": float(edges[number]),
                "to": float(edges[number + 1]),
                "n": int((bins == number).sum()),
                "predicted": float(predicted[bins == number].mean()),
                "observed": share(outcome[bins == number], prompts[bins == number]).as_dict(),
            }
            for number in np.unique(bins)
        ]
        by_chance = calibration.ece_if_calibrated(predicted, edges, seed).as_dict()
        errors[name] = {**calibration.calibration_errors(predicted, outcome, edges), "if_calibrated": by_chance}
    return {
        "tables": tables,
        "errors": errors,
        "confidence": average(confidence, prompts, seed).as_dict(),
        "gap": average(confidence - right, prompts, seed).as_dict(),
        "temperature": _fit_temperature(data, seed),
    }


def _fit_temperature(data: Columns, seed: int) -> dict[str, Any]:
    margin, prompts = data.margin[~data.fits], data.prompt[~data.fits]
    if not len(margin):
        return {"temperature": None, "why_not": "all prompts fell into one half"}
    try:
        found = calibration.fit_temperature(data.margin[data.fits])
    except ValueError as error:
        return {"temperature": None, "why_not": str(error)}
    before, after = (_describe_half(scaled, prompts, seed) for scaled in (margin, margin / found.mean))
    change = calibration.nll(margin / found.mean) - calibration.nll(margin)
    return {
        "temperature": found.as_dict(),
        "measured_on": len(margin),
        "before": before,
        "after": after,
        "nll_change": average(change, prompts, seed).as_dict(),
    }


def _describe_half(margin: np.ndarray, prompts: np.ndarray, seed: int) -> dict[str, Any]:
    confidence = calibration.confidence(margin)
    edges = calibration.equal_mass(confidence, BINS)
    return {
        "nll": average(calibration.nll(margin), prompts, seed).as_dict(),
        "brier": average(calibration.brier(margin), prompts, seed).as_dict(),
        "ece": calibration.calibration_errors(confidence, correct(margin), edges)["ece"],
        "ece_if_calibrated": calibration.ece_if_calibrated(confidence, edges, seed).as_dict(),
    }
