"""Step `explore`: what the preference data is like and which biases it has, before any of it is dropped.

Reads `data.source`. Writes `exploration/`: `statistics.json` (every number with its interval, per subset), figures,
and `samples.md` with pairs to read.

    rlhf-trl explore RECIPE
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.data.chunks import map_chunks
from rlhf_trl.data.examples import Examples
from rlhf_trl.data.figures import draw
from rlhf_trl.data.hh import normalise
from rlhf_trl.data.pair import Pair, RowError
from rlhf_trl.data.sources import Row, read_rows
from rlhf_trl.data.summary import TERMS, longer, quantiles, share
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import write_json, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import Estimate
from rlhf_trl.text.refusals import REFUSAL_CHARACTERS, REFUSALS, refuses

UNITS = ("characters", "words", "tokens")
# How many times longer the longer answer is, in words.
RATIOS = (1.0, 1.25, 1.5, 2.0, 3.0, math.inf)
TOP_WORDS = 12
MIN_WORD_COUNT = 20
WORD = re.compile(r"\w+(?:'\w+)*")
# One pair in numbers; two stand for the chosen and the rejected answer. `prefix`: words that both answers begin with.
PAIR = np.dtype([("depth", int), *((unit, int, 2) for unit in UNITS), ("refuses", bool, 2), ("prefix", int)])


@dataclass
class Subset:
    """The pairs of one subset, in arrays of dtype `PAIR`, and how many answers of each side hold each word."""

    parts: list[np.ndarray] = field(default_factory=list)
    words: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))

    @property
    def pairs(self) -> np.ndarray:
        return np.concatenate([np.empty(0, PAIR), *self.parts])

    def add(self, other: Subset) -> None:
        self.parts += other.parts
        for mine, others in zip(self.words, other.words, strict=True):
            mine.update(others)


Measured = tuple[dict[str, Subset], Counter[str], Examples]


def explore(recipe: Recipe, run: RunDir) -> None:
    """Measure the source and draw what its reader should know.

    Raises:
        UserError: the source cannot be used.
    """
    subsets: defaultdict[str, Subset] = defaultdict(Subset)
    unreadable: Counter[str] = Counter()
    examples = Examples(recipe.seed)
    rows = tqdm(read_rows(recipe.data, recipe.seed), desc="explore", unit=" rows")
    work = _set_up(recipe, run)
    for _, (measured, dropped, chunk) in map_chunks(work, partial(_set_up, recipe, run), iter(rows)):
        for name, subset in measured.items():
            subsets[name].add(subset)
        unreadable.update(dropped)
        examples.merge(chunk)
    statistics = _describe(subsets, unreadable)
    write_json(run.exploration / "statistics.json", statistics)
    draw(run.exploration, statistics, {name: subset.pairs for name, subset in subsets.items()})
    write_text(run.exploration / "samples.md", examples.render(recipe.data.source))


def _set_up(recipe: Recipe, run: RunDir) -> Callable[[list[Row]], Measured]:
    """What measures rows, in this process or another one."""
    from rlhf_trl.models.tokenizer import load_tokenizer

    return partial(measure, load_tokenizer(recipe, run), recipe.seed)


def measure(tokenizer: Any, seed: int, rows: Sequence[Row]) -> Measured:
    """Measure rows: the pairs of each subset, the reasons against the others, and the best of both to be read."""
    usable: defaultdict[str, list[tuple[Row, Pair]]] = defaultdict(list)
    unreadable: Counter[str] = Counter()
    examples = Examples(seed)
    for row in rows:
        try:
            usable[row[1]].append((row, normalise(row[2])))
        except RowError as error:
            unreadable[error.reasons[0].value] += 1
            examples.add_unusable(row, error)
    subsets = {name: Subset() for name, pairs in usable.items() if pairs}
    for name, subset in subsets.items():
        answers = [(pair.chosen, pair.rejected) for _, pair in usable[name]]
        ids = tokenizer([*itertools.chain(*answers)], add_special_tokens=False, verbose=False).input_ids
        numbers = []
        for (row, pair), both, *tokens in zip(usable[name], answers, ids[::2], ids[1::2], strict=True):
            words = [WORD.findall(text.lower().replace("’", "'")) for text in both]
            for count, side in zip(subset.words, words, strict=True):
                count.update({*side})
            prefix = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False))
            refusing = refuses(pair.chosen), refuses(pair.rejected)
            lengths = ((len(one), len(other)) for one, other in (both, words, tokens))
            numbers.append((pair.user_turns, *lengths, refusing, sum(1 for _ in prefix)))
            examples.add(row, pair, refusing)
        subset.parts.append(np.array(numbers, PAIR))
    return subsets, unreadable, examples


# --- statistics ------------------------------------------------------------------------------------------------------


def _describe(subsets: dict[str, Subset], unreadable: Counter[str]) -> dict[str, Any]:
    whole = Subset()
    for subset in subsets.values():
        whole.add(subset)
    pairs = sum(map(len, whole.parts))
    return {
        "rows": pairs + unreadable.total(),
        "unusable": dict(unreadable),
        "overall": _describe_subset(whole) if pairs else None,
        "subsets": {name: _describe_subset(subset) for name, subset in subsets.items()},
        "refusal_patterns": REFUSALS,
        "definitions": {key: text.format(REFUSAL_CHARACTERS) for key, text in TERMS["explore"].items()},
    }


def _describe_subset(subset: Subset) -> dict[str, Any]:
    pairs = subset.pairs
    refusing, prefix, words = pairs["refuses"], pairs["prefix"], pairs["words"]
    one_refuses = refusing[refusing[:, 0] != refusing[:, 1]]
    depths = zip(*np.unique(pairs["depth"], return_counts=True), strict=True)
    return {
        "pairs": len(pairs),
        "depth": {"mean": _mean(pairs["depth"]), "counts": {str(turns): int(count) for turns, count in depths}},
        "lengths": {
            unit: {"chosen": _quantiles(pairs[unit][:, 0]), "rejected": _quantiles(pairs[unit][:, 1]),
                   "difference": _mean(pairs[unit][:, 0] - pairs[unit][:, 1])}
            for unit in UNITS
        },
        "chosen_longer": {unit: _share(longer(*pairs[unit].T)) for unit in UNITS},
        "verbosity": _verbosity(words),
        "refusals": {"chosen": _share(refusing[:, 0]), "rejected": _share(refusing[:, 1]),
                     "refusal_is_chosen": _share(one_refuses[:, 0])},
        "shared_prefix": {"first_word": _share(prefix >= 1), "first_three_words": _share(prefix >= 3),
                          "share": _quantiles(prefix / np.maximum(words.min(axis=1), 1))},
        "words": _typical_words(*subset.words),
    }  # fmt: skip


def _share(values: np.ndarray) -> dict[str, float] | None:
    return share(float(values.sum()), len(values))


def _mean(values: np.ndarray) -> dict[str, float]:
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean, mean - half, mean + half, len(values)).as_dict()


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), **quantiles(values)}


def _verbosity(words: np.ndarray) -> list[dict[str, Any]]:
    words = words[words[:, 0] != words[:, 1]]
    ratio = words.max(axis=1) / np.maximum(words.min(axis=1), 1)
    return [
        {"from": low, "to": high if math.isfinite(high) else None,  # JSON has no infinity: the last bin is open
         "longer_is_chosen": _share(longer(*words[(ratio >= low) & (ratio < high)].T))}
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
