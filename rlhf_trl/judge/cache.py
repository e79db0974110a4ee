"""What judge calls cost and what they brought: an append-only file of replies, and the money.

Reads and writes one JSONL file for each judge, with the raw reply of every finished call, and a lock beside it:

    with JudgeCache(path) as cache:
        if cache.get(key(judge_id, prompt, first, second)) is None:
            ...  # make the call
            cache.append({"key": ..., "status": "ok", "reply": "... [[A]]", ...})

A run that was killed goes on from this file and pays for no call twice; verdicts are parsed from it, never stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Price

logger = logging.getLogger(__name__)

Message = dict[str, str]
Usage = dict[str, int]
"""`prompt_tokens` (cached ones included), `cached_tokens`, `completion_tokens`."""

Stands = Literal["ok", "refusal", "content_filter", "length", "null_content", "context_length"]
# The same call may bring something else another time: it is made again.
Passes = Literal[
    "rate_limit", "quota", "server_error", "timeout", "connection", "html", "bad_json", "no_choices", "bad_request"
]
Status = Literal[Stands, Passes]
MAY_PASS: frozenset[Status] = frozenset(get_args(Passes))
# Every line is handed to the operating system at once, which is enough for a killed process; the disk waits for no
# more lines than these, which is for a power failure.
LINES_A_SYNC = 64
BYTES_A_TOKEN = 4


def key(judge_id: str, prompt: Sequence[Message], first: str, second: str, again: str | None = None) -> str:
    """Name a call: SHA-256, in hexadecimal, over all that decides its verdict; the nonce is not part of it.

    `again` is the unreadable reply that a re-ask follows, so that the re-ask has a line of its own.
    """
    parts = [judge_id, list(prompt), first, second, again]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class JudgeCache:
    """The replies in one file. A line whose call may pass is kept as a log, but is no hit."""

    def __init__(self, path: Path):
        """Read the file, mend an end that a kill cut off, and hold the file for this process.

        Raises:
            UserError: another process holds the file.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        """Every finished call, oldest first; what they cost is a sum over these."""
        self._latest: dict[str, dict[str, Any]] = {}
        self._turn = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, or stop it"
            raise UserError(str(path), "another process writes to this file of judge replies", remedy) from None
        self._load()
        self._file = path.open("ab")

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """Find the reply to a call that needs not be made again."""
        line = self._latest.get(key)
        return None if line is None or line["status"] in MAY_PASS else line

    def latest(self, key: str) -> dict[str, Any] | None:
        """Find what a call brought last, a failure too; a reply that stands is never hidden by a later failure."""
        return self._latest.get(key)

    def append(self, line: dict[str, Any]) -> None:
        """Add a finished call. Any thread may.

        Raises:
            ValueError: a number is not finite.
        """
        data = json.dumps(line, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._turn:
            self._file.write(data)
            self._file.flush()
            self._note(line)
            if len(self.lines) % LINES_A_SYNC == 0:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring all to the disk and let go of the file."""
        with self._turn:
            if not self._file.closed:
                os.fsync(self._file.fileno())
                self._file.close()
        self._lock.release()

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.get(line["key"]) is None:
            self._latest[line["key"]] = line

    def _load(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: its last line was cut off; that call is made again", self.path)
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            line = _line(text)
            if line is None:
                logger.warning("%s:%d: not a judge reply, passed over; its call is made again", self.path, number)
            else:
                self._note(line)


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("status"), str)
    return line if whole else None


@dataclass(frozen=True)
class Forecast:
    """What calls may cost before any is made, from a token for every four bytes of text: a rule of thumb.

    `likely` takes the replies to be `LIKELY_REPLY` tokens long and `most` to use up their limit; `dearest` is the most
    that one call may cost. All in US dollars.
    """

    calls: int
    prompt_tokens: int
    likely: float
    most: float
    dearest: float


LIKELY_REPLY = 100
"""Tokens of a reply: three short sentences and a verdict."""


def cost(usage: Usage | None, price: Price) -> float:
    """US dollars for what a server counted; 0 for a call it counted nothing for."""
    if usage is None:
        return 0.0
    fresh = usage["prompt_tokens"] - usage["cached_tokens"]
    dollars = fresh * price.input + usage["cached_tokens"] * price.cached + usage["completion_tokens"] * price.output
    return dollars / 1e6


def estimate(calls: Iterable[Sequence[Message]], price: Price, max_tokens: int) -> Forecast:
    """Estimate the cost of calls, given their messages and the limit of a reply's tokens."""
    prompts = [_tokens(messages) for messages in calls]
    likely, most = (
        [cost({"prompt_tokens": tokens, "cached_tokens": 0, "completion_tokens": reply}, price) for tokens in prompts]
        for reply in (min(LIKELY_REPLY, max_tokens), max_tokens)
    )
    return Forecast(len(prompts), sum(prompts), sum(likely), sum(most), max(most, default=0.0))


def _tokens(messages: Sequence[Message]) -> int:
    return -(-sum(len(message["content"].encode()) for message in messages) // BYTES_A_TOKEN)


@dataclass
class Budget:
    """The limits of one run. Nothing is begun that, with all in flight, could go over one.

    `dearest` is what a call may cost at most, in US dollars (`Forecast.dearest`); a call that cost more raises it.
    """

    price: Price
    dearest: float = 0.0
    max_cost: float | None = None
    max_requests: int | None = None
    spent: float = field(default=0.0, init=False)
    calls: int = field(default=0, init=False)

    def add(self, usage: Usage | None) -> None:
        """Count a finished call."""
        dollars = cost(usage, self.price)
        self.calls += 1
        self.spent += dollars
        self.dearest = max(self.dearest, dollars)

    def stop(self, in_flight: int) -> str | None:
        """Say why no further call may begin; None if one may."""
        if self.max_requests is not None and self.calls + in_flight >= self.max_requests:
            return f"max_requests reached: {self.calls + in_flight} calls"
        ahead = self.spent + (in_flight + 1) * self.dearest
        # What adds up to the limit exactly is within it; a sum of floats may say otherwise in its last digit.
        if self.max_cost is not None and ahead > self.max_cost * (1 + 1e-9):
            return f"max_cost reached: ${self.spent:.4f} spent, and another call could go over ${self.max_cost:.4f}"
        return None
