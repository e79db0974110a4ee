"""Step `compare`: what is named, what stands beside what, and who is said to have won."""

from __future__ import annotations

import copy
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixtures import GOLD, STAGES, training_stats, write_run
from syrupy.assertion import SnapshotAssertion

from rlhf_trl.compare.step import build, compare, compare_stages, summarise, weigh
from rlhf_trl.compare.text_report import render
from rlhf_trl.compare.training import find, generated_tokens, needed
from rlhf_trl.compare.verdict import Judged, compare_groups, conclude, read_judge, say
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe, expand_sweeps
from rlhf_trl.report.svg import draw_comparison
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl

ALIKE = {"temperature": 1.0}
RL = {
    **STAGES,
    **GOLD,
    "grpo": {**STAGES["grpo"], "args": {"beta": 0.05, "max_completion_length": 64, **ALIKE}},
    "ppo": {**STAGES["ppo"], "args": {"kl_coef": 0.05, "response_length": 64, "stop_token": "eos", **ALIKE}},
}


def recipe_of(stages: dict[str, Any], **rest: Any) -> Recipe:
    content = {"name": "a-run", "model": {"model_name_or_path": "openai-community/gpt2"}, "stages": stages, **rest}
    return expand_sweeps(Recipe.model_validate(content))


def stats_of(recipe: Recipe, steps: int = 60) -> dict[str, Any]:
    return {
        name: training_stats(name, stage.trainer, steps, random.Random(name)) for name, stage in recipe.stages.items()
    }


def measured(recipe: Recipe, stats: dict[str, Any], names: list[str] | None = None) -> dict[str, Any]:
    return compare_stages(recipe, stats, {"policies": {}, "checkpoints": {}}, {}, names or recipe.policies)


def words(results: dict[str, Any], stage: str) -> dict[str, str]:
    return {found["finding"]: found["quantity"] for found in results["stages"][stage]["findings"]}


# --- what stands out -------------------------------------------------------------------------------------------------

SEEDS = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"seed": [1, 2, 3, 4]}}}


def test_healthy_runs_are_named_for_nothing() -> None:
    recipe = recipe_of(SEEDS)
    results = measured(recipe, stats_of(recipe), [name for name in recipe.policies if name.startswith("dpo")])
    assert {stage: words(results, stage) for stage in results["stages"]} == {
        f"dpo-seed={seed}": {} for seed in (1, 2, 3, 4)
    }


def test_a_spike_a_divergence_and_slowness_are_each_named_for_what_they_are() -> None:
    recipe = recipe_of(SEEDS)
    stats = stats_of(recipe)
    stats["dpo-seed=1"]["history"][30]["loss"] += 5.0
    for row in stats["dpo-seed=2"]["history"]:
        if "loss" in row:
            row["loss"] = 0.69 + 0.02 * row["step"]
    for row in stats["dpo-seed=3"]["history"]:
        row["seconds"] *= 3
    stats["dpo-seed=3"]["summary"]["seconds"] *= 3
    results = measured(recipe, stats, [name for name in recipe.policies if name.startswith("dpo")])
    assert words(results, "dpo-seed=1") == {"spike": "loss"}
    assert results["stages"]["dpo-seed=1"]["findings"][0]["steps"] == [30]
    assert words(results, "dpo-seed=2") == {"diverging": "loss"}
    assert words(results, "dpo-seed=3") == {"slow": "samples_per_second"}
    assert words(results, "dpo-seed=4") == {}


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (lambda row: row.update(reward=1.0 - 0.05 * row["step"]), "reward"),
        (lambda row: row.update(grad_norm=1.4 if row["step"] < 50 else 90.0), "grad_norm"),
        (lambda row: row.update(kl=0.8 * row["step"]), "kl"),
    ],
)
def test_a_policy_that_runs_away_is_diverging(change: Any, quantity: str) -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    for row in stats["ppo"]["history"]:
        change(row)
    found = [of for of in measured(recipe, stats)["stages"]["ppo"]["findings"] if of["finding"] == "diverging"]
    assert [of["quantity"] for of in found] == [quantity]


def test_a_surrogate_loss_that_rises_is_no_divergence() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    for row in stats["grpo"]["history"]:
        row["loss"] = -0.05 + 0.002 * row["step"]
    assert "diverging" not in words(measured(recipe, stats), "grpo")


def test_a_run_that_was_stopped_says_why() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    stats["ppo"]["summary"]["stopped"] = "max_kl of 6 nats was passed"
    [found] = [of for of in measured(recipe, stats)["stages"]["ppo"]["findings"] if of["finding"] == "stopped"]
    assert "max_kl of 6 nats" in found["says"]


def test_the_same_training_twice_is_called_identical() -> None:
    recipe = recipe_of({**STAGES, "again": STAGES["ppo"]})
    stats = stats_of(recipe)
    stats["again"]["history"] = copy.deepcopy(stats["ppo"]["history"])
    stats["again"]["history"][3]["seconds"] += 0.7  # the same training takes its own time
    results = measured(recipe, stats)
    assert words(results, "again")["identical"] == words(results, "ppo")["identical"] == "history"
    assert "identical" not in words(results, "grpo")


# --- what means the same ---------------------------------------------------------------------------------------------


def test_losses_and_kls_of_different_trainers_never_share_a_table() -> None:
    recipe = recipe_of(RL)
    comparable = measured(recipe, stats_of(recipe))["comparable"]
    assert [of["stages"] for of in comparable["loss"]] == [["dpo"], ["grpo"], ["ppo"]]
    assert [of["stages"] for of in comparable["kl"]] == [["grpo"], ["ppo"]]
    assert [of["stages"] for of in comparable["reward"]] == [["grpo", "ppo"]]
    assert [of["stages"] for of in comparable["seconds"]] == [["dpo", "grpo", "ppo"]]


def test_rewards_of_answers_that_are_sampled_differently_do_not_mean_the_same() -> None:
    recipe = recipe_of(STAGES)  # the libraries' own defaults: temperature 1.0 and 0.7, 256 and 53 tokens
    comparable = measured(recipe, stats_of(recipe))["comparable"]
    assert [of["stages"] for of in comparable["reward"]] == [["grpo"], ["ppo"]]
    assert "temperature 0.7, up to 53 tokens, not ended by their end token" in comparable["reward"][1]["meaning"]


def test_a_loss_scaled_by_beta_is_another_loss_and_a_learning_rate_is_not() -> None:
    stages = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.1, 0.3], "learning_rate": [1e-6, 5e-6]}}}
    recipe = recipe_of(stages)
    names = [name for name in recipe.policies if name.startswith("dpo")]
    classes = measured(recipe, stats_of(recipe), names)["comparable"]["loss"]
    assert [[name.partition("-")[2][:8] for name in of["stages"]] for of in classes] == [
        ["beta=0.1"] * 2,
        ["beta=0.3"] * 2,
    ]


def test_times_on_other_devices_or_threads_are_not_compared() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    stats["ppo"]["summary"]["cpu_threads"] = 1
    stats["ppo"]["summary"]["seconds"] *= 100
    results = measured(recipe, stats)
    assert [of["stages"] for of in results["comparable"]["seconds"]] == [["dpo", "grpo"], ["ppo"]]
    assert "slow" not in words(results, "ppo")
    results["groups"] = {name: summarise(results["stages"], [name], 0) for name in ("dpo", "grpo", "ppo")}
    assert weigh(results, "dpo", "ppo")["ratio"] is None
    assert [of["stages"] for of in results["comparable"]["pace"]] == [["dpo"], ["grpo"], ["ppo"]]
    assert "different devices" in weigh(results, "dpo", "ppo")["why_not"]


# --- convergence and compute -----------------------------------------------------------------------------------------


def test_a_threshold_that_was_not_reached_is_censored() -> None:
    recipe = recipe_of(RL, comparison={"threshold": 0.45, "hold": 4})
    stats = stats_of(recipe, 20)
    for name, top in (("grpo", 0.44), ("ppo", 1.0)):
        for row in stats[name]["history"]:
            row["reward"] = top * row["step"] / 20
    stages = measured(recipe, stats)["stages"]
    missed, reached = stages["grpo"]["convergence"], stages["ppo"]["convergence"]
    assert not missed["reached"]
    assert missed["steps"] is missed["seconds"] is missed["tokens"] is None
    # From step 17 on there were four values; from step 18 on nobody knows.
    assert missed["censored_at"] == {"steps": 17, "seconds": pytest.approx(17 * 1.9), "tokens": 17 * 64 * 60}
    assert (reached["reached"], reached["steps"]) == (True, 9)  # 9/20 = .45
    assert reached["tokens"] == 9 * 64 * 60
    assert reached["seconds"] == pytest.approx(9 * 1.9)
    text = render("a-run", {**measured(recipe, stats), "groups": {}, "pairs": [], "verdict": None, "definitions": {}})
    assert "> 17" in text


def test_a_method_that_samples_nothing_has_no_reward_to_reach() -> None:
    recipe = recipe_of(RL)
    found = measured(recipe, stats_of(recipe))["stages"]["dpo"]
    assert found["convergence"]["meaning"] is None
    assert "no checkpoint was evaluated" in found["convergence"]["why_not"]
    assert found["efficiency"]["generated_tokens"] is None


def test_evaluated_checkpoints_let_every_method_be_compared() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    curve = [{"step": step, "reward": {"mean": step / 60}} for step in (15, 30, 45, 60)]
    reference = {"reference": {"reward": {"mean": -0.25}}}
    metrics = {"policies": reference, "checkpoints": dict.fromkeys(recipe.policies, curve)}
    results = compare_stages(recipe, stats, metrics, {}, recipe.policies)
    assert [of["stages"] for of in results["comparable"]["convergence"]] == [["dpo", "grpo", "ppo"]]
    found = results["stages"]["dpo"]["convergence"]
    assert (found["start"], found["final"], found["tokens"]) == (-0.25, pytest.approx(1.0), None)
    assert found["rate"] == pytest.approx(1.25 / (60 * 1.9))


def test_checkpoints_that_no_reward_model_scored_are_no_rewards() -> None:
    recipe = recipe_of(RL)
    metrics = {"policies": {}, "checkpoints": {"dpo": [{"step": 30, "kl": {"mean": 1.0}}]}}
    results = compare_stages(recipe, stats_of(recipe), metrics, {}, ["dpo"])
    assert results["stages"]["dpo"]["convergence"]["meaning"] is None


def test_a_run_that_logged_nothing_stands_beside_others() -> None:
    recipe = recipe_of({**RL, "again": {**RL["grpo"]}})
    stats = stats_of(recipe)
    stats["again"]["history"] = []
    results = measured(recipe, stats, ["grpo", "again"])
    assert [of["stages"] for of in results["comparable"]["convergence"]] == [["grpo"]]
    assert results["stages"]["again"]["efficiency"]["tokens_per_second"] is None


def test_a_run_is_held_against_its_own_start() -> None:
    """A run that begins high and stays there has not risen, whatever the others began with."""
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    for row in stats["ppo"]["history"]:
        row["reward"] = 2.0
    found = measured(recipe, stats)["stages"]["ppo"]["convergence"]
    assert (found["start"], found["rate"], found["area"]) == (2.0, 0.0, 0.0)


def test_areas_are_over_the_time_that_all_of_them_trained() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe)
    for row in stats["ppo"]["history"]:
        row["seconds"] *= 2
    stages = measured(recipe, stats)["stages"]
    assert stages["ppo"]["convergence"]["area_seconds"] == stages["grpo"]["convergence"]["area_seconds"] == 60 * 1.9


def test_tokens_after_the_last_log_and_around_a_validation_are_counted() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe, 26)["grpo"]
    stats["history"] = [row for row in stats["history"] if row["step"] % 10 == 0]
    stats["history"].insert(1, {"step": 15, "seconds": 28.5, "log": {}, "validation_loss": 0.5})
    assert generated_tokens(recipe, "grpo", stats)["total"] == 26 * 64 * 60


def test_grpo_counts_a_batch_once_however_often_it_learns_from_it() -> None:
    stages = {**RL, "grpo": {**RL["grpo"], "args": {**RL["grpo"]["args"], "num_iterations": 2}}}
    once, twice = recipe_of(RL), recipe_of(stages)
    stats = stats_of(once)["grpo"]
    assert generated_tokens(once, "grpo", stats)["total"] == 60 * 64 * 60
    assert generated_tokens(twice, "grpo", stats)["total"] == 60 * 64 * 60 / 2


def test_compute_holds_every_stage_that_is_needed_once() -> None:
    recipe = recipe_of(RL)
    assert needed(recipe, "ppo") == ["sft", "rm", "ppo"]
    assert needed(recipe, "dpo") == ["sft", "dpo"]
    stats = stats_of(recipe)
    for name, seconds in {"sft": 100.0, "rm": 40.0, "dpo": 30.0, "ppo": 7.0}.items():
        stats[name]["summary"]["seconds"] = seconds
    stats["rm"]["summary"]["processes"] = 2
    stages = measured(recipe, stats)["stages"]
    assert stages["ppo"]["efficiency"]["device_seconds_with_inputs"] == 100 + 2 * 40 + 7
    assert stages["dpo"]["efficiency"]["device_seconds_with_inputs"] == 130
    assert stages["ppo"]["efficiency"]["inputs"] == ["sft", "rm"]


# --- which method won ------------------------------------------------------------------------------------------------


def answers(kl: float, gain: float, seed: int, prompts: int = 200) -> list[list[dict[str, Any]]]:
    """A run's final answers: KL about `kl`, gain about `gain` by the gold model, on the same prompts."""
    draw = np.random.default_rng(seed)
    return [[{"id": str(i), "kl": kl * of, "gold_gain": gain + noise} for i, (of, noise) in
             enumerate(zip(draw.uniform(0.5, 1.5, prompts), draw.normal(0, 0.5, prompts), strict=True))]]  # fmt: skip


def five(kl: float, gain: float, start: int) -> dict[int, Any]:
    return {seed: answers(kl, gain + 0.02 * (seed % 5 - 2), seed) for seed in range(start, start + 5)}


NOBODY = Judged({}, {}, None, "there is no judge, or it has not judged")
SURE: dict[str, str | None] = {"gold": None, "reward": None, "win_rate": None}


def judge(methods: dict[str, dict[int, Any]]) -> tuple[list[Any], Any]:
    groups = {name: [f"{name}-{seed}" for seed in runs] for name, runs in methods.items()}
    records = {f"{name}-{seed}": rows for name, runs in methods.items() for seed, rows in runs.items()}
    pairs = compare_groups(list(combinations(groups, 2)), groups, records, NOBODY, 0)
    return pairs, conclude(list(groups), pairs, SURE)


def test_the_better_method_is_named_and_by_how_much() -> None:
    pairs, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.2, 20)})
    assert verdict["winner"] == "ppo"
    assert verdict["sentence"] == "ppo is better than dpo and grpo by the gold model at the same KL."
    assert len(verdict["warnings"]) == 1
    assert verdict["warnings"][0].startswith("5 seeds say little")
    outcomes = {(pair["a"], pair["b"]): pair["measures"]["gold"]["equal_kl"]["outcome"] for pair in pairs}
    assert outcomes == {("dpo", "ppo"): "worse", ("dpo", "grpo"): "same", ("ppo", "grpo"): "better"}
    assert pairs[0]["sentence"].startswith("ppo is better than dpo by the gold model at the same KL of ")
    assert "nats: +0.4" in pairs[0]["sentence"]  # told from the better one's side
    assert "There is no significant difference between dpo and grpo" in pairs[1]["sentence"]
    assert pairs[0]["measures"]["win_rate"]["why_not"] == "there is no judge, or it has not judged"


def test_without_a_difference_nobody_wins() -> None:
    _, verdict = judge({"dpo": five(4, 0.3, 0), "ppo": five(4, 0.3, 10)})
    assert verdict["winner"] is None
    assert (
        verdict["sentence"]
        == "There is no significant difference between dpo and ppo by the gold model at the same KL."
    )


def test_identical_runs_are_indistinguishable() -> None:
    runs = five(4, 0.3, 0)
    pairs, verdict = judge({"dpo": runs, "again": runs})
    assert pairs[0]["measures"]["gold"]["equal_kl"]["outcome"] == "indistinguishable"
    assert (
        pairs[0]["sentence"]
        == "dpo and again are indistinguishable by the gold model: every prompt has the same score."
    )
    assert verdict["sentence"] == "dpo and again are indistinguishable by the gold model at the same KL."


def test_more_kl_on_the_same_curve_is_no_better_method() -> None:
    """Gain grows with sqrt(KL): the run that went further has more as trained, and is the same at equal KL."""
    pairs, verdict = judge({"near": five(1, 0.4, 0), "far": five(4, 0.8, 10)})
    result = pairs[0]["measures"]["gold"]
    assert result["as_trained"]["p"] < 0.05
    assert result["equal_kl"]["outcome"] == "same"
    assert verdict["winner"] is None


def test_a_line_alone_makes_no_winner() -> None:
    """On a curve that saturates, a line from a far point lies below it: the nearer run is not better for that."""
    pairs, verdict = judge({"near": five(1, 1.0, 0), "far": five(4, 1.2, 10)})
    result = pairs[0]["measures"]["gold"]
    assert result["equal_kl"]["difference"]["low"] > 0
    assert result["equal_kl"]["lines"] == ["far"]
    assert (result["equal_kl"]["p"], result["equal_kl"]["outcome"]) == (1.0, "same")
    assert "far read off a line, far from what was measured" in pairs[0]["sentence"]
    assert verdict["winner"] is None


def test_measured_checkpoints_near_the_kl_decide() -> None:
    runs = {seed: [*answers(1, 0.4, seed), *answers(4, 1.2, seed + 50)] for seed in range(20, 25)}
    pairs, verdict = judge({"near": five(1, 1.0, 0), "far": runs})
    assert pairs[0]["measures"]["gold"]["equal_kl"]["lines"] == []
    assert verdict["winner"] == "near"


def test_large_differences_survive_the_correction_for_dozens_of_pairs() -> None:
    methods = {f"dpo-{index}": five(4, 10.0 * index, 10 * index) for index in range(12)}
    pairs, verdict = judge(methods)
    assert len(pairs) == 66
    assert verdict["winner"] == "dpo-11"
    assert verdict["sentence"] == "dpo-11 is better than 11 others by the gold model at the same KL."


def test_an_order_that_is_not_complete_has_no_winner_and_says_what_is_known() -> None:
    _, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.61, 20)})
    assert verdict["winner"] is None
    assert verdict["sentence"] == (
        "No method is better than all others by the gold model at the same KL: ppo is better than dpo; "
        "grpo is better than dpo; there is no significant difference between ppo and grpo."
    )


def test_one_seed_is_about_these_runs_alone() -> None:
    _, verdict = judge({"dpo": {0: answers(4, 0.2, 0)}, "ppo": {1: answers(4, 0.6, 1)}})
    assert verdict["winner"] == "ppo"
    assert (
        verdict["sentence"] == "ppo is better than dpo by the gold model at the same KL, as far as one seed can tell."
    )
    assert len(verdict["warnings"]) == 1
    assert verdict["warnings"][0].startswith("one seed")


def test_a_policy_that_never_moved_is_not_compared() -> None:
    pairs, _ = judge({"dpo": five(0, 0.0, 0), "ppo": five(4, 0.6, 10)})
    result = pairs[0]["measures"]["gold"]["equal_kl"]
    assert (result["difference"], result["outcome"]) == (None, "unknown")
    assert "not moved" in pairs[0]["sentence"]


def judged_runs(dpo: dict[str, float], ppo: dict[str, float], **about: Any) -> tuple[list[Any], Any]:
    runs = {name: [[{"id": str(i), "kl": 4.0} for i in range(200)]] for name in ("dpo-0", "ppo-0")}
    judged = Judged({"dpo-0": dpo, "ppo-0": ppo}, {}, "gpt", **about)
    pairs = compare_groups([("dpo", "ppo")], {"dpo": ["dpo-0"], "ppo": ["ppo-0"]}, runs, judged, 0)
    return pairs, conclude(["dpo", "ppo"], pairs, {**SURE, "win_rate": judged.doubt})


def test_without_scores_the_judge_decides_on_the_prompts_that_all_were_judged_on() -> None:
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
    assert result["improvement"] == 0.0
    assert pairs[0]["sentence"].endswith("on 100 prompts.")


def test_a_handful_of_verdicts_makes_no_winner() -> None:
    pairs, verdict = judged_runs({str(i): 1.0 for i in range(3)}, {str(i): 0.0 for i in range(3)})
    assert pairs[0]["measures"]["win_rate"]["why_not"].startswith("only 3 prompts")
    assert verdict is None


def test_a_judge_that_is_the_gold_model_is_no_second_opinion() -> None:
    dpo = {str(i): 1.0 for i in range(200)}
    pairs, _ = judged_runs(dpo, dpo, why_not="the judge is the gold model, whose scores stand beside this")
    assert pairs[0]["measures"]["win_rate"]["why_not"].startswith("the judge is the gold model")


def test_a_pair_without_any_score_says_so() -> None:
    runs = {name: [[{"id": str(i), "kl": 4.0} for i in range(40)]] for name in ("dpo-0", "ppo-0")}
    pairs = compare_groups([("dpo", "ppo")], {"dpo": ["dpo-0"], "ppo": ["ppo-0"]}, runs, NOBODY, 0)
    assert say(pairs[0], 1).startswith(
        "Nothing can be said about dpo and ppo: there is no reward model; there is no judge"
    )
    assert conclude(["dpo", "ppo"], pairs, SURE) is None


def test_policies_that_could_not_be_compared_are_named_beside_the_others() -> None:
    _, verdict = judge({"dpo": five(0, 0.0, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.6, 20)})
    assert (
        verdict["sentence"]
        == "There is no significant difference between ppo and grpo by the gold model at the same KL."
    )
    assert verdict["warnings"][-1] == "not compared: dpo and ppo; dpo and grpo"
    _, nothing = judge({"dpo": five(0, 0.0, 0), "ppo": five(4, 0.6, 10)})
    assert nothing["sentence"] == "No two methods could be compared at the same KL."


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_stages_that_differ_in_their_seed_alone_are_one_group() -> None:
    stages = {
        **STAGES,
        "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.1, 0.3], "seed": [1, 2]}},
        "again": STAGES["ppo"],
    }
    assert recipe_of(stages).groups == {
        "sft": ["sft"],
        "rm": ["rm"],
        "dpo-beta=0.1": ["dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"],
        "dpo-beta=0.3": ["dpo-beta=0.3-seed=1", "dpo-beta=0.3-seed=2"],
        "grpo": ["grpo"],
        "ppo": ["ppo"],
        "again": ["again"],  # the same seed twice is not two seeds
    }


def test_hand_written_seeds_are_a_group_under_the_first_name() -> None:
    dpo = STAGES["dpo"]
    stages = {
        "sft": STAGES["sft"],
        **{f"dpo_{seed}": {**dpo, "args": {**dpo["args"], "seed": seed}} for seed in (7, 8)},
    }
    assert recipe_of(stages).groups == {"sft": ["sft"], "dpo_7": ["dpo_7", "dpo_8"]}


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Any:
    return write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")


def test_the_step_writes_results_report_and_figure(finished: Any) -> None:
    recipe, run = finished
    compare(recipe, run)
    results = read_json(run.comparison)
    assert list(results["stages"]) == sorted(recipe.policies)
    assert {(pair["a"], pair["b"]) for pair in results["pairs"]} == {("dpo", "grpo"), ("dpo", "ppo"), ("grpo", "ppo")}
    text = run.comparison_report.read_text()
    assert results["verdict"]["sentence"] in " ".join(text.split())
    for title in ("Training stability", "Convergence", "Computational efficiency", "Sample quality"):
        assert title in text
    assert "nan" not in text.lower()
    assert run.comparison_figure.read_bytes().startswith(b"\x89PNG")
    assert read_json(run.prompt_scores).keys() == set(recipe.policies)


def test_the_same_files_give_the_same_results(finished: Any) -> None:
    recipe, run = finished
    assert build(recipe, run) == build(recipe, run)


def test_the_order_of_answers_in_the_gold_scores_is_the_evaluations(finished: Any) -> None:
    """The verdict is the paired difference of the answers' own gold scores, at the KL that both reached."""
    recipe, run = finished
    pair = next(pair for pair in build(recipe, run)["pairs"] if (pair["a"], pair["b"]) == ("dpo", "grpo"))
    rows = {name: read_jsonl(run.completions(name)) for name in ("dpo", "grpo")}
    means = {name: [np.mean([row[key] for row in of]) for key in ("kl", "gold_gain")] for name, of in rows.items()}
    (near, low), (far, high) = means["dpo"], means["grpo"]
    assert near < far
    expected = low - high * math.sqrt(near / far)
    assert pair["measures"]["gold"]["equal_kl"]["difference"]["mean"] == pytest.approx(expected)
    assert pair["measures"]["gold"]["equal_kl"]["kl"] == pytest.approx(near)


def test_a_judge_of_other_answers_is_not_used(finished: Any) -> None:
    recipe, run = finished
    write_json(run.winrate, {**read_json(run.winrate), "evaluation": "another"})
    pair = build(recipe, run)["pairs"][0]
    assert pair["measures"]["win_rate"] == {"why_not": "there is no judge, or it has not judged"}


def test_stages_that_are_asked_for_are_compared(finished: Any) -> None:
    recipe, run = finished
    comparison = recipe.comparison
    asked = recipe.model_copy(update={"comparison": comparison.model_copy(update={"stages": ["rm", "gold"]})})
    results = build(asked, run)
    assert set(results["stages"]) == {"rm", "gold"}
    assert (results["pairs"], results["verdict"]) == ([], None)
    mixed = recipe.model_copy(update={"comparison": comparison.model_copy(update={"stages": ["sft", "dpo", "ppo"]})})
    compare(mixed, run)
    assert read_json(run.comparison)["verdict"]["warnings"][-1] == "not among the compared: grpo"
    assert draw_comparison(read_json(run.comparison))


def test_without_a_gold_model_the_verdict_says_who_was_trained_for_its_score(tmp_path: Path) -> None:
    stages = {name: RL[name] for name in ("sft", "rm", "dpo", "ppo", "grpo")}
    recipe, run = write_run(tmp_path / "a-run", stages=stages)
    warnings = build(recipe, run)["verdict"]["warnings"]
    assert warnings[0].startswith("ppo and grpo were trained to raise this very reward")


@pytest.mark.parametrize(("kind", "word"), [("chance", "has not shown"), ("offline", "a rule for tests")])
def test_a_judge_that_means_little_is_called_so(tmp_path: Path, kind: str, word: str) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge=kind)
    judged = read_judge(recipe, run)
    assert judged.doubt is not None
    assert word in judged.doubt


def test_a_diverged_dpo_is_seen_by_its_evaluated_kl(finished: Any) -> None:
    recipe, run = finished
    metrics = read_json(run.metrics)
    metrics["policies"]["dpo"]["kl"]["mean"] = 300.0
    write_json(run.metrics, metrics)
    found = build(recipe, run)["stages"]["dpo"]["findings"]
    assert ("diverging", "kl") in [(of["finding"], of["quantity"]) for of in found]


def test_reward_models_alone_can_be_compared(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages={"sft": STAGES["sft"], "rm": STAGES["rm"]})
    compare(recipe, run)
    assert set(read_json(run.comparison)["stages"]) == {"sft", "rm"}


def test_an_evaluation_that_is_missing_is_named(finished: Any) -> None:
    recipe, run = finished
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="evaluate"):
        compare(recipe, run)


def test_a_stage_to_compare_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comparison.stages.1: there is no stage 'pp'"):
        load_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml", ["comparison.stages=[dpo, pp]"])


def test_a_swept_stage_stands_for_all_that_it_expands_to() -> None:
    recipe = load_recipe(
        Path(__file__).parents[2] / "recipes" / "demo.yaml",
        ["comparison.stages=[dpo, ppo]", "stages.dpo.sweep.seed=[1, 2]"],
    )
    assert recipe.compared == ["dpo-seed=1", "dpo-seed=2", "ppo"]


def test_findings_need_no_second_run() -> None:
    recipe = recipe_of({"sft": STAGES["sft"]})
    stats = stats_of(recipe)
    results = measured(recipe, stats, ["sft"])
    assert find(results["stages"], stats, 20.0) == {"sft": []}


def test_the_report_of_a_fixed_run_is_the_golden_one(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    """Every number and word of the report on fixed JSON inputs."""
    stages = {**RL, "dpo": {**RL["dpo"], "sweep": {"seed": [1, 2]}}}
    recipe, run = write_run(tmp_path / "golden", stages=stages, evaluation={"gold": "gold"}, judge="good")
    history = read_json(run.training_stats("ppo"))
    history["history"][50]["loss"] += 3.0
    write_json(run.training_stats("ppo"), history)
    rows = read_jsonl(run.completions("grpo"))
    write_jsonl(run.completions("grpo"), [{**row, "gold_gain": row["gold_gain"] + 1.0} for row in rows])
    compare(recipe, run)
    assert run.comparison_report.read_text() == snapshot
