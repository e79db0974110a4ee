"""What one call to a judge's server brought, read without trust in its form: answers, errors and Retry-After."""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rlhf_trl.text.redact import redact

Stands = Literal["ok", "refusal", "content_filter", "length", "null_content", "context_length"]
# The same call may bring something else another time: it is made again.
Passes = Literal[
    "rate_limit", "quota", "server_error", "timeout", "connection", "html", "bad_json", "no_choices", "bad_request"
]
Status = Literal[Stands, Passes]
MAY_PASS: frozenset[Status] = frozenset(get_args(Passes))

DETAIL = 300  # characters of a server's own words that are kept
QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FILTERED = {"content_filter", "content_policy_violation"}
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
# OpenAI, vLLM (two wordings) and llama.cpp, which share no code for it.
TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum model length|prompt is too long", re.IGNORECASE)

Tokens = Annotated[int, Field(ge=0, le=10**9, strict=True)]


class Usage(TypedDict):
    """Tokens that a server counted; cached ones are a part of the prompt's."""

    prompt_tokens: Tokens
    cached_tokens: Tokens
    completion_tokens: Tokens


USAGE = TypeAdapter(Usage)


@dataclass(frozen=True)
class Reply:
    """What a call, or one attempt of it, came to."""

    status: Status
    text: str | None = None  # as far as the model wrote: part of a reply with `length`, the words of a `refusal`
    usage: Usage | None = None  # the sum over the attempts that the server counted tokens for
    model: str | None = None  # by the server's name, such as a dated snapshot
    detail: str | None = None  # why it is not "ok", in the words of the server or of the HTTP library
    wait: float | None = None  # seconds that the server asks to wait before the next attempt
    attempts: int = 1


def read_answer(content_type: str, body: bytes) -> Reply:
    """Tell what a server's 200 says."""
    start = body.decode(errors="replace").lstrip()
    if "text/html" in content_type or start.startswith("<"):
        return Reply("html", detail=words(start))
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Reply("bad_json", detail=words(f"{error}: {start}"))
    if not isinstance(answer, dict):
        return Reply("bad_json", detail=words(f"not an object: {start}"))
    about: dict[str, Any] = {"usage": _usage(answer.get("usage")), "model": _text(answer.get("model"))}
    match answer.get("choices"):
        case None | []:
            return Reply("no_choices", **about, detail=words(start))
        case [{"message": dict(message), **choice}, *_]:
            text, refusal, finish = _text(message.get("content")), message.get("refusal"), choice.get("finish_reason")
        case _:
            return Reply("bad_json", **about, detail=words(f"a choice without a message: {start}"))
    if isinstance(refusal, str) and refusal:
        return Reply("refusal", _text(refusal), **about, detail="the model refused")
    if finish in ("content_filter", "length"):
        return Reply(finish, text, **about, detail=f"finish_reason {finish}")
    if text is None or not text.strip():
        return Reply("null_content", text, **about, detail=words(f"no text; finish_reason {finish}"))
    return Reply("ok", text, **about)


def read_failure(status: int, codes: set[str], headers: Mapping[str, str], detail: str) -> Reply | None:
    """Read an HTTP error or redirect; None where the key, the model, the address or an option is wrong.

    `codes` are the server's `code` and `type` of the error, `detail` its words.
    """
    if status == 402 or codes & QUOTA:
        return Reply("quota", detail=detail)
    if status in (408, 409, 429) or status >= 500:
        name: Status = "rate_limit" if status == 429 else "server_error"
        return Reply(name, detail=detail, wait=retry_after(headers, time.time()))
    if codes & FILTERED:
        return Reply("content_filter", detail=detail)
    if status < 400 or status in (401, 403, 404) or codes & UNSUPPORTED:
        return None
    return Reply("context_length" if TOO_LONG.search(" ".join([*codes, detail])) else "bad_request", detail=detail)


def read_error(body: bytes) -> tuple[set[str], str]:
    """Read a server's error in any form: its `code` and `type`, and its message or, without one, the whole of it."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    error = error if isinstance(error, dict) else {}
    codes = {code for name in ("code", "type") if isinstance(code := error.get(name), str)}
    return codes, words(_text(error.get("message")) or body.decode(errors="replace"))


def _usage(value: Any) -> Usage | None:
    """Read OpenAI's token counts; None where they are missing or cannot be."""
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")  # null on many local servers
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    try:
        usage = USAGE.validate_python({**value, "cached_tokens": cached or 0})
    except ValidationError:
        return None
    return usage if usage["cached_tokens"] <= usage["prompt_tokens"] else None


def _text(value: Any) -> str | None:
    """A server's text without secrets, and without lone surrogates, which JSON can hold and no file can."""
    return redact(value.encode(errors="replace").decode()) if isinstance(value, str) else None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Read the seconds to wait from Retry-After (RFC 9110, 10.2.3), which may be a date, or Azure's retry-after-ms."""
    for name, a_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / a_second
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except (ValueError, OverflowError):
                continue
            # "-0000" means UTC without a word on the sender's zone, and comes back without one.
            seconds = (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp() - now
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def words(text: str) -> str:
    """Bring a server's or a library's own words onto one line, no longer than `DETAIL`, without secrets."""
    # Redacted before it is cut: a part of a secret is not known for one.
    return redact(" ".join(text.encode(errors="replace").decode().split()))[:DETAIL]
