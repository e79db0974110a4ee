"""Ratings: published abilities, closed forms, and what has no finite rating."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from test_win_rate import both_orders, verdict

from rlhf_trl.judge.bradley_terry import ELO, _fit, bradley_terry, fit_abilities

TEAMS = ["Baltimore", "Cleveland", "Boston", "New York", "Toronto", "Detroit", "Milwaukee"]


def baseball():
    """Wins and games of each home team (rows) against each team away, 1987, shape (1, 7, 7) each."""
    wins, totals = np.zeros((2, 1, 7, 7))
    with (SHARED / "judge-data" / "baseball_agresti.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = 0, TEAMS.index(row["home.team"]), TEAMS.index(row["away.team"])
            wins[at], totals[at] = int(row["home.wins"]), int(row["home.wins"]) + int(row["away.wins"])
    return wins, totals


def test_the_baseball_teams_have_the_published_abilities():
    """Agresti (2002), table 10.11: without the home effect, and with it (BradleyTerry2, R)."""
    wins, totals = baseball()
    design = (np.eye(7)[:, None, :] - np.eye(7)[None, :, :]).reshape(-1, 7)[:, 1:]
    (plain,) = _fit(design, wins.reshape(1, -1), totals.reshape(1, -1))
    assert plain == pytest.approx([0.684, 1.108, 1.248, 1.295, 1.436, 1.581], abs=6e-4)
    (ability,), (home,) = fit_abilities(wins, totals)
    assert home == pytest.approx(0.302, abs=5e-4)
    assert ability == pytest.approx([0, 0.7047, 1.1438, 1.2813, 1.3271, 1.4754, 1.6196], abs=1e-4)


def test_two_policies_have_the_rating_of_their_win_rate():
    """Without an order effect, the ability is the log-odds of the win rate: 30 of 40 is 190.85 Elo."""
    found = bradley_terry(both_orders([(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 10), "reference", 0)
    rating = found["ratings"]["dpo"]
    assert rating["mean"] == pytest.approx(400 * math.log10(3))
    assert rating["mean"] == pytest.approx(190.85, abs=0.005)
    assert rating["low"] < ELO * logit(0.7) and ELO * logit(0.8) < rating["high"]
    assert found["ratings"]["reference"] == {"mean": 0, "low": 0, "high": 0, "n": 40}
    assert found["first_wins"]["mean"] == pytest.approx(0.5)


def test_a_tie_is_half_a_win_and_the_order_effect_is_told_apart():
    """In closed form: the log-odds of the two orders are ability + eta and ability - eta."""
    scores = [(1.0, 0.5)] * 60 + [(1.0, 0.0)] * 20 + [(0.0, 0.5)] * 20
    found = bradley_terry(both_orders(scores), "reference", 0)
    first, second = logit(0.8), logit(0.4)
    assert found["ratings"]["dpo"]["mean"] == pytest.approx(ELO * (first + second) / 2)
    assert found["first_wins"]["mean"] == pytest.approx(expit((first - second) / 2))
    assert found["first_wins"]["low"] > 0.5


def test_another_reference_moves_all_ratings_alike():
    random_ = np.random.default_rng(0)
    games = [
        one
        for at, (a, b) in enumerate(itertools.combinations(("dpo", "grpo", "reference"), 2))
        for one in both_orders(random_.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6], size=(50 + at, 2)), a, b)
    ]
    one, other = bradley_terry(games, "reference", 0), bradley_terry(games, "grpo", 0)
    for policy in one["ratings"]:
        moved = one["ratings"][policy]["mean"] - one["ratings"]["grpo"]["mean"]
        assert other["ratings"][policy]["mean"] == pytest.approx(moved, abs=1e-4)
    assert one["first_wins"] == pytest.approx(other["first_wins"], abs=1e-6)
    assert (one["first_wins"]["n"], one["ratings"]["dpo"]["n"]) == (52, 51)


# --- no finite rating ------------------------------------------------------------------------------------------------


def test_a_policy_that_always_wins_is_above_any_bound_and_the_others_keep_theirs():
    chances = [(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 10
    alone = bradley_terry(both_orders(chances), "reference", 0)
    games = both_orders(chances) + both_orders([(1.0, 1.0)] * 40, a="best") + both_orders([(0.0, 0.0)] * 40, a="worst")
    found = bradley_terry(games, "reference", 0)
    assert found["ratings"]["best"]["mean"] is None
    assert "above any" in found["ratings"]["best"]["why_not"]
    assert "below any" in found["ratings"]["worst"]["why_not"]
    assert found["ratings"]["dpo"] == pytest.approx(alone["ratings"]["dpo"])
    # Only `dpo` beat the reference and lost to it; with `worst` as the reference, nothing is bounded.
    assert {name for name, row in bradley_terry(games, "worst", 0)["ratings"].items() if row["mean"] is None} == {
        "best",
        "dpo",
        "reference",
    }


def test_one_lost_verdict_gives_a_rating_whose_upper_limit_is_open():
    found = bradley_terry(both_orders([(1.0, 1.0)] * 39 + [(0.0, 0.0)]), "reference", 0)["ratings"]["dpo"]
    assert found["mean"] == pytest.approx(400 * math.log10(39))
    assert 0 < found["low"] < found["mean"]
    assert found["high"] is None


def test_a_policy_that_many_resamples_miss_has_open_limits():
    """One prompt joins it with the reference: a third of the resamples do not have it."""
    games = both_orders([(1.0, 0.5), (0.0, 0.5)] * 20) + both_orders([(1.0, 0.5)], "ppo")
    found = bradley_terry(games, "reference", 0)["ratings"]
    assert found["ppo"]["mean"] > 0
    assert (found["ppo"]["low"], found["ppo"]["high"]) == (None, None)
    assert found["dpo"]["low"] < 0 < found["dpo"]["high"]


def test_a_judge_that_always_says_a_finds_all_policies_equal():
    found = bradley_terry(both_orders([(1.0, 0.0)] * 20) + both_orders([(1.0, 0.0)] * 20, a="grpo"), "reference", 0)
    assert found["first_wins"]["mean"] is None
    for rating in found["ratings"].values():
        assert (rating["mean"], rating["low"], rating["high"]) == pytest.approx((0, 0, 0), abs=1e-9)


def test_policies_that_no_verdict_joins_with_the_reference():
    games = [*both_orders([(1.0, 0.5), (0.0, 0.5)] * 5), *both_orders([(1.0, 0.5), (0.0, 0.5)] * 5, "ppo", "grpo")]
    ratings = bradley_terry([*games, verdict(99, True, None, a="sft", status="timeout")], "reference", 0)["ratings"]
    assert [name for name, row in ratings.items() if row["mean"] is None] == ["grpo", "ppo", "sft"]
    assert ratings["ppo"]["why_not"] == "no chain of verdicts leads from it to the reference"
    assert ratings["sft"]["n"] == 0
    nothing = bradley_terry([verdict(0, True, None, status="quota")], "reference", 0)
    assert (nothing["ratings"]["dpo"]["mean"], nothing["first_wins"]["mean"]) == (None, None)
    unjoined = bradley_terry(games, "sft", 0)["ratings"]
    assert [name for name, row in unjoined.items() if row["mean"] is None] == ["dpo", "grpo", "ppo", "reference"]


RESULT = st.sampled_from([0.0, 0.5, 1.0])
TABLE = st.lists(st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 2), (1, 3)]), RESULT, RESULT), min_size=1, max_size=9)


@settings(deadline=None, max_examples=100)
@given(TABLE)
def test_infinite_is_what_has_no_chain_of_wins_both_ways(rows):
    """Ford (1957): a fit without position bias is finite between policies that chains of wins join both ways."""
    wins, totals = np.zeros((2, 1, 4, 4))
    for (a, b), first, second in rows:
        wins[0, a, b] += first
        wins[0, b, a] += 1 - second
        totals[0, [a, b], [b, a]] += 1
    beats = wins[0] + (totals - wins)[0].T > 0
    reaches = np.linalg.matrix_power(beats + np.eye(4), 4) > 0
    design = (np.eye(4)[:, None, :] - np.eye(4)[None, :, :]).reshape(-1, 4)[:, 1:]
    (ability,) = _fit(design, wins.reshape(1, -1), totals.reshape(1, -1))
    for at, value in enumerate(ability, start=1):
        assert math.isfinite(value) == bool(reaches[0, at] and reaches[at, 0])
        if reaches[0, at] != reaches[at, 0]:
            assert value == (math.inf if reaches[at, 0] else -math.inf)


@settings(deadline=None, max_examples=40)
@given(TABLE, st.randoms(use_true_random=False))
def test_results_are_json_and_do_not_depend_on_the_order_of_the_games(rows, shuffler):
    names = ("reference", "dpo", "grpo", "ppo")
    games = []
    for prompt, ((a, b), first, second) in enumerate(rows):
        one = both_orders([(first, second)], names[a], names[b])
        games += [row | {"prompt_id": str(prompt)} for row in one]
    shuffled = games[:]
    shuffler.shuffle(shuffled)
    found = [bradley_terry(some, games[0]["a"], 0) for some in (games, shuffled)]
    assert json.dumps(found[0], allow_nan=False) == json.dumps(found[1], allow_nan=False)
