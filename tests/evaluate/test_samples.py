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


def test_every_model_answers_the_same_prompts_of_each_subset_in_turn(tmp_path: Path) -> None:
    recipe, run = export(tmp_path, evaluation={"gold": "gold"})
    exported = {name: read_jsonl(run.samples / f"{name}.jsonl") for name in ("reference", *recipe.policies)}
    assert list(exported) == ["reference", "dpo", "grpo", "ppo"]
    for name, rows in exported.items():
        assert [row["id"] for row in rows] == [row["id"] for row in exported["reference"]]
        answers = {row["id"]: row for row in read_jsonl(run.completions(name))}
        for row in rows:
            source = answers[row["id"]]
            assert row["response"] == source["answer"]
            assert row["prompt"] == source["prompt"]
            assert row["scores"] == {key: source[key] for key in ("reward", "reward_gain", "gold", "gold_gain", "kl")}
            assert row["decoding"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 128}
    subsets = [row["subset"] for row in exported["dpo"]]
    assert subsets == ["harmless-base", "helpful-base", "harmless-base", "helpful-base", "harmless-base"]


def test_the_choice_does_not_depend_on_the_answers_nor_on_their_order_in_a_policys_file(tmp_path: Path) -> None:
    recipe, run = export(tmp_path)
    before = [row["id"] for row in read_jsonl(run.samples / "dpo.jsonl")]
    rows = read_jsonl(run.completions("dpo"))
    random.Random(0).shuffle(rows)
    write_jsonl(run.completions("dpo"), [{**row, "answer": row["answer"][::-1]} for row in rows])
    samples(recipe, run)
    assert [row["id"] for row in read_jsonl(run.samples / "dpo.jsonl")] == before


def test_answers_of_the_second_decoding_are_taken_where_there_are_some(tmp_path: Path) -> None:
    evaluation = {"judge_decoding": {"temperature": 0.7, "top_p": 0.9}}
    recipe, run = write_run(tmp_path / "run", steps=1, count=4, evaluation=evaluation)
    for name in ("reference", *recipe.policies):
        rows = read_jsonl(run.completions(name))
        keys = ("id", "subset", "prompt", "finished", "answer_tokens")
        second = [{**{key: row[key] for key in keys}, "answer": f"second of {name}"} for row in rows]
        write_jsonl(run.judge_answers(name), second)
    samples(recipe, run)
    row = read_jsonl(run.samples / "ppo.jsonl")[0]
    assert row["response"] == "second of ppo"
    assert row["scores"] == {}
    assert row["decoding"] == {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "max_new_tokens": 128}
    assert "sampled at temperature 0.7, top_k 0, top_p 0.9, up to 128 tokens" in (run.samples / "ppo.md").read_text()


def test_fewer_prompts_than_asked_are_all_taken_and_it_is_said(tmp_path: Path) -> None:
    _, run = export(tmp_path, per_model=50)
    assert len(read_jsonl(run.samples / "grpo.jsonl")) == 12
    for name in ("grpo", "side_by_side"):
        text = (run.samples / f"{name}.md").read_text()
        assert "`samples.per_model` is 50; the evaluation has only 12 prompts, and all of them are here." in text


def test_enough_prompts_are_not_called_too_few(tmp_path: Path) -> None:
    _, run = export(tmp_path, per_model=12)
    assert "all of them are here" not in (run.samples / "grpo.md").read_text()


def test_side_by_side_has_every_model_below_each_prompt(tmp_path: Path) -> None:
    _, run = export(tmp_path, per_model=3)
    page = (run.samples / "side_by_side.md").read_text()
    assert page.count("\n## ") == 3
    for part in page.split("\n## ")[1:]:
        found = [line for line in part.splitlines() if line.startswith("### ")]
        assert found == [f"### Response of `{name}`" for name in ("reference", "dpo", "grpo", "ppo")]


def test_hostile_texts_stay_inside_their_fences(tmp_path: Path) -> None:
    _, run = export(
        tmp_path,
        per_model=12,
        prompts=[[{"role": "user", "content": text}] for text in HOSTILE],
        answers=HOSTILE,
        subsets=("`a` <b>", "a\n# b"),
    )
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
def test_a_fence_holds_any_text(text: str) -> None:
    tokens = MARKDOWN.parse(f"before\n\n{fence(text)}\nafter\n")
    assert [token.type for token in tokens if token.level == 0 and token.nesting >= 0] == [
        "paragraph_open",
        "fence",
        "paragraph_open",
    ]
    assert next(token.content for token in tokens if token.type == "fence") == f"{visible(text)}\n"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("` \n#<a\\*_[]\u202e"), max_size=20))
def test_a_code_span_holds_any_text(text: str) -> None:
    children = MARKDOWN.parse(f"x {inline(text)} y")[1].children or []
    assert [child.type for child in children] == ["text", "code_inline", "text"]
    assert children[1].content.strip(" ") == visible(text.replace("\n", " ")).strip(" ")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 40))
def test_turns_are_fair(groups: list[str], count: int) -> None:
    chosen = take_turns(groups, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(groups))
    taken = {group: sum(groups[index] == group for index in chosen) for group in set(groups)}
    for group, number in taken.items():
        assert [index for index in chosen if groups[index] == group] == [
            index for index, other in enumerate(groups) if other == group
        ][:number]
        assert number == groups.count(group) or number >= max(taken.values()) - 1


def test_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", steps=1, count=4)
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="rlhf-trl evaluate RECIPE"):
        samples(recipe, run)
    assert not run.samples.exists() or not list(run.samples.glob("*.md"))


def test_a_recipe_without_policies_has_no_samples(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", stages={name: STAGES[name] for name in ("sft", "rm")}, steps=1)
    with pytest.raises(UserError, match="no policy"):
        samples(recipe, run)
