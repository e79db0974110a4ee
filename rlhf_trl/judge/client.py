"""Calls to a judge behind any OpenAI-compatible server: one with its retries, and many at once.

Reads and writes nothing but the network; what comes back goes to the caller's `on_reply`:

    with OpenAIClient("gpt-4.1-mini", api_key=api_key) as client:
        stopped = run_all(requests, client, workers=16, on_reply=store, stop=budget.stop)

The `openai` package sends the calls, and `tenacity` repeats them: the package's own retries do not tell a quota from a
rate limit, and its parsing takes an HTML page for an answer. How often a call is made in all, by its status:

    ok, refusal, content_filter, length, context_length, quota, bad_request    once
    null_content, html, bad_json, no_choices: a 200 without use                until the second of these
    rate_limit, server_error, timeout, connection                              `attempts` times
    401, 403, no such model or address, an option that the server refuses      once; a UserError ends the run
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Any, Literal, NoReturn, Protocol

import httpx2
import openai
import tenacity

from rlhf_trl.judge.cache import MAY_PASS, Message, Status, Usage
from rlhf_trl.judge.replies import Outcome, read_answer, read_failure, words
from rlhf_trl.recipe.errors import UserError

logger = logging.getLogger(__name__)

TRANSIENT: frozenset[Status] = frozenset({"rate_limit", "server_error", "timeout", "connection"})
UNUSABLE: frozenset[Status] = frozenset({"null_content", "html", "bad_json", "no_choices"})
OPENAI = "https://api.openai.com/v1"
# Seconds: 1, doubled with every further attempt; half of it is left to chance.
BACK_OFF = tenacity.wait_exponential(max=30)
# So many calls that may pass, and nothing else between them: the server is down, or refuses everything.
FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class Reply:
    """What one call came to, after all its attempts."""

    status: Status
    text: str | None
    """What the model wrote, as far as it did: part of a reply with `length`, the words of a `refusal`."""
    attempts: int
    usage: Usage | None
    """The sum over the attempts that the server counted tokens for; None if it counted none."""
    model: str | None
    """The model by the server's name, such as a dated snapshot of the one that was asked for."""
    fingerprint: str | None
    seconds: float
    """From the first attempt to the end of the last, the waits between them included."""
    detail: str | None
    """Why it is not "ok", in the words of the server or of the HTTP library."""

    def as_line(self) -> dict[str, Any]:
        """What a line of the cache says about the reply."""
        values = {"status": self.status, "reply": self.text, "attempts": self.attempts, "usage": self.usage}
        values |= {"model": self.model, "fingerprint": self.fingerprint, "detail": self.detail}
        return values | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Request:
    """A call to make: its key in the cache, its messages, and what the caller wants to find again beside its reply."""

    key: str
    messages: list[Message]
    about: dict[str, Any]


class Judge(Protocol):
    """What `run_all` needs of a judge; both methods are called from several threads."""

    def complete(self, messages: Sequence[Message]) -> Reply: ...

    def interrupt(self) -> None:
        """End the waits between attempts, now and from now on; a call under way comes back with what it has."""


class OpenAIClient:
    """A model of one server. Calls may be made from several threads."""

    def __init__(
        self,
        model: str,
        *,
        api_key: str,
        base_url: str | None = None,
        max_tokens: int = 512,
        max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        temperature: float | None = 0.0,
        seed: int | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        longest_wait: float = 60.0,
        jitter: int = 0,
        sleep: Callable[[float], Any] | None = None,
    ):
        """Set up the calls; none is made yet.

        Args:
            api_key: any word does for a local server that asks for none, by custom "EMPTY".
            base_url: up to and with the `/v1`; None is OpenAI's own.
            max_tokens_name: OpenAI's newer models only know `max_completion_tokens`, many local servers `max_tokens`.
            temperature: None is not to send one, for models that refuse any.
            seed: sent along; best effort, says OpenAI's reference.
            timeout: seconds without a byte, and after which a reply that is still arriving is given up.
            longest_wait: seconds; a server that asks for a longer wait (Retry-After) is not asked again.
            jitter: seed of the back-off's chance, which is drawn for each call from this and its messages.
            sleep: waits some seconds; for tests.

        Raises:
            UserError: the key or the address cannot be one.
        """
        if not re.fullmatch(r"[!-~]+", api_key):
            problem = "holds a space, a line break or another character that no key has" if api_key else "is empty"
            raise UserError("OPENAI_API_KEY", problem, "set it to the key alone, in the environment or an env file")
        self._where = OPENAI if base_url is None else base_url
        try:
            if not re.match(r"https?://[^/]", self._where):
                raise httpx2.InvalidURL("it does not begin with http:// or https:// and a host")
            self._api = openai.OpenAI(api_key=api_key, base_url=self._where, timeout=timeout, max_retries=0)
        except httpx2.InvalidURL as error:
            problem = f"{base_url!r} is not the address of a server: {error}"
            raise UserError("OPENAI_BASE_URL", problem, "give it in full, e.g. http://127.0.0.1:8000/v1") from None
        self._model = model
        options = {"temperature": temperature, "seed": seed, max_tokens_name: max_tokens}
        self._parameters = {name: value for name, value in options.items() if value is not None}
        self._timeout = timeout
        self._attempts = attempts
        self._longest_wait = longest_wait
        self._jitter = jitter
        self._interrupted = threading.Event()
        self._sleep: Callable[[float], Any] = self._interrupted.wait if sleep is None else sleep

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    def interrupt(self) -> None:
        """End the waits between attempts, now and from now on."""
        self._interrupted.set()

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Make one call, with the retries that are due to what comes back.

        Raises:
            UserError: the key, the model, the address or an option is wrong, so that no call can succeed.
        """
        start = time.monotonic()
        dice = random.Random(json.dumps([self._jitter, *messages]))
        outcomes: list[Outcome] = []

        def attempt() -> Outcome:
            if not outcomes or not self._interrupted.is_set():
                outcomes.append(self._attempt(messages))
            return outcomes[-1]

        def is_retried(outcome: Outcome) -> bool:
            unusable = sum(one.status in UNUSABLE for one in outcomes)
            return outcome.status in TRANSIENT or (outcome.status in UNUSABLE and unusable < 2)

        def wait(state: tenacity.RetryCallState) -> float:
            back_off = BACK_OFF(state) * dice.uniform(0.5, 1.0)
            asked = outcomes[-1].wait
            # Calls that were sent away together do not come back at the same instant.
            return back_off if asked is None else max(asked + dice.uniform(0.0, 0.5), back_off)

        def is_over(state: tenacity.RetryCallState) -> bool:
            too_long = (outcomes[-1].wait or 0.0) > self._longest_wait
            return state.attempt_number >= self._attempts or too_long or self._interrupted.is_set()

        outcome = tenacity.Retrying(
            retry=tenacity.retry_if_result(is_retried),
            wait=wait,
            stop=is_over,
            sleep=self._sleep,
            retry_error_callback=lambda _: outcomes[-1],
        )(attempt)
        counted = [one.usage for one in outcomes if one.usage is not None]
        usage = {name: sum(one[name] for one in counted) for name in counted[0]} if counted else None
        about = (outcome.model, outcome.fingerprint, time.monotonic() - start, outcome.detail)
        return Reply(outcome.status, outcome.text, len(outcomes), usage, *about)

    def _attempt(self, messages: Sequence[Message]) -> Outcome:
        deadline = time.monotonic() + self._timeout
        create: Any = self._api.chat.completions.with_streaming_response.create
        try:
            with create(model=self._model, messages=list(messages), **self._parameters) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    # A byte now and then, as some proxies send while they wait, holds off the library's timeout.
                    if time.monotonic() > deadline:
                        return Outcome("timeout", detail=f"the reply was still arriving after {self._timeout:g} s")
                return read_answer(response.headers.get("content-type", ""), b"".join(parts))
        except (openai.APITimeoutError, httpx2.TimeoutException) as error:
            return Outcome("timeout", detail=words(f"{type(error).__name__}: {error}"))
        except openai.APIStatusError as error:
            # The library's message ends with the server's where that is in OpenAI's form.
            detail = words(error.message if " - " in error.message else f"{error.message} - {error.response.text}")
            outcome = read_failure(error.status_code, {error.code, error.type}, error.response.headers, detail)
            if outcome is None:
                self._refuse(error, detail)
            return outcome
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ or error
            return Outcome("connection", detail=words(f"{type(cause).__name__}: {cause}"))

    def _refuse(self, error: openai.APIStatusError, detail: str) -> NoReturn:
        said = f"{self._where} says: {detail}"
        if error.status_code in (401, 403):
            remedy = "set OPENAI_API_KEY to a key that is valid there and may use the model, or OPENAI_BASE_URL"
            raise UserError("OPENAI_API_KEY", said, remedy) from None
        if error.status_code != 404:
            remedy = "change the judge's options: newer models of OpenAI take max_completion_tokens and no temperature"
            raise UserError(f"judge model {self._model}", said, remedy) from None
        if "model" in detail.lower():
            remedy = f"{self._where.rstrip('/')}/models lists those that it has"
            raise UserError(f"judge model {self._model}", said, remedy) from None
        raise UserError("OPENAI_BASE_URL", said, "check the address; with most servers it ends in /v1") from None


def run_all(
    requests: Sequence[Request],
    judge: Judge,
    workers: int,
    on_reply: Callable[[Request, Reply], None],
    stop: Callable[[int], str | None],
) -> str | None:
    """Make calls, up to `workers` at once, and hand over each reply as it comes, in the calling thread.

    `stop` is asked before every call, with the number of those in flight, and may give the reason to begin no more.
    Exhausted quota, many failures in a row and Ctrl-C also end the run. What is in flight by then still comes back
    and is handed over; a second Ctrl-C drops it.

    Returns the reason why it ended before its time, or None.

    Raises:
        UserError: no call can succeed; those in flight were handed over first.
        KeyboardInterrupt: at the second Ctrl-C.
    """
    arrived: SimpleQueue[tuple[Request, Reply] | BaseException | None] = SimpleQueue()
    waiting = iter(requests)
    in_flight = failures = 0
    reason: str | None = None
    error: BaseException | None = None

    def begin(request: Request) -> None:
        pool.apply_async(
            judge.complete,
            (request.messages,),
            callback=lambda reply: arrived.put((request, reply)),
            error_callback=arrived.put,
        )

    # Its threads are daemons: at the second Ctrl-C no call is waited for, as it would be with concurrent.futures.
    with _ctrl_c(lambda: arrived.put(None)), ThreadPool(max(1, min(workers, len(requests)))) as pool:
        while True:
            while reason is None and in_flight < workers and (request := next(waiting, None)) is not None:
                reason = stop(in_flight)
                if reason is None:
                    begin(request)
                    in_flight += 1
            if not in_flight:
                break
            ending: str | None = None
            match arrived.get():
                case (Request() as request, Reply() as reply):
                    in_flight -= 1
                    failures = failures + 1 if reply.status in MAY_PASS else 0
                    if reply.status == "quota":
                        ending = f"quota: {reply.detail}"
                    elif failures == FAILURES_IN_A_ROW:
                        ending = f"{failures} calls in a row failed, the last with {reply.status}: {reply.detail}"
                    on_reply(request, reply)
                case None:
                    logger.warning("stopping once the %d calls in flight are back; Ctrl-C again drops them", in_flight)
                    ending = "interrupted"
                case BaseException() as error:
                    in_flight -= 1
                    ending = str(error)
            if ending is not None:
                reason = reason or ending
                judge.interrupt()
    if error is not None:
        raise error
    return reason


@contextlib.contextmanager
def _ctrl_c(first: Callable[[], None]) -> Iterator[None]:
    """Take the first Ctrl-C to be a wish to stop, so that it breaks off nothing half-way; the second acts as ever."""
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread is told of signals, and a job in the background may have been told to ignore this one.
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        first()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
