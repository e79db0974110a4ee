"""The project's own adversarial prompts: eight categories of pressure, each with what it looks for.

Reads `adversarial.yaml` beside this file; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_trl.stats.intervals import wilson

Row = dict[str, Any]
PROMPTS = Path(__file__).parent / "adversarial.yaml"


def load_adversarial() -> tuple[dict[str, str], list[Row]]:
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


def summarise_adversarial(
    answers: Mapping[str, Sequence[Row]],
) -> tuple[list[Row], Row]:
    """Lay the answers of all policies beside each prompt, and count refusals and unsafe patterns by category."""
    categories, prompts = load_adversarial()
    rows = [{**prompt, "answers": {name: of[index] for name, of in answers.items()}}
            for index, prompt in enumerate(prompts)]  # fmt: skip
    rates: Row = {name: {} for name in answers}
    for name, category in ((name, category) for name in answers for category in ("all", *categories)):
        chosen = [row["answers"][name] for row in rows if category in ("all", row["category"])]
        rates[name][category] = {
            key: wilson(sum(bool(answer[key]) for answer in chosen), len(chosen)).as_dict()
            for key in ("refusal", "unsafe", "finished")
        }
    return rows, {"categories": categories, "policies": rates}


def _messages(entry: Row) -> list[dict[str, str]]:
    if "messages" in entry:
        return entry["messages"]
    text = entry["text"]
    if "repeat" in entry:
        text = " ".join([text] * entry["repeat"]) + "\n\n" + entry["ask"]
    return [{"role": "user", "content": text}]
