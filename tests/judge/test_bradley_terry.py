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
from scipy.optimize import linprog
from scipy.special import expit, logit
from test_winrates import both_orders, game

from rlhf_trl.judge.bradley_terry import ELO, abilities, bradley_terry, fit_abilities

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
    (plain,) = fit_abilities(wins, totals, np.ones((1, 7, 7), dtype=bool), order=False)
    assert plain == pytest.approx([0, 0.684, 1.108, 1.248, 1.295, 1.436, 1.581], abs=6e-4)
    (ability,), (home,) = abilities(wins, totals)
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
    assert found["order_effect"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["first_wins"]["mean"] == pytest.approx(0.5)


def test_a_tie_is_half_a_win_and_the_order_effect_is_told_apart():
    """In closed form: the log-odds of the two orders are ability + eta and ability - eta."""
    scores = [(1.0, 0.5)] * 60 + [(1.0, 0.0)] * 20 + [(0.0, 0.5)] * 20
    found = bradley_terry(both_orders(scores), "reference", 0)
    first, second = logit(0.8), logit(0.4)
    assert found["ratings"]["dpo"]["mean"] == pytest.approx(ELO * (first + second) / 2)
    assert found["order_effect"]["mean"] == pytest.approx((first - second) / 2)
    assert found["first_wins"]["mean"] == pytest.approx(expit((first - second) / 2))
    assert found["order_effect"]["low"] > 0


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
    assert one["order_effect"] == pytest.approx(other["order_effect"], abs=1e-6)
    assert one["n"] == 52
    assert one["ratings"]["dpo"]["n"] == 51


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
    assert found["order_effect"]["mean"] is None
    assert "first answer won too often" in found["order_effect"]["why_not"]
    for rating in found["ratings"].values():
        assert (rating["mean"], rating["low"], rating["high"]) == pytest.approx((0, 0, 0), abs=1e-9)
    second = bradley_terry(both_orders([(0.0, 1.0)] * 20), "reference", 0)
    assert "second answer won too often" in second["order_effect"]["why_not"]


def test_policies_that_no_verdict_joins_with_the_reference():
    games = [*both_orders([(1.0, 0.5), (0.0, 0.5)] * 5), *both_orders([(1.0, 0.5), (0.0, 0.5)] * 5, "ppo", "grpo")]
    ratings = bradley_terry([*games, game(99, True, None, a="sft", status="timeout")], "reference", 0)["ratings"]
    assert [name for name, row in ratings.items() if row["mean"] is None] == ["grpo", "ppo", "sft"]
    assert ratings["ppo"]["why_not"] == "no chain of verdicts leads from it to reference"
    assert ratings["sft"]["n"] == 0
    nothing = bradley_terry([game(0, True, None, status="quota")], "reference", 0)
    assert (nothing["n"], nothing["ratings"]["dpo"]["mean"], nothing["order_effect"]["mean"]) == (0, None, None)
    assert nothing["missing"] == {"comparisons": 1, "verdicts": {"not judged": 1, "quota": 1}}
    with pytest.raises(ValueError, match="no game is about sft"):
        bradley_terry(games, "sft", 0)


RESULT = st.sampled_from([0.0, 0.5, 1.0])
TABLE = st.lists(st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 2), (1, 3)]), RESULT, RESULT), min_size=1, max_size=9)


@settings(deadline=None, max_examples=150)
@given(TABLE)
def test_infinite_is_what_a_linear_programme_says_is_infinite(rows):
    """Albert and Anderson (1984): no finite maximum exists if some direction makes no verdict seen less likely.

    The programme says for eta and each ability whether such a direction lowers it, raises it, or both. Where eta has
    no end itself, abilities that need not follow it keep the finite value of a fit without it.
    """
    wins, totals = np.zeros((2, 1, 4, 4))
    for (a, b), first, second in rows:
        wins[0, a, b] += first
        wins[0, b, a] += 1 - second
        totals[0, [a, b], [b, a]] += 1
    seen = []
    for i, j in zip(*totals[0].nonzero(), strict=True):
        first_wins = np.append(np.eye(4)[i] - np.eye(4)[j], 1.0)
        seen += [first_wins] if wins[0, i, j] > 0 else []
        seen += [-first_wins] if wins[0, i, j] < totals[0, i, j] else []
    box = [(0, 0), (-1, 1), (-1, 1), (-1, 1), (-1, 1)]

    def moves(target):
        """Whether a direction lowers and raises a parameter."""
        ends = (
            linprog(sign * np.eye(5)[target], -np.array(seen), np.zeros(len(seen)), bounds=box) for sign in (1, -1)
        )
        return tuple(end.fun < -1e-9 for end in ends)

    says = {(True, False): -math.inf, (False, True): math.inf, (True, True): math.nan}
    (ability,), (eta,) = abilities(wins, totals)
    for value, found in [(eta, moves(4)), *zip(ability[1:], map(moves, (1, 2, 3)), strict=True)]:
        if found == (False, False):
            assert math.isfinite(value)
        elif math.isfinite(eta) or value is eta:
            assert value == pytest.approx(says[found], nan_ok=True)
        elif not math.isfinite(value):
            assert value == pytest.approx(says[found], nan_ok=True) or found == (True, True)


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
