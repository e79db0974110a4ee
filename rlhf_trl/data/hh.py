"""Preference rows of every shape, brought into one form: a prompt, a chosen and a rejected answer.

Reads one row at a time; writes nothing. A row has `chosen` and `rejected`, one of `PROMPTS` perhaps, `history` and a
system message. A value is

- a transcript, "\\n\\nHuman: …\\n\\nAssistant: …" as in HH, or with single newlines, or CRLF: the prompt is everything
  up to the last "Assistant:";
- plain text: one user turn as the prompt, an answer in `chosen` and `rejected` (which may repeat the prompt in front);
- messages, {"role", "content"} or {"from", "value"}, or their JSON or Python text; `chosen` and `rejected` may repeat
  the prompt. One message may stand without its list; its content may be a list of text parts.

Every turn is stripped of the whitespace around it; nothing else in a text is changed.
"""

import ast
import contextlib
import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.text.display import has_lone_surrogate

Value = str | list[Message]

PROMPTS = ("prompt", "conversations", "question", "query", "instruction")
SYSTEMS = ("system", "system_prompt")
SCORES = tuple(
    tuple(form.format(name, side) for side in ("chosen", "rejected"))
    for name in ("score", "rating", "reward")
    for form in ("{0}_{1}", "{1}_{0}", "{1}-{0}")
)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
KEYS = ({"role", "content"}, {"from", "value"})
WRAPPERS = ("messages", "conversation", "conversations")
# Columns of a row, or keys of a message, without which its text is not the whole.
UNREAD = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), Reason.TOOLS),
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos"), Reason.MEDIA),
}
READ = {"chosen", "rejected", "completion", "subset", "input", "history", *PROMPTS, *SYSTEMS, *UNREAD}
READ.update(itertools.chain(*SCORES))
# Messages as text, "[{'role': 'user', …", in JSON (also twice), in Python, or as numpy prints them; their first key.
SERIALISED = re.compile(
    r"""(?s)\s*["']?\s*(?:array\()?[\[({]\s*[\[{(]?\s*(?=.*["'](?:role|from)\\*["']\s*:)"""
    r"""(?=.*["'](?:content|value)\\*["']\s*:)\\*["'](\w+)\\*["']\s*:"""
)
IS_TRANSCRIPT = re.compile(r"\s*Human:")
# In HH only a marker that begins a paragraph begins a turn ("Human:" also stands inside answers); elsewhere on a line.
PARAGRAPH = re.compile(r"\n\r?\n(Human|Assistant):")
LINE = re.compile(r"\n(Human|Assistant):")


class _Side(NamedTuple):
    """One conversation, cut at its last assistant turn; it is open if it ends on something else than an answer."""

    turns: list[Message]
    prompt: list[Message]
    answer: str
    open: bool


def normalise(raw: Any) -> Pair:
    """Bring one row into the form of a `Pair` whose prompt ends on a user turn.

    Raises:
        RowError: with every reason against it, up to `identical`; the later reasons are found by `prepare`.
    """
    chosen, rejected = _read_row(raw, "chosen", "rejected")
    return Pair(chosen.prompt, chosen.answer, rejected.answer)


def read_completion(raw: Any) -> tuple[list[Message], str]:
    """Read a row of one answer, `completion`, in every shape of a pair's: the prompt, and the answer to it.

    Raises:
        RowError: with every reason against it.
    """
    (side,) = _read_row(raw, "completion")
    return side.prompt, side.answer


def unread_columns(raw: Any) -> list[str]:
    """Columns that say something and that nothing here reads."""
    names = raw.keys() - READ if isinstance(raw, dict) else ()
    return [str(name).encode(errors="backslashreplace").decode() for name in names if not _is_empty(raw[name])]


def score_not_higher(raw: dict[str, Any]) -> bool:
    """Whether the row's own scores, in numbers or as text, do not put the chosen answer above the rejected one."""
    for chosen, rejected in SCORES:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            return float(raw[chosen]) <= float(raw[rejected])
    return False


def _read_row(raw: Any, *names: str) -> list[_Side]:
    """Read the answers of a row as whole conversations."""
    if not isinstance(raw, dict):
        raise RowError([Reason.MALFORMED])
    _refuse_unread(raw)
    answers = [_read_column(raw, name) for name in names]
    prompt = _read_prompt(raw)
    if prompt is not None:
        answers = _without_repeat(prompt, answers)
    elif any(isinstance(value, str) and value and not IS_TRANSCRIPT.match(value) for value in answers):
        raise RowError([Reason.NULL_FIELD if raw.keys() & set(PROMPTS) else Reason.MALFORMED])
    joined = [_join(prompt or [], value) for value in answers]
    given = [_read_text(raw[name]) for name in SYSTEMS if not _is_empty(raw.get(name))]
    system = [{"role": "system", "content": text} for text in _distinct(given)]
    for opening in (_read_history(raw.get("history")), system):
        for turns, _ in joined:
            if turns and turns[: len(opening)] != opening:
                turns[:0] = opening
    sides = [_cut(turns) for turns, _ in joined]
    whole = next((side for side in sides if side.turns), sides[0])
    fits = all(fits for _, fits in joined) and all(side.prompt == whole.prompt for side in sides)
    if reasons := _find_reasons(sides, whole, fits):
        readable = len(sides) == 2 and all(side.turns and not side.open for side in sides)
        raise RowError(reasons, Pair(whole.prompt, *(side.answer for side in sides)) if readable else None)
    return sides


def _find_reasons(sides: list[_Side], whole: _Side, fits: bool) -> list[Reason]:
    roles = [turn["role"] for turn in whole.turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    asked = [turn["content"] for turn in whole.prompt if turn["role"] == "user"]
    differ = all(side.turns for side in sides) and not fits
    empty = [not side.answer and not side.open for side in sides]
    holds = {
        Reason.MALFORMED: "system" in spoken or (spoken[:1] == ["assistant"] and bool(asked)),
        Reason.UNKNOWN_ROLE: any(turn["role"] not in ROLES.values() for side in sides for turn in side.turns),
        Reason.ENDS_ON_HUMAN: any(side.open for side in sides),
        Reason.PROMPTS_DIFFER: differ,
        Reason.EMPTY_CHOSEN: empty[0],
        Reason.EMPTY_REJECTED: empty[-1] and len(sides) == 2,
        Reason.EMPTY_PROMPT: not asked or not asked[-1],
        Reason.CONSECUTIVE_ROLES: any(first == second for first, second in itertools.pairwise(spoken)),
        Reason.IDENTICAL: len({side.answer for side in sides}) < len(sides) and whole.answer != "" and not differ,
    }
    return [reason for reason, held in holds.items() if held]


def _cut(turns: list[Message]) -> _Side:
    last = len(turns) - 1
    end = next((index for index in range(last, -1, -1) if turns[index]["role"] == "assistant"), len(turns))
    return _Side(turns, turns[:end], turns[end]["content"] if end <= last else "", bool(turns) and end != last)


def _read_prompt(raw: dict[str, Any]) -> Value | None:
    """The prompt, whichever column gives it; None where no column does."""
    given = {name: _read_column(raw, name) for name in (*PROMPTS, "input") if not _is_empty(raw.get(name))}
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


def _without_repeat(prompt: Value, sides: list[Value]) -> list[Value]:
    """Cut a plain prompt off the front of plain answers where both begin with it.

    One of one or two words stays: both answers may well begin with "Yes" by themselves.
    """
    if isinstance(prompt, str) and len(prompt.split()) > 2 and not IS_TRANSCRIPT.match(prompt):
        repeat = re.compile(re.escape(prompt) + r"(?!\w)")
        if all(isinstance(side, str) and repeat.match(side) for side in sides):
            return [side[len(prompt) :].strip() for side in sides if isinstance(side, str)]
    return sides


def _join(prompt: Value, side: Value) -> tuple[list[Message], bool]:
    """The whole conversation of one side, and whether it goes on from the prompt."""
    if isinstance(prompt, str) and IS_TRANSCRIPT.match(prompt):
        context, marker = _read_transcript(prompt)
        if context[-1] == {"role": "assistant", "content": ""}:  # the marker after which the answer goes
            context.pop()
        if isinstance(side, str) and not IS_TRANSCRIPT.match(side):
            side = context + _cut_turns(marker, "Assistant: " + side.removeprefix("Assistant:"))
    elif isinstance(prompt, str):
        if PARAGRAPH.search(prompt) or prompt.endswith("\nAssistant:"):  # text before the first turn of a transcript
            raise RowError([Reason.MALFORMED])
        context = [{"role": "user", "content": prompt}] if prompt else []
    else:
        context = prompt
    if isinstance(side, str) and IS_TRANSCRIPT.match(side):
        side = _read_transcript(side)[0]
    elif isinstance(side, str):
        side = [{"role": "assistant", "content": side}] if side or context else []
    if side[: len(context)] == context:
        return [*side], True
    if [turn["role"] for turn in side] == ["assistant"]:
        return context + side, True
    # A plain prompt may be only the last of the user's turns in the messages.
    return [*side], isinstance(prompt, str) and _cut(side).prompt[-1:] == context


def _is_empty(value: Any) -> bool:
    """Whether a column or key says nothing: null, NaN, or an empty value in some spelling."""
    if isinstance(value, (list, tuple)):
        return all(_is_empty(item) for item in value)
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None", "nan")
    return value is None or value == {} or value != value


def _refuse_unread(item: dict[str, Any]) -> None:
    """Refuse a row or message of which the text is only a part."""
    for name, reason in UNREAD.items():
        if name in item and not _is_empty(item[name]):
            raise RowError([reason])


def _read_column(raw: dict[str, Any], name: str) -> Value:
    """Read a column as stripped text or as messages with our names of the roles."""
    if name not in raw:
        raise RowError([Reason.MISSING_FIELD])
    value = _unwrap(_read_serialised(raw[name]))
    return [_read_message(item) for item in value] if isinstance(value, list) else _read_text(value)


def _unwrap(value: Any) -> Any:
    """The list of messages where there is one under a name of its own, or one message without its list."""
    if isinstance(value, dict):
        return next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), [value])
    return value


def _read_text(value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas writes a missing value
        raise RowError([Reason.NULL_FIELD])
    if not isinstance(value, str):
        raise RowError([Reason.NOT_TEXT])
    if has_lone_surrogate(value):
        raise RowError([Reason.INVALID_UNICODE])
    return value.strip()


def _read_history(value: Any) -> list[Message]:
    """Read earlier turns: messages, or pairs of a question and its answer."""
    if _is_empty(value):
        return []
    value = _parse(value) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise RowError([Reason.NOT_TEXT])
    if all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        spoken = zip(itertools.cycle(("user", "assistant")), itertools.chain(*value), strict=False)
        return [{"role": role, "content": _read_text(text)} for role, text in spoken]
    return [_read_message(item) for item in value]


def _read_serialised(value: Any) -> Any:
    """Messages that stand as text, which is never an answer; any other value as it is."""
    start = SERIALISED.match(value) if isinstance(value, str) else None
    if start is None:
        return value
    try:
        read = _parse(value)
    except RowError:
        if start.group(1) in (*WRAPPERS, *itertools.chain(*KEYS)):
            raise
        return value
    if isinstance(read, str):
        return _read_serialised(read)
    items = _unwrap([*read] if isinstance(read, tuple) else read)
    is_messages = all(isinstance(item, dict) and any(item.keys() >= keys for keys in KEYS) for item in items)
    return items if is_messages else value


def _parse(text: str) -> Any:
    """Read JSON or Python text, else RowError."""
    # Python writes no raw newline inside a string, so this is between items, where numpy puts no comma.
    commas = re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())
    for read, written in ((json.loads, text), (ast.literal_eval, commas)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return read(written)
    raise RowError([Reason.MALFORMED])


def _read_message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise RowError([Reason.NOT_TEXT])
    _refuse_unread(item)
    role, content = ("from", "value") if item.get("from") is not None else ("role", "content")
    if role not in item or content not in item:
        raise RowError([Reason.MISSING_FIELD])
    speaker, value = _read_text(item[role]), item[content]
    if speaker.lower() in TOOL_ROLES:
        raise RowError([Reason.TOOLS])
    text = "\n".join(map(_read_part, value)) if isinstance(value, list) and value else _read_text(value)
    return {"role": ROLES.get(speaker.lower(), speaker), "content": text}


def _read_part(part: Any) -> str:
    """One part of a message's content, which has to be text."""
    if not isinstance(part, dict):
        return _read_text(part)
    kind = str(part.get("type") or "text")
    if not kind.endswith("text"):
        raise RowError([Reason.TOOLS if kind.startswith("tool") else Reason.MEDIA])
    _refuse_unread(part)
    if "text" not in part:
        raise RowError([Reason.NOT_TEXT])
    return _read_text(part["text"])


def _read_transcript(text: str) -> tuple[list[Message], re.Pattern[str]]:
    """Read the turns of a transcript, and the marker between them: HH's, unless turns alternate only by lines."""
    for marker in (PARAGRAPH, LINE):
        turns = _cut_turns(marker, text)
        if len(turns) > 1 and all(first["role"] != second["role"] for first, second in itertools.pairwise(turns)):
            return turns, marker
    return _cut_turns(PARAGRAPH, text), PARAGRAPH


def _cut_turns(marker: re.Pattern[str], text: str) -> list[Message]:
    parts = marker.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": turn.strip()} for role, turn in zip(parts[::2], parts[1::2], strict=True)]
