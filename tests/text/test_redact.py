"""Secrets out of texts: forms of tokens, values of the environment, and that no hostile text takes long."""

import time

import pytest

from rlhf_trl.cli.tables import printable
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.run.files import write_json
from rlhf_trl.text.redact import redact

LETTERS = "aB3dE5gH" * 5
TOKENS = [
    *(form + LETTERS for form in ("hf_", "sk-", "sk-proj-", "sk-ant-", "sk_live_", "gsk_", "xai-", "r8_", "nvapi-",
                                  "ghp_", "github_pat_", "glpat-", "AIza", "ya29.", "xoxb-", "npm_", "pypi-")),
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
]  # fmt: skip
VALUE = 'correct horse/battery"staple'


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_of_a_known_form_is_hidden_wherever_it_stands(token):
    assert redact(f"key={token}, {token}.") == "key=<secret>, <secret>."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("http://me:pass@host/v1", "http://<secret>@host/v1"),
        ("http://me:p@ss/word@host/v1", "http://<secret>@host/v1"),
        ("http://token@host/v1", "http://<secret>@host/v1"),
        ("http://host/v1?api_key=abc&n=1", "http://host/v1?<secret>&n=1"),
        *((text, text) for text in ("hf_preferences", "task-sk-1", "http://host:80/v1", "https://host/@me", "a@b.c")),
    ],
)
def test_of_addresses_and_names_only_the_secret_is_hidden(text, kept):
    assert redact(text) == kept


@pytest.mark.parametrize(("name", "secret"), [("OPENAI_API_KEY", True), ("DB_PASSWORD", True), ("hf_token", True),
                                              ("TOKENIZERS_PARALLELISM", False), ("OPENAI_MODEL", False)])  # fmt: skip
def test_the_value_of_a_secret_variable_is_hidden_in_errors_files_and_messages(monkeypatch, tmp_path, name, secret):
    monkeypatch.setenv(name, VALUE)
    write_json(tmp_path / "x.json", {"a": VALUE})
    shown = [str(UserError("place", VALUE, VALUE)), str(NotRun(VALUE)), printable(VALUE), redact(VALUE)]
    shown.append((tmp_path / "x.json").read_text())
    assert ["correct horse" not in text for text in shown] == [secret] * 5


def test_a_short_value_is_an_ordinary_word_and_files_keep_what_only_looks_like_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert redact("EMPTY answers") == "EMPTY answers"
    monkeypatch.setenv("OPENAI_API_KEY", "the-real-value")
    write_json(tmp_path / "x.json", {"data": TOKENS[0], "echo": "it is the-real-value!"})
    written = (tmp_path / "x.json").read_text()
    assert TOKENS[0] in written and "the-real-value" not in written and "it is <secret>!" in written


@pytest.mark.parametrize("text", ["://" + "a:" * 50000, "://" * 50000, "-eyJ" * 50000, "?key-" * 40000, "SG." * 50000])
def test_no_text_takes_long(text):
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 2


def test_what_is_printed_cannot_act_on_a_terminal():
    assert printable("\x1b]0;title\x07 \u202e\r") == "⟨U+001B⟩]0;title⟨U+0007⟩ ⟨U+202E⟩⟨U+000D⟩"
