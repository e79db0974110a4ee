"""Step `prepare`: clean the preference pairs, count what is dropped, fit them to the length limit, split by prompt.

Reads `data.source`. Writes `data/`: pairs and prompts for train and test; `quarantine.jsonl` with every dropped row
and its reasons; `summary.json`, which accounts for every row; the tokenizer that all later steps use.

    rlhf-trl prepare RECIPE
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import TextIO

import numpy as np
from tqdm import tqdm

from rlhf_trl.data.check import Checked, check
from rlhf_trl.data.pair import Reason
from rlhf_trl.data.sources import Row, map_chunks, read_rows
from rlhf_trl.data.split import KEY, Split, split
from rlhf_trl.data.summary import KEPT, Tally, longer, summarise, total_length
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import json_line, write_json, writing
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.words import prompt_id

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, run: RunDir) -> None:
    """Turn the source into train and test pairs and prompts.

    The rows go by once: a temporary file takes the pairs that are kept, memory their numbers and keys.

    Raises:
        UserError: the source cannot be used; too large a share of it is dropped (`quarantine.jsonl` is there to read);
            or what is left cannot be split.
    """
    from rlhf_trl.models.tokenizer import load_tokenizer

    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    rows = tqdm(read_rows(recipe.data, recipe.seed), desc="prepare", unit=" rows")
    run.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=run.data) as pairs:
        with writing(run.quarantine) as quarantine:
            chunks = map_chunks(partial(_set_up, recipe, run), iter(rows))
            kept, keys = _clean(chunks, tallies, pairs, quarantine)
        _check_dropped(recipe, run, sum(tallies.values(), Tally()))
        by_name = np.argsort(np.argsort([*tallies]))[kept["subset"]]
        parts = split(keys, kept["keys"], by_name, total_length(kept), recipe.data.test_fraction, recipe.seed)
        pairs.seek(0)
        _write_splits(run, pairs, parts)
    tokenizer = load_tokenizer(recipe, run)
    tokenizer.save_pretrained(run.tokenizer)
    summary = summarise(recipe, tokenizer, tallies, kept, parts)
    if summary["columns_not_read"]:
        logger.warning("columns of the source that no step reads: %s", ", ".join(sorted(summary["columns_not_read"])))
    write_json(run.summary, summary)


def _set_up(recipe: Recipe, run: RunDir) -> Callable[[list[Row]], list[Checked]]:
    """What checks rows, in this process or another one."""
    from rlhf_trl.models.tokenizer import load_tokenizer

    return partial(check, load_tokenizer(recipe, run), recipe.data)


def _clean(
    chunks: Iterator[tuple[list[Row], list[Checked]]],
    tallies: defaultdict[str, Tally],
    pairs: TextIO,
    quarantine: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Write each row to the pairs or to the quarantine, and count it.

    Returns:
        What is counted of the kept pairs, of dtype `KEPT`, and the keys of their prompts, of dtype `KEY`.
    """
    numbers, keys = array("q"), bytearray()
    seen: set[bytes] = set()
    places: dict[str, int] = {}
    for (number, subset, raw), row in (item for chunk in chunks for item in zip(*chunk, strict=True)):
        tally, place = tallies[subset], places.setdefault(subset, len(places))
        reasons = _reasons(row, seen)
        tally.rows += 1
        tally.found.update(reasons)
        tally.dropped.update(reasons[:1])
        tally.not_read.update(row.not_read)
        tally.notes["multi_turn"] += row.multi_turn
        lengths = (len(row.pair.chosen), len(row.pair.rejected)) if row.pair else ()
        if lengths:
            tally.compared += 1
            tally.chosen_longer += float(longer(*lengths))
        if row.pair is None or reasons:
            entry = {"row": number, "subset": subset, "reason": reasons[0], "reasons": reasons}
            # JSON has no NaN. Dropped rows may hold what UTF-8 cannot, so this file is ASCII.
            entry["raw"] = json.loads(json.dumps(raw, default=str), parse_constant=lambda _: None)
            quarantine(json.dumps(entry, sort_keys=True) + "\n")
            continue
        tally.notes.update([*row.notes, *_votes(row, seen)])
        pairs.write(json_line(vars(row.pair) | {"row": number, "subset": subset, "id": prompt_id(row.pair.prompt)}))
        numbers.extend((number, place, len(row.keys), *row.tokens, *lengths))
        keys += b"".join(row.keys)
    return np.frombuffer(numbers, KEPT), np.frombuffer(keys, KEY)


def _reasons(row: Checked, seen: set[bytes]) -> list[str]:
    """What speaks against a row, with earlier rows that are copies of it; the row is then seen."""
    kinds = (Reason.DUPLICATE, Reason.NEAR_DUPLICATE)
    found = [kind.value for kind, copy in zip(kinds, row.copies, strict=False) if copy in seen][:1]
    seen.update(row.copies)
    return [reason.value for reason in row.reasons if not (found and reason is Reason.TOO_LONG)] + found


def _votes(row: Checked, seen: set[bytes]) -> list[str]:
    """What earlier kept rows say on the same prompt; the row is then seen as kept."""
    prompt, pair, other_way_round = row.votes
    notes = ["contradictory"] * (other_way_round in seen) + ["repeated_prompt"] * (prompt in seen)
    seen.update((prompt, pair))
    return notes


def _write_splits(run: RunDir, kept: TextIO, parts: Split) -> None:
    written: set[str] = set()
    with contextlib.ExitStack() as files:
        pairs, prompts = (
            [files.enter_context(writing(path(name))) for name in ("train", "test")]
            for path in (run.pairs, run.prompts)
        )
        for line, held_out, first_half in zip(kept, parts.held_out.tolist(), parts.first_half, strict=True):
            pair = json.loads(line)
            pairs[held_out](json_line(pair | {"half": "first" if first_half else "second"}))
            if pair["id"] not in written:
                written.add(pair["id"])
                prompts[held_out](json_line({key: pair[key] for key in ("id", "prompt", "subset")}))


def _check_dropped(recipe: Recipe, run: RunDir, whole: Tally) -> None:
    dropped, limit = whole.dropped.total(), recipe.data.max_dropped_fraction
    if dropped > limit * whole.rows:
        top = ", ".join(f"{reason} {count}" for reason, count in whole.dropped.most_common(4))
        share = f"{dropped / whole.rows:.1%}, more than the {limit:.1%} of `data.max_dropped_fraction`"
        remedy = f"read {run.quarantine}; mend the data, or raise the limit"
        raise UserError(recipe.data.source, f"{dropped} of {whole.rows} rows are dropped ({share}): {top}", remedy)
