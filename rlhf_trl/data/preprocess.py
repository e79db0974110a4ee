"""Step `prepare`: clean the preference pairs, count what is dropped, fit them to the length limit, split by prompt.

Reads `data.source`. Writes `data/`: pairs and prompts for train and test, and the pairs' token ids; `quarantine.jsonl`
with every dropped row and its reasons; `summary.json`, which accounts for every row; the tokenizer of all later steps.

    rlhf-trl prepare RECIPE
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter
from rapidfuzz.distance import Indel
from tqdm import tqdm

from rlhf_trl.data.hh import normalise, score_not_higher, unread_columns
from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.data.sources import Row, map_chunks, read_rows
from rlhf_trl.data.split import KEY, Split, prompt_keys, split
from rlhf_trl.data.summary import KEPT, Tally, longer, summarise, total_length
from rlhf_trl.models.tokenizer import encode, encode_all, load_tokenizer, render
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Data
from rlhf_trl.run.files import json_line, replacing, write_json, writing
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.redact import without_values
from rlhf_trl.text.words import prompt_id

logger = logging.getLogger(__name__)

# Two copies of one text may differ in these and in spaces; not in marks that carry meaning, such as a minus.
MARKS = str.maketrans(dict.fromkeys(".,;:!?'\"“”‘’…()[]{}–—", " "))
IDS = {side: pa.list_(pa.int32()) for side in ("prompt", "chosen", "rejected")}
ROW_GROUP = 8  # chunks of rows that the files of token ids take at once
THOUGHT = "</think>"
OPEN_HALF = '"half": null'  # of a line whose half is not yet known; inside a text, quotes are escaped
# A usable pair on its way from `check` to the split: its line and its prompt's line of the views, and its token ids.
USABLE = pa.schema({"pair_line": pa.string(), "prompt_line": pa.string(), "id": pa.string(), **IDS})
# The row of a pair, in the order of `train.jsonl`. The first row of each prompt stands for it in the view of prompts.
TOKENS = pa.schema({**IDS, "half": pa.string(), "first": pa.bool_()})


@dataclass
class Checked:
    """A row; without a reason against it, `prepare` keeps it unless it is a copy of an earlier one."""

    characters: tuple[int, ...]
    """Of both answers, where they can be read."""
    reasons: list[Reason]
    not_read: list[str]
    multi_turn: bool
    copies: tuple[bytes, ...] = ()
    """What an exact and a rough copy has in common with the row."""
    tokens: tuple[int, ...] = ()
    """How many the prompt and both answers have."""
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
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    rows = tqdm(read_rows(recipe.data, recipe.seed), desc="prepare", unit=" rows")
    run.data.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(recipe, run)
    with tempfile.TemporaryFile(dir=run.data) as pairs:
        with writing(run.quarantine) as quarantine, pa.ipc.new_stream(pairs, USABLE) as stream:
            chunks = map_chunks(partial(check, tokenizer, recipe.data), iter(rows))
            kept, keys = _clean(chunks, tallies, stream.write_batch, quarantine)
        _check_dropped(recipe, run, sum(tallies.values(), Tally()))
        by_name = np.argsort(np.argsort([*tallies]))[kept["subset"]]
        parts = split(keys, kept["keys"], by_name, total_length(kept), recipe.data.test_fraction, recipe.seed)
        pairs.seek(0)
        _write_splits(run, pairs, parts)
    tokenizer.save_pretrained(run.tokenizer)
    summary = summarise(recipe, tokenizer, tallies, kept, parts)
    if summary["columns_not_read"]:
        logger.warning("columns of the source that no step reads: %s", ", ".join(sorted(summary["columns_not_read"])))
    write_json(run.summary, summary)


def _clean(
    chunks: Iterator[tuple[list[Row], tuple[list[Checked], pa.RecordBatch]]],
    tallies: defaultdict[str, Tally],
    keep: Callable[[pa.RecordBatch], None],
    quarantine: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each pair or write its row to the quarantine, and count it.

    Returns:
        What is counted of the kept pairs, of dtype `KEPT`, and the keys of their prompts, of dtype `KEY`.
    """
    numbers, keys = array("q"), bytearray()
    seen: set[bytes] = set()
    places: dict[str, int] = {}
    for chunk, (rows, usable) in chunks:
        is_kept = []
        for (number, subset, raw), row in zip(chunk, rows, strict=True):
            tally, place = tallies[subset], places.setdefault(subset, len(places))
            reasons = _reasons(row, seen)
            tally.rows += 1
            tally.found.update(reasons)
            tally.dropped.update(reasons[:1])
            tally.not_read.update(row.not_read)
            tally.notes["multi_turn"] += row.multi_turn
            if row.characters:
                tally.compared += 1
                tally.chosen_longer += float(longer(*row.characters))
            is_kept += [not reasons] * (not row.reasons)
            if reasons:
                entry = {"row": number, "subset": subset, "reason": reasons[0], "reasons": reasons}
                # JSON has no NaN. Dropped rows may hold what UTF-8 cannot, so this file is ASCII.
                entry["raw"] = json.loads(json.dumps(raw, default=str), parse_constant=lambda _: None)
                quarantine(json.dumps(entry, sort_keys=True) + "\n")
                continue
            tally.notes.update([*row.notes, *_votes(row, seen)])
            numbers.extend((number, place, len(row.keys), *row.tokens, *row.characters))
            keys += b"".join(row.keys)
        keep(usable.filter(pa.array(is_kept, pa.bool_())))
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


def _write_splits(run: RunDir, kept: IO[bytes], parts: Split) -> None:
    written: set[str] = set()
    with contextlib.ExitStack() as files:
        add, names = files.enter_context, ("train", "test")
        pairs, prompts = ([add(writing(path(name))) for name in names] for path in (run.pairs, run.prompts))
        tokens = [add(ParquetWriter(add(replacing(run.tokens(name))), TOKENS, compression="zstd")) for name in names]
        stream, at = pa.ipc.open_stream(kept), 0
        while chunks := [*itertools.islice(stream, ROW_GROUP)]:
            batch = pa.concat_batches(chunks)
            rows = slice(at, at := at + len(batch))
            held_out, half = parts.held_out[rows], np.where(parts.first_half[rows], "first", "second")
            first = []
            texts = (batch[name].to_pylist() for name in ("pair_line", "prompt_line", "id"))
            for part, name, pair, prompt, key in zip(held_out.tolist(), half, *texts, strict=True):
                pairs[part](pair.replace(OPEN_HALF, f'"half": "{name}"', 1))
                first.append(key not in written)
                if first[-1]:
                    written.add(key)
                    prompts[part](prompt)
            ids = pa.record_batch([*(batch[side] for side in IDS), half, first], schema=TOKENS)
            for part in np.unique(held_out):
                tokens[int(part)].write_batch(ids.filter(pa.array(held_out == part)))


def _check_dropped(recipe: Recipe, run: RunDir, whole: Tally) -> None:
    dropped, limit = whole.dropped.total(), recipe.data.max_dropped_fraction
    if dropped > limit * whole.rows:
        top = ", ".join(f"{reason} {count}" for reason, count in whole.dropped.most_common(4))
        share = f"{dropped / whole.rows:.1%}, more than the {limit:.1%} of `data.max_dropped_fraction`"
        remedy = f"read {run.quarantine}; mend the data, or raise the limit"
        raise UserError(recipe.data.source, f"{dropped} of {whole.rows} rows are dropped ({share}): {top}", remedy)


def check(tokenizer: Any, data: Data, rows: Sequence[Row]) -> tuple[list[Checked], pa.RecordBatch]:
    """Check rows one by one, and fit those to the length limit that nothing speaks against; UserError as in `render`.

    Returns:
        All rows, and those without a reason against them as they are to be written, of schema `USABLE`.
    """
    control = _control_texts(tokenizer)
    checked = [_check_alone(raw, data, control) for *_, raw in rows]
    usable = [(row, source) for (row, pair), source in zip(checked, rows, strict=True) if pair]
    pairs = _without_secrets([pair for _, pair in checked if pair])
    lines: list[tuple[Any, ...]] = []
    fits = fit(tokenizer, pairs, data.max_length)
    for (row, (number, subset, raw)), pair, fitted in zip(usable, pairs, fits, strict=True):
        short, tokens = fitted or (pair, [])
        if not tokens or tokens[1] == tokens[2]:  # as of an uncased tokenizer
            row.reasons = [Reason.IDENTICAL if tokens else Reason.TOO_LONG]
            continue
        row.tokens = tuple(map(len, tokens))
        _compare(row, pair, short.prompt, raw)
        of_prompt = {"id": prompt_id(short.prompt), "prompt": short.prompt, "subset": subset}
        whole = {**vars(short), **of_prompt, "row": number, "half": None}
        lines.append((json_line(whole), json_line(of_prompt), of_prompt["id"], *tokens))
    columns = map(list, zip(*lines, strict=True)) if lines else [[]] * len(USABLE)
    return [row for row, _ in checked], pa.record_batch([*columns], schema=USABLE)


def _without_secrets(pairs: list[Pair]) -> list[Pair]:
    """The pairs as files take them, so that the token ids say what these say."""
    texts = "\n".join("\n".join([*(m["content"] for m in pair.prompt), pair.chosen, pair.rejected]) for pair in pairs)
    if without_values(texts) == texts:
        return pairs
    return [Pair(**json.loads(without_values(json_line(vars(pair))))) for pair in pairs]


def _control_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer or the template would read as control, not as content."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added}
    if "Human:" in tokenizer.chat_template:
        tokens |= {"\n\nHuman:", "\n\nAssistant:"}
    if "1" not in render(tokenizer, [[{"role": "user", "content": "0"}]], [f"1{THOUGHT}2"])[1]:
        tokens.add(THOUGHT)  # many templates cut off what comes before it
    return [token for token in tokens if token.strip()]


def _check_alone(raw: Any, data: Data, control: list[str]) -> tuple[Checked, Pair | None]:
    """Check a row, and give its pair where nothing speaks against it."""
    try:
        pair = normalise(raw)
    except RowError as error:
        read = error.pair
        characters = (len(read.chosen), len(read.rejected)) if read else ()
        return Checked(characters, error.reasons, unread_columns(raw), bool(read and read.user_turns > 1)), None
    texts = [*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected]
    similarity = Indel.normalized_similarity(pair.chosen, pair.rejected, score_cutoff=data.tie_threshold)
    roles, characters = [message["role"] for message in pair.prompt], (len(pair.chosen), len(pair.rejected))
    holds = {
        Reason.TOO_SHORT: min(characters) < data.min_answer_chars,
        Reason.TIE: similarity >= data.tie_threshold,
        Reason.CONTROL_TOKENS: any(token in text for text in texts for token in control),
    }
    rough = [" ".join(text.casefold().translate(MARKS).split()) or text for text in texts]
    prompt, *answers = (_digest(part).hex() for part in (pair.prompt, pair.chosen, pair.rejected))
    copies = _digest("pair", prompt, answers), _digest("rough", roles, rough)
    reasons = [reason for reason, held in holds.items() if held]
    row = Checked(characters, reasons, unread_columns(raw), pair.user_turns > 1, copies)
    row.votes = tuple(_digest("kept", prompt, part) for part in ([], answers, answers[::-1]))
    return row, None if reasons else pair


def _compare(row: Checked, pair: Pair, fitted: list[Message], raw: Any) -> None:
    """Note what the split compares with other rows, and what was shortened."""
    *heads, whole = prompt_keys(pair.prompt)
    *short_heads, short = [whole] if fitted is pair.prompt else prompt_keys(fitted)
    row.keys = [*heads, *short_heads, whole, short]
    holds = {
        "score_not_higher": score_not_higher(raw),
        "truncated": fitted[-1] != pair.prompt[-1],
        "turns_dropped": len(fitted) < len(pair.prompt),
    }
    row.notes = [note for note, held in holds.items() if held]


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def fit(tokenizer: Any, pairs: Sequence[Pair], max_length: int) -> Iterator[tuple[Pair, list[list[int]]] | None]:
    """Shorten the prompts so that each has, with its longer answer, at most `max_length` tokens.

    Whole turns go first, the oldest before the others, so that the prompt still begins with the user (after the system
    message); then the beginning of the last user turn goes, up to a token boundary. UserError as in `render`.

    Returns:
        For each pair, the pair and the token ids of its prompt and answers; None if there is no room for a prompt.
    """
    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    encoded = encode_all(tokenizer, [pair.prompt for pair in pairs], *sides)
    for pair, (prompt, *answers) in zip(pairs, encoded, strict=True):
        room = max_length - max(map(len, answers))
        if len(prompt) <= room:
            yield pair, [prompt, *answers]
            continue
        shorter = _shorten(tokenizer, pair.prompt, room)
        yield shorter and (Pair(shorter[0], pair.chosen, pair.rejected), [shorter[1], *answers])


def _shorten(tokenizer: Any, prompt: list[Message], room: int) -> tuple[list[Message], list[int]] | None:
    def find(candidates: list[list[Message]]) -> tuple[list[Message], list[int]] | None:
        # Text may break into other tokens where it is cut, so each candidate is measured whole.
        tokens = cache(lambda place: encode(tokenizer, candidates[place])[0])
        first = bisect.bisect_left(range(len(candidates)), True, key=lambda place: len(tokens(place)) <= room)
        return None if first == len(candidates) else (candidates[first], tokens(first))

    system = prompt[: prompt[0]["role"] == "system"]
    turns = prompt[len(system) :]
    if shorter := find([system + turns[start:] for start in range(2, len(turns), 2)]):  # roles alternate
        return shorter
    text = turns[-1]["content"]
    cuts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    tails = [text[start:].lstrip() for start, _ in cuts[1:][-max(room, 1) :]]
    return find([[*system, {"role": "user", "content": tail}] for tail in tails if tail])
