"""The health of a run: each rule finds its fault once, warns or stops, and is said in the statistics."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import small_recipe

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.health import WATCHED, rules_of
from rlhf_trl.recipe.schema import Rule, Stage
from rlhf_trl.run.files import read_json
from rlhf_trl.train.callbacks import LOG_KEYS, Health, History, Watch

KEYS = {name: keys.split()[-1] for name, keys in LOG_KEYS.items()}


def watch(tmp_path, trainer, **health):
    """What a stage with these rules logs is judged by the returned function, (values of one log) -> findings."""
    history = History(tmp_path / "stats.json", "stage", trainer)
    found = Watch("stage", Stage(trainer=trainer, health=health), history)
    state = SimpleNamespace(global_step=0, max_steps=9, epoch=0.0, is_world_process_zero=True)
    control = SimpleNamespace(should_save=False)

    def log(**values):
        state.global_step += 1
        logs = {KEYS[name]: value for name, value in values.items()}
        for callback in (history, found):
            callback.on_log(None, state, control, logs=logs)
        return [entry["what"] for entry in history.stats["health"]]

    def end():
        for callback in (history, found):
            callback.on_train_end(None, state, control)
        return [entry["what"] for entry in history.stats["health"]]

    return log, end


@pytest.mark.parametrize(
    ("trainer", "what", "sick", "well"),
    [
        ("ppo", "reward_std", 0.0, 0.1),
        ("grpo", "equal_groups", 1.0, 0.9),
        ("ppo", "kl", 14.0, 9.0),
        ("grpo", "kl", 1.2, 0.2),
        ("dpo", "reward_margin", 80.0, 3.0),
        ("grpo", "answer_tokens", 1.0, 2.0),
        ("ppo", "entropy", 0.001, 1.0),
    ],
)
def test_three_logs_beyond_a_limit_are_said_once(tmp_path, caplog, trainer, what, sick, well):
    log, end = watch(tmp_path, trainer)
    for value in (sick, sick, well, sick, sick, math.nan):
        assert log(**{what: value}) == []
    log(**{what: sick})
    log(**{what: sick})
    assert log(**{what: sick}) == [what] == log(**{what: sick}) == end()
    (entry,) = read_json(tmp_path / "stats.json")["health"]
    assert (entry["step"], entry["value"], entry["then"]) == (9, sick, "warn")
    assert caplog.text.count(entry["says"]) == 1
    assert "stage: health: " in caplog.text


def test_a_short_run_is_judged_by_all_its_logs(tmp_path):
    log, end = watch(tmp_path, "grpo")
    assert log(equal_groups=1.0, kl=0.1) == []
    assert end() == ["equal_groups"]


def test_a_rule_of_the_recipe_changes_the_limit_stops_or_is_silent(tmp_path):
    log, _ = watch(tmp_path, "ppo", kl=Rule(above=2.0, logs=1, then="stop"), reward_std=Rule(then="off"))
    for _ in range(4):
        assert log(kl=1.9, reward_std=0.0) == []
    with pytest.raises(UserError, match=r"stages.stage.health.kl: the KL .* is 2.5 nats per answer \(step 5"):
        log(kl=2.5)
    assert read_json(tmp_path / "stats.json")["health"][0]["then"] == "stop"
    log, _ = watch(tmp_path, "sft", loss=Rule(above=5.0, logs=2))
    assert [log(loss=6.0), log(loss=6.0)] == [[], ["loss"]]


def test_a_recipe_gives_rules_for_what_its_trainer_logs(tmp_path):
    recipe = small_recipe(tmp_path, ("stages.grpo.health={kl: {above: 0.5, then: stop}}",))
    _, rule = rules_of(recipe.stages["grpo"])["kl"]
    assert (rule.above, rule.logs, rule.then) == (0.5, 3, "stop")


def test_what_is_watched_is_logged():
    measured_at_the_end = {"over_chance", "over_length"}
    assert {watched.what for watched in WATCHED} <= LOG_KEYS.keys() | measured_at_the_end
    rules = [(watched.what, trainer) for watched in WATCHED for trainer in watched.trainers]
    assert len(set(rules)) == len(rules)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_that_overflows_ends_a_run_unless_the_loss_scaler_skips_its_step(fp16):
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([math.inf])
    args, state, health = SimpleNamespace(fp16=fp16, output_dir=""), SimpleNamespace(global_step=1), Health()
    for call in (lambda: health.on_pre_optimizer_step(args, state, None, model=torch.nn.ParameterList([weight])),
                 lambda: health.on_log(args, state, None, logs={"grad_norm": math.inf})):  # fmt: skip
        with nullcontext() if fp16 else pytest.raises(UserError, match="not finite"):
            call()
    with pytest.raises(UserError, match="loss is not finite"):
        health.on_log(args, state, None, logs={"loss": math.nan})
