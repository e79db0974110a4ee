"""Preference rows of every shape, brought into one form: a prompt, a chosen and a rejected answer.

Reads one row at a time; writes nothing:

    pair = normalise(raw)  # or RowError, which says what is wrong with the row

A row has `chosen` and `rejected`, and may have one of `PROMPTS`, `history` and a system message. A value is

- a transcript, "\\n\\nHuman: …\\n\\nAssistant: …" as in HH, or with single newlines, or CRLF: the prompt is everything
  up to the last "Assistant:";
- plain text: one user turn as the prompt, an answer in `chosen` and `rejected` (which may repeat the prompt in front);
- messages, {"role", "content"} or {"from", "value"}, or their JSON or Python text; `chosen` and `rejected` may repeat
  the prompt. One message may stand without its list; its content may be a list of text parts.

Every turn is stripped of the whitespace around it; nothing else in a text is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from rlhf_trl.data import values
from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.data.values import IS_TRANSCRIPT, PARAGRAPH, Value, is_empty

PROMPTS = ("prompt", "conversations", "question", "query", "instruction")
SYSTEMS = ("system", "system_prompt")
SCORES = tuple(
    tuple(form.format(name, side) for side in ("chosen", "rejected"))
    for name in ("score", "rating", "reward")
    for form in ("{0}_{1}", "{1}_{0}")
)
READ = {"chosen", "rejected", "completion", "subset", "input", "history", *PROMPTS, *SYSTEMS, *values.UNREAD}
READ.update(itertools.chain(*SCORES))


class _Side(NamedTuple):
    """One conversation, cut at its last assistant turn; it is open if it ends on something else than an answer."""

    turns: list[Message]
    prompt: list[Message]
    answer: str
    open: bool


def _cut(turns: list[Message]) -> _Side:
    last = len(turns) - 1
    end = next((index for index in range(last, -1, -1) if turns[index]["role"] == "assistant"), len(turns))
    return _Side(turns, turns[:end], turns[end]["content"] if end <= last else "", bool(turns) and end != last)


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


def unread_columns(raw: Any) -> list[str]:
    """Columns that say something and that nothing here reads."""
    names = raw.keys() - READ if isinstance(raw, dict) else ()
    return [str(name).encode(errors="backslashreplace").decode() for name in names if not is_empty(raw[name])]


def score_not_higher(raw: dict[str, Any]) -> bool:
    """Whether the row's own scores, in numbers or as text, do not put the chosen answer above the rejected one."""
    for chosen, rejected in SCORES:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            return float(raw[chosen]) <= float(raw[rejected])
    return False


def _faults(whole: _Side, *sides: _Side) -> dict[Reason, bool]:
    """Tell which reasons hold against one conversation, or the roles and ends of any."""
    roles = [turn["role"] for turn in whole.turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    asked = [turn["content"] for turn in whole.prompt if turn["role"] == "user"]
    return {
        Reason.MALFORMED: "system" in spoken or (spoken[:1] == ["assistant"] and bool(asked)),
        Reason.UNKNOWN_ROLE: any(turn["role"] not in values.SPEAKERS for side in sides for turn in side.turns),
        Reason.ENDS_ON_HUMAN: any(side.open for side in sides),
        Reason.EMPTY_PROMPT: not asked or not asked[-1],
        Reason.CONSECUTIVE_ROLES: any(first == second for first, second in itertools.pairwise(spoken)),
    }


def _read_sides(raw: Any, *names: str) -> tuple[list[_Side], bool]:
    """Read answers as whole conversations, and tell whether all go on from the row's prompt."""
    if not isinstance(raw, dict):
        raise RowError([Reason.MALFORMED])
    values.refuse_unread(raw)
    answers = tuple(_read_column(raw, name) for name in names)
    prompt = _read_prompt(raw)
    if prompt is not None:
        answers = _without_repeat(prompt, *answers)
    elif any(isinstance(value, str) and value and not IS_TRANSCRIPT.match(value) for value in answers):
        raise RowError([Reason.NULL_FIELD if raw.keys() & set(PROMPTS) else Reason.MALFORMED])
    joined = [_join(prompt or [], value) for value in answers]
    given = [values.read_text(raw[name]) for name in SYSTEMS if not is_empty(raw.get(name))]
    system = [{"role": "system", "content": text} for text in _distinct(given)]
    for opening in (values.read_history(raw.get("history")), system):
        for turns, _ in joined:
            if turns and turns[: len(opening)] != opening:
                turns[:0] = opening
    return [_cut(turns) for turns, _ in joined], all(fits for _, fits in joined)


def _read_prompt(raw: dict[str, Any]) -> Value | None:
    """The prompt, whichever column gives it; None where no column does."""
    given = {name: _read_column(raw, name) for name in (*PROMPTS, "input") if not is_empty(raw.get(name))}
    task, subject = given.get("instruction"), given.get("input")
    if isinstance(task, str) and isinstance(subject, str):
        given["instruction"] = f"{task}\n\n{given.pop('input')}"
    absent = None if all(raw.get(name) is None or raw[name] != raw[name] for name in PROMPTS) else ""
    return next(iter(_distinct(given.values())), absent)


def _distinct(given: Iterable[Any]) -> list[Any]:
    """The one value that all columns have, or none."""
    found = [value for value, _ in itertools.groupby(given)]
    if len(found) > 1:
        raise RowError([Reason.SEVERAL_PROMPTS])
    return found


def _read_column(raw: dict[str, Any], name: str) -> Value:
    if name not in raw:
        raise RowError([Reason.MISSING_FIELD])
    return values.read_value(raw[name])


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
    marker = PARAGRAPH
    if isinstance(prompt, str) and IS_TRANSCRIPT.match(prompt):
        context, marker = values.read_transcript(prompt)
        if context[-1] == {"role": "assistant", "content": ""}:  # the marker after which the answer goes
            context.pop()
        if isinstance(side, str) and not IS_TRANSCRIPT.match(side):
            side = context + values.cut_turns(marker, "Assistant: " + side.removeprefix("Assistant:"))
    elif isinstance(prompt, str):
        if PARAGRAPH.search(prompt) or prompt.endswith("\nAssistant:"):  # text before the first turn of a transcript
            raise RowError([Reason.MALFORMED])
        context = [{"role": "user", "content": prompt}] if prompt else []
    else:
        context = prompt
    if isinstance(side, str):
        if IS_TRANSCRIPT.match(side):
            side = values.read_transcript(side)[0]
        else:
            side = [{"role": "assistant", "content": side}] if side or context else []
    if side[: len(context)] == context:
        return [*side], True
    if [turn["role"] for turn in side] == ["assistant"]:
        return context + side, True
    # A plain prompt may be only the last of the user's turns in the messages.
    return [*side], isinstance(prompt, str) and _cut(side).prompt[-1:] == context
