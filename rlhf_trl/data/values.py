"""One value of a row: plain text, a transcript, or messages in any spelling.

Works on values in memory:

    turns = read_value(raw["chosen"])  # text, or messages with our names of the roles; or RowError
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import re
from typing import Any

from rlhf_trl.data.pair import Message, Reason, RowError

Value = str | list[Message]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
SPEAKERS = {*ROLES.values()}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
KEYS = ({"role", "content"}, {"from", "value"})
# Columns of a row, or keys of a message, without which its text is not the whole.
UNREAD = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), Reason.TOOLS),
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos"), Reason.MEDIA),
}
WRAPPERS = ("messages", "conversation", "conversations")
# Messages as text, "[{'role': 'user', …", in JSON (also twice), in Python, or as numpy prints them; their first key.
SERIALISED = re.compile(
    r"""(?s)\s*["']?\s*(?:array\()?[\[({]\s*[\[{(]?\s*(?=.*["'](?:role|from)\\*["']\s*:)"""
    r"""(?=.*["'](?:content|value)\\*["']\s*:)\\*["'](\w+)\\*["']\s*:"""
)
IS_TRANSCRIPT = re.compile(r"\s*Human:")
# In HH only a marker that begins a paragraph begins a turn ("Human:" also stands inside answers); elsewhere on a line.
PARAGRAPH = re.compile(r"\n\r?\n(Human|Assistant):")
LINE = re.compile(r"\n(Human|Assistant):")


def is_empty(value: Any) -> bool:
    """Whether a column or key says nothing: null, NaN, or an empty value in some spelling."""
    if isinstance(value, (list, tuple)):
        return all(is_empty(item) for item in value)
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None", "nan")
    return value is None or value == {} or value != value


def refuse_unread(item: dict[str, Any]) -> None:
    """Refuse a row or message of which the text is only a part."""
    for name, reason in UNREAD.items():
        if name in item and not is_empty(item[name]):
            raise RowError([reason])


def read_value(value: Any) -> Value:
    """Read a column as stripped text or as messages."""
    value = _unwrap(_read_serialised(value))
    return [_read_message(item) for item in value] if isinstance(value, list) else read_text(value)


def _unwrap(value: Any) -> Any:
    """The list of messages where there is one under a name of its own, or one message without its list."""
    if isinstance(value, dict):
        return next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), [value])
    return value


def read_text(value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas writes a missing value
        raise RowError([Reason.NULL_FIELD])
    if not isinstance(value, str):
        raise RowError([Reason.NOT_TEXT])
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError([Reason.INVALID_UNICODE]) from None
    return value.strip()


def read_history(value: Any) -> list[Message]:
    """Read earlier turns: messages, or pairs of a question and its answer."""
    if is_empty(value):
        return []
    value = _parse(value) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise RowError([Reason.NOT_TEXT])
    if all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        spoken = zip(itertools.cycle(("user", "assistant")), itertools.chain(*value), strict=False)
        return [{"role": role, "content": read_text(text)} for role, text in spoken]
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
    """Read JSON or Python text.

    Raises:
        RowError: it is neither.
    """
    # Python writes no raw newline inside a string, so this is between items, where numpy puts no comma.
    commas = re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())
    for read, written in ((json.loads, text), (ast.literal_eval, commas)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return read(written)
    raise RowError([Reason.MALFORMED])


def _read_message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise RowError([Reason.NOT_TEXT])
    refuse_unread(item)
    role, content = ("from", "value") if item.get("from") is not None else ("role", "content")
    if role not in item or content not in item:
        raise RowError([Reason.MISSING_FIELD])
    speaker, value = read_text(item[role]), item[content]
    if speaker.lower() in TOOL_ROLES:
        raise RowError([Reason.TOOLS])
    text = "\n".join(map(_read_part, value)) if isinstance(value, list) and value else read_text(value)
    return {"role": ROLES.get(speaker.lower(), speaker), "content": text}


def _read_part(part: Any) -> str:
    """One part of a message's content, which has to be text."""
    if not isinstance(part, dict):
        return read_text(part)
    kind = str(part.get("type") or "text")
    if not kind.endswith("text"):
        raise RowError([Reason.TOOLS if kind.startswith("tool") else Reason.MEDIA])
    refuse_unread(part)
    if "text" not in part:
        raise RowError([Reason.NOT_TEXT])
    return read_text(part["text"])


def read_transcript(text: str) -> tuple[list[Message], re.Pattern[str]]:
    """Read the turns of a transcript, and the marker between them: HH's, unless turns alternate only by lines."""
    for marker in (PARAGRAPH, LINE):
        turns = cut_turns(marker, text)
        if len(turns) > 1 and all(first["role"] != second["role"] for first, second in itertools.pairwise(turns)):
            return turns, marker
    return cut_turns(PARAGRAPH, text), PARAGRAPH


def cut_turns(marker: re.Pattern[str], text: str) -> list[Message]:
    parts = marker.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": turn.strip()} for role, turn in zip(parts[::2], parts[1::2], strict=True)]
