"""Step `prepare`: clean the preference pairs, count what is dropped, fit them to the length limit, split by prompt.

Reads `data.source`. Writes `data/`: pairs and prompts for train and test; `quarantine.jsonl` with every dropped row
and its reasons; `summary.json`, which accounts for every row; the tokenizer that all later steps use.

    rlhf-trl prepare RECIPE
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import re
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

import numpy as np
from rapidfuzz.distance import Indel
from tqdm import tqdm

from rlhf_trl.data.hh import normalise, score_not_higher, unread_columns
from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.data.sources import Row, map_chunks, read_rows
from rlhf_trl.data.split import KEY, Split, prompt_keys, split
from rlhf_trl.data.summary import KEPT, Tally, longer, summarise, total_length
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Data
from rlhf_trl.run.files import json_line, write_json, writing
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.words import prompt_id

logger = logging.getLogger(__name__)

# Marks that may differ between two copies of one text; not those that carry meaning, such as the minus of a number.
ROUGH = re.compile(r"[\s.,;:!?'\"“”‘’…()\[\]{}–—]+")
Tokens = tuple[int, int, int]  # of the prompt and both answers


@dataclass
class Checked:
    """A row; without a reason against it, `prepare` keeps it unless it is a copy of an earlier one."""

    pair: Pair | None
    """As far as it can be read; without a reason, fitted to the length limit."""
    reasons: list[Reason]
    not_read: list[str]
    multi_turn: bool
    copies: tuple[bytes, ...] = ()
    """What an exact and a rough copy has in common with the row."""
    tokens: Tokens = (0, 0, 0)
    keys: list[bytes] = field(default_factory=list)
    """Of the beginnings of the prompt, then those of the whole prompt as it was and as it is kept."""
    notes: list[str] = field(default_factory=list)
    votes: tuple[bytes, ...] = ()
    """What a row with the same prompt, with the same pair, and with the pair the other way round has in common."""


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


# --- rows by themselves ----------------------------------------------------------------------------------------------


def check(tokenizer: Any, data: Data, rows: Sequence[Row]) -> list[Checked]:
    """Check rows one by one, and fit those to the length limit that nothing speaks against.

    Raises:
        UserError: the chat template refuses a conversation.
    """
    control = _control_pattern(tokenizer)
    checked = [_check_alone(raw, data, control) for *_, raw in rows]
    usable = [
        (row, row.pair, raw) for row, (*_, raw) in zip(checked, rows, strict=True) if row.pair and not row.reasons
    ]
    fits = fit(tokenizer, [pair for _, pair, _ in usable], data.max_length)
    for (row, pair, raw), fitted in zip(usable, fits, strict=True):
        if fitted is None:
            row.reasons = [Reason.TOO_LONG]
        else:
            row.pair, row.tokens = fitted
            _compare(row, pair, row.pair, raw)
    return checked


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Match text that the tokenizer or the template would read as control, not as content."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added}
    if "Human:" in tokenizer.chat_template:
        tokens |= {"\n\nHuman:", "\n\nAssistant:"}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens) if token.strip()))


def _check_alone(raw: Any, data: Data, control: re.Pattern[str]) -> Checked:
    try:
        pair = normalise(raw)
    except RowError as error:
        multi_turn = error.pair is not None and error.pair.user_turns > 1
        return Checked(error.pair, error.reasons, unread_columns(raw), multi_turn)
    texts = [*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected]
    similarity = Indel.normalized_similarity(pair.chosen, pair.rejected, score_cutoff=data.tie_threshold)
    roles = [message["role"] for message in pair.prompt]
    holds = {
        Reason.TOO_SHORT: min(len(pair.chosen), len(pair.rejected)) < data.min_answer_chars,
        Reason.TIE: similarity >= data.tie_threshold,
        Reason.CONTROL_TOKENS: any(control.search(text) for text in texts),
    }
    rough = [ROUGH.sub(" ", text.casefold()).strip() or text for text in texts]
    copies = _digest("pair", roles, texts), _digest("rough", roles, rough)
    reasons = [reason for reason, held in holds.items() if held]
    return Checked(pair, reasons, unread_columns(raw), pair.user_turns > 1, copies)


def _compare(row: Checked, pair: Pair, fitted: Pair, raw: Any) -> None:
    """Note what other rows are compared with, and what was shortened."""
    *heads, whole = prompt_keys(pair.prompt)
    *short_heads, short_whole = [whole] if fitted is pair else prompt_keys(fitted.prompt)
    row.keys = [*heads, *short_heads, whole, short_whole]
    prompt = _digest("prompt", pair.prompt)
    both = (pair.chosen, pair.rejected), (pair.rejected, pair.chosen)
    row.votes = prompt, *(_digest("kept", prompt.hex(), *answers) for answers in both)
    holds = {
        "score_not_higher": score_not_higher(raw),
        "truncated": fitted.prompt[-1] != pair.prompt[-1],
        "turns_dropped": len(fitted.prompt) < len(pair.prompt),
    }
    row.notes = [note for note, held in holds.items() if held]


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def fit(tokenizer: Any, pairs: Sequence[Pair], max_length: int) -> Iterator[tuple[Pair, Tokens] | None]:
    """Shorten the prompts so that each has, with its longer answer, at most `max_length` tokens.

    Whole turns go first, the oldest before the others, so that the prompt still begins with the user (after the system
    message); then the beginning of the last user turn goes, up to a token boundary.

    Returns:
        For each pair, the pair and its tokens; None if there is no room for a prompt.

    Raises:
        UserError: the chat template refuses a conversation.
    """
    from rlhf_trl.models.tokenizer import encode_all

    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    encoded = encode_all(tokenizer, [pair.prompt for pair in pairs], *sides)
    for pair, (prompt, chosen, rejected) in zip(pairs, encoded, strict=True):
        room = max_length - max(len(chosen), len(rejected))
        if len(prompt) <= room:
            yield pair, (len(prompt), len(chosen), len(rejected))
            continue
        shorter = _shorten(tokenizer, pair.prompt, room)
        yield shorter and (Pair(shorter[0], pair.chosen, pair.rejected), (shorter[1], len(chosen), len(rejected)))


def _shorten(tokenizer: Any, prompt: list[Message], room: int) -> tuple[list[Message], int] | None:
    from rlhf_trl.models.tokenizer import encode

    def tokens(prompt: list[Message]) -> int:
        return len(encode(tokenizer, prompt)[0])

    system = prompt[: prompt[0]["role"] == "system"]
    turns = prompt[len(system) :]
    shorter = [system + turns[start:] for start in range(2, len(turns), 2)]  # roles alternate
    text = turns[-1]["content"]
    cuts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    tails = [text[start:].lstrip() for start, _ in cuts[1:][-max(room, 1) :]]
    shorter += [[*system, {"role": "user", "content": tail}] for tail in tails if tail]
    # Text may break into other tokens where it is cut, so each candidate is measured whole.
    first = bisect.bisect_left(shorter, True, key=lambda prompt: tokens(prompt) <= room)
    return None if first == len(shorter) else (shorter[first], tokens(shorter[first]))
