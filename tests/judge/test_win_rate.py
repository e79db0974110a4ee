"""What verdicts come to: win rates, habits, length, ratings and agreement, by published figures and closed forms."""

import csv
import gzip
import itertools
import json
import math

import numpy as np
import pytest
import statsmodels.api as sm
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit

from rlhf_trl.judge.questions import parse_verdict
from rlhf_trl.judge.results import kappa, measure_agreement
from rlhf_trl.judge.win_rate import (
    ELO,
    bradley_terry,
    fit,
    length_controlled,
    mean,
    measure_habits,
    prompt_scores,
    win_rate,
)


def verdict(prompt, a_first, score, a="dpo", b="reference", status="ok", lengths=(100, 100)):
    return {"prompt_id": str(prompt), "subset": "helpful-base", "a": a, "b": b, "a_first": a_first, "score": score,
            "status": status, "length_a": lengths[0], "length_b": lengths[1]}  # fmt: skip


def both_orders(scores, a="dpo", b="reference", lengths=None):
    """Verdicts on prompts 0, 1, ... from the scores of `a` when it is shown first and second."""
    return [
        verdict(prompt, a_first, score, a, b, lengths=(100, 100) if lengths is None else lengths[prompt])
        for prompt, pair in enumerate(scores)
        for a_first, score in zip((True, False), pair, strict=True)
    ]


def judged(rule, lengths):
    """Verdicts of a judge that follows a rule on the lengths of the answers shown first and second."""
    return both_orders([(rule(a, b), 1 - rule(b, a)) for a, b in lengths], lengths=lengths)


def drawn_lengths(n, shift, seed):
    return np.maximum(np.random.default_rng(seed).normal([300 + shift, 300], 100, size=(n, 2)), 1).astype(int).tolist()


SCORE = st.sampled_from([1.0, 0.5, 0.0, None])
VERDICTS = st.lists(st.tuples(SCORE, SCORE, st.integers(0, 9), st.integers(0, 9)), max_size=12).map(
    lambda rows: both_orders([row[:2] for row in rows], lengths=[row[2:] for row in rows])
)

# --- win rates and habits --------------------------------------------------------------------------------------------


def test_phi_3_against_phi_3_dpo():
    """What FastChat's rule gives on its 75 rows, and the place that GPT-4 favours on the 73 usable ones."""
    with gzip.open(SHARED / "judge-data" / "mtbench_gpt4_pair_verdicts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    games = []
    for row in rows:
        first, second = parse_verdict(row["g1_judgment"]), parse_verdict(row["g2_judgment"])
        scores = first, None if second is None else 1 - second
        games += [one | {"prompt_id": str(row["question_id"])} for one in both_orders([scores])]
    found, habits = win_rate(games, "dpo", "reference"), measure_habits(games)
    fastchat = found["alternatives"]["disagreement_is_tie"]
    assert (fastchat["n"], fastchat["mean"]) == (73, (18 + 35 / 2) / 73), "18 wins, 20 losses, 35 ties"
    assert found["missing"] == {"comparisons": 2, "verdicts": {"invalid": 3}}
    assert (found["wins"], found["ties"], found["losses"]) == (18 + 5, 8 + 18, 20 + 4)
    assert found["win_rate"]["mean"] == pytest.approx((18 + 8 / 2 + 18 / 2 + 5 * 0.75 + 4 * 0.25) / 73)
    assert found["alternatives"]["consistent_only"]["mean"] == 22 / 46
    means = {"first_share": 78 / 121, "consistency": 46 / 73, "tie_rate": 25 / 146, "invalid_rate": 3 / 150}
    assert {name: habits[name]["mean"] for name in means} == pytest.approx(means)
    assert habits["first_share"]["low"] > 0.5, "GPT-4 favours the first place"


def test_only_prompts_with_both_orders_count_and_the_others_are_told():
    games = [
        *both_orders([(1.0, 1.0), (1.0, 0.5)]),
        verdict(2, True, 1.0),
        verdict(2, False, None),  # a reply that says nothing
        verdict(3, True, None, status="timeout"),
        verdict(3, False, None, status="refusal"),
        verdict(4, True, 0.0),  # the other order was not judged
    ]
    assert prompt_scores(games, "dpo", "reference") == {"0": 1.0, "1": 0.75}
    found, agreement = win_rate(games, "dpo", "reference"), measure_agreement(games)
    verdicts = {"invalid": 1, "not judged": 1, "refusal": 1, "timeout": 1}
    assert found["missing"] == agreement["missing"] == {"comparisons": 3, "verdicts": verdicts}
    assert (found["n"], found["wins"], found["win_rate"]["mean"]) == (2, 2, 0.875)
    assert measure_habits(games)["invalid_rate"]["mean"] == 1 / 7, "of the replies that came"


def test_comparisons_of_one_prompt_are_one_unit():
    """The same verdicts on two pairs of policies of each prompt add no certainty."""
    drawn = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=(80, 2))
    one, two = measure_habits(both_orders(drawn)), measure_habits(both_orders(drawn) + both_orders(drawn, a="sft"))
    for name in ("consistency", "first_share", "tie_rate"):
        assert two[name]["mean"] == pytest.approx(one[name]["mean"])
        assert two[name]["high"] - two[name]["low"] == pytest.approx(one[name]["high"] - one[name]["low"], rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_same_score_everywhere_leaves_a_doubt_that_falls_with_n(value):
    few, many = mean(np.full(5, value)), mean(np.full(500, value))
    assert few["mean"] == many["mean"] == value
    assert 0 <= few["low"] <= many["low"] <= value <= many["high"] <= few["high"] <= 1
    assert few["high"] - few["low"] == pytest.approx(1 - 0.025 ** (1 / 5))


def test_the_interval_of_the_win_rate_holds_the_truth_19_times_in_20():
    """A judge that favours the first place, ties where it sees little between the answers, and fails at times."""
    random_, prompts, experiments = np.random.default_rng(7), 120, 600

    def judge(n):
        """Scores of `a` in both orders: the prompts differ, and the verdicts on one prompt go together."""
        seen = random_.normal(0.3, 1.0, size=(n, 1)) + np.array([0.5, -0.5]) + random_.logistic(size=(n, 2)) / 2
        return np.where(np.abs(seen) < 0.3, 0.5, (seen > 0).astype(float))

    truth = float(judge(2_000_000).mean())
    held = 0
    for _ in range(experiments):
        scores = judge(prompts).astype(object)
        scores[random_.random((prompts, 2)) < 0.05] = None
        found = win_rate(both_orders(scores), "dpo", "reference")["win_rate"]
        held += found["low"] <= truth <= found["high"]
    assert 0.93 <= held / experiments <= 0.97


# --- agreement with people -------------------------------------------------------------------------------------------


def read_runs():
    """LLMBar: each run, and its games, in which `a` is the output that people chose.

    A missing verdict and a tie count as wrong there: so they are a win of the wrong answer here.
    """
    with gzip.open(SHARED / "judge-data" / "llmbar_runs.jsonl.gz", "rt", encoding="utf-8") as file:
        for run in map(json.loads, file):
            winners = list(zip(run["winner_swap_false"], run["winner_swap_true"], strict=True))
            scores = [[float(name == str(label)) for name in pair]
                      for pair, label in zip(winners, run["labels"], strict=True)]  # fmt: skip
            yield run, winners, scores


def test_250_runs_of_llmbar_have_the_published_statistics():
    checked = 0
    for run, winners, scores in read_runs():
        result = measure_agreement(both_orders(scores))
        average = float(run["published"]["correct_average"].rstrip("%")) / 100
        assert result["accuracy"]["mean"] == pytest.approx(average, abs=1e-12)
        won = np.array([[first == "1", second == "1"] for first, second in winners], dtype=float)
        one, other = won.mean(axis=0)
        between_orders = kappa(won[:, 0] == won[:, 1], one * other + (1 - one) * (1 - other))["mean"]
        assert between_orders == pytest.approx(run["published"]["kappa_agreement"], abs=1e-12)
        checked += 1
    assert checked == 250


def test_gpt_4_on_the_natural_set_beside_its_answers_lengths():
    """One run with its texts: the judge is far better than taking the longer answer."""
    with gzip.open(SHARED / "judge-data" / "llmbar_natural_gpt4_cot_raw.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    wanted = ("LLMBar/Natural", "GPT-4", "CoT")
    (scores,) = [of for run, _, of in read_runs() if (run["subset"], run["judge"], run["strategy"]) == wanted]
    chosen = [(len(row[f"output_{row['label']}"]), len(row[f"output_{3 - row['label']}"])) for row in rows]
    found = measure_agreement(both_orders(scores, lengths=chosen))
    assert found["kappa"]["mean"] == pytest.approx(2 * found["accuracy"]["mean"] - 1), "without ties, chance is 1/2"
    longer = np.mean([(np.sign(better - worse) + 1) / 2 for better, worse in chosen])
    assert found["length_rule"]["accuracy"]["mean"] == pytest.approx(max(longer, 1 - longer))
    assert found["length_rule"]["over_rule"]["low"] > 0


@pytest.mark.parametrize(
    ("scores", "accuracy", "agreed"),
    [((1.0, 0.0), 0.5, 0.0), ((0.5, 0.5), 0.5, 0.0), ((1.0, 1.0), 1, 1.0), ((0.0, 0.0), 0, -1.0)],
)
def test_judges_of_one_habit(scores, accuracy, agreed):
    """Always the first, always a tie, always right, always wrong."""
    found = measure_agreement(both_orders([scores] * 50))
    assert found["accuracy"]["mean"] == accuracy
    assert found["kappa"]["mean"] == pytest.approx(agreed)
    assert found["kappa"]["high"] - found["kappa"]["low"] > 0.05, "fifty pairs leave something open"


# --- length control --------------------------------------------------------------------------------------------------


def test_a_longer_wins_judge_is_exposed():
    games = judged(lambda first, second: float(first > second), drawn_lengths(300, 120, 0))
    found, raw = length_controlled(games, "dpo", "reference"), win_rate(games, "dpo", "reference")["win_rate"]
    assert found["length_controlled"]["high"] < 0.5 < 0.7 < raw["low"], "nothing is left of the win"
    assert "moves the win rate by -" in found["warnings"][0]
    assert measure_habits(games)["prefers_longer"]["mean"] == 1


def test_the_length_controlled_rate_is_that_of_a_plain_fit():
    lengths = drawn_lengths(200, 30, 4)
    scores = np.random.default_rng(4).choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=(200, 2))
    found = length_controlled(both_orders(scores, lengths=lengths), "dpo", "reference")
    apart = -np.diff(lengths)[:, 0] * -1.0
    design = np.column_stack([np.tanh(apart / apart.std(ddof=1)), np.ones(200)])
    wanted = sm.GLM(scores.mean(axis=1), design, sm.families.Binomial()).fit().params
    assert logit(found["length_controlled"]["mean"]) == pytest.approx(wanted[1], abs=2e-3)
    assert not found["warnings"]


@pytest.mark.parametrize(
    ("lengths", "scores", "warns"),
    [
        ([(100, 100)] * 100, None, None),
        ([(90, 100)] * 100, None, "dpo gives the shorter answer to 100% of the prompts"),
        (drawn_lengths(100, 0, 6), (1.0, 1.0), None),
    ],
)
def test_where_the_effect_of_length_cannot_be_told_the_rate_is_the_plain_one(lengths, scores, warns):
    drawn = np.random.default_rng(6).choice([0.0, 1.0], size=(100, 2)) if scores is None else [scores] * 100
    games = both_orders(drawn, lengths=lengths)
    found = length_controlled(games, "dpo", "reference")
    assert found["length_controlled"] == win_rate(games, "dpo", "reference")["win_rate"]
    assert [warns in said for said in found["warnings"]] == ([True] if warns else [])


# --- ratings ---------------------------------------------------------------------------------------------------------


def test_the_baseball_teams_have_the_published_abilities():
    """Agresti (2002), table 10.11: without the home effect, and with it (BradleyTerry2, R)."""
    teams = ["Baltimore", "Cleveland", "Boston", "New York", "Toronto", "Detroit", "Milwaukee"]
    design, scores = [], []
    with (SHARED / "judge-data" / "baseball_agresti.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sides = np.eye(7)[teams.index(row["home.team"])] - np.eye(7)[teams.index(row["away.team"])]
            games = [1.0] * int(row["home.wins"]) + [0.0] * int(row["away.wins"])
            design += [sides[1:]] * len(games)
            scores += games
    rows, prior = np.array(design), [4e-6] * 6
    plain, _ = fit(rows, np.array(scores), np.arange(len(scores)), prior)
    assert plain[0] == pytest.approx([0.684, 1.108, 1.248, 1.295, 1.436, 1.581], abs=6e-4)
    home, _ = fit(np.column_stack([rows, np.ones(len(rows))]), np.array(scores), np.arange(len(scores)), prior)
    assert home[0] == pytest.approx([0.7047, 1.1438, 1.2813, 1.3271, 1.4754, 1.6196, 0.302], abs=5e-4)


def test_two_policies_have_the_rating_of_their_win_rate_and_the_order_effect_is_told_apart():
    """30 of 40 is 190.85 Elo; the log-odds of the two orders are ability + bias and ability - bias."""
    found = bradley_terry(both_orders([(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 10), "reference")
    rating = found["dpo"]
    assert rating["mean"] == pytest.approx(190.85, abs=0.005)
    # An interval like that of the log-odds of 30 in 40.
    assert (rating["high"] - rating["low"]) / 2 / ELO == pytest.approx(2.02 / math.sqrt(40 * 0.75 * 0.25), rel=0.05)
    assert found["reference"] == {"mean": 0, "low": 0, "high": 0, "n": 40}
    found = bradley_terry(both_orders([(1.0, 0.5)] * 60 + [(1.0, 0.0)] * 20 + [(0.0, 0.5)] * 20), "reference")
    first, second = logit(0.8), logit(0.4)
    assert found["dpo"]["mean"] == pytest.approx(ELO * (first + second) / 2, rel=1e-4)


def test_another_reference_moves_all_ratings_alike():
    random_ = np.random.default_rng(0)
    games = [
        one
        for at, (a, b) in enumerate(itertools.combinations(("dpo", "grpo", "reference"), 2))
        for one in both_orders(random_.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6], size=(50 + at, 2)), a, b)
    ]
    one, other = bradley_terry(games, "reference"), bradley_terry(games, "grpo")
    for policy in one:
        assert other[policy]["mean"] == pytest.approx(one[policy]["mean"] - one["grpo"]["mean"], abs=0.01)
    assert one["dpo"]["n"] == 51


def unrated(games, reference="reference"):
    ratings = bradley_terry(games, reference)
    return {name: row["why_not"].split(": ")[-1] for name, row in ratings.items() if row["mean"] is None}


def test_what_has_no_finite_rating_says_why_and_leaves_the_others_theirs():
    """Ford (1957): a rating is finite between policies that chains of wins join both ways."""
    chances = [(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 10
    games = both_orders(chances) + both_orders([(1.0, 1.0)] * 40, a="best") + both_orders([(0.0, 0.0)] * 40, a="worst")
    assert unrated(games) == {"best": "above any bound", "worst": "below any bound"}
    alone, found = (bradley_terry(of, "reference")["dpo"] for of in (both_orders(chances), games))
    assert found["mean"] == pytest.approx(alone["mean"], abs=0.1)
    assert unrated(games, "worst").keys() == {"best", "dpo", "reference"}
    joined = [(1.0, 0.5), (0.0, 0.5)] * 5
    apart = [
        *both_orders(joined),
        *both_orders(joined, "ppo", "grpo"),
        verdict(9, True, None, a="sft", status="quota"),
    ]
    assert unrated(apart) == dict.fromkeys(
        ("grpo", "ppo", "sft"), "no chain of verdicts leads from it to the reference"
    )
    assert unrated(apart, "sft").keys() == {"dpo", "grpo", "ppo", "reference"}
    nothing = bradley_terry([verdict(0, True, None, status="quota")], "reference")
    assert nothing["dpo"]["mean"] is None


def test_a_judge_that_always_says_a_finds_all_policies_equal():
    found = bradley_terry(both_orders([(1.0, 0.0)] * 20) + both_orders([(1.0, 0.0)] * 20, a="grpo"), "reference")
    assert [rating["mean"] for rating in found.values()] == pytest.approx([0, 0, 0], abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(VERDICTS, st.randoms(use_true_random=False))
def test_results_are_json_and_do_not_depend_on_the_order_of_the_games(games, shuffler):
    shuffled = games[:]
    shuffler.shuffle(shuffled)
    results = [
        [win_rate(of, "dpo", "reference"), measure_habits(of), length_controlled(of, "dpo", "reference"),
         bradley_terry(of, "reference"), measure_agreement(of)] for of in (games, shuffled)
    ]  # fmt: skip
    assert json.dumps(results[0], allow_nan=False) == json.dumps(results[1], allow_nan=False)
