"""Step `explore`: what the preference data is like and which biases it has, before any of it is dropped.

Reads `data.source`. Writes `exploration/`: `statistics.json` (every number with its interval, per subset), figures,
and `samples.md` with pairs to read.

    rlhf-trl explore RECIPE
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.data.examples import Examples
from rlhf_trl.data.figures import draw
from rlhf_trl.data.hh import normalise
from rlhf_trl.data.pair import Pair, RowError
from rlhf_trl.data.sources import read_rows
from rlhf_trl.data.summary import QUANTILES
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import write_json, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import Estimate, wilson
from rlhf_trl.text.refusals import REFUSAL_CHARACTERS, REFUSALS, refuses

UNITS = ("characters", "words", "tokens")
# How many times longer the longer answer is, in words.
RATIOS = (1.0, 1.25, 1.5, 2.0, 3.0, math.inf)
TOP_WORDS = 12
MIN_WORD_COUNT = 20
WORD = re.compile(r"\w+(?:'\w+)*")
DEFINITIONS = {
    "pairs": "rows of the source with one prompt and two different, non-empty answers; what else `prepare` drops "
    "(ties, duplicates, over-long rows) is included",
    "depth": "how often the user speaks in the prompt",
    "lengths": "of an answer without the whitespace around it: characters, words (runs of letters and digits), tokens "
    "of the text alone",
    "chosen_longer": "share of the pairs whose chosen answer is longer; an equal length counts half; Wilson interval",
    "verbosity": "the same share in words, by how many times longer the longer answer is; equal lengths left out",
    "difference": "chosen minus rejected, mean with its normal 95 % interval",
    "refusals": f"answers with a plain refusal in the first {REFUSAL_CHARACTERS} characters, by the patterns listed; "
    "refusal_is_chosen: of the pairs in which exactly one answer refuses",
    "shared_prefix": "words that both answers begin with, as a share of the shorter answer; first_word, "
    "first_three_words: share of the pairs whose answers begin with the same one, three",
    "words": "words that more of the chosen (rejected) answers hold than of the others: z of the log-odds ratio with "
    "an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, eq. 22); each answer counts a word once; "
    "beyond the threshold, a word stands out by chance in 1 of 20 data sets (Bonferroni)",
}


@dataclass(frozen=True)
class Measured:
    """One pair in numbers."""

    depth: int
    characters: tuple[int, int]
    words: tuple[int, int]
    tokens: tuple[int, int]
    refuses: tuple[bool, bool]
    prefix: int
    """Words that both answers begin with."""


@dataclass
class Subset:
    """The pairs of one subset, and how many of their answers hold each word."""

    pairs: list[Measured]
    chosen_words: Counter[str]
    rejected_words: Counter[str]


def explore(recipe: Recipe, run: RunDir) -> None:
    """Measure the source and draw what its reader should know.

    Raises:
        UserError: the source cannot be used.
    """
    from rlhf_trl.models.base import load_tokenizer

    tokenizer = load_tokenizer(recipe, run)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []
        return [len(answer) for answer in ids]

    subsets: dict[str, Subset] = {}
    examples = Examples(recipe.seed)
    unreadable: Counter[str] = Counter()
    rows = iter(tqdm(read_rows(recipe.data, recipe.seed), desc="explore", unit=" rows"))
    while chunk := list(itertools.islice(rows, 1000)):
        pairs: list[tuple[str, Pair]] = []
        for row in chunk:
            try:
                pair = normalise(row[2])
            except RowError as error:
                unreadable[error.reasons[0].value] += 1
                examples.add_unusable(row, error)
            else:
                pairs.append((row[1], pair))
                examples.add(row, pair, (refuses(pair.chosen), refuses(pair.rejected)))
        _measure(subsets, pairs, count_tokens)
    statistics = _describe(subsets, unreadable)
    write_json(run.exploration / "statistics.json", statistics)
    draw(run.exploration, statistics, {name: _lengths(subset) for name, subset in subsets.items()})
    write_text(run.exploration / "samples.md", examples.render(recipe.data.source))


def _measure(
    subsets: dict[str, Subset], pairs: list[tuple[str, Pair]], count_tokens: Callable[[Sequence[str]], list[int]]
) -> None:
    sides = [pair.chosen for _, pair in pairs], [pair.rejected for _, pair in pairs]
    for (name, pair), *tokens in zip(pairs, *map(count_tokens, sides), strict=True):
        subset = subsets.setdefault(name, Subset([], Counter(), Counter()))
        chosen, rejected = (WORD.findall(text.lower().replace("’", "'")) for text in (pair.chosen, pair.rejected))
        subset.chosen_words.update(set(chosen))
        subset.rejected_words.update(set(rejected))
        prefix = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        subset.pairs.append(Measured(
            depth=pair.user_turns, characters=(len(pair.chosen), len(pair.rejected)),
            words=(len(chosen), len(rejected)), tokens=(tokens[0], tokens[1]),
            refuses=(refuses(pair.chosen), refuses(pair.rejected)), prefix=sum(1 for _ in prefix),
        ))  # fmt: skip


def _lengths(subset: Subset) -> dict[str, np.ndarray]:
    """Lengths in each unit, shape (pairs, 2): chosen, rejected."""
    return {unit: np.array([getattr(pair, unit) for pair in subset.pairs]) for unit in UNITS}


# --- statistics ------------------------------------------------------------------------------------------------------


def _describe(subsets: dict[str, Subset], unreadable: Counter[str]) -> dict[str, Any]:
    whole = Subset([], Counter(), Counter())
    for subset in subsets.values():
        whole.pairs += subset.pairs
        whole.chosen_words += subset.chosen_words
        whole.rejected_words += subset.rejected_words
    return {
        "rows": len(whole.pairs) + unreadable.total(),
        "unusable": dict(unreadable),
        "overall": _describe_subset(whole) if whole.pairs else None,
        "subsets": {name: _describe_subset(subset) for name, subset in subsets.items()},
        "refusal_patterns": REFUSALS,
        "definitions": DEFINITIONS,
    }


def _describe_subset(subset: Subset) -> dict[str, Any]:
    pairs, lengths = subset.pairs, _lengths(subset)
    refusing = np.array([pair.refuses for pair in pairs])
    one_refuses = refusing[refusing[:, 0] != refusing[:, 1]]
    shorter = lengths["words"].min(axis=1)
    prefix = np.array([pair.prefix for pair in pairs])
    depth = [pair.depth for pair in pairs]
    return {
        "pairs": len(pairs),
        "depth": {"mean": _mean(depth), "counts": {str(turns): n for turns, n in sorted(Counter(depth).items())}},
        "lengths": {
            unit: {"chosen": _quantiles(both[:, 0]), "rejected": _quantiles(both[:, 1]),
                   "difference": _mean(both[:, 0] - both[:, 1])}
            for unit, both in lengths.items()
        },
        "chosen_longer": {unit: _share(_longer(both)) for unit, both in lengths.items()},
        "verbosity": _verbosity(lengths["words"]),
        "refusals": {"chosen": _share(refusing[:, 0]), "rejected": _share(refusing[:, 1]),
                     "refusal_is_chosen": _share(one_refuses[:, 0])},
        "shared_prefix": {"first_word": _share(prefix >= 1), "first_three_words": _share(prefix >= 3),
                          "share": _quantiles(prefix / np.maximum(shorter, 1))},
        "words": _typical_words(subset.chosen_words, subset.rejected_words),
    }  # fmt: skip


def _longer(both: np.ndarray) -> np.ndarray:
    """(pairs, 2) -> (pairs,): 1 where the chosen answer is longer, 0.5 where both are equal."""
    return (np.sign(both[:, 0] - both[:, 1]) + 1) / 2


def _share(values: np.ndarray) -> dict[str, float] | None:
    return wilson(float(values.sum()), len(values)).as_dict() if len(values) else None


def _mean(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    array = np.asarray(values, dtype=float)
    half = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return Estimate(float(array.mean()), float(array.mean() - half), float(array.mean() + half), len(array)).as_dict()


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def _verbosity(words: np.ndarray) -> list[dict[str, Any]]:
    words = words[words[:, 0] != words[:, 1]]
    ratio = words.max(axis=1) / np.maximum(words.min(axis=1), 1)
    return [
        {"from": low, "to": high if math.isfinite(high) else None,  # JSON has no infinity: the last bin is open
         "longer_is_chosen": _share(_longer(words[(ratio >= low) & (ratio < high)]))}
        for low, high in itertools.pairwise(RATIOS)
    ]  # fmt: skip


def _typical_words(chosen: Counter[str], rejected: Counter[str]) -> dict[str, Any]:
    """The words that tell the sides apart; the prior is the frequency in both sides together, worth 1,000 words."""
    from scipy.stats import norm

    totals = chosen.total(), rejected.total()
    everything = chosen + rejected
    scored: list[dict[str, Any]] = []
    for word, count in everything.items():
        if count < MIN_WORD_COUNT or word.isdigit():
            continue
        prior = 1000 * count / sum(totals)
        with_prior = chosen[word] + prior, rejected[word] + prior
        odds = (math.log(mine / (total + 1000 - mine)) for mine, total in zip(with_prior, totals, strict=True))
        difference = next(odds) - next(odds)
        z = difference / math.sqrt(1 / with_prior[0] + 1 / with_prior[1])
        scored.append({"word": word, "z": z, "chosen": chosen[word], "rejected": rejected[word]})
    scored.sort(key=lambda item: (-item["z"], item["word"]))
    return {
        "tested": len(scored),
        "threshold": float(norm.isf(0.025 / max(len(scored), 1))),
        "chosen": [item for item in scored[:TOP_WORDS] if item["z"] > 0],
        "rejected": [item for item in scored[::-1][:TOP_WORDS] if item["z"] < 0],
    }
