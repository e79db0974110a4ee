"""What a judge's server sends back, read without trust in its form: answers, errors and Retry-After.

Reads and writes nothing; works on bytes and headers.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_trl.judge.cache import Status, Usage

DETAIL = 300  # characters of a server's own words that are kept
QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FILTERED = {"content_filter", "content_policy_violation"}
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
# OpenAI, vLLM (two wordings) and llama.cpp, which share no code for it.
TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum model length|prompt is too long", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """What one attempt came to; `wait` is the seconds that the server asks to wait before the next."""

    status: Status
    text: str | None = None
    usage: Usage | None = None
    model: str | None = None
    fingerprint: str | None = None
    detail: str | None = None
    wait: float | None = None


def read_answer(content_type: str, body: bytes) -> Outcome:
    """Tell what a server's 200 says."""
    start = body.lstrip()[:DETAIL].decode(errors="replace")
    if "text/html" in content_type or start.startswith("<"):
        return Outcome("html", detail=words(start))
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Outcome("bad_json", detail=words(f"{error}: {start}"))
    if not isinstance(answer, dict):
        return Outcome("bad_json", detail=words(f"not an object: {start}"))
    about: dict[str, Any] = {
        "usage": _usage(answer.get("usage")),
        "model": _text(answer.get("model")),
        "fingerprint": _text(answer.get("system_fingerprint")),
    }
    match answer.get("choices"):
        case None | []:
            return Outcome("no_choices", **about, detail=words(start))
        case [{"message": dict(message), **choice}, *_]:
            content, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        case _:
            return Outcome("bad_json", **about, detail=words(f"a choice without a message: {start}"))
    text = _text(content)
    if isinstance(refusal, str) and refusal:
        return Outcome("refusal", _text(refusal), **about, detail="the model refused")
    if finish == "content_filter":
        return Outcome("content_filter", text, **about, detail="finish_reason content_filter")
    if finish == "length":
        return Outcome("length", text, **about, detail="finish_reason length")
    if text is None or not text.strip():
        return Outcome("null_content", text, **about, detail=words(f"no text; finish_reason {finish}"))
    return Outcome("ok", text, **about)


def read_failure(status: int, codes: set[Any], headers: Mapping[str, str], detail: str) -> Outcome | None:
    """Read an HTTP error; None where the key, the model, the address or an option is wrong.

    Args:
        status: the HTTP status, 400 or above.
        codes: the server's `code` and `type` of the error.
        headers: of the response.
        detail: the server's words.
    """
    if status == 402 or codes & QUOTA:
        return Outcome("quota", detail=detail)
    if status == 429:
        return Outcome("rate_limit", detail=detail, wait=retry_after(headers, time.time()))
    if status in (408, 409) or status >= 500:
        return Outcome("server_error", detail=detail, wait=retry_after(headers, time.time()))
    if codes & FILTERED:
        return Outcome("content_filter", detail=detail)
    if status in (401, 403, 404) or codes & UNSUPPORTED:
        return None
    too_long = TOO_LONG.search(" ".join(map(str, [*codes, detail])))
    return Outcome("context_length" if too_long else "bad_request", detail=detail)


def _usage(value: Any) -> Usage | None:
    match value:
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)}:
            details = value.get("prompt_tokens_details")  # null on many local servers
            cached = details.get("cached_tokens") if isinstance(details, dict) else None
            counted = cached if isinstance(cached, int) else 0
            return {"prompt_tokens": prompt, "cached_tokens": counted, "completion_tokens": completion}
    return None


def _text(value: Any) -> str | None:
    """A server's text without lone surrogates, which JSON can hold and no file can."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait, or None; `now` is the time in seconds since the epoch.

    Knows Retry-After as seconds and as a date (RFC 9110, 10.2.3), and OpenAI's and Azure's retry-after-ms.
    """
    for name, a_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / a_second
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except ValueError:
                continue
            # "-0000" means UTC without a word on the sender's zone, and comes back without one.
            seconds = (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp() - now
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def words(text: str) -> str:
    """Bring a server's or a library's own words onto one line, no longer than `DETAIL`."""
    return " ".join(text.encode(errors="replace").decode().split())[:DETAIL]
