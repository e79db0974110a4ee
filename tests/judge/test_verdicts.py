"""Verdicts read from replies: real ones of GPT-4, and what judges write instead of what they are told to."""

import gzip
import json

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trl.judge.verdict import Verdict, parse_verdict

FIRST, SECOND, TIE, INVALID = Verdict.FIRST, Verdict.SECOND, Verdict.TIE, Verdict.INVALID
TAGS = {"[[A]]": FIRST, "[[B]]": SECOND, "[[C]]": TIE, "[[tie]]": TIE}


def test_150_replies_of_gpt_4_mean_what_fastchat_stored():
    with gzip.open(SHARED / "judge-data" / "mtbench_gpt4_pair_verdicts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    first = {FIRST: "model_1", SECOND: "model_2", TIE: "tie", INVALID: "error"}
    second = {FIRST: "model_2", SECOND: "model_1", TIE: "tie", INVALID: "error"}
    found = [first[parse_verdict(row["g1_judgment"])] for row in rows]
    found += [second[parse_verdict(row["g2_judgment"])] for row in rows]
    stored = [row["g1_winner"] for row in rows] + [row["g2_winner"] for row in rows]
    assert found == stored
    assert len(stored) == 150
    assert stored.count("error") == 3


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
        ("[[\nA\n]]", FIRST),
        ("Final verdict: **[[C]]**.", TIE),
        ("```\n[[B]]\n```", SECOND),
        ('```json\n{"winner": "B"}\n```\n', SECOND),
        # The last one counts.
        ("If A were right I would say [[A]], but it is not.\n\n[[B]]", SECOND),
        ("The answer tells me to write [[B]].\n[[A]]\n\nThank you.", FIRST),
        ('{"winner": "A"}\n[[B]]', SECOND),
        ('[[B]]\n{"winner": "A"}', SECOND),
        ("[[A]] and again [[A]]", FIRST),
        ("[[C]], that is [[tie]]", TIE),
        # Nothing was decided.
        ("Either [[A]] or [[B]]", INVALID),
        ("[[A]]\nEither [[B]] or [[C]]\nI cannot say.", INVALID),
        ("[A]", INVALID),
        ("[[A", INVALID),
        ("[[t\u0131e]]", INVALID),
        ("[[A/B/C]]", INVALID),
        ("[[AB]]", INVALID),
        ("A", INVALID),
        ("", INVALID),
        ("$ERROR$", INVALID),
        # JSON, whatever stands around it.
        ('I think {"winner": "tie"} is right, {really}.', TIE),
        ('{"reason": "uses {braces} and \\"quotes\\"", "winner": "a"}', FIRST),
        ('{"winner": "A", "scores": {"a": 1}}', FIRST),
        ('{"verdict": {"winner": " C "}}', TIE),
        ('{"winner": "A"} no: {"winner": "B"}', SECOND),
        ('{"winner": "B"} {"confidence": 0.5}', SECOND),
        ('{"winner": "A"|"B"|"tie"}', INVALID),
        ('{"winner": "A"', INVALID),
        ('{"winner": null}', INVALID),
        ('{"winner": ["A"]}', INVALID),
        ('{"winner": "answer 1"}', INVALID),
        ('{"a": ' * 100_000, INVALID),
        ('{"a": ' + "[" * 100_000, INVALID),
        ('{"n": ' + "9" * 5000 + "}", INVALID),
        ('["A"]', INVALID),
    ],
)
def test_replies(reply, verdict):
    assert parse_verdict(reply) is verdict


@given(st.text(), st.sampled_from(sorted(TAGS)), st.text(alphabet=st.characters(exclude_characters="[]")))
def test_a_tag_on_a_line_of_its_own_decides_whatever_comes_before(before, tag, after):
    assert parse_verdict(f"{before}\n{tag}\n{after}") is TAGS[tag]


@given(st.text(alphabet='[]{}ABC":winertie \n'))
def test_no_reply_is_an_error(reply):
    assert isinstance(parse_verdict(reply), Verdict)


def test_verdicts_are_written_as_text():
    assert json.dumps([FIRST, SECOND, TIE, INVALID]) == '["first", "second", "tie", "invalid"]'
