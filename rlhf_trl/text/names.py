"""Names of texts and prompts by their content: the same in every step and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence


def digest(text: str) -> str:
    """Name a text: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_id(prompt: Sequence[Mapping[str, object]]) -> str:
    """Name a prompt, which is a list of messages: 16 hexadecimal digits."""
    return digest(json.dumps(prompt, sort_keys=True))
