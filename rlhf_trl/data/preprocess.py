"""Step `prepare`: clean the preference pairs, count what is dropped, fit them to the length limit, split by prompt.

Reads `data.source`. Writes `data/`: pairs and prompts for train and test; `quarantine.jsonl` with every dropped row
and its reasons; `summary.json`, which accounts for every row; the tokenizer that all later steps use.

    rlhf-trl prepare RECIPE
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from rlhf_trl.data.check import Checked, check
from rlhf_trl.data.chunks import map_chunks
from rlhf_trl.data.pair import Reason
from rlhf_trl.data.sources import Row, read_rows
from rlhf_trl.data.split import KEY, Split, split
from rlhf_trl.data.summary import KEPT, Tally, summarise, total_length
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import json_line, write_json, writing
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.names import prompt_id

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, run: RunDir) -> None:
    """Turn the source into train and test pairs and prompts.

    The rows go by once: a temporary file takes the pairs that are kept, memory their numbers and keys.

    Raises:
        UserError: the source cannot be used; too large a share of it is dropped (`quarantine.jsonl` is there to read);
            or what is left cannot be split.
    """
    from rlhf_trl.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe, run)
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    rows = tqdm(read_rows(recipe.data, recipe.seed), desc="prepare", unit=" rows")
    run.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=run.data) as pairs:
        with writing(run.quarantine) as quarantine:
            chunks = map_chunks(partial(check, tokenizer, recipe.data), partial(_set_up, recipe, run), iter(rows))
            kept, keys = _clean(chunks, tallies, pairs, quarantine)
        _check_dropped(recipe, run, tallies)
        by_name = np.argsort(np.argsort([*tallies]))[kept["subset"]]
        parts = split(keys, kept["keys"], by_name, total_length(kept), recipe.data.test_fraction, recipe.seed)
        pairs.seek(0)
        _write_splits(run, pairs, parts)
    tokenizer.save_pretrained(run.tokenizer)
    summary = summarise(recipe, tokenizer, tallies, kept, parts)
    if summary["columns_not_read"]:
        logger.warning("columns of the source that no step reads: %s", ", ".join(sorted(summary["columns_not_read"])))
    write_json(run.summary, summary)


def _set_up(recipe: Recipe, run: RunDir) -> Callable[[list[Row]], list[Checked]]:
    """What checks rows in another process."""
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
    for chunk, checked in chunks:
        for (number, subset, raw), row in zip(chunk, checked, strict=True):
            tally, place = tallies[subset], places.setdefault(subset, len(places))
            reasons = _reasons(row, seen)
            tally.add(row, reasons)
            if row.fitted is None or reasons:
                entry = {"row": number, "subset": subset, "reason": reasons[0], "reasons": reasons}
                # Dropped rows may hold what UTF-8 cannot, so this file is ASCII.
                quarantine(json.dumps(entry | {"raw": _printable(raw)}, sort_keys=True) + "\n")
                continue
            tally.notes.update([*row.notes, *_votes(row, seen)])
            identity = {"row": number, "subset": subset, "id": prompt_id(row.fitted.prompt)}
            pairs.write(json_line(vars(row.fitted) | identity))
            numbers.extend((number, place, len(row.keys), *row.tokens, *(row.answers or ())))
            keys += b"".join(row.keys)
    return np.frombuffer(numbers, KEPT), np.frombuffer(keys, KEY)


def _reasons(row: Checked, seen: set[bytes]) -> list[str]:
    """What speaks against a row, with earlier rows that are copies of it; the row is then seen."""
    copies = [copy in seen for copy in row.copies]
    seen.update(row.copies)
    kinds = (Reason.DUPLICATE, Reason.NEAR_DUPLICATE)
    found = [kind.value for kind, held in zip(kinds, copies, strict=False) if held][:1]
    own = [reason.value for reason in row.reasons if not (found and reason is Reason.TOO_LONG)]
    return own + found


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


def _check_dropped(recipe: Recipe, run: RunDir, tallies: dict[str, Tally]) -> None:
    whole, limit = sum(tallies.values(), Tally()), recipe.data.max_dropped_fraction
    dropped = whole.dropped.total()
    if dropped > limit * whole.rows:
        top = ", ".join(f"{reason} {count}" for reason, count in whole.dropped.most_common(4))
        share = f"{dropped / whole.rows:.1%}, more than the {limit:.1%} of `data.max_dropped_fraction`"
        remedy = f"read {run.quarantine}; mend the data, or raise the limit"
        raise UserError(recipe.data.source, f"{dropped} of {whole.rows} rows are dropped ({share}): {top}", remedy)


def _printable(value: Any) -> Any:
    """A raw row as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
