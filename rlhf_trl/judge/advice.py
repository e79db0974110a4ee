"""What a user can do about calls to a judge that came to nothing. Reads the environment's proxies, nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from rlhf_trl.judge.cache import Line
from rlhf_trl.judge.replies import Status, words

# What the words of a server that refuses a request name, the first that fits -> what to do.
OPTIONS = (
    (r"max_completion_tokens|max_tokens",
     "set judge.max_tokens_name to the other of max_tokens and max_completion_tokens (what reasoning models take)"),
    (r"temperature", "set judge.temperature: null, so that none is sent"),
    (r"seed", "set judge.seed: null, so that none is sent"),
    (r"model", "set judge.model to one that the server has"),
)  # fmt: skip
ADDRESS = "check judge.base_url or OPENAI_BASE_URL: it is up to and with the /v1"
LONGER = "raise judge.max_tokens (reasoning counts too), or ask another model"
ADVICE: dict[Status, str] = {
    "ok": LONGER,
    "length": LONGER,
    "null_content": LONGER,
    "refusal": "ask another model",
    "content_filter": "ask another model or server",
    "context_length": "ask a model with a longer context, or lower judge.max_tokens",
    "rate_limit": "lower judge.workers, and start the same command again later",
    "quota": "add credit to the account of the key, or lower judge.prompts",
    "server_error": "see the log of the server, or start the same command again later",
    "timeout": "raise judge.timeout or lower judge.workers",
    "connection": "see that the server runs, and that judge.base_url or OPENAI_BASE_URL is its address",
    "bad_request": "change the options of `judge:`",
    **dict.fromkeys(("html", "bad_json", "no_choices"), ADDRESS),
}


def advise(status: Status, detail: str) -> str:
    """Say what to do about calls that came to this, given the server's words."""
    found = (remedy for pattern, remedy in OPTIONS if re.search(pattern, detail))
    return next(found, ADVICE[status]) if status == "bad_request" else ADVICE[status]


def proxy_of(address: str) -> list[str]:
    """Say, where calls to an address go through a proxy of the environment, how to pass it by; else nothing."""
    parts, proxies = urlsplit(address), getproxies()
    used = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if used is None or proxy_bypass(parts.hostname or ""):
        return []
    return [
        f"calls go through {used.upper()}_PROXY: set NO_PROXY={parts.hostname} if the server is in your own network"
    ]


def tell_failures(where: str, lines: Sequence[Line]) -> str | None:
    """Say how many calls came to what, what the server said last of the most frequent status, and what to do."""
    if not lines:
        return None
    names = {"ok": "no verdict in the reply"}
    counts = Counter(line["status"] for line in lines).most_common()
    most = counts[0][0]
    detail = [line.get("detail") or line["reply"] or most for line in lines if line["status"] == most][-1]
    tally = ", ".join(f"{names.get(status, status)}: {count}" for status, count in counts)
    remedies = "; or ".join([advise(most, detail), *proxy_of(where)])
    return f"{len(lines)} calls without a verdict ({tally}); {where}: {words(detail)}; what to do: {remedies}"
