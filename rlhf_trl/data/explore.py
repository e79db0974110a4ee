"""Step `explore`: what the preference data is like and which biases it has, before any of it is dropped.

Reads `data.source`. Writes `exploration/`: `statistics.json` (every number with its interval, per subset), figures,
and `samples.md` with pairs to read.

    rlhf-trl explore RECIPE
"""

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.data.figures import draw
from rlhf_trl.data.hh import normalise
from rlhf_trl.data.pair import Pair, RowError
from rlhf_trl.data.sources import Row, map_chunks, read_rows, seeded_hash
from rlhf_trl.data.summary import TERMS, longer, quantiles, share
from rlhf_trl.models.tokenizer import load_tokenizer
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import write_json, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import estimate_mean
from rlhf_trl.text.display import fence, inline
from rlhf_trl.text.refusals import REFUSAL_CHARACTERS, REFUSALS, refuses

UNITS = ("characters", "words", "tokens")
# How many times longer the longer answer is, in words.
RATIOS = {"1–1.25": 1.25, "1.25–1.5": 1.5, "1.5–2": 2.0, "2–3": 3.0, "over 3": math.inf}
WORD = re.compile(r"\w+(?:'\w+)*")
# One pair in numbers; two stand for the chosen and the rejected answer. `prefix`: words that both answers begin with.
PAIR = np.dtype([("depth", int), *((unit, int, 2) for unit in UNITS), ("refuses", bool, 2), ("prefix", int)])
# Where an example stands in `samples.md` -> the rows of the smallest hashes, so that their order plays no part: the
# hash, the row, and its pair as far as it can be read.
Examples = dict[tuple[bool, str, str], list[tuple[str, Row, Pair | None]]]
Measured = tuple[dict[str, np.ndarray], Counter[str], Examples]
RANDOM, RANDOM_PAIRS = "Drawn by hash", 3
REFUSING = {(True, False): ["Only the chosen answer refuses"], (False, True): ["Only the rejected answer refuses"]}
UNUSABLE = "## Rows that `prepare` drops\n\nOne for each reason (see `data/quarantine.jsonl`).\n"
MAX_CHARACTERS = 1200


def explore(recipe: Recipe, run: RunDir) -> None:
    """Measure the source (else UserError) and draw what its reader should know."""
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    unreadable: Counter[str] = Counter()
    examples: Examples = {}
    rows = tqdm(read_rows(recipe.data, recipe.seed), desc="explore", unit=" rows")
    work = partial(measure, load_tokenizer(recipe, run), recipe.seed)
    for _, (measured, dropped, chunk) in map_chunks(work, iter(rows)):
        for name, pairs in measured.items():
            parts[name].append(pairs)
        unreadable.update(dropped)
        _keep(examples, chunk)
    subsets = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    everything = np.concatenate([np.empty(0, PAIR), *subsets.values()])
    statistics: dict[str, Any] = {
        "rows": len(everything) + unreadable.total(),
        "unusable": dict(unreadable),
        "overall": _describe(everything) if len(everything) else None,
        "subsets": {name: _describe(pairs) for name, pairs in subsets.items()},
        "refusal_patterns": REFUSALS,
        "definitions": {key: text.format(REFUSAL_CHARACTERS) for key, text in TERMS["explore"].items()},
    }
    write_json(run.exploration / "statistics.json", statistics)
    draw(run.exploration, statistics["subsets"], subsets)
    write_text(run.exploration / "samples.md", render(recipe.data.source, examples))


def measure(tokenizer: Any, seed: int, rows: Sequence[Row]) -> Measured:
    """Measure rows: the pairs of each subset, of dtype `PAIR`; the reasons against the others; examples."""
    usable: defaultdict[str, list[tuple[Row, Pair]]] = defaultdict(list)
    unreadable: Counter[str] = Counter()
    examples: Examples = {}
    for row in rows:
        try:
            pair = normalise(row[2])
        except RowError as error:
            unreadable[error.reasons[0].value] += 1
            reasons = ", ".join(reason.value for reason in error.reasons)
            _keep(examples, {(True, UNUSABLE, reasons): [(seeded_hash(seed, row), row, error.pair)]})
        else:
            usable[row[1]].append((row, pair))
    measured = {}
    for subset, pairs in usable.items():
        answers = [(pair.chosen, pair.rejected) for _, pair in pairs]
        ids = tokenizer([*itertools.chain(*answers)], add_special_tokens=False, verbose=False).input_ids
        numbers = []
        for (row, pair), both, *tokens in zip(pairs, answers, ids[::2], ids[1::2], strict=True):
            words = [WORD.findall(text.lower().replace("’", "'")) for text in both]
            prefix = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False))
            refusing = refuses(pair.chosen), refuses(pair.rejected)
            lengths = ((len(one), len(other)) for one, other in (both, words, tokens))
            numbers.append((pair.user_turns, *lengths, refusing, sum(1 for _ in prefix)))
            example = seeded_hash(seed, row), row, pair
            heading = f"## {inline(subset[:60])}\n"
            _keep(examples, {(False, heading, title): [example] for title in (RANDOM, *REFUSING.get(refusing, ()))})
        measured[subset] = np.array(numbers, PAIR)
    return measured, unreadable, examples


def _describe(pairs: np.ndarray) -> dict[str, Any]:
    refusing, prefix, words = pairs["refuses"], pairs["prefix"], pairs["words"]
    one_refuses = refusing[refusing[:, 0] != refusing[:, 1]]
    depths = zip(*np.unique(pairs["depth"], return_counts=True), strict=True)
    apart = words[words[:, 0] != words[:, 1]]
    bins = np.digitize(apart.max(axis=1) / np.maximum(apart.min(axis=1), 1), [*RATIOS.values()])
    return {
        "pairs": len(pairs),
        "depth": {"mean": estimate_mean(pairs["depth"]).as_dict(),
                  "counts": {str(turns): int(count) for turns, count in depths}},
        "lengths": {
            unit: {"chosen": quantiles(pairs[unit][:, 0]), "rejected": quantiles(pairs[unit][:, 1]),
                   "difference": estimate_mean(pairs[unit][:, 0] - pairs[unit][:, 1]).as_dict()}
            for unit in UNITS
        },
        "chosen_longer": {unit: share(longer(*pairs[unit].T)) for unit in UNITS},
        "verbosity": {name: share(longer(*apart[bins == place].T)) for place, name in enumerate(RATIOS)},
        "refusals": {"chosen": share(refusing[:, 0]), "rejected": share(refusing[:, 1])},
        "one_refusal": {"is_chosen": share(one_refuses[:, 0])},
        "shared_prefix": {"first_word": share(prefix >= 1), "first_three_words": share(prefix >= 3)},
    }  # fmt: skip


def _keep(examples: Examples, more: Examples) -> None:
    """Add examples, and let go those that others outrank."""
    for place, new in more.items():
        ranked = sorted([*examples.get(place, []), *new], key=lambda example: example[0])
        examples[place] = ranked[: RANDOM_PAIRS if place[2] == RANDOM else 1]


def render(source: str, examples: Examples) -> str:
    """Write `samples.md`: the texts are hostile by design, so each stands in a fence that it cannot close."""
    note = "Pairs as they stand in the data; some may offend. Row numbers count from 0 over the source."
    parts = [f"# Samples of {inline(source[:60])}\n\n{note}\n"]
    for heading, places in itertools.groupby(sorted(examples), key=lambda place: place[1]):
        parts.append(heading)
        parts += [_render_one(place[2], *example) for place in places for example in examples[place]]
    return "\n".join(parts)


def _render_one(title: str, _: str, row: Row, pair: Pair | None) -> str:
    number, subset, raw = row
    heading = f"### {title} (row {number} of {inline(subset[:60])})\n\n"
    if pair is None:
        return heading + _fence(json.dumps(raw, default=str, indent=1, ensure_ascii=False))
    asked = pair.prompt[-1]["content"] if pair.prompt else ""
    texts = {f"User, message {len(pair.prompt)}": asked, "Chosen": pair.chosen, "Rejected": pair.rejected}
    return heading + "\n".join(f"**{who}**, {len(text)} characters\n\n{_fence(text)}" for who, text in texts.items())


def _fence(text: str) -> str:
    """A Markdown code block of a text's beginning."""
    more = len(text) - MAX_CHARACTERS
    return fence(text[:MAX_CHARACTERS].replace("\r\n", "\n") + (f"\n[… {more} more characters]" if more > 0 else ""))
