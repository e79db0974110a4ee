"""Calls to a judge, against a real HTTP server that misbehaves as real ones do, and what they cost."""

import asyncio
import contextlib
import gzip
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from fake_openai import USAGE, FakeOpenAI, completion, cut, drip, drop, hang, json_of, ok, raw, status

from rlhf_trl.judge.client import FAILURES_IN_A_ROW, LARGEST, Budget, OpenAIClient, Request, cost, forecast, run_all
from rlhf_trl.judge.replies import Reply, read_answer, read_error, retry_after, tell_failures
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Price

ASK = [{"role": "user", "content": "Which is better?"}]
COUNTED = {"prompt_tokens": 100, "cached_tokens": 40, "completion_tokens": 10}


def client_of(server: FakeOpenAI, waits: list | None = None, **options) -> OpenAIClient:
    """A client that notes its waits between attempts instead of waiting."""
    client = OpenAIClient("judge", api_key="EMPTY", base_url=server.url, **{"attempts": 3, "timeout": 20} | options)

    async def sleep(seconds):
        if waits is not None:
            waits.append(seconds)

    client._pause = sleep
    return client


def complete(client: OpenAIClient, messages=ASK) -> Reply:
    async def call():
        async with client:
            return await client.complete(messages)

    return asyncio.run(call())


# Behaviours of the server, what one call comes to with at most three attempts, how many were made, and the text kept.
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "[[B]]"}]}, {"type": "text", "text": "So.\n[[A]]"}]
QUOTA = status(429, {"code": "insufficient_quota", "type": "insufficient_quota"})
TABLE = {
    "ok": ([ok("because\n[[B]]")], "ok", 1, "because\n[[B]]"),
    "429 twice, then ok": ([status(429), status(429, headers={"Retry-After": "2"}), ok("[[A]]")], "ok", 3, "[[A]]"),
    "429 for ever": ([status(429)] * 9, "rate_limit", 3, None),
    "Retry-After too long": ([status(429, headers={"Retry-After": "3600"})] * 9, "rate_limit", 1, None),
    "quota": ([QUOTA] * 9, "quota", 1, None),
    "500": ([status(500)] * 9, "server_error", 3, None),
    "hang": ([hang] * 9, "timeout", 2, None),
    "a body that drips": ([drip(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"\n")] * 9, "timeout", 2, None),
    "headers that drip": ([drip(b"HTTP/1.1 200 OK\r\n", b"X-Wait: 1\r\n")] * 9, "timeout", 2, None),
    "102 for ever": ([drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n")] * 9, "timeout", 2, None),
    "endless headers": ([raw(b"{}", X="x" * 10**6)] * 9, "connection", 3, None),
    "a huge body": ([raw(b" " * (LARGEST + 1))] * 9, "unreadable", 2, None),
    "a packed body": ([raw(gzip.compress(b" " * 10**6), **{"Content-Encoding": "gzip"})] * 9, "unreadable", 2, None),
    "a failure packed": ([status(400, headers={"Content-Encoding": "br"})] * 9, "unreadable", 2, None),
    "truncated JSON": ([raw(json.dumps(completion("[[A]]")).encode()[:-30])] * 9, "unreadable", 2, None),
    "null content": ([json_of(completion(None))] * 9, "null_content", 2, None),
    "500, then null content": ([status(500), *[json_of(completion(None))] * 9], "null_content", 3, None),
    "refusal": ([json_of(completion(None, refusal="I cannot judge this."))] * 9, "refusal", 1, "I cannot judge this."),
    "content filter": ([json_of(completion("I", "content_filter"))] * 9, "content_filter", 1, "I"),
    "length": ([json_of(completion("Both answers are", "length"))] * 9, "length", 1, "Both answers are"),
    "parts": ([json_of(completion(PARTS))], "ok", 1, "So.\n[[A]]"),
    "no choices": ([json_of(completion("") | {"choices": []})] * 9, "null_content", 2, None),
    "an error in the middle": ([json_of(completion("Answer A", "error"))] * 9, "server_error", 3, "Answer A"),
    "429 in a 200, then ok": ([json_of({"error": {"code": 429, "message": "slow"}}), ok("[[A]]")], "ok", 2, "[[A]]"),
    "402 in a 200": ([json_of({"error": {"code": 402, "message": "credits"}})] * 9, "quota", 1, None),
    "flagged, OpenRouter": ([status(403, {"code": 403}, "Your input was flagged")] * 9, "content_filter", 1, None),
    "flagged, DeepSeek": ([status(400, {"code": "x"}, "Content Exists Risk")] * 9, "content_filter", 1, None),
    "dropped connection": ([drop] * 9, "connection", 3, None),
    "dropped, then ok": ([drop, ok("[[A]]")], "ok", 2, "[[A]]"),
    "cut in the middle": ([cut] * 9, "connection", 3, None),
    "context": ([status(400, {"code": "context_length_exceeded"})] * 9, "context_length", 1, None),
    "context, vLLM": ([status(400, {"code": 400}, "maximum context length is 2048")], "context_length", 1, None),
    "context, llama.cpp": ([status(400, {"type": "exceed_context_size_error"})] * 9, "context_length", 1, None),
    "codes of another form": ([status(400, {"code": [1], "type": {"a": 1}})] * 9, "bad_request", 1, None),
    "bad request": ([status(400, message="messages: field required")] * 9, "bad_request", 1, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_a_call_comes_to(name):
    script, expected, attempts, text = TABLE[name]
    timeout = 0.2 if expected == "timeout" else 20
    with FakeOpenAI(script) as server:
        reply = complete(client_of(server, timeout=timeout))
        assert (reply.status, reply.attempts, len(server.requests)) == (expected, attempts, attempts)
        assert (reply.text, reply.uncounted) == (text, attempts * (expected == "timeout"))
        assert (reply.detail is None) == (expected == "ok")


REDIRECT = status(307, headers={"Location": "http://127.0.0.1:9/v1/chat/completions"})
OPTION = status(400, {"code": "unsupported_parameter"}, "Unsupported parameter: 'max_tokens'")
REFUSALS = {
    "401": (status(401, {"code": "invalid_api_key"}, "Incorrect API key"), "OPENAI_API_KEY", "Incorrect API key"),
    "403": (status(403, message="Country not supported"), "OPENAI_API_KEY", "Country not supported"),
    "model": (status(404, {"code": "model_not_found"}, "The model `judge` does not exist"), "judge", "/v1/models"),
    "address": (status(404, message="Not Found"), "OPENAI_BASE_URL", "/v1"),
    "a redirect": (REDIRECT, "OPENAI_BASE_URL", "http://127.0.0.1:9/v1"),
    "option": (OPTION, "judge", "max_completion_tokens"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_call_can_succeed_with_is_the_users_to_mend_after_one_attempt(name):
    behaviour, place, says = REFUSALS[name]
    with FakeOpenAI(then=behaviour) as server:
        with pytest.raises(UserError) as caught:
            complete(client_of(server))
        assert len(server.requests) == 1
    assert place in caught.value.problems[0].place
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["", "sk-1\n", "two words", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_before_a_call(key):
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        OpenAIClient("judge", api_key=key, base_url="http://h/v1")
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "http://", "http://[::1/v1", "ftp://h/v1", "http://a:b@h/v1", "http://h/v1?key=a"]
)
def test_an_address_that_cannot_be_one_is_refused_before_a_call(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        OpenAIClient("judge", api_key="EMPTY", base_url=url)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTP_PROXY", "localhost:x"), ("SSL_CERT_FILE", "/nowhere/ca.pem"),
     ("SSL_CERT_FILE", __file__)],
)  # fmt: skip
def test_a_proxy_or_certificates_that_cannot_be_used_are_the_users_to_mend(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with FakeOpenAI() as server, pytest.raises(UserError) as caught:
        complete(client_of(server))
    assert name in caught.value.problems[0].place


def line_of(status: str, detail: str | None = None, reply: str | None = None):
    return {"key": "k", "status": status, "reply": reply, "detail": detail}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line_of("ok", reply="Hard to say.")] * 2, "the reply: 2); http://h: Hard to say.; what to do: ask"),
        ([line_of("rate_limit", "slow down"), line_of("refusal"), line_of("rate_limit")], "rate_limit: 2, refusal: 1"),
        ([line_of("bad_request", "use 'max_completion_tokens' instead")], "set judge.max_tokens_name"),
        ([line_of("bad_request", "Unrecognized request argument supplied: seed")], "set judge.seed: null"),
        ([line_of("bad_request", "temperature does not support 0")], "set judge.temperature: null"),
        ([line_of("bad_request", "no")], "change the options of `judge:`"),
        ([line_of("connection", "refused")], "see that the server runs"),
    ],
)
def test_calls_that_came_to_nothing_are_told_with_the_servers_words_and_what_to_do(lines, says):
    assert says in tell_failures("http://h", lines)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "all_proxy"])
def test_a_proxy_that_catches_a_local_address_is_named(monkeypatch, name):
    refused = [line_of("connection", "refused")]
    monkeypatch.setenv(name, "http://p:1")
    assert f"{name.upper()}: set NO_PROXY=127.0.0.1" in tell_failures("http://127.0.0.1:1/v1", refused)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "NO_PROXY" not in tell_failures("http://127.0.0.1:1/v1", refused)


def test_what_is_sent_and_what_is_recorded():
    options = {"max_completion_tokens": 64, "temperature": 0.0, "seed": 7, "top_p": None}
    with FakeOpenAI() as server:
        reply = complete(client_of(server, **options))
        sent = {"model": "judge", "messages": ASK, "temperature": 0.0, "seed": 7, "max_completion_tokens": 64}
        assert server.requests == [sent], "what is None is not sent"
        assert server.paths == ["/v1/chat/completions"]
        assert server.headers[0]["Authorization"] == "Bearer EMPTY"
        assert server.headers[0]["Accept-Encoding"] == "identity"
    assert reply == Reply("ok", "A reason.\n[[A]]", usage=COUNTED, model="judge-2025-04-14")


def test_tokens_of_every_counted_attempt_are_paid_for():
    script = [json_of(completion(None)), status(500), ok("[[A]]")]
    with FakeOpenAI(script) as server:
        assert complete(client_of(server)).usage == {name: 2 * count for name, count in COUNTED.items()}


def test_the_waits_double_leave_a_half_to_chance_and_are_the_same_for_the_same_call():
    def waits_of(messages):
        waits = []
        with FakeOpenAI(then=status(500)) as server:
            complete(client_of(server, waits, attempts=7), messages)
        return waits

    waits = waits_of(ASK)
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, [1, 2, 4, 8, 16, 30], strict=True)), waits
    assert waits_of(ASK) == waits
    assert waits_of([{"role": "user", "content": "another"}]) != waits


def test_a_server_is_given_the_time_it_asks_for_up_to_the_limit():
    waits = []
    script = [
        status(429, headers={"Retry-After": "20"}),
        status(503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}),
        status(429, headers={"Retry-After": "40"}),
        status(429, headers={"Retry-After": "0"}),
        status(429, headers={"Retry-After": "61"}),
    ]
    with FakeOpenAI(script) as server:
        reply = complete(client_of(server, waits, attempts=9))
    assert (reply.status, reply.attempts) == ("rate_limit", 5)
    lowest, highest = (20, 28, 40, 4), (20.5, 30.5, 40.5, 8)  # the last one is the back-off of a fourth attempt
    assert all(low <= wait <= high for low, wait, high in zip(lowest, waits, highest, strict=True)), waits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        *(({"retry-after": odd}, None) for odd in ("nan", "inf", "1e999", "-", "9" * 5000, "\u0663 s")),
        ({"retry-after": "Thu, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:20:00 +999999999"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:20:00 GMT"}, 200.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:20:00 -0000"}, 200.0),
        ({"retry-after": "Thu, 01 Jan 1970 01:20:00 +0100"}, 200.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
    ],
)
def test_retry_after_in_each_of_its_forms(headers, seconds):
    assert retry_after(headers, now=1000.0) == seconds


@pytest.mark.parametrize(
    ("wrong", "counted"),
    [
        ({}, COUNTED | {"cached_tokens": 0}),  # a local server counts no cached tokens
        ({"prompt_tokens_details": None}, COUNTED | {"cached_tokens": 0}),
        ({"prompt_tokens_details": {"cached_tokens": 40}}, COUNTED),
        ({"total_tokens": 374}, COUNTED | {"cached_tokens": 0, "completion_tokens": 274}),  # with those of reasoning
        ({"total_tokens": "374"}, COUNTED | {"cached_tokens": 0}),
        ({"prompt_tokens_details": {"cached_tokens": 101}}, None),
        ({"prompt_tokens_details": {"cached_tokens": -1}}, None),
        ({"prompt_tokens": -1}, None),
        ({"completion_tokens": 10**400}, None),
        ({"completion_tokens": 10.5}, None),
        ({"completion_tokens": "10"}, None),
        ({"completion_tokens": [10]}, None),
    ],
)
def test_token_counts_that_cannot_be_are_not_counted(wrong, counted):
    outcome = read_answer(json.dumps(completion("[[A]]") | {"usage": USAGE | wrong}).encode())
    assert (outcome.status, outcome.usage) == ("ok", counted)


def make(count: int, judge, workers: int, got: list[str], budget: Budget | None = None) -> str | None:
    """Make calls; note the status of each, and return why they ended before their time."""
    requests = [Request(f"key-{n}", [{"role": "user", "content": f"pair {n}"}]) for n in range(count)]
    note = lambda request, reply: got.append(reply.status)  # noqa: E731
    return asyncio.run(run_all(requests, judge, workers, budget or Budget(Price()), note))


def scripted(reply_to) -> OpenAIClient:
    """A client whose n-th call comes to the status `reply_to(n)`, without a server."""
    client, numbers = client_of(SimpleNamespace(url="http://h/v1")), itertools.count()

    async def complete(_):
        return Reply(reply_to(next(numbers)), "[[A]]")

    client.complete = complete
    return client


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize(("limits", "calls"), [({"max_requests": 13}, 13), ({"max_cost": 0.00042 * 7}, 7), ({}, 50)])
def test_a_limit_is_never_gone_over_however_many_calls_are_in_flight(workers, limits, calls):
    budget = Budget(Price(input=4.0, cached=1.0, output=14.0), dearest=0.00042, **limits)
    with FakeOpenAI(then=ok(latency=0.01)) as server:
        said = make(50, client_of(server), workers, [], budget)
        assert len(server.requests) == budget.calls == calls
    assert (said is None) == (not limits)
    if limits:
        assert next(iter(limits)) in said


def test_as_many_calls_as_there_are_workers_are_made_at_once():
    together = threading.Barrier(8)

    def meet(handler, body):
        together.wait(20)  # fails unless eight requests are there at once
        handler.answer(completion("[[A]]"))

    got = []
    with FakeOpenAI(then=meet) as server:
        make(40, client_of(server, attempts=1), 8, got)
    assert got == ["ok"] * 40


CHILD = """
import asyncio
import sys
from rlhf_trl.judge.client import Budget, OpenAIClient, Request, run_all
from rlhf_trl.recipe.schema import Price
requests = [Request(f"key-{n}", [{"role": "user", "content": f"pair {n}"}]) for n in range(40)]
client = OpenAIClient("judge", api_key="EMPTY", base_url=sys.argv[1])
show = lambda request, reply: print(reply.status, flush=True)
said = asyncio.run(run_all(requests, client, 4, Budget(Price()), show))
print(said, flush=True)
"""


@contextlib.contextmanager
def interrupted(behaviour):
    """A server, and a process that has been told to stop while its four workers were waiting for replies."""
    program, pipes = [sys.executable, "-c", CHILD], dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with FakeOpenAI(then=behaviour) as server, subprocess.Popen([*program, server.url], text=True, **pipes) as child:
        end = time.monotonic() + 20
        while len(server.requests) < 4:
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert "stopping" in child.stderr.readline()
        yield server, child


# Calls in flight come back; waits between attempts end.
@pytest.mark.parametrize("status_of_each", ["ok", "rate_limit"])
def test_ctrl_c_waits_for_the_calls_in_flight_and_begins_no_other(status_of_each):
    noticed = threading.Event()

    def hold(handler, body):
        noticed.wait(20)
        handler.answer(completion("[[A]]"))

    behaviour = hold if status_of_each == "ok" else status(429, headers={"Retry-After": "50"})
    with interrupted(behaviour) as (server, child):
        noticed.set()
        out, _ = child.communicate(timeout=20)
        assert len(server.requests) == 4
    assert out.split() == [status_of_each] * 4 + ["interrupted"]
    assert child.returncode == 0


def test_a_second_ctrl_c_leaves_at_once():
    with interrupted(hang) as (_, child):
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=10)  # the calls would hang for 60 s
    assert child.returncode != 0
    assert out == ""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *(
            (json.dumps(value).encode(), "unreadable")
            for value in (None, [], 3, "text", {"choices": {}}, {"choices": []}, {"error": {"code": 401}})
        ),
        *((json.dumps({"choices": [choice]}).encode(), "unreadable") for choice in ("x", {}, {"message": "x"})),
        *((body, "unreadable") for body in (b"", b"<html>", b"[" * 200_000, b"\xff\xfe\x00", b"9" * 5000)),
        (json.dumps(completion([1], 3) | {"usage": [], "model": {}}).encode(), "null_content"),
        (json.dumps(completion("a\ud800", refusal=5)).encode(), "ok"),
    ],
)
def test_no_body_crashes_the_reader(body, status):
    reply = read_answer(body)
    assert (reply.status, reply.usage or COUNTED, reply.text in (None, "a?")) == (status, COUNTED, True)


@pytest.mark.parametrize(
    ("value", "codes", "said"),
    [
        ({"error": {"code": "a", "type": "b", "message": "no"}}, {"a", "b"}, "no"),
        ({"error": {"code": [1], "type": {}, "message": [2]}}, set(), "[2]"),
        ({"error": {"code": 402, "message": "no"}}, {"402"}, "no"),
        ({"detail": [{"msg": "field not known"}]}, set(), "field not known"),
        ({"error": "overloaded"}, set(), "overloaded"),
        *((value, set(), "") for value in (None, [], 3, "x", {"error": None})),
    ],
)
def test_errors_are_read_in_any_form(value, codes, said):
    found, words = read_error(json.dumps(value).encode())
    assert found == codes and said in words


@pytest.mark.parametrize(("ending", "says"), [(QUOTA, "quota"), (status(401), "OPENAI_API_KEY")])
def test_a_call_that_ends_the_run_keeps_what_was_in_flight(ending, says):
    script, got = [ok("[[A]]", latency=0.2), ending, ok("[[B]]", latency=0.2)], []
    with FakeOpenAI(script) as server:
        try:
            said = make(20, client_of(server), 3, got)
        except UserError as error:
            said = str(error)
        assert len(server.requests) == 3
    assert says in said and [status for status in got if status != "quota"] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("status_of", "count", "workers", "ends"),
    [
        (lambda n: "connection", 200, 4, f"{FAILURES_IN_A_ROW} calls in a row failed"),
        (lambda n: "ok" if n % 10 == 0 else "timeout", 100, 1, None),  # failures between replies
        (lambda n: "length", 200, 4, f"{FAILURES_IN_A_ROW} calls in a row failed"),  # each of them is paid for
        (lambda n: "refusal", 100, 1, None),  # a judge that always refuses
        (lambda n: "ok", 0, 1, None),
    ],
)
def test_a_server_that_is_gone_ends_the_run_and_nothing_else_is_taken_for_it(status_of, count, workers, ends):
    judge, got = scripted(status_of), []
    assert make(count, judge, workers, got) == ends
    assert judge._interrupted.is_set() == (ends is not None)
    assert len(got) <= FAILURES_IN_A_ROW + 4 if ends else len(got) == count


def test_a_defect_in_the_judge_is_raised_and_ctrl_c_acts_as_before():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        make(9, scripted(lambda n: 1 / 0), 2, [])
    assert signal.getsignal(signal.SIGINT) is before


# --- money -----------------------------------------------------------------------------------------------------------

MINI = Price(input=0.4, cached=0.1, output=1.6)


def test_what_calls_cost():
    usage = {"prompt_tokens": 1_000_000, "cached_tokens": 250_000, "completion_tokens": 500_000}
    assert cost(usage, MINI) == pytest.approx(0.75 * 0.4 + 0.25 * 0.1 + 0.5 * 1.6)
    calls = [[{"role": "user", "content": "x" * 4000}], [{"role": "user", "content": "é" * 3}] * 2]  # 1000, 3 tokens
    each = [(1000 * 0.4 + 500 * 1.6) / 1e6, (3 * 0.4 + 500 * 1.6) / 1e6]
    assert forecast(calls, MINI, 500) == pytest.approx(each)


def test_a_budget_counts_what_is_in_flight_and_what_calls_cost_beyond_the_forecast():
    budget = Budget(Price(input=1.0, cached=1.0, output=1.0), dearest=0.1, max_cost=1.0)
    assert budget.stop(9) is None
    assert "max_cost" in budget.stop(10)
    budget.add({"prompt_tokens": 50_000, "cached_tokens": 0, "completion_tokens": 0})
    assert budget.stop(8) is None
    assert "$0.0500 spent" in budget.stop(9)
    budget.add({"prompt_tokens": 400_000, "cached_tokens": 0, "completion_tokens": 0})  # dearer than was thought
    assert budget.stop(0) is None
    assert "max_cost" in budget.stop(1)
    budget.add(None, uncounted=1)  # it may have cost as much as the dearest
    assert "$0.8500 spent" in budget.stop(0)
    assert Budget(MINI, dearest=9.0).stop(10**6) is None
