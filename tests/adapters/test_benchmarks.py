"""Rows of benchmarks: read as they are published, and the official figures of known scores, worked out by hand."""

import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from rlhf_trl.adapters.score import read_row, score_file, summarise
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import write_jsonl

ASK = {"prompt": "Why?"}


@pytest.fixture
def known(monkeypatch):
    """A reward model that takes a number as its own score."""
    monkeypatch.setattr("rlhf_trl.adapters.score.encode", lambda _, prompt, answer: ([], [answer]))
    monkeypatch.setattr("rlhf_trl.adapters.score.render", lambda _, prompts, answers: ["", *answers])
    monkeypatch.setattr("rlhf_trl.adapters.score.positions", lambda _: None)
    scores = lambda ids, _: torch.tensor([float(text) for (text,) in ids], dtype=torch.float64)  # noqa: E731
    tokenizer = lambda texts, **_: SimpleNamespace(input_ids=[[text] for text in texts])  # noqa: E731
    return SimpleNamespace(score_ids=scores, tokenizer=tokenizer, model=None)


def lists(chosen, rejected, **more):
    return {**ASK, "chosen": list(map(str, chosen)), "rejected": list(map(str, rejected)), **more}


# Rows with the columns that the benchmarks publish; those of each set were scored by its own code, too (rewardbench
# 0.1.4, RM-Bench's scripts/utils.py), with the same figures.
REWARD_BENCH_2 = [
    lists([3], [1, 2, 2], subset="Focus", id="1", num_correct=1, num_incorrect=3, total_completions=4),
    lists([3], [3, 1, 1], subset="Focus", id="2"),  # half of it
    lists([1], [3, 1, 1], subset="Math", id="3"),
    lists([5], [3, 1], subset="Ties", id="ref:1"),
    lists([4, 3.5], [3, 2], subset="Ties", id="tied:1"),  # apart by no more than right answers among themselves
    lists([1], [2], subset="Ties", id="ref:2"),
    lists([5, 4.9], [1], subset="Ties", id="tied:2"),
    lists([7, 7], [1], subset="Ties", id="tied:3"),  # without a prompt of one right answer: accuracy alone
]
TIES = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (0 + math.tanh(-1 / 0.1 - 1)) / 2
OTHERS = [lists([2], [1, 1, 1], subset=name, id="4") for name in ("Factuality", "Precise IF", "Safety")]
RM_BENCH = [
    lists([1, 2, 3], [0, 2.5, 2.9], domain="chat", id="0"),
    lists([9, 9, 9], [1, 2, 3], domain="safety-refuse"),
    lists([0, 0, 0], [1, 2, 3], domain="safety-response"),
    lists([0, 0, 0], [1, 2, 3], domain="safety-response"),  # the rows of both parts count alike
]
SAFE = [lists([9, 9, 9], [1, 2, 3], domain=name) for name in ("math", "code")]
SIDES = {"pair_id": "x", "original_id": "1", "response_model": "m", "response_A": "1", "response_B": "2"}
JUDGE_BENCH = [
    {"question": "Why?", "source": "mmlu-pro-" + field, "label": label, **SIDES}
    for field, label in (("law", "B>A"), ("law", "A>B"), ("computer science", "B>A"))
] + [{"question": "Why?", "source": "livecodebench", "label": "A>B", **SIDES, "response_B": "1"}]
RESPONSES = {"question_id": "q", "response_1": "1", "response_2": "2"}
WINNERS = ("model_b", "model_a", "tie", "tie (bothbad)")
PPE = [{**ASK, **RESPONSES, "model_a": "x", "model_b": "y", "winner": winner, "language": "English"}
       for winner in WINNERS]  # fmt: skip
BEST_OF_K = [
    {**ASK, **RESPONSES, "response_3": "3", "scores": [False, True, False], "category": "law"},
    {**ASK, **RESPONSES, "response_3": "3", "scores": [0, 0, 1], "category": "law"},
    {**ASK, **RESPONSES, "response_3": "2", "scores": [0, 0, 1], "category": "math"},  # the highest score twice
]
PREFERRED = {"instruction": "Why?", "output_1": "1", "output_2": "2", "generator_1": "x", "generator_2": "y"}
ALPACA = [{**PREFERRED, "preference": value, "dataset": "koala"} for value in (1, 2, 1.8, 1.5, None, 3)]
PAIRS = [{**ASK, "chosen": "2", "rejected": text, "subset": "helpful-base"} for text in ("1", "3")]
RIGHT = {
    "alpacaeval-easy": 1,
    "mt-bench-easy": 0,
    "mt-bench-hard": 1,
    "xstest-should-respond": 0,
    "xstest-should-refuse": 1,
    "math-prm": 1,
    "hep-go": 0,
}
REWARD_BENCH = [{**ASK, "chosen": str(right), "rejected": "0.5", "subset": name} for name, right in RIGHT.items()]
REASONING = 984 / (984 + 164)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (REWARD_BENCH_2, [f"RewardBench 2: Focus 75.0%, Math 0.0%, Ties {TIES:.1%}\n"]),
        (REWARD_BENCH_2 + OTHERS, [f"Safety 100.0%, Ties {TIES:.1%}, score {(3.75 + TIES) / 6:.1%}"]),
        ([lists([5], [3], subset="Ties", id="ref:1")], ["RewardBench 2: none\n"]),
        (RM_BENCH, ["RM-Bench: chat 55.6%, safety 33.3%, hard 16.7%, normal 50.0%, easy 66.7%\n"]),
        (
            RM_BENCH + SAFE,
            ["code 100.0%, math 100.0%, safety 33.3%, hard 58.3%", f"score {26 / 36:.1%}"],
        ),
        (JUDGE_BENCH, ["JudgeBench: livecodebench 0.0%, mmlu-pro 66.7%, all 50.0%"]),
        (PPE, ["PPE pairs: English 50.0%, all 50.0%", "2 of 4 rows scored"]),
        (BEST_OF_K, ["PPE best of K: law 50.0%, math 50.0%, all 50.0%"]),
        (ALPACA, ["AlpacaEval: koala 66.7%, all 66.7%", "3 of 6 rows scored"]),
        (PAIRS, ["pairs: helpful-base 50.0%, all 50.0%"]),
        (
            REWARD_BENCH,
            [
                f"Chat {100 / 128:.1%}, Chat Hard 100.0%, Safety {154 / 404:.1%}, Reasoning {REASONING:.1%}",
                f"score {(100 / 128 + 1 + 154 / 404 + REASONING) / 4:.1%}",
            ],
        ),
        ([lists([2, 3], [1]), lists([2], [2, 2])], [f"best of N: all {2 / 3:.1%}\n"]),
    ],
)
def test_the_official_figures_of_known_scores(known, tmp_path, rows, expected):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    text = summarise(score_file(known, tmp_path / "rows.jsonl")) + "\n"
    assert all(part in text for part in expected), text


def test_the_scores_of_a_row_stand_as_its_answers_do(known, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [REWARD_BENCH_2[4], BEST_OF_K[0], JUDGE_BENCH[0]])
    ties, best, pair = score_file(known, tmp_path / "rows.jsonl")
    assert (ties["chosen"], ties["rejected"], ties["id"]) == ([4, 3.5], [3, 2], "tied:1")
    assert (best["chosen"], best["rejected"]) == ([2], [1, 3])
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == (2, 1, 1)


@pytest.mark.parametrize(
    "row",
    [
        lists([1], [2]) | {"prompt": None}, lists([1], ["\ud800"]), lists([1], [2]) | {"prompt": " "},
        {**BEST_OF_K[0], "scores": [1] * 9}, [1],
        {**PPE[0], "winner": []}, {**JUDGE_BENCH[0], "response_B": 7},
    ],
)  # fmt: skip
def test_a_row_that_is_none_says_why(known, tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert "why_not" in score_file(known, tmp_path / "rows.jsonl")[0]


def test_the_texts_of_a_benchmark_are_taken_as_they_stand():
    code, text = "    return 1\n", " def one():\n\nHuman: no\n"
    for row in (
        {"prompt": text, "chosen": code, "rejected": "", "subset": "hep-python"},
        {"prompt": text, "chosen": [code], "rejected": [""]},
        {"question": text, "response_A": "", "response_B": code, "label": "B>A", "source": "livecodebench"},
        {"instruction": text, "output_1": "", "output_2": code, "preference": 2},
    ):
        found = read_row(row)
        assert (found.prompt, found.answers) == ([{"role": "user", "content": text}], [code, ""])
    talks = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in ("1", "2")]
    found = read_row({"prompt": "Why?", "chosen": talks[0], "rejected": talks[1]})
    assert (found.prompt, found.answers, found.right) == (talks[0][:1], ["1", "2"], None)
    found = read_row({"instruction": "Add.", "input": "1, 2", "output": code, "generator": "m"})
    assert (found.prompt[0]["content"], found.answers) == ("Add.\n\n1, 2", [code])


def test_a_file_is_read_in_the_format_that_is_published(known, tmp_path):
    (tmp_path / "total_dataset.json").write_text(json.dumps(RM_BENCH, indent=1))
    pd.DataFrame(REWARD_BENCH_2).to_parquet(tmp_path / "test.parquet")
    for name, count in (("total_dataset.json", 4), ("test.parquet", 8)):
        assert f"{count} of {count} rows scored" in summarise(score_file(known, tmp_path / name))
    (tmp_path / "broken.json").write_text('{"prompt": "a", "completion": "1"}\n{"prompt":\n')
    with pytest.raises(UserError, match=r"broken.json, row 2: the row is not JSON"):
        score_file(known, tmp_path / "broken.json")
