"""Secrets out of texts: the values of secret environment variables, and the forms of well-known access tokens."""

from __future__ import annotations

import functools
import json
import os
import re
from urllib.parse import quote

# Names such as OPENAI_API_KEY, HF_TOKEN and DB_PASSWORD; TOKENIZERS_PARALLELISM is none.
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value, such as EMPTY, may be an ordinary word
# The forms that secret scanners know. What repeats before more must follow is bounded: a server may send megabytes.
SECRET = re.compile(
    r"\b("
    r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|hf_[a-z]{20,}"  # Hugging Face; `hf_preferences` is a name
    r"|sk-[A-Za-z0-9_-]{8,}|[sr]k_(live|test)_\w{10,}|gsk_\w{20,}|xai-\w{20,}|r8_\w{20,}|nvapi-[\w-]{20,}"
    r"|pplx-\w{20,}|tgp_v1_[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|npm_\w{30,}|pypi-[\w-]{40,}|dop_v1_[0-9a-f]{20,}"
    r"|SG\.[\w-]{16,40}\.[\w-]{16,}|eyJ[\w-]{10,300}\.eyJ[\w-]{10,}(\.[\w-]*)?"  # SendGrid, a JSON web token
    r")|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<=://)([^\s/@:]{0,60}:\S{1,200}|[^\s/]{1,200})(?=@)"  # user and password of an address
    r"|(?<=[?&])[\w-]{0,40}(key|token|secret|password)[\w-]{0,40}=[^\s&]+",
    re.ASCII,
)
_is_secret = functools.cache(SECRET_NAME.search)


def redact(text: str) -> str:
    """Put `<secret>` for the values of secret environment variables and for what looks like an access token."""
    return SECRET.sub("<secret>", without_values(text))


def without_values(text: str) -> str:
    """Put `<secret>` for the values of secret environment variables alone: a text of other people stays as it is."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _is_secret(name)}
    for value in sorted(values, key=len, reverse=True):
        for form in (value, quote(value, safe=""), json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(form, "<secret>")
    return text
