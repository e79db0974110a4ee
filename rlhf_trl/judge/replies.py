"""What calls to a judge's server brought, read without trust in its form; what to do about it; the file of replies.

That file is JSONL, append-only, with a line for every finished call and a lock beside it. A run that was killed goes
on from it and pays for no call twice; verdicts are parsed from it, never stored.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import json_line
from rlhf_trl.text.redact import redact

logger = logging.getLogger(__name__)


class Fault(NamedTuple):
    """What a status of a call means."""

    calls: int  # how often the call is made in all
    stands: bool  # another run would bring the same; otherwise the same command asks again
    remedy: str  # what to do where there is no verdict


MANY = 10**9  # as often as the client's `attempts` allow; not for a timeout: a server may go on, and be paid for it
LONGER = "raise judge.max_tokens (reasoning counts too), or ask another model"
FAULTS = {
    "ok": Fault(1, True, "ask another model"),
    "length": Fault(1, True, LONGER),
    "null_content": Fault(2, True, LONGER),
    "refusal": Fault(1, True, "ask another model"),
    "content_filter": Fault(1, True, "ask another model or server"),
    "context_length": Fault(1, True, "ask a model with a longer context, or lower judge.max_tokens"),
    "rate_limit": Fault(MANY, False, "lower judge.workers, and start the same command again later"),
    "quota": Fault(1, False, "add credit to the account of the key, or lower judge.prompts"),
    "server_error": Fault(MANY, False, "see the log of the server, or start the same command again later"),
    "timeout": Fault(2, False, "raise judge.timeout or lower judge.workers"),
    "connection": Fault(MANY, False, "see that the server runs at judge.base_url or OPENAI_BASE_URL"),
    "bad_request": Fault(1, False, "change the options of `judge:`"),
    "unreadable": Fault(2, False, "check judge.base_url or OPENAI_BASE_URL: it is up to and with the /v1"),
}  # fmt: skip
# Of a bad request, by the first of these that its words name.
OPTIONS = {
    "max_completion_tokens|max_tokens": "set judge.max_tokens_name to the other of max_tokens and "
    "max_completion_tokens (what reasoning models take), or lower judge.max_tokens",
    "temperature": "set judge.temperature: null, so that none is sent",
    "seed": "set judge.seed: null, so that none is sent",
    "model": "set judge.model to one that the server has",
}
DETAIL = 300  # characters of a server's own words that are kept
QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FILTERED = {"content_filter", "content_policy_violation", "data_inspection_failed"}
FLAGGED = re.compile(r"input was flagged|content exists risk", re.IGNORECASE)  # OpenRouter (403), DeepSeek
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

    status: str
    text: str | None = None  # as far as the model wrote: part of a reply with `length`, the words of a `refusal`
    usage: Usage | None = None  # the sum over the attempts that the server counted tokens for
    model: str | None = None  # by the server's name, such as a dated snapshot
    detail: str | None = None  # why it is not "ok", in the words of the server or of the HTTP library
    wait: float | None = None  # seconds that the server asks to wait before the next attempt
    attempts: int = 1
    uncounted: int = 0  # attempts that timed out: they may have cost something


def read_answer(body: bytes) -> Reply:
    """Tell what a server's 200 says."""
    answer = _object(body)
    about: dict[str, Any] = {"usage": _usage(answer.get("usage")), "model": _text(answer.get("model"))}
    match answer.get("choices"):
        case [{"message": dict(message), **choice}, *_]:
            text, refusal, finish = _text(message.get("content")), message.get("refusal"), choice.get("finish_reason")
        case [] | None if about["usage"]:  # a gateway whose model declined (LiteLLM)
            return Reply("null_content", **about, detail="no choices")
        case _:
            codes, said = read_error(body)
            # OpenRouter sends 200 before a model begins, and the status of what came then in the body.
            late = [int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)]
            failed = read_failure(late[0], codes, {}, said) if late else None
            return replace(failed or Reply("unreadable", detail=said or "an empty reply"), **about)
    if finish == "error":
        return Reply("server_error", text, **about, detail=words(f"finish_reason error: {choice.get('error')}"))
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
        wait = retry_after(headers, time.time())
        return Reply("rate_limit" if status == 429 else "server_error", detail=detail, wait=wait)
    if codes & FILTERED or FLAGGED.search(detail):
        return Reply("content_filter", detail=detail)
    if status < 400 or status in (401, 403, 404) or codes & UNSUPPORTED:
        return None
    return Reply("context_length" if TOO_LONG.search(" ".join([*codes, detail])) else "bad_request", detail=detail)


def read_error(body: bytes) -> tuple[set[str], str]:
    """Read a server's error in any form: its `code` and `type`, and its message or, without one, the whole of it."""
    answer = _object(body)
    error = answer.get("error", answer)
    error = error if isinstance(error, dict) else {}
    codes = {str(code) for name in ("code", "type") if isinstance(code := error.get(name), (str, int))}
    return codes, words(_text(error.get("message")) or body.decode(errors="replace"))


def _object(body: bytes) -> dict[str, Any]:
    """Read a JSON object; an empty one of anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


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
    total = value.get("total_tokens")
    if type(total) is int:  # some leave the tokens of reasoning, which are paid for, to the total alone
        usage["completion_tokens"] = max(usage["completion_tokens"], min(total, 10**9) - usage["prompt_tokens"])
    return usage if usage["cached_tokens"] <= usage["prompt_tokens"] else None


def _text(value: Any) -> str | None:
    """A server's text without secrets, and without lone surrogates, which JSON can hold and no file can."""
    if isinstance(value, list):  # of parts (Mistral), of which those of reasoning have another key
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        value = "\n".join(part for part in parts if isinstance(part, str)) or None
    return redact(value.encode(errors="replace").decode()) if isinstance(value, str) else None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Read the seconds to wait from Retry-After (RFC 9110, 10.2.3), which may be a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        # "-0000" means UTC without a word on the sender's zone, and comes back without one.
        seconds = (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def words(text: str) -> str:
    """Bring a server's or a library's own words onto one line, no longer than `DETAIL`, without secrets."""
    # Redacted before it is cut: a part of a secret is not known for one.
    return redact(" ".join(text.encode(errors="replace").decode().split()))[:DETAIL]


def advise(status: str, detail: str) -> str:
    """Say what to do about calls that came to this, given the server's words."""
    named = (remedy for option, remedy in OPTIONS.items() if status == "bad_request" and re.search(option, detail))
    return next(named, FAULTS[status].remedy)


def name_proxy(address: str) -> str:
    """Say, where calls to an address go through a proxy of the environment, how to pass it by; else nothing."""
    parts, proxies = urlsplit(address), getproxies()
    used = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if used is None or proxy_bypass(parts.hostname or ""):
        return ""
    return f"; calls go through {used.upper()}_PROXY: set NO_PROXY={parts.hostname} if the server is in your network"


def tell_failures(address: str, lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how many calls came to what, what the server said last of the most frequent status, and what to do."""
    if not lines:
        return None
    counts = Counter(line["status"] for line in lines).most_common()
    most = counts[0][0]
    detail = [line.get("detail") or line["reply"] or most for line in lines if line["status"] == most][-1]
    names = {"ok": "no verdict in the reply"}
    tally = ", ".join(f"{names.get(status, status)}: {count}" for status, count in counts)
    said = f"calls without a verdict: {len(lines)} ({tally}); {address}: {words(detail)}"
    return f"{said}; what to do: {advise(most, detail)}{name_proxy(address)}"


# --- the file of replies ---------------------------------------------------------------------------------------------


@with_config(extra="allow", strict=True)
class Line(TypedDict):
    """What is read again of a line; more stands in it for people."""

    key: str
    status: str
    reply: str | None
    asked: NotRequired[str]
    usage: NotRequired[Usage | None]
    model: NotRequired[str | None]
    detail: NotRequired[str | None]


LINE = TypeAdapter(Line)


class JudgeCache:
    """The replies in one file. A line whose call may pass is kept as a log, but is no hit."""

    def __init__(self, path: Path, asked: str = ""):
        """Read the file, mend an end that a kill cut off, and hold the file, which its owner alone may read. `asked`
        are the server and the limit of tokens: what failed with others may pass with these.

        UserError where another process holds the file."""
        self.path, self.asked = path, asked
        self._latest: dict[str, Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, or stop it"
            raise UserError(str(path), "another process writes to this file of judge replies", remedy) from None
        self._load()
        self._file = path.open("ab")
        self._sync()
        path.chmod(0o600)  # a server may have sent anything

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._file.close()
        self._lock.release()

    def get(self, key: str) -> Line | None:
        """Find the reply to a call that needs not be made again."""
        line = self._latest.get(key)
        if line is None or (line["status"] != "ok" and line.get("asked", "") != self.asked):
            return None
        return line if FAULTS[line["status"]].stands else None

    def latest(self, key: str) -> Line | None:
        """Find what a call brought last, a failure too; a reply that stands is never hidden by a later failure."""
        return self._latest.get(key)

    def append(self, line: Line) -> None:
        """Add a finished call. A kill loses nothing, a power failure the last second: a disk takes longer than a call.

        Raises:
            ValueError: a number is not finite.
        """
        self._file.write(json_line(line).encode())
        self._file.flush()
        if time.monotonic() > self._synced + 1.0:
            self._sync()
        self._note(line)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _note(self, line: Line) -> None:
        if self.get(line["key"]) is None:
            self._latest[line["key"]] = line

    def _load(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: its last line was cut off; that call is made again", self.path)
            os.truncate(self.path, whole)
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                line = LINE.validate_json(text)
                if line["status"] not in FAULTS or (line["status"] == "ok" and line["reply"] is None):
                    raise ValueError("an unknown status, or a reply without a text")
            except ValueError:  # pydantic's ValidationError is one
                logger.warning("%s:%d: not a judge reply, passed over; its call is made again", self.path, number)
            else:
                self._note(line)
