"""Step `compare`: who is said to have won, and by what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from report_fixtures import STAGES, recipe_of, write_run
from test_training import RL

from rlhf_trl.compare.evidence import Judged, Trajectory, read_judge
from rlhf_trl.compare.step import build, compare
from rlhf_trl.compare.verdict import compare_groups, name_winner
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl

# --- which method won ------------------------------------------------------------------------------------------------


def answers(gains: Sequence[float], kls: Sequence[float], seed: int, prompts: int = 200) -> Trajectory:
    """A run's answers at each point: KL and gold gain about these, on the same prompts."""
    draw = np.random.default_rng(seed)
    drawn = [(kl * draw.uniform(0.5, 1.5, prompts), gain + draw.normal(size=prompts) / 2)
             for gain, kl in zip(gains, kls, strict=True)]  # fmt: skip
    numbers = dict(zip(("kl", "gold_gain"), np.array(drawn).swapaxes(0, 1), strict=True))
    return Trajectory([*range(1, len(gains)), None], [*map(str, range(prompts))], numbers)


def five(kl: float, gain: float, start: int) -> dict[int, Trajectory]:
    """Five seeds of a method whose gain grows with sqrt(KL)."""
    return {
        seed: answers([gain + 0.02 * (seed % 5 - 2)] * 2, [kl / 1.4, kl], seed) for seed in range(start, start + 5)
    }


NOBODY = Judged({}, {}, None, "there is no judge, or it has not judged")
SURE: dict[str, list[str]] = {"gold": [], "reward": [], "win_rate": []}


def judge(methods: dict[str, dict[int, Trajectory]], smallest: float = 0.05) -> tuple[list[Any], Any]:
    groups = {name: [f"{name}-{seed}" for seed in runs] for name, runs in methods.items()}
    runs = {f"{name}-{seed}": run for name, of in methods.items() for seed, run in of.items()}
    pairs, _ = compare_groups(list(combinations(groups, 2)), groups, runs, NOBODY, {"gold": smallest})
    return pairs, name_winner(list(groups), pairs, SURE)


def outcomes(pair: Any) -> tuple[str, str]:
    found = pair["measures"]["gold"]
    return found["equal_kl"]["outcome"], found["as_trained"]["outcome"]


def test_the_better_method_is_named_and_by_how_much():
    pairs, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.2, 20)})
    assert verdict["winner"] == "ppo"
    assert verdict["sentence"].startswith(
        "ppo is better than dpo and grpo by the gold model at equal KL, and no worse"
    )
    assert verdict["warnings"] == []
    assert [outcomes(pair)[0] for pair in pairs] == ["worse", "same", "better"]
    assert "ppo is better than dpo: +0.4" in pairs[0]["sentence"]  # told from the better one's side
    assert "p < 0.001" in pairs[0]["sentence"]
    assert pairs[0]["measures"]["win_rate"]["why_not"] == "there is no judge, or it has not judged"


def one(*points: tuple[float, float], seed: int = 0) -> dict[int, Trajectory]:
    """A method of one seed; each point is its KL and gain."""
    kls, gains = zip(*points, strict=True)
    return {seed: answers(gains, kls, seed)}


EQUAL, APART = {"dpo": five(4, 0.3, 0), "ppo": five(4, 0.3, 10)}, {"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10)}
ON_ONE_CURVE = {  # gain grows with sqrt(KL)
    "near": {seed: answers([0.3, 0.35, 0.4], [0.5625, 0.77, 1], seed) for seed in range(5)},
    "far": {seed: answers([0.36, 0.44, 0.8], [0.81, 1.21, 4], seed) for seed in range(10, 15)},
}
COLLAPSED = {"a": one((1, 0.3), (2, 0.6), (5, 0.0), (10, -1.0)),
             "b": one((1, 0.1), (2, 0.15), (5, 0.2), (10, 0.3), seed=1)}  # fmt: skip
ONE_SEED = one((2.9, 0.5), (4.1, 0.5), seed=11)


@pytest.mark.parametrize(
    ("methods", "smallest", "found", "winner", "says"),
    [
        (EQUAL, 0.05, ("same", "same"), None, ["there is no significant difference between dpo and ppo"]),
        (EQUAL, 0.3, ("equivalent", "equivalent"), None, ["dpo and ppo are equivalent"]),
        # A difference of 1e-9 on every prompt, and one that is sure and too small.
        ({"a": one((4, 0.3)), "b": {1: answers([0.3 + 1e-9], [4], 0)}}, 0.05, ("equivalent", "equivalent"), None, []),
        (APART, 0.42, ("trivial", "trivial"), None, ["there is no difference that matters between dpo and ppo"]),
        ({"dpo": EQUAL["dpo"], "again": dict(reversed(EQUAL["dpo"].items()))}, 0.05, ("indistinguishable",) * 2, None,
         ["dpo and again have the same score on every prompt"]),
        # The run that went further has more as trained, and is the same at equal KL.
        (ON_ONE_CURVE, 0.05, ("same", "worse"), None, []),
        # a is better up to KL 4, b goes on to more.
        ({"a": one((2, 0.6), (3, 0.8), (4, 0.9)), "b": one((2, 0.1), (4, 0.3), (9, 1.5), seed=1)}, 0.05,
         ("better", "worse"), None,
         ["The two answers differ", "At equal KL, a scores higher than b. As trained, b scores higher than a."]),
        (COLLAPSED, 0.05, ("worse", "worse"), "b", ["a-0 fell after a peak at step 2 (KL 2.0"]),
        # b saturates further out; a line from the reference would lie below its curve.
        ({"a": one((1, 0.30)), "b": one((1.45, 0.33), seed=1)}, 0.05, ("unknown", "same"), None,
         ["evaluation.checkpoints", "At equal KL, nothing can be said about a and b"]),
        ({"dpo": five(0, 0.0, 0), "ppo": APART["ppo"]}, 0.05, ("unknown", "worse"), None, ["has not moved"]),
        # The order is not complete.
        ({**APART, "grpo": five(4, 0.61, 20)}, 0.05, ("worse", "worse"), None,
         ["ppo is better than dpo; grpo is better than dpo", "between ppo and grpo"]),
        # One seed is about these adapters.
        ({"dpo": one((4, 0.2)), "ppo": one((4.1, 0.6), seed=1)}, 0.05, ("worse", "worse"), "ppo",
         ["The adapter ppo scores higher than the adapter dpo by the gold model", "one seed: nothing is known"]),
        ({"dpo": APART["dpo"], "ppo": ONE_SEED}, 0.05, ("worse", "worse"), "ppo",
         ["the adapter ppo scores higher than the 5 adapters of dpo"]),
        ({"dpo": APART["dpo"], "grpo": five(4, 0.9, 20), "ppo": ONE_SEED}, 0.05, ("worse", "worse"), "grpo",
         ["The 5 adapters of grpo score higher than the 5 adapters of dpo and the adapter"]),
    ],
)  # fmt: skip
def test_who_wins_and_what_is_said(methods, smallest, found, winner, says):
    pairs, verdict = judge(methods, smallest)
    assert (outcomes(pairs[0]), verdict["winner"]) == (found, winner)
    said = " ".join([pairs[0]["sentence"], verdict["sentence"], *verdict["warnings"]])
    assert [words for words in says if words not in said] == [], said
    peaks = [(peak["stage"], peak["step"]) for peak in pairs[0]["measures"]["gold"]["collapsed"]]
    assert peaks == ([("a-0", 2)] if methods is COLLAPSED else [])


def test_every_run_is_read_at_as_many_points():
    many = answers([0.1] * 9 + [0.5], [0.4 * k for k in range(1, 11)], 0)
    pairs, _ = judge({"a": {0: many}, "b": one((4, 0.5), seed=1)})
    found = pairs[0]["measures"]["gold"]
    assert (found["points"], found["equal_kl"]["a"]) == (1, found["as_trained"]["a"])


def judged_runs(dpo: dict[str, float], ppo: dict[str, float], **about: Any) -> tuple[list[Any], Any]:
    one = Trajectory([None], [*map(str, range(200))], {"kl": np.full((1, 200), 4.0)})
    judged = Judged({"dpo-0": dpo, "ppo-0": ppo}, {}, "gpt", **about)
    groups = {"dpo": ["dpo-0"], "ppo": ["ppo-0"]}
    pairs, _ = compare_groups([("dpo", "ppo")], groups, {"dpo-0": one, "ppo-0": one}, judged, {"win_rate": 0.02})
    return pairs, name_winner(["dpo", "ppo"], pairs, {**SURE, "win_rate": [judged.doubt] if judged.doubt else []})


def test_without_scores_the_judge_decides_on_the_prompts_that_all_were_judged_on():
    draw = random.Random(0)
    dpo = {str(i): draw.choice([0.0, 0.5, 1.0]) for i in range(150)}
    ppo = {str(i): draw.choice([0.5, 1.0, 1.0]) for i in range(50, 200)}
    pairs, verdict = judged_runs(dpo, ppo, doubt="it may know nothing")
    assert (verdict["measure"], verdict["winner"]) == ("win_rate", "ppo")
    assert verdict["warnings"][0] == "it may know nothing"
    result = pairs[0]["measures"]["win_rate"]["as_trained"]
    both = [str(i) for i in range(50, 150)]
    true = np.mean([dpo[i] for i in both]) - np.mean([ppo[i] for i in both])
    assert result["difference"]["mean"] == pytest.approx(true)
    assert result["difference"]["n"] == 100


@pytest.mark.parametrize(
    ("prompts", "why_not", "says"),
    [(19, None, "only 19 prompts have a score"), (200, "it is the gold model", "it is")],
)
def test_a_pair_without_a_measure_says_why_and_has_no_winner(prompts, why_not, says):
    scores = ({str(i): score for i in range(prompts)} for score in (1.0, 0.0))
    pairs, verdict = judged_runs(*scores, why_not=why_not)
    start = "Nothing can be said about dpo and ppo: there is no reward model; "
    assert pairs[0]["sentence"].startswith(start + says)
    assert verdict is None


def test_equal_policies_are_not_called_better_than_the_reference():
    """The gains of six equal policies are corrected together."""
    false = 0
    for start in range(0, 600, 6):
        runs = {f"p{seed}": answers([0.0], [4], seed, 50) for seed in range(start, start + 6)}
        _, gains = compare_groups([], {}, runs, NOBODY, {"gold": 0.0})
        false += any(of["gold"]["outcome"] in ("better", "worse") for of in gains.values())
    assert false <= 11


# --- the step --------------------------------------------------------------------------------------------------------


DPO = STAGES["dpo"]


@pytest.mark.parametrize(
    ("stages", "groups"),
    [
        ({"dpo": {**DPO, "sweep": {"beta": [0.1, 0.3], "seed": [1, 2]}}, "again": DPO},
         {"dpo-beta=0.1": ["dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"],
          "dpo-beta=0.3": ["dpo-beta=0.3-seed=1", "dpo-beta=0.3-seed=2"], "again": ["again"]}),
        # The same seed twice is not two seeds; hand-written seeds are a group under the first name.
        ({"dpo": DPO, "again": DPO}, {"dpo": ["dpo"], "again": ["again"]}),
        ({f"dpo_{seed}": {**DPO, "args": {"seed": seed}} for seed in (7, 8)}, {"dpo_7": ["dpo_7", "dpo_8"]}),
    ],
)  # fmt: skip
def test_stages_that_differ_in_their_seed_alone_are_one_group(stages, groups):
    assert recipe_of({"sft": STAGES["sft"], **stages}).groups == {"sft": ["sft"], **groups}


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")


def test_the_numbers_are_the_paired_differences_of_the_answers(judged_run):
    recipe, run = judged_run
    compare(recipe, run)
    results = read_json(run.comparison)
    assert results == build(recipe, run)
    assert results["verdict"]["sentence"] in " ".join(run.comparison_report.read_text().split())
    assert run.comparison_figure.read_bytes().startswith(b"\x89PNG")
    assert set(results["stages"]) == read_json(run.prompt_scores).keys() == set(recipe.policies)
    pairs = {(pair["a"], pair["b"]): pair for pair in results["pairs"]}
    assert set(pairs) == {("dpo", "grpo"), ("dpo", "ppo"), ("grpo", "ppo")}
    low, high = (np.mean([row["gold_gain"] for row in read_jsonl(run.completions(name))]) for name in ("dpo", "grpo"))
    found = pairs["dpo", "grpo"]["measures"]["gold"]
    assert found["as_trained"]["difference"]["mean"] == pytest.approx(low - high)
    reference = np.std([row["gold"] for row in read_jsonl(run.completions("reference"))])
    assert found["smallest"] == pytest.approx(0.1 * reference)


def test_stages_that_are_asked_for_are_compared(judged_run):
    recipe, run = judged_run

    def asked(*names: str) -> Any:
        settings = recipe.comparison.model_copy(update={"stages": list(names)})
        return build(recipe.model_copy(update={"comparison": settings}), run)

    results = asked("rm", "gold")
    assert (set(results["stages"]), results["pairs"], results["verdict"]) == ({"rm", "gold"}, [], None)
    worse = "lower than the reference by the gold model: ppo"
    assert asked("sft", "dpo", "ppo")["verdict"]["warnings"][-2:] == [worse, "not among the compared: grpo"]


def test_a_judge_of_other_answers_is_not_used_and_a_missing_evaluation_is_named(tmp_path):
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")
    write_json(run.winrate, {**read_json(run.winrate), "evaluation": "another"})
    pair = build(recipe, run)["pairs"][0]
    assert pair["measures"]["win_rate"] == {"why_not": "there is no judge, or it has not judged"}
    run.winrate.write_text('{"status": "comp')
    with pytest.raises(UserError, match=r"winrate.json cannot be read"):
        build(recipe, run)
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="evaluate"):
        compare(recipe, run)


def test_without_a_gold_model_the_verdict_says_who_was_trained_for_its_score_and_what_the_model_is_worth(tmp_path):
    stages = {name: RL[name] for name in ("sft", "rm", "dpo", "ppo")}
    warnings = build(*write_run(tmp_path / "a-run", stages=stages, accuracy=(0.5, 0.5)))["verdict"]["warnings"]
    assert warnings[0].startswith("ppo was trained to raise this very reward")
    assert warnings[1] == "the reward model has not shown that it can tell better answers"


@pytest.mark.parametrize(("kind", "word"), [("chance", "has not shown"), ("offline", "a rule for tests")])
def test_a_judge_that_means_little_is_called_so(tmp_path, kind, word):
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge=kind)
    assert word in (read_judge(recipe, run).doubt or "")


def test_reward_models_alone_can_be_compared(tmp_path):
    recipe, run = write_run(tmp_path / "a-run", stages={"sft": STAGES["sft"], "rm": STAGES["rm"]})
    compare(recipe, run)
    assert set(read_json(run.comparison)["stages"]) == {"sft", "rm"}


def test_stages_to_compare_exist_and_a_swept_one_stands_for_all_that_it_expands_to():
    demo = ROOT / "recipes" / "demo.yaml"
    with pytest.raises(UserError, match=r"comparison.stages.1: there is no stage 'pp'"):
        load_recipe(demo, ["comparison.stages=[dpo, pp]"])
    recipe = load_recipe(demo, ["comparison.stages=[dpo, ppo]", "stages.dpo.sweep.seed=[1, 2]"])
    assert recipe.compared == ["dpo-seed=1", "dpo-seed=2", "ppo"]


def test_the_report_of_a_fixed_run_is_the_golden_one(tmp_path, snapshot):
    """Every number and word of the report on fixed JSON inputs."""
    stages = {**RL, "dpo": {**RL["dpo"], "sweep": {"seed": [1, 2]}}}
    recipe, run = write_run(
        tmp_path / "golden", stages=stages, evaluation={"gold": "gold", "checkpoints": 3}, judge="good"
    )
    history = read_json(run.training_stats("ppo"))
    history["history"][50]["loss"] += 3.0
    write_json(run.training_stats("ppo"), history)
    rows = read_jsonl(run.completions("grpo"))
    write_jsonl(run.completions("grpo"), [{**row, "gold_gain": row["gold_gain"] + 1.0} for row in rows])
    compare(recipe, run)
    assert run.comparison_report.read_text() == snapshot
