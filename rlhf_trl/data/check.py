"""What `prepare` finds out about a row by itself: its pair, what speaks against it, and how it fits the length limit.

Works on values in memory, on many rows at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Indel

from rlhf_trl.data.hh import normalise, score_not_higher, unread_columns
from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.data.sources import Row
from rlhf_trl.data.split import prompt_keys
from rlhf_trl.recipe.schema import Data

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
