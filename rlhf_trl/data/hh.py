"""Preference rows of every shape, brought into one form: a prompt, a chosen and a rejected answer.

Reads one row at a time; writes nothing:

    pair = normalise(raw)  # or RowError, which says what is wrong with the row

A row has `chosen` and `rejected`, and may have `prompt` (or `conversations`) and `system`. A value is

- an HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …": the prompt is everything up to the last "\\n\\nAssistant:";
- plain text: one user turn in `prompt`, an answer in `chosen` and `rejected` (which may repeat the prompt in front);
- messages, {"role", "content"} or {"from", "value"}; `chosen` and `rejected` may repeat the prompt. One message may
  stand without its list.

Every turn is stripped of the whitespace around it; nothing else in a text is changed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Message = dict[str, str]
Value = str | list[Message]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    "system": "system",
}
IS_TRANSCRIPT = re.compile(r"\s*Human:")
# Only a marker that begins a paragraph begins a turn: "Human:" also stands inside answers, and "\n\nHumans:" in some.
TURN = re.compile(r"\n\n(Human|Assistant):")


class Reason(str, Enum):
    """Why a row is dropped. A row with several reasons is dropped for the one that comes first here."""

    MALFORMED = "malformed"
    """Not an object or a transcript, text before the first turn, a system message inside, or the assistant begins."""
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    NOT_TEXT = "not_text"
    INVALID_UNICODE = "invalid_unicode"
    """A lone surrogate, which no UTF-8 file can hold."""
    UNKNOWN_ROLE = "unknown_role"
    ENDS_ON_HUMAN = "ends_on_human"
    """A transcript goes on after its last answer, or has none."""
    PROMPTS_DIFFER = "prompts_differ"
    """What comes before the last answer is not the same on both sides, or is not the row's `prompt`."""
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    EMPTY_PROMPT = "empty_prompt"
    CONSECUTIVE_ROLES = "consecutive_roles"
    """Two turns of one role in a row in the chosen transcript. (If only in the rejected one, the prompts differ.)"""
    IDENTICAL = "identical"
    """Both answers are the same. From here on, only rows without a reason above are looked at."""
    TOO_SHORT = "too_short"
    TIE = "tie"
    CONTROL_TOKENS = "control_tokens"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    TOO_LONG = "too_long"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first was preferred."""

    prompt: list[Message]
    chosen: str
    rejected: str

    @property
    def user_turns(self) -> int:
        return sum(message["role"] == "user" for message in self.prompt)


class RowError(Exception):
    """A row that is not a usable pair.

    Attributes:
        reasons: every reason that holds, in the order of `Reason`; the row is dropped for the first.
        pair: the pair as far as it can be read (the prompt is the chosen side's), or None where a side has no answer.
    """

    def __init__(self, reasons: Iterable[Reason], pair: Pair | None = None):
        found = set(reasons)
        self.reasons = [reason for reason in Reason if reason in found]
        self.pair = pair
        super().__init__(", ".join(reason.value for reason in self.reasons))


@dataclass(frozen=True)
class _Side:
    """One conversation, cut at its last assistant turn."""

    turns: list[Message]

    @property
    def end(self) -> int:
        answers = [index for index, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        return answers[-1] if answers else len(self.turns)

    @property
    def prompt(self) -> list[Message]:
        return self.turns[: self.end]

    @property
    def answer(self) -> str:
        return self.turns[self.end]["content"] if self.end < len(self.turns) else ""

    @property
    def open(self) -> bool:
        """Whether the conversation ends on something else than an answer."""
        return bool(self.turns) and self.end != len(self.turns) - 1


def normalise(raw: Any) -> Pair:
    """Bring one row into the form of a `Pair` whose prompt ends on a user turn.

    Raises:
        RowError: with every reason against it, up to `identical`; the later reasons are found by `prepare`.
    """
    (chosen, rejected), fits_prompt = _read_sides(raw, "chosen", "rejected")
    whole = chosen if chosen.turns else rejected
    differ = bool(chosen.turns and rejected.turns) and not (fits_prompt and chosen.prompt == rejected.prompt)
    holds = _faults(whole, chosen, rejected) | {
        Reason.PROMPTS_DIFFER: differ,
        Reason.EMPTY_CHOSEN: not chosen.answer and not chosen.open,
        Reason.EMPTY_REJECTED: not rejected.answer and not rejected.open,
        Reason.IDENTICAL: bool(chosen.answer) and chosen.answer == rejected.answer and not differ,
    }
    pair = Pair(whole.prompt, chosen.answer, rejected.answer)
    if any(holds.values()):
        readable = all(side.turns and not side.open for side in (chosen, rejected))
        raise RowError((reason for reason, held in holds.items() if held), pair if readable else None)
    return pair


def read_completion(raw: Any) -> tuple[list[Message], str]:
    """Read a row of one answer, `completion`, in every shape of a pair's: the prompt, and the answer to it.

    Raises:
        RowError: with every reason against it.
    """
    (side,), fits_prompt = _read_sides(raw, "completion")
    holds = _faults(side, side) | {
        Reason.PROMPTS_DIFFER: bool(side.turns) and not fits_prompt,
        Reason.EMPTY_CHOSEN: not side.answer and not side.open,
    }
    if any(holds.values()):
        raise RowError(reason for reason, held in holds.items() if held)
    return side.prompt, side.answer


def _faults(whole: _Side, *sides: _Side) -> dict[Reason, bool]:
    """Tell which reasons hold against one conversation, or the roles and ends of any."""
    roles = [turn["role"] for turn in whole.turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    asked = [turn["content"] for turn in whole.prompt if turn["role"] == "user"]
    return {
        Reason.MALFORMED: "system" in spoken or (spoken[:1] == ["assistant"] and bool(asked)),
        Reason.UNKNOWN_ROLE: any(turn["role"] not in ROLES.values() for side in sides for turn in side.turns),
        Reason.ENDS_ON_HUMAN: any(side.open for side in sides),
        Reason.EMPTY_PROMPT: not asked or not asked[-1],
        Reason.CONSECUTIVE_ROLES: any(first == second for first, second in itertools.pairwise(spoken)),
    }


def _read_sides(raw: Any, *names: str) -> tuple[list[_Side], bool]:
    """Read answers as whole conversations, and tell whether all go on from the row's prompt."""
    if not isinstance(raw, dict):
        raise RowError([Reason.MALFORMED])
    prompt: Value = []
    values = tuple(_read_value(raw, name) for name in names)
    if "prompt" in raw or "conversations" in raw:
        prompt = _read_value(raw, "prompt" if "prompt" in raw else "conversations")
        values = _without_repeat(prompt, *values)
    elif any(isinstance(value, str) and value and not IS_TRANSCRIPT.match(value) for value in values):
        raise RowError([Reason.MALFORMED])
    joined = [_join(prompt, value) for value in values]
    if raw.get("system"):
        opening = {"role": "system", "content": _text(raw["system"])}
        for turns, _ in joined:
            if turns and turns[0] != opening:
                turns.insert(0, opening)
    return [_Side(turns) for turns, _ in joined], all(fits for _, fits in joined)


def _read_value(raw: dict[str, Any], name: str) -> Value:
    """A field as stripped text or as messages with our names of the roles."""
    if name not in raw:
        raise RowError([Reason.MISSING_FIELD])
    value = [raw[name]] if isinstance(raw[name], dict) else raw[name]
    if not isinstance(value, list):
        return _text(value)
    messages = []
    for item in value:
        if not isinstance(item, dict):
            raise RowError([Reason.NOT_TEXT])
        role, content = ("from", "value") if "from" in item else ("role", "content")
        if role not in item or content not in item:
            raise RowError([Reason.MISSING_FIELD])
        speaker = _text(item[role])
        messages.append({"role": ROLES.get(speaker.lower(), speaker), "content": _text(item[content])})
    return messages


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas writes a missing value
        raise RowError([Reason.NULL_FIELD])
    if not isinstance(value, str):
        raise RowError([Reason.NOT_TEXT])
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError([Reason.INVALID_UNICODE]) from None
    return value.strip()


def _without_repeat(prompt: Value, *sides: Value) -> tuple[Value, ...]:
    """Cut a plain prompt off the front of plain answers where both begin with it.

    One of one or two words stays: both answers may well begin with "Yes" by themselves.
    """
    if isinstance(prompt, str) and len(prompt.split()) > 2 and not IS_TRANSCRIPT.match(prompt):
        repeat = re.compile(re.escape(prompt) + r"(?!\w)")
        if all(isinstance(side, str) and repeat.match(side) for side in sides):
            return tuple(side[len(prompt) :].strip() for side in sides if isinstance(side, str))
    return sides


def _join(prompt: Value, side: Value) -> tuple[list[Message], bool]:
    """The whole conversation of one side, and whether it goes on from the prompt."""
    if isinstance(prompt, str) and IS_TRANSCRIPT.match(prompt):
        context = _split_transcript(prompt)
        if context[-1] == {"role": "assistant", "content": ""}:  # the marker after which the answer goes
            context.pop()
        if isinstance(side, str) and not IS_TRANSCRIPT.match(side):
            side = prompt.removesuffix("\n\nAssistant:") + "\n\nAssistant: " + side
    elif isinstance(prompt, str):
        if TURN.search(prompt):  # a transcript after all, with text before its first turn
            raise RowError([Reason.MALFORMED])
        context = [{"role": "user", "content": prompt}] if prompt else []
    else:
        context = prompt
    if isinstance(side, str):
        if IS_TRANSCRIPT.match(side):
            side = _split_transcript(side)
        else:
            side = [{"role": "assistant", "content": side}] if side or context else []
    if side[: len(context)] == context:
        return [*side], True
    if [turn["role"] for turn in side] == ["assistant"]:
        return context + side, True
    # A plain prompt may be only the last of the user's turns in the messages.
    return [*side], isinstance(prompt, str) and _Side(side).prompt[-1:] == context


def _split_transcript(text: str) -> list[Message]:
    parts = TURN.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": turn.strip()} for role, turn in zip(parts[::2], parts[1::2], strict=True)]
