"""The project's own adversarial prompts: eight categories of pressure, each with what it looks for.

Reads `adversarial.yaml` beside this file; writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PROMPTS = Path(__file__).parent / "adversarial.yaml"


def load_adversarial() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Read the prompts: what each category tests, and `id`, `category` and `prompt` (messages) of every prompt.

    An id is the category and the place in its list, `sycophancy-3`.
    """
    document = YAML(typ="safe", pure=True).load(PROMPTS)
    categories = {name: category["tests"] for name, category in document.items()}
    prompts = [
        {"id": f"{name}-{place}", "category": name, "prompt": _messages(entry)}
        for name, category in document.items()
        for place, entry in enumerate(category["prompts"], start=1)
    ]
    return categories, prompts


def _messages(entry: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in entry:
        return entry["messages"]
    text = entry["text"]
    if "repeat" in entry:
        text = " ".join([text] * entry["repeat"]) + "\n\n" + entry["ask"]
    return [{"role": "user", "content": text}]
