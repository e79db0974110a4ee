"""Calls to a judge behind any OpenAI-compatible server: one with its retries, many at once, and what they may cost.

The `openai` package sends them. They are repeated here (`replies.FAULTS`): the package does not tell a quota from a
rate limit. What no call can succeed with, such as a wrong key, ends the run with a UserError after one attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import openai

from rlhf_trl.judge.questions import Message
from rlhf_trl.judge.replies import (
    FAULTS,
    Reply,
    Usage,
    advise,
    name_proxy,
    read_answer,
    read_error,
    read_failure,
    words,
)
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Price, check_address

logger = logging.getLogger(__name__)

LONGEST_BACK_OFF = 30.0  # seconds: 1, doubled with every further attempt; half of it is left to chance
LONGEST_WAIT = 60.0  # seconds; a server that asks for a longer wait (Retry-After) is not asked again
LARGEST = 2 * 2**20  # bytes of a reply
# So many calls that may pass, or end without a text, and nothing else between them: the server is down, or refuses
# everything, or the limit of tokens is too low, and each call is paid for.
FAILURES_IN_A_ROW, NO_TEXT = 20, ("length", "null_content")
BYTES_A_TOKEN = 4  # a rule of thumb


@dataclass(frozen=True)
class Request:
    """A call to make, its key in the cache, and what the caller wants to find again beside its reply."""

    key: str
    messages: list[Message]
    about: Any = None


def cost(usage: Usage | None, price: Price) -> float:
    """Price what a server counted, in US dollars; 0 for a call it counted nothing for."""
    if usage is None:
        return 0.0
    fresh = usage["prompt_tokens"] - usage["cached_tokens"]
    dollars = fresh * price.input + usage["cached_tokens"] * price.cached + usage["completion_tokens"] * price.output
    return dollars / 1e6


def forecast(calls: Iterable[Sequence[Message]], price: Price, reply_tokens: int) -> list[float]:
    """Estimate what calls cost before any is made, given their messages and the length of each reply."""
    sizes = [-(-sum(len(turn["content"].encode()) for turn in call) // BYTES_A_TOKEN) for call in calls]
    return [cost({"prompt_tokens": of, "cached_tokens": 0, "completion_tokens": reply_tokens}, price) for of in sizes]


@dataclass
class Budget:
    """The limits of one run, in US dollars and calls. Nothing is begun that, with all in flight, could go over one."""

    price: Price
    dearest: float = 0.0  # what a call may cost at most by the forecast; a call that cost more raises it
    max_cost: float | None = None
    max_requests: int | None = None
    spent: float = field(default=0.0, init=False)
    calls: int = field(default=0, init=False)

    def add(self, usage: Usage | None, uncounted: int = 0) -> None:
        """Count a finished call, and the most that its attempts without a count may have cost."""
        dollars = cost(usage, self.price)
        self.calls += 1
        self.spent += dollars + uncounted * self.dearest
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


class _Unusable(Exception):
    """A reply that is not read."""


async def _limit(response: httpx2.Response) -> None:
    """Read a body up to `LARGEST` bytes; a packed one, which may unpack to much more, is not read."""
    packing, body = response.headers.get("content-encoding", "identity"), bytearray()
    if packing != "identity":
        raise _Unusable(f"a body packed with {packing}, though plain text was asked for")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    async for part in response.stream:
        body += part
        if len(body) > LARGEST:
            raise _Unusable(f"a reply of more than {LARGEST // 2**20} MB")
    await response.stream.aclose()
    response.stream = httpx2.ByteStream(bytes(body))


class OpenAIClient:
    """A model of one server; its connections are open inside `async with`."""

    def __init__(
        self, model: str, *, api_key: str, base_url: str, timeout: float = 60.0, attempts: int = 5, **parameters: Any
    ):
        """Set up the calls; UserError where the key or the address cannot be used.

        Args:
            timeout: seconds for one attempt, from its connection to the last byte of its reply.
            parameters: sent along with each call, such as `temperature`; None is not sent.
        """
        if not re.fullmatch(r"[!-~]+", api_key):
            problem = "holds a space, a line break or another character that no key has" if api_key else "is empty"
            raise UserError("OPENAI_API_KEY", problem, "set it to the key alone, in the environment or an env file")
        try:
            self.where = check_address(base_url).rstrip("/")
        except ValueError as error:
            raise UserError("OPENAI_BASE_URL", "is not the address of a server", str(error)) from None
        self._model, self._timeout, self._attempts, self._key = model, timeout, attempts, api_key
        self._parameters = {name: value for name, value in parameters.items() if value is not None}

    async def __aenter__(self) -> OpenAIClient:
        """Open the client in the event loop; UserError where a proxy or the certificates cannot be used."""
        self._interrupted = asyncio.Event()
        limits, hooks = httpx2.Limits(max_connections=None), {"response": [_limit]}
        try:
            # A redirect would hand the prompts to another host. The deadline of a whole call is `_attempt`'s.
            http = httpx2.AsyncClient(follow_redirects=False, timeout=None, limits=limits, event_hooks=hooks)
        except OSError as error:  # ssl.SSLError is one
            remedy = "let SSL_CERT_FILE and SSL_CERT_DIR name certificates that are there, or unset them"
            raise UserError("SSL_CERT_FILE", f"the certificates cannot be read: {error}", remedy) from None
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            remedy = "give the address of an HTTP proxy, unset it, or name the judge's host in NO_PROXY"
            raise UserError("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY", f"cannot be used: {error}", remedy) from None
        self._api = openai.AsyncOpenAI(
            api_key=self._key, base_url=self.where, http_client=http, max_retries=0, timeout=None
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.close()

    def interrupt(self) -> None:
        """End the waits between attempts, now and from now on; a call under way comes back with what it has."""
        self._interrupted.set()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._interrupted.wait(), seconds)

    async def complete(self, messages: Sequence[Message]) -> Reply:
        """Make one call, with the retries that are due to what comes back; UserError where no call can succeed."""
        dice = random.Random(json.dumps(messages))
        replies: list[Reply] = []
        while not replies or not self._interrupted.is_set():
            reply = await self._attempt(messages)
            replies.append(reply)
            alike = sum(one.status == reply.status for one in replies)
            asked = -1.0 if reply.wait is None else reply.wait
            if alike >= FAULTS[reply.status].calls or len(replies) == self._attempts or asked > LONGEST_WAIT:
                break
            back_off = min(2.0 ** (len(replies) - 1), LONGEST_BACK_OFF) * dice.uniform(0.5, 1.0)
            # Calls that were sent away together do not come back at the same instant.
            await self._pause(back_off if asked < 0 else max(asked + dice.uniform(0.0, 0.5), back_off))
        counted: list[Any] = [one.usage for one in replies if one.usage is not None]
        usage: Any = {name: sum(one[name] for one in counted) for name in Usage.__annotations__} if counted else None
        uncounted = sum(one.status == "timeout" for one in replies)
        return replace(replies[-1], usage=usage, attempts=len(replies), uncounted=uncounted)

    async def _attempt(self, messages: Sequence[Message]) -> Reply:
        try:
            # The HTTP library's timeouts are for single reads: a header or a byte now and then would hold them off.
            return await asyncio.wait_for(self._post(messages), self._timeout)
        except asyncio.TimeoutError:
            return Reply("timeout", detail=f"no whole reply within {self._timeout:g} s")
        except _Unusable as error:
            return Reply("unreadable", detail=words(str(error)))
        except (openai.APIConnectionError, OSError, ValueError) as error:  # ValueError: a header that cannot be read
            cause = error.__cause__ or error
            return Reply("connection", detail=words(f"{type(cause).__name__}: {cause}"))

    async def _post(self, messages: Sequence[Message]) -> Reply:
        typed: Any = messages
        headers, create = {"Accept-Encoding": "identity"}, self._api.chat.completions.with_raw_response.create
        try:
            raw = await create(model=self._model, messages=typed, extra_body=self._parameters, extra_headers=headers)
        except openai.APIStatusError as error:
            response = error.response
        else:
            return read_answer(raw.http_response.content)
        codes, said = read_error(response.content)
        detail = words(f"HTTP {response.status_code}: {said}")
        reply = read_failure(response.status_code, codes, response.headers, detail)
        if reply is None:
            raise self._refusal(response, detail)
        return reply

    def _refusal(self, response: httpx2.Response, detail: str) -> UserError:
        place, remedy = f"judge model {self._model}", f"{self.where}/models lists those that it has"
        if response.status_code in (401, 403):
            place = "OPENAI_API_KEY"
            remedy = "set it to a key that is valid there and may use the model, or set OPENAI_BASE_URL"
        elif response.status_code < 400:
            place, target = "OPENAI_BASE_URL", words(response.headers.get("location", "another address"))
            remedy = f"redirects are not followed: give the address of the server itself; this one points to {target}"
        elif response.status_code != 404:
            remedy = advise("bad_request", detail)
        elif "model" not in detail.lower():
            place, remedy = "OPENAI_BASE_URL", "check the address; with most servers it ends in /v1"
        return UserError(place, f"{self.where} says: {detail}", remedy + name_proxy(self.where))


async def run_all(
    requests: Sequence[Request],
    judge: OpenAIClient,
    workers: int,
    budget: Budget,
    on_reply: Callable[[Request, Reply], None],
) -> str | None:
    """Make calls, up to `workers` at once, count them in the budget and hand over each reply as it comes.

    A limit of the budget, exhausted quota, many failures in a row and Ctrl-C end the run. What is in flight by then
    still comes back and is handed over; a second Ctrl-C drops it. Returns the reason why it ended before its time;
    UserError, once those in flight were handed over, where no call can succeed.
    """
    waiting, loop = iter(requests), asyncio.get_running_loop()
    in_flight = failures = 0
    reason: str | None = None

    def end(why: str) -> None:
        nonlocal reason
        if why == "interrupted" and reason is None:
            logger.warning("stopping once %d calls in flight are back; Ctrl-C again drops them", in_flight)
        reason = reason or why
        judge.interrupt()

    async def work() -> None:
        nonlocal in_flight, failures, reason
        while reason is None and (request := next(waiting, None)) is not None:
            reason = budget.stop(in_flight)
            if reason is not None:
                return
            in_flight += 1
            handed_over = False
            try:
                reply = await judge.complete(request.messages)
                budget.add(reply.usage, reply.uncounted)
                failures = 0 if FAULTS[reply.status].stands and reply.status not in NO_TEXT else failures + 1
                if reply.status == "quota":
                    end("quota")
                elif failures == FAILURES_IN_A_ROW:
                    end(f"{failures} calls in a row failed")
                on_reply(request, reply)
                handed_over = True
            finally:
                in_flight -= 1
                if not handed_over:
                    end("a call cannot succeed")

    async with judge:
        with _first_ctrl_c(lambda: loop.call_soon_threadsafe(end, "interrupted")):
            ended = await asyncio.gather(*(work() for _ in range(workers)), return_exceptions=True)
    for error in filter(None, ended):
        raise error
    return reason


@contextlib.contextmanager
def _first_ctrl_c(act: Callable[[], Any]) -> Iterator[None]:
    """Take the first Ctrl-C to be a wish to stop, so that it breaks off nothing half-way; the second acts as ever."""
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread is told of signals, and a job in the background may have been told to ignore this one.
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        act()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
