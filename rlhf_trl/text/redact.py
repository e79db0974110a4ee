"""Secrets out of texts: the values of secret environment variables, and the forms of well-known access tokens."""

import functools
import json
import os
import re
from urllib.parse import quote

# Names such as OPENAI_API_KEY, HF_TOKEN and DB_PASSWORD; TOKENIZERS_PARALLELISM is none.
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value, such as EMPTY, may be an ordinary word
# The forms that secret scanners know. What repeats before more must follow is bounded: a server may send megabytes.
PREFIXES = (
    "gsk_", "xai-", "r8_", "nvapi-", "pplx-", "csk-", "fw_", "jina_", "tgp_v1_", "lsv2_", "pcsk_", "AIza", "ya29[.]",
    "gh[pousr]_", "github_pat_", "glpat-", "npm_", "pypi-", "rubygems_", "dckr_pat_", "do[opr]_v1_", "hv[sb][.]",
    "lin_api_", "ntn_", "PMAK-", "shp(?:at|ca|pa|ss)_", "sq0[a-z]{3}-", "dapi(?=[0-9a-f]{16})", "ATATT3", "sntrys_",
    "figd_", "AGE-SECRET-KEY-",
)  # fmt: skip
SECRET = re.compile(
    r"\b(?:"
    r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|hf_[a-z]{20,}"  # Hugging Face; `hf_preferences` is a name
    rf"|sk-[\w-]{{8,}}|(?:{'|'.join(PREFIXES)})[\w.-]{{15,}}[\w-]"
    r"|(?:[sr]k|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|(?:xox[abeoprs]|xapp)-[\w-]{10,}"
    r"|SG\.[\w-]{16,40}\.[\w-]{16,}|eyJ[\w-]{10,300}\.eyJ[\w-]{10,}(?:\.[\w-]*)?"  # SendGrid, a JSON web token
    r"|(?:SK|AC|key-)[0-9a-f]{32}|\d{8,10}:AA[\w-]{30,}|[MN][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}"  # Discord at the end
    r"|(?:Bearer|Basic)\s(?=\S{0,40}[\d=])[\w.~+/-]{16,}=*"
    r")"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\w+/=:,.\s\\-]*"
    r"|(?<=://)(?:[^\s/@:]{0,60}:\S{1,200}|[^\s/]{1,200})(?=@)|(?<=hooks\.slack\.com/services/)[\w/]+"  # in addresses
    r"|(?<=[?&])[\w-]{0,40}(?:key|token|secret|password)[\w-]{0,40}=[^\s&]+"
    r"|(?i:(?<=key=)|(?<=secret=)|(?<=password=)|(?<=pwd=)|(?<=access_token=)|(?<=auth_token=))[^\s&;,\"']{8,}",
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
