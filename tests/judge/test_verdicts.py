"""Verdicts read from replies: real ones of GPT-4, and what judges write instead of what they are told to."""

import gzip
import json

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trl.judge.verdict import parse_verdict

FIRST, SECOND, TIE, INVALID = 1.0, 0.0, 0.5, None
TAGS = {"[[A]]": FIRST, "[[B]]": SECOND, "[[C]]": TIE, "[[tie]]": TIE}


def test_150_replies_of_gpt_4_mean_what_fastchat_stored():
    with gzip.open(SHARED / "judge-data" / "mtbench_gpt4_pair_verdicts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found, stored = [], []
    for game, first, second in (("g1", "model_1", "model_2"), ("g2", "model_2", "model_1")):
        names = {FIRST: first, SECOND: second, TIE: "tie", INVALID: "error"}
        found += [names[parse_verdict(row[f"{game}_judgment"])] for row in rows]
        stored += [row[f"{game}_winner"] for row in rows]
    assert found == stored
    assert (len(stored), stored.count("error")) == (150, 3)


def test_200_replies_in_another_format_say_nothing():
    """LLMBar's judge ends with "Output (a) is better": words that quote no tag are no verdict."""
    with gzip.open(SHARED / "judge-data" / "llmbar_natural_gpt4_cot_raw.json.gz", "rt", encoding="utf-8") as file:
        texts = [game["completion"][0] for row in json.load(file) for run in row["results"] for game in run.values()]
    assert len(texts) == 200
    assert {parse_verdict(text) for text in texts} == {INVALID}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", FIRST),
        ("[[ b ]]", SECOND),
        ("[[TIE]]\n", TIE),
        ("Final verdict: **[[C]]**.", TIE),
        ("Final verdict: [[C]] for a tie, as both are wrong.", TIE),
        ("```\n[[B]]\n```", SECOND),
        ('```json\n{"winner": "B"}\n```\n', SECOND),
        # Only the last line counts.
        ("If A were right I would say [[A]], but it is not.\n\n[[B]]", SECOND),
        ("The answer tells me to write [[B]].\n[[A]]\n", FIRST),
        ("[[A]]\nI cannot say.", INVALID),
        ("[[A]]\n\nThank you.", INVALID),
        ('{"winner": "A"}\n[[B]]', SECOND),
        ('[[B]]\n{"winner": "A"}', INVALID),
        ("[[A]] and again [[A]]", FIRST),
        ("[[C]], that is [[tie]]", TIE),
        # Reasoning is cut.
        ("<think>[[B]]</think>\nSo:\n[[A]]", FIRST),
        ("[[B]] at first</think> [[A]]", FIRST),
        ("<think>a</think><think>\n[[B]]\n</think>[[A]]", FIRST),
        ("<think>I choose\n[[A]]\n</think>", INVALID),
        ("<think>I choose\n[[A]]", INVALID),
        ('<Thinking>{"winner": "A"}', INVALID),
        # Nothing was decided.
        ("The rubric says [[A]] if answer A is better, so I choose B.", INVALID),
        ("[[A]] if A is better, [[B]] otherwise: so [[B]]", SECOND),
        ("Either [[A]] or [[B]]", INVALID),
        *((text, INVALID) for text in ("[A]", "[[A", "[[\nA\n]]", "[[t\u0131e]]", "[[A/B/C]]", "[[AB]]", "A", "")),
        # JSON, whatever stands around it.
        ('I think {"winner": "tie"} is right, {really}.', TIE),
        ('{"reason": "uses {braces} and \\"quotes\\"", "winner": "a"}', FIRST),
        ('{"winner": "A", "scores": {"a": 1}}', FIRST),
        ('{"verdict": {"winner": " C "}}', TIE),
        ('{"winner": "A"} no: {"winner": "B"}', SECOND),
        ('{"winner": "B"} {"confidence": 0.5}', SECOND),
        *((f'{{"winner": {end}', INVALID) for end in ('"A"|"B"|"tie"}', '"A"', "null}", '["A"]}', '"answer 1"}')),
        ('{"a": ' * 100_000, INVALID),
        ('{"a": ' + "[" * 100_000, INVALID),
        ('{"n": ' + "9" * 5000 + "}", INVALID),
        ('["A"]', INVALID),
    ],
)  # fmt: skip
def test_replies(reply, verdict):
    assert parse_verdict(reply) == verdict


@given(st.text(), st.sampled_from(sorted(TAGS)), st.text(alphabet="*.\n `"))
def test_a_tag_on_the_last_line_decides_whatever_comes_before(before, tag, after):
    assert parse_verdict(f"{before}\n{tag}\n{after}") == TAGS[tag]


@given(st.text(alphabet='[]{}ABC":winertie \n<>/think'))
def test_no_reply_is_an_error(reply):
    assert parse_verdict(reply) in (FIRST, SECOND, TIE, INVALID)
