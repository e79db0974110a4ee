"""Answering files of prompts: every shape of a row, each benchmark's form, and a second start."""

import json
from types import SimpleNamespace

import pytest

from rlhf_trl.adapters.answer import answer_file
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_jsonl

HOW = {"max_new_tokens": 4, "temperature": 1.0, "seed": 0}


@pytest.fixture
def echo():
    """A policy that says what was asked so far; `calls` counts its batches."""

    def answer_all(talks, batch_size, **how):
        policy.calls += 1
        assert how == HOW
        if policy.calls > policy.most:
            raise KeyboardInterrupt
        return ["+".join(message["content"] for message in talk) for talk in talks]

    policy = SimpleNamespace(answer_all=answer_all, calls=0, most=99, made="1")
    return policy


def run(policy, folder, rows, form="jsonl", batch_size=4, **how):
    write_jsonl(folder / "prompts.jsonl", rows)
    return answer_file(
        policy, folder / "prompts.jsonl", folder / "out.json", form, "mine", batch_size, **{**HOW, **how}
    )


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ("a", "a"),
        ({"prompt": "a", "id": 7}, "a"),
        ({"question": "a"}, "a"),
        ({"instruction": "a", "input": "b"}, "a\n\nb"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, "s+a"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "a"),
        ({"turns": ["a", "b"]}, ["a", "a+a+b"]),
        ({"turns": [{"content": "a"}]}, "a"),
    ],
)
def test_every_shape_of_a_row_is_answered(echo, tmp_path, row, answer):
    assert run(echo, tmp_path, [row, "z"]) == {"rows": 2, "kept": 0}
    first, second = read_jsonl(tmp_path / "out.json")
    assert (first["answer"], second["answer"], first["model"]) == (answer, "z", "mine")
    assert first.get("id") == (row.get("id") if isinstance(row, dict) else None)


def test_a_row_that_cannot_be_written_is_refused_before_any_answer(echo, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "note": "\\ud800"}')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: there is a lone surrogate"):
        answer_file(echo, tmp_path / "prompts.jsonl", tmp_path / "out", "jsonl", "mine", 4, **HOW)


@pytest.mark.parametrize("row", [7, None, {}, {"prompt": ""}, {"turns": []}, {"turns": [1]}, {"prompt": {}},
                                 {"messages": [{"role": "assistant", "content": "a"}]}, {"turns": [7]}])  # fmt: skip
def test_a_row_without_a_prompt_is_named(echo, tmp_path, row):
    with pytest.raises(UserError, match=r"prompts.jsonl:2: there is no prompt in the line"):
        run(echo, tmp_path, ["a", row])


def test_the_forms_are_those_of_the_benchmarks(echo, tmp_path):
    run(echo, tmp_path, [{"instruction": "a", "dataset": "helpful"}], "alpaca_eval")
    found = {"instruction": "a", "output": "a", "generator": "mine", "dataset": "helpful"}
    assert read_json(tmp_path / "out.json") == [found]
    for form, id in (("arena_hard", "uid"), ("mt_bench", "question_id")):  # of Arena-Hard before 2.0, and of one's own
        with pytest.raises(UserError, match=f"there is no '{id}' in the line"):
            run(echo, tmp_path, [{"prompt": "a"}], form)
    run(echo, tmp_path, [{"uid": "u", "prompt": "a"}], "arena_hard")
    (row,) = read_jsonl(tmp_path / "out.json")
    assert (row["uid"], row["model"], row["messages"][-1]["content"]["answer"]) == ("u", "mine", "a")
    run(echo, tmp_path, [{"question_id": 81, "turns": ["a", "b"]}], "mt_bench")
    (row,) = read_jsonl(tmp_path / "out.json")
    assert (row["question_id"], row["model_id"]) == (81, "mine")
    assert row["choices"] == [{"index": 0, "turns": ["a", "a+a+b"]}]
    run(echo, tmp_path, [{"question_id": 81, "turns": ["a", "b"]}], "mt_bench")
    assert read_jsonl(tmp_path / "out.json") == [row]  # the same bytes, whenever it is run


def test_a_second_start_goes_on_where_the_first_one_ended(echo, tmp_path):
    rows, echo.most = list("abcdefghi"), 2
    with pytest.raises(KeyboardInterrupt):
        run(echo, tmp_path, rows, batch_size=1)
    partial = tmp_path / "out.json.partial"
    partial.write_text(partial.read_text() + '["cut')
    with pytest.raises(UserError, match="holds answers of another file, model, or way of sampling"):
        run(echo, tmp_path, rows, batch_size=1, seed=1)
    echo.made = "2"
    with pytest.raises(UserError, match="holds answers of another file, model"):  # exported again
        run(echo, tmp_path, rows, batch_size=1)
    echo.most, echo.made = 99, "1"
    assert run(echo, tmp_path, rows, batch_size=1) == {"rows": 9, "kept": 8}
    assert [json.loads(line)["answer"] for line in (tmp_path / "out.json").read_text().splitlines()] == rows
    assert not partial.exists()
