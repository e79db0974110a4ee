"""Calls to a judge behind any OpenAI-compatible server: one with its retries, and many at once.

The `openai` package sends them. They are repeated here: the package does not tell a quota from a rate limit.
How often a call is made in all, by its status:

    ok, refusal, content_filter, length, context_length, quota, bad_request    once
    null_content, html, bad_json, no_choices: a 200 without use                until the second of these
    rate_limit, server_error, timeout, connection                              `attempts` times
    401, 403, a redirect, no such model or address, an option that is refused  once; a UserError ends the run
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from rlhf_trl.judge.advice import advise, proxy_of
from rlhf_trl.judge.prompt import Message
from rlhf_trl.judge.replies import MAY_PASS, Reply, Status, Usage, read_answer, read_error, read_failure, words
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import check_address

logger = logging.getLogger(__name__)

TRANSIENT: frozenset[Status] = frozenset({"rate_limit", "server_error", "timeout", "connection"})
UNUSABLE: frozenset[Status] = frozenset({"null_content", "html", "bad_json", "no_choices"})
LONGEST_BACK_OFF = 30.0  # seconds: 1, doubled with every further attempt; half of it is left to chance
LONGEST_WAIT = 60.0  # seconds; a server that asks for a longer wait (Retry-After) is not asked again
LARGEST = 2 * 2**20  # bytes of a reply
# So many calls that may pass, and nothing else between them: the server is down, or refuses everything.
FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class Request:
    """A call to make, its key in the cache, and what the caller wants to find again beside its reply."""

    key: str
    messages: list[Message]
    about: Any = None


class _Unusable(Exception):
    """A reply that is not read."""


class _Capped(httpx2.AsyncByteStream):
    """The body of a reply, up to `LARGEST` bytes."""

    def __init__(self, body: httpx2.AsyncByteStream):
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for part in self._body:
            received += len(part)
            if received > LARGEST:
                raise _Unusable(f"a reply of more than {LARGEST // 2**20} MB")
            yield part

    async def aclose(self) -> None:
        await self._body.aclose()


async def _limit(response: httpx2.Response) -> None:
    packing = response.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise _Unusable(f"a body packed with {packing}, though plain text was asked for")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Capped(response.stream)


class OpenAIClient:
    """A model of one server; its connections are open inside `async with`."""

    def __init__(
        self, model: str, *, api_key: str, base_url: str, timeout: float = 60.0, attempts: int = 5, **parameters: Any
    ):
        """Set up the calls; none is made yet.

        Args:
            timeout: seconds for one attempt, from its connection to the last byte of its reply.
            parameters: sent along with each call, such as `max_tokens` or `temperature`; None is not sent.

        Raises:
            UserError: the key or the address cannot be used.
        """
        if not re.fullmatch(r"[!-~]+", api_key):
            problem = "holds a space, a line break or another character that no key has" if api_key else "is empty"
            raise UserError("OPENAI_API_KEY", problem, "set it to the key alone, in the environment or an env file")
        try:
            self.where = check_address(base_url).rstrip("/")
        except ValueError as error:
            raise UserError("OPENAI_BASE_URL", "is not the address of a server", str(error)) from None
        self._model, self._timeout, self._attempts = model, timeout, attempts
        self._parameters = {name: value for name, value in parameters.items() if value is not None}
        self._key = api_key
        self.sleep: Callable[[float], Awaitable[Any]] = self._pause

    async def __aenter__(self) -> OpenAIClient:
        """Open the client in the event loop that makes the calls.

        Raises:
            UserError: a proxy or the certificates cannot be used.
        """
        self._interrupted = asyncio.Event()
        try:
            # A redirect would hand the prompts to another host. The deadline of a whole call is `_attempt`'s.
            limits = httpx2.Limits(max_connections=None)
            http = httpx2.AsyncClient(
                follow_redirects=False, timeout=None, limits=limits, event_hooks={"response": [_limit]}
            )
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
        """Make one call, with the retries that are due to what comes back.

        Raises:
            UserError: the key, the model, the address or an option is wrong, so that no call can succeed.
        """
        dice = random.Random(json.dumps(messages))
        replies: list[Reply] = []
        while True:
            reply = await self._attempt(messages)
            replies.append(reply)
            useless = sum(one.status in UNUSABLE for one in replies)
            repeat = reply.status in TRANSIENT or (reply.status in UNUSABLE and useless < 2)
            asked = -1.0 if reply.wait is None else reply.wait
            if not repeat or len(replies) == self._attempts or asked > LONGEST_WAIT or self._interrupted.is_set():
                break
            back_off = min(2.0 ** (len(replies) - 1), LONGEST_BACK_OFF) * dice.uniform(0.5, 1.0)
            # Calls that were sent away together do not come back at the same instant.
            await self.sleep(back_off if asked < 0 else max(asked + dice.uniform(0.0, 0.5), back_off))
            if self._interrupted.is_set():
                break
        counted: list[Any] = [one.usage for one in replies if one.usage is not None]
        usage: Any = {name: sum(one[name] for one in counted) for name in Usage.__annotations__} if counted else None
        return replace(reply, usage=usage, attempts=len(replies))

    async def _attempt(self, messages: Sequence[Message]) -> Reply:
        try:
            # The HTTP library's timeouts are for single reads: a header or a byte now and then would hold them off.
            return await asyncio.wait_for(self._post(messages), self._timeout)
        except asyncio.TimeoutError:
            return Reply("timeout", detail=f"no whole reply within {self._timeout:g} s")
        except _Unusable as error:
            return Reply("bad_json", detail=words(str(error)))
        except (openai.APIConnectionError, OSError, ValueError) as error:  # ValueError: a header that cannot be read
            cause = error.__cause__ or error
            return Reply("connection", detail=words(f"{type(cause).__name__}: {cause}"))

    async def _post(self, messages: Sequence[Message]) -> Reply:
        typed: Any = messages
        # Uncompressed: a small body may unpack to one that fills the memory.
        headers = {"Accept-Encoding": "identity"}
        create = self._api.chat.completions.with_raw_response.create
        try:
            raw = await create(model=self._model, messages=typed, extra_body=self._parameters, extra_headers=headers)
            response = raw.http_response
        except openai.APIStatusError as error:
            response = error.response
        if response.is_success:
            return read_answer(response.headers.get("content-type", ""), response.content)
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
        return UserError(place, f"{self.where} says: {detail}", "; or ".join([remedy, *proxy_of(self.where)]))


async def run_all(
    requests: Sequence[Request],
    judge: OpenAIClient,
    workers: int,
    on_reply: Callable[[Request, Reply], None],
    stop: Callable[[int], str | None],
) -> str | None:
    """Make calls, up to `workers` at once, and hand over each reply as it comes.

    `stop` is asked before every call, with the number of those in flight, and may give the reason to begin no more.
    Exhausted quota, many failures in a row and Ctrl-C also end the run. What is in flight by then still comes back
    and is handed over; a second Ctrl-C drops it. Returns the reason why it ended before its time, or None.

    Raises:
        UserError: no call can succeed; those in flight were handed over first.
    """
    waiting, failures = iter(requests), 0
    reason: str | None = None
    error: BaseException | None = None
    in_flight: dict[asyncio.Task[Reply], Request] = {}
    loop, ctrl_c = asyncio.get_running_loop(), asyncio.Event()
    watch: asyncio.Task[Any] = asyncio.create_task(ctrl_c.wait())

    def end(why: str) -> None:
        nonlocal reason
        reason = reason or why
        judge.interrupt()

    async with judge:
        with _first_ctrl_c(lambda: loop.call_soon_threadsafe(ctrl_c.set)):
            while True:
                while reason is None and len(in_flight) < workers and (request := next(waiting, None)) is not None:
                    reason = stop(len(in_flight))
                    if reason is None:
                        in_flight[asyncio.create_task(judge.complete(request.messages))] = request
                if not in_flight:
                    break
                watched = {*in_flight} if ctrl_c.is_set() else {*in_flight, watch}
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in in_flight if task.done()]:
                    request = in_flight.pop(task)
                    if task.exception() is not None:
                        error = task.exception()
                        end("a call cannot succeed")
                        continue
                    reply = task.result()
                    failures = failures + 1 if reply.status in MAY_PASS else 0
                    if reply.status == "quota":
                        end("quota")
                    elif failures == FAILURES_IN_A_ROW:
                        end(f"{failures} calls in a row failed")
                    on_reply(request, reply)
                if ctrl_c.is_set() and reason is None:
                    logger.warning(
                        "stopping once %d calls in flight are back; Ctrl-C again drops them", len(in_flight)
                    )
                    end("interrupted")
    watch.cancel()
    if error is not None:
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
