"""Calls to a judge behind any OpenAI-compatible server: one with its retries, and many at once.

The `openai` package sends the calls. They are repeated here: the package's own retries do not tell a quota from a rate
limit, and its parsing takes an HTML page for an answer. How often a call is made in all, by its status:

    ok, refusal, content_filter, length, context_length, quota, bad_request    once
    null_content, html, bad_json, no_choices: a 200 without use                until the second of these
    rate_limit, server_error, timeout, connection                              `attempts` times
    401, 403, a redirect, no such model or address, an option that is refused  once; a UserError ends the run
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
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Any, NoReturn

import httpx2
import openai

from rlhf_trl.judge.prompt import Message
from rlhf_trl.judge.replies import MAY_PASS, Reply, Status, Usage, read_answer, read_failure, words
from rlhf_trl.recipe.errors import UserError

logger = logging.getLogger(__name__)

TRANSIENT: frozenset[Status] = frozenset({"rate_limit", "server_error", "timeout", "connection"})
UNUSABLE: frozenset[Status] = frozenset({"null_content", "html", "bad_json", "no_choices"})
OPENAI = "https://api.openai.com/v1"
LONGEST_BACK_OFF = 30.0  # seconds: 1, doubled with every further attempt; half of it is left to chance
LONGEST_WAIT = 60.0  # seconds; a server that asks for a longer wait (Retry-After) is not asked again
# So many calls that may pass, and nothing else between them: the server is down, or refuses everything.
FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class Request:
    """A call to make, its key in the cache, and what the caller wants to find again beside its reply."""

    key: str
    messages: list[Message]
    about: Any = None


class OpenAIClient:
    """A model of one server. Calls may be made from several threads."""

    def __init__(
        self,
        model: str,
        *,
        api_key: str,
        base_url: str | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        **parameters: Any,
    ):
        """Set up the calls; none is made yet.

        Args:
            base_url: up to and with the `/v1`; None is OpenAI's own.
            timeout: seconds without a byte, and after which a reply that is still arriving is given up.
            parameters: sent along with each call, such as `max_tokens` or `temperature`; None is not sent.

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
            # A redirect would hand the prompts to another host, and take its verdicts.
            http = openai.DefaultHttpxClient(follow_redirects=False)
            options: Any = {"timeout": timeout, "max_retries": 0, "http_client": http}
            self._api = openai.OpenAI(api_key=api_key, base_url=self._where, **options)
        except httpx2.InvalidURL as error:
            problem = f"{base_url!r} is not the address of a server: {error}"
            raise UserError("OPENAI_BASE_URL", problem, "give it in full, e.g. http://127.0.0.1:8000/v1") from None
        self._model, self._timeout, self._attempts = model, timeout, attempts
        self._parameters = {name: value for name, value in parameters.items() if value is not None}
        self._interrupted = threading.Event()
        self.sleep: Callable[[float], Any] = self._interrupted.wait

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    def interrupt(self) -> None:
        """End the waits between attempts, now and from now on; a call under way comes back with what it has."""
        self._interrupted.set()

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Make one call, with the retries that are due to what comes back.

        Raises:
            UserError: the key, the model, the address or an option is wrong, so that no call can succeed.
        """
        dice = random.Random(json.dumps(list(messages)))
        replies: list[Reply] = []
        while True:
            reply = self._attempt(messages)
            replies.append(reply)
            useless = sum(one.status in UNUSABLE for one in replies)
            repeat = reply.status in TRANSIENT or (reply.status in UNUSABLE and useless < 2)
            asked = -1.0 if reply.wait is None else reply.wait
            if not repeat or len(replies) == self._attempts or asked > LONGEST_WAIT or self._interrupted.is_set():
                break
            back_off = min(2.0 ** (len(replies) - 1), LONGEST_BACK_OFF) * dice.uniform(0.5, 1.0)
            # Calls that were sent away together do not come back at the same instant.
            self.sleep(back_off if asked < 0 else max(asked + dice.uniform(0.0, 0.5), back_off))
            if self._interrupted.is_set():
                break
        counted: list[Any] = [one.usage for one in replies if one.usage is not None]
        usage: Any = {name: sum(one[name] for one in counted) for name in Usage.__annotations__} if counted else None
        return replace(reply, usage=usage, attempts=len(replies))

    def _attempt(self, messages: Sequence[Message]) -> Reply:
        deadline = time.monotonic() + self._timeout
        create: Any = self._api.chat.completions.with_streaming_response.create
        try:
            with create(model=self._model, messages=list(messages), **self._parameters) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    # A byte now and then, as some proxies send while they wait, holds off the library's timeout.
                    if time.monotonic() > deadline:
                        return Reply("timeout", detail=f"the reply was still arriving after {self._timeout:g} s")
                return read_answer(response.headers.get("content-type", ""), b"".join(parts))
        except (openai.APITimeoutError, httpx2.TimeoutException) as error:
            return Reply("timeout", detail=words(f"{type(error).__name__}: {error}"))
        except openai.APIStatusError as error:
            # The library's message ends with the server's where that is in OpenAI's form.
            detail = words(error.message if " - " in error.message else f"{error.message} - {error.response.text}")
            codes = {str(error.code), str(error.type)}  # a server may send anything here
            reply = read_failure(error.status_code, codes, error.response.headers, detail)
            if reply is None:
                self._refuse(error, detail)
            return reply
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ or error
            return Reply("connection", detail=words(f"{type(cause).__name__}: {cause}"))

    def _refuse(self, error: openai.APIStatusError, detail: str) -> NoReturn:
        place, remedy = f"judge model {self._model}", f"{self._where.rstrip('/')}/models lists those that it has"
        if error.status_code in (401, 403):
            place = "OPENAI_API_KEY"
            remedy = "set it to a key that is valid there and may use the model, or set OPENAI_BASE_URL"
        elif error.status_code < 400:
            place, target = "OPENAI_BASE_URL", error.response.headers.get("location", "another address")
            remedy = f"redirects are not followed: give the address of the server itself; this one points to {target}"
        elif error.status_code != 404:
            remedy = "change the judge's options: newer models of OpenAI take max_completion_tokens and no temperature"
        elif "model" not in detail.lower():
            place, remedy = "OPENAI_BASE_URL", "check the address; with most servers it ends in /v1"
        raise UserError(place, f"{self._where} says: {detail}", remedy) from None


def run_all(
    requests: Sequence[Request],
    judge: OpenAIClient,
    workers: int,
    on_reply: Callable[[Request, Reply], None],
    stop: Callable[[int], str | None],
) -> str | None:
    """Make calls, up to `workers` at once, and hand over each reply as it comes, in the calling thread.

    `stop` is asked before every call, with the number of those in flight, and may give the reason to begin no more.
    Exhausted quota, many failures in a row and Ctrl-C also end the run. What is in flight by then still comes back
    and is handed over; a second Ctrl-C drops it. Returns the reason why it ended before its time, or None.

    Raises:
        UserError: no call can succeed; those in flight were handed over first.
    """
    arrived: SimpleQueue[tuple[Request, Reply] | BaseException | None] = SimpleQueue()
    waiting, in_flight, failures = iter(requests), 0, 0
    reason: str | None = None
    error: BaseException | None = None

    def call(request: Request) -> None:
        arrived.put((request, judge.complete(request.messages)))

    # Its threads are daemons: at the second Ctrl-C no call is waited for, as it would be with concurrent.futures.
    with _first_ctrl_c(lambda: arrived.put(None)), ThreadPool(max(1, min(workers, len(requests)))) as pool:
        while True:
            while reason is None and in_flight < workers and (request := next(waiting, None)) is not None:
                reason = stop(in_flight)
                if reason is None:
                    pool.apply_async(call, (request,), error_callback=arrived.put)
                    in_flight += 1
            if not in_flight:
                break
            ending, event = None, arrived.get()
            in_flight -= event is not None
            if isinstance(event, tuple):
                request, reply = event
                failures = failures + 1 if reply.status in MAY_PASS else 0
                if reply.status == "quota":
                    ending = f"quota: {reply.detail}"
                elif failures == FAILURES_IN_A_ROW:
                    ending = f"{failures} calls in a row failed, the last with {reply.status}: {reply.detail}"
                on_reply(request, reply)
            elif event is None:
                logger.warning("stopping once the %d calls in flight are back; Ctrl-C again drops them", in_flight)
                ending = "interrupted"
            else:
                error, ending = event, str(event)
            if ending is not None:
                reason = reason or ending
                judge.interrupt()
    if error is not None:
        raise error
    return reason


@contextlib.contextmanager
def _first_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
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
