"""A chat-completions server for tests: real HTTP on a local port, with every behaviour that a test asks for.

with FakeOpenAI([status(429), ok("[[B]]")]) as server:  # the first two requests; then always `then`
    OpenAIClient("judge", api_key="EMPTY", base_url=server.url)
assert len(server.requests) == 2
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]
Behaviour = Callable[["Handler", dict[str, Any]], None]
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a completion as OpenAI's reference has it."""
    message = {"role": "assistant", "content": content, "refusal": None} | message
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-2025-04-14",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "finish_reason": finish_reason, "logprobs": None, "message": message}],
        "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 40}},
    }


def ok(text: str | Callable[[Messages], str] = "A reason.\n[[A]]", latency: float = 0.0) -> Behaviour:
    """Answer with a text, or with what a function makes of the messages."""

    def act(handler: "Handler", body: dict[str, Any]) -> None:
        time.sleep(latency)
        handler.answer(completion(text if isinstance(text, str) else text(body["messages"])))

    return act


def json_of(value: Any) -> Behaviour:
    """Answer 200 with any JSON."""
    return lambda handler, body: handler.answer(value)


def status(
    code: int, error: dict[str, Any] | None = None, message: str = "no", headers: dict[str, str] | None = None
) -> Behaviour:
    """Fail with a status, an error object in OpenAI's form, and headers."""
    return lambda handler, body: handler.answer({"error": {"message": message, **(error or {})}}, code, headers or {})


def raw(data: bytes, content_type: str = "application/json", **headers: str) -> Behaviour:
    """Answer 200 with these bytes."""
    return lambda handler, body: handler.send(200, data, {"Content-Type": content_type} | headers)


def hang(handler: "Handler", body: dict[str, Any]) -> None:
    """Say nothing until the test is over."""
    handler.server.over.wait(60)
    handler.close_connection = True


def drip(first: bytes, again: bytes) -> Behaviour:
    """Send one thing, and then another now and then, as some servers do while a request waits for its turn."""

    def act(handler: "Handler", body: dict[str, Any]) -> None:
        handler.wfile.write(first)
        while not handler.server.over.wait(0.05):
            handler.wfile.write(again)
        handler.close_connection = True

    return act


def drop(handler: "Handler", body: dict[str, Any]) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def cut(handler: "Handler", body: dict[str, Any]) -> None:
    """Close the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": ')
    handler.close_connection = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "FakeOpenAI"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.behaviour_for(self.path, self.headers, body)(self, body)

    def answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(code, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server on a local port that runs inside `with`."""

    daemon_threads = True
    request_queue_size = 256  # as many connections may be opened at one instant

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.over, self.turn = threading.Event(), threading.Lock()

    def __enter__(self) -> Any:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what a test wanted; any other error is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)


class FakeOpenAI(Server):
    """A running server: `script` is what the first requests meet with, in the order they arrive, `then` all others.

    Keeps the bodies, headers and paths of all requests.
    """

    def __init__(self, script: Sequence[Behaviour] = (), then: Behaviour | None = None):
        super().__init__(Handler)
        self.url += "/v1"
        self.script, self.then = list(script), then or ok()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.paths: list[str] = []

    def behaviour_for(self, path: str, headers: Message, body: dict[str, Any]) -> Behaviour:
        with self.turn:
            self.requests.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            return self.script.pop(0) if self.script else self.then
