"""What a user can do about calls to a judge that came to nothing, from `advice.yaml` and the environment's proxies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ruamel.yaml import YAML

from rlhf_trl.judge.cache import Line
from rlhf_trl.judge.replies import Status, words


def advise(status: Status, detail: str) -> str:
    """Say what to do about calls that came to this, given the server's words."""
    advice = YAML(typ="safe", pure=True).load(Path(__file__).with_name("advice.yaml"))
    named = (remedy for option, remedy in advice["option"].items() if re.search(option, detail))
    found = next(named, None) if status == "bad_request" else None
    return str(found or advice["status"][status])


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
    return f"calls without a verdict: {len(lines)} ({tally}); {where}: {words(detail)}; what to do: {remedies}"
