"""The exported samples: the same prompts for all models, chosen without the answers, and inert on a page."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_fixtures import GOLD, STAGES, write_run

from rlhf_trl.evaluate.samples import samples
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_jsonl, write_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import fence, inline, take_turns, visible

MARKDOWN = MarkdownIt("commonmark")
HOSTILE = [
    "```\n# heading\n```\n<script>alert(1)</script>",
    "~~~\n[x](javascript:alert(1)) ![](http://x/y.png)",
    "````text\n`````` \u202egpj.exe\u202c \x1b[31m",
    "a\r\nb\x00c\u2028d",
    "    indented\n\n- list\n> quote\n***",
    "",
]


def export(folder: Path, per_model: int = 5, **options: object) -> tuple[Recipe, RunDir]:
    recipe, run = write_run(folder / "run", steps=1, **{"count": 12, "stages": {**STAGES, **GOLD}, **options})
    changed = recipe.model_copy(update={"samples": recipe.samples.model_copy(update={"per_model": per_model})})
    samples(changed, run)
    return changed, run


def test_every_model_answers_the_same_prompts_whatever_the_answers_are(tmp_path):
    recipe, run = export(tmp_path, evaluation={"gold": "gold"})
    names = ["reference", "dpo", "grpo", "ppo"]
    exported = {name: read_jsonl(run.samples / f"{name}.jsonl") for name in names}
    for name, rows in exported.items():
        assert [row["id"] for row in rows] == [row["id"] for row in exported["reference"]]
        answers = {row["id"]: row for row in read_jsonl(run.completions(name))}
        for row in rows:
            source = answers[row["id"]]
            assert (row["response"], row["prompt"]) == (source["answer"], source["prompt"])
            assert row["scores"] == {key: source[key] for key in ("reward", "reward_gain", "gold", "gold_gain", "kl")}
            assert row["decoding"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 128}
    assert [row["subset"] for row in exported["dpo"]][:3] == ["harmless-base", "helpful-base", "harmless-base"]
    page = (run.samples / "side_by_side.md").read_text()
    for part in page.split("\n## ")[1:]:
        headings = [line for line in part.splitlines() if line.startswith("### ")]
        assert headings == [f"### Response of `{name}`" for name in names]
    assert page.count("\n## ") == 5 and "all of them are here" not in page
    rows = read_jsonl(run.completions("dpo"))
    random.Random(0).shuffle(rows)
    write_jsonl(run.completions("dpo"), [{**row, "answer": row["answer"][::-1]} for row in rows])
    samples(recipe, run)
    assert [row["id"] for row in read_jsonl(run.samples / "dpo.jsonl")] == [row["id"] for row in exported["dpo"]]


def test_answers_of_the_second_decoding_are_taken_where_there_are_some(tmp_path):
    evaluation = {"judge_decoding": {"temperature": 0.7, "top_p": 0.9}}
    recipe, run = write_run(tmp_path / "run", steps=1, count=12, evaluation=evaluation)
    for name in ("reference", *recipe.policies):
        keys = ("id", "subset", "prompt", "finished", "answer_tokens")
        rows = [{key: row[key] for key in keys} for row in read_jsonl(run.completions(name))]
        write_jsonl(run.judge_answers(name), [{**row, "answer": f"second of {name}"} for row in rows])
    samples(recipe, run)
    row, page = read_jsonl(run.samples / "ppo.jsonl")[0], (run.samples / "ppo.md").read_text()
    assert (row["response"], row["scores"]) == ("second of ppo", {})
    assert row["decoding"] == {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "max_new_tokens": 128}
    assert "sampled at temperature 0.7, top_k 0, top_p\n0.9, up to 128 tokens" in page
    assert "`samples.per_model` is 20; the evaluation has only 12 prompts, and all of them are here." in page


def test_hostile_texts_stay_inside_their_fences(tmp_path):
    prompts = [[{"role": "user", "content": text}] for text in HOSTILE]
    _, run = export(tmp_path, per_model=12, prompts=prompts, answers=HOSTILE, subsets=("`a` <b>", "a\n# b"))
    page = (run.samples / "side_by_side.md").read_text()
    tokens = MARKDOWN.parse(page)
    fences = [token.content for token in tokens if token.type == "fence"]
    assert set(fences) == {f"{visible(text)}\n" for text in HOSTILE if text}
    others = {token.type for token in tokens} - {"fence"}
    assert others <= {"heading_open", "heading_close", "paragraph_open", "paragraph_close", "inline"}
    inner = {child.type for token in tokens for child in token.children or []}
    assert inner <= {"text", "code_inline", "strong_open", "strong_close", "em_open", "em_close", "softbreak"}
    headings = [token.content for token in tokens if token.type == "inline" and token.content.startswith("1. ")]
    assert len(headings) == 1
    assert "*an empty text*" in page
    assert not set("\x1b\x00\r\u202e\u2028") & set(page)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("`~ \n\t#<>a\\*_[]\u202e\r\x00-"), max_size=40))
def test_a_fence_and_a_code_span_hold_any_text(text):
    tokens = MARKDOWN.parse(f"before\n\n{fence(text)}\nafter\n")
    blocks = [token.type for token in tokens if token.level == 0 and token.nesting >= 0]
    assert blocks == ["paragraph_open", "fence", "paragraph_open"]
    assert next(token.content for token in tokens if token.type == "fence") == f"{visible(text)}\n"
    if set(text) <= set("` \n#<a\\*_[]\u202e"):
        children = MARKDOWN.parse(f"x {inline(text)} y")[1].children or []
        assert [child.type for child in children] == ["text", "code_inline", "text"]
        assert children[1].content.strip(" ") == visible(text.replace("\n", " ")).strip(" ")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 40))
def test_turns_are_fair(groups, count):
    chosen = take_turns(groups, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(groups))
    taken = {group: [index for index in chosen if groups[index] == group] for group in set(groups)}
    for group, places in taken.items():
        assert places == [index for index, other in enumerate(groups) if other == group][: len(places)]
        assert len(places) == groups.count(group) or len(places) >= max(map(len, taken.values())) - 1


def test_an_unfinished_evaluation_and_a_recipe_without_policies_are_refused(tmp_path):
    recipe, run = write_run(tmp_path / "run", steps=1, count=4)
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="rlhf-trl evaluate RECIPE"):
        samples(recipe, run)
    assert not list(run.samples.glob("*.md"))
    none = write_run(tmp_path / "none", stages={name: STAGES[name] for name in ("sft", "rm")}, steps=1)
    with pytest.raises(UserError, match="no policy"):
        samples(*none)
