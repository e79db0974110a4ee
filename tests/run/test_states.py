"""What has become of each step of a run, from files: fresh, finished, changed, running, stopped and killed ones."""

import fcntl
import json
import os
import time
from threading import Timer

import pytest
from conftest import THREE, finish, plain_recipe

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import StepState, step_states

STEPS = ["explore", "prepare", "sft", "rm", "dpo", "evaluate", "judge", "compare", "errors", "samples", "report"]


def begin(run: RunDir, recipe: Recipe, step: int, checkpoint: int | None = None, stage: str = "dpo") -> None:
    """Leave what a stage leaves that has come to a step, half a second each."""
    run.replace(stage)
    write_json(run.started(stage), {"fingerprint": recipe.fingerprint(stage)})
    history = [{"step": step, "seconds": step / 2, "loss": 0.5, "kl": 1.5, "log": {}}] if step else []
    write_json(run.training_stats(stage), {"max_steps": 40, "history": history})
    if checkpoint is not None:
        (run.checkpoints(stage) / f"checkpoint-{checkpoint}").mkdir(parents=True)


def state_of(recipe: Recipe, run: RunDir, step: str = "dpo") -> StepState:
    return {state.step: state for state in step_states(recipe, run)}[step]


def test_a_fresh_run_has_all_to_do_and_no_estimate(run, recipe):
    states = step_states(recipe, run)
    assert [state.step for state in states] == STEPS
    assert {(state.state, state.seconds_left) for state in states} == {("to do", None)}
    assert [state.trainer for state in states if state.trainer] == ["sft", "reward", "dpo"]
    assert not run.root.exists()


def test_a_finished_run_and_one_whose_settings_changed(run, recipe):
    finish(run, recipe, *STEPS)
    times = {(state.state, state.last_seconds, state.seconds_left) for state in step_states(recipe, run)}
    assert times == {("done", 2.0, 0.0)}
    other = plain_recipe(stages={**THREE, "rm": {"trainer": "reward", "init": "sft", "args": {"seed": 1}}})
    changed = {state.step: state for state in step_states(other, run) if state.state == "changed"}
    assert list(changed) == ["rm", "errors", "report"] and changed["rm"].seconds_left == 2.0


def test_a_stage_that_stopped_goes_on_at_its_newest_checkpoint(run, recipe):
    begin(run, recipe, 14, 9)
    (run.checkpoints("dpo") / "checkpoint-10").mkdir()
    state = state_of(recipe, run)
    assert (state.state, state.checkpoint, state.progress.step) == ("stopped", 10, 14)
    assert state.progress.values == {"loss": 0.5, "kl": 1.5} and state.seconds_left == 30 * 0.5
    begin(run, recipe, 0)
    state = state_of(recipe, run)
    assert (state.state, state.checkpoint, state.progress.step) == ("stopped", None, 0)
    assert state.seconds_left is None
    begin(run, plain_recipe(seed=7), 14, 10)  # checkpoints of other settings do not count as progress
    state = state_of(recipe, run)
    assert (state.state, state.checkpoint, state.progress) == ("changed", 10, None)


def test_a_running_stage_shows_its_progress_and_how_old_it_is(run, recipe):
    with run.lock("dpo"):
        begin(run, recipe, 14)
        os.utime(run.training_stats("dpo"), (time.time() - 720, time.time() - 720))
        os.utime(run.holder("dpo"), (time.time() - 900, time.time() - 900))
        state = state_of(recipe, run)
        assert (state.state, state.seconds_left, state.progress.seconds_per_step) == ("running", 13.0, 0.5)
        assert state.progress.log_age == pytest.approx(720, abs=30)
        assert state.holder.startswith(f"process {os.getpid()} on ")
        assert json.loads(json.dumps(state.as_dict()))["progress"]["step"] == 14
    assert (state_of(recipe, run).state, state_of(recipe, run).holder) == ("stopped", None)


def test_what_an_earlier_attempt_logged_is_not_the_progress_of_this_one(run, recipe):
    begin(run, recipe, 14, 10)
    os.utime(run.training_stats("dpo"), (time.time() - 5, time.time() - 5))
    with run.lock("dpo"):
        state = state_of(recipe, run)
        assert (state.state, state.progress, state.checkpoint) == ("running", None, 10)
    finish(run, recipe, "rm")
    with run.lock("rm"):
        assert state_of(recipe, run, "rm").progress is None


def test_the_holder_of_a_killed_step_is_named(run, recipe):
    with run.lock("evaluate"):
        assert state_of(recipe, run, "evaluate").state == "running"
    run.holder("evaluate").write_text("process 7 on here")
    state = state_of(recipe, run, "evaluate")
    assert (state.state, state.holder) == ("to do", "process 7 on here")


def test_a_look_never_makes_a_step_fail_that_begins_at_that_moment(run):
    """A look holds the lock for an instant: here for a tenth of a second."""
    with run.lock("dpo"):
        pass
    with run.holder("dpo").with_name("dpo.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        assert not run.is_held("dpo")
        with run.lock("dpo"):
            assert run.is_held("dpo")


def test_a_judge_that_was_stopped_says_why(run, recipe):
    write_json(run.winrate, {"status": "partial", "reason": "max_cost", "evaluation": recipe.fingerprint("evaluate")})
    assert state_of(recipe, run, "judge").note == "partial: max_cost"
    assert state_of(plain_recipe(seed=7), run, "judge").note is None
    finish(run, recipe, "judge")
    assert state_of(recipe, run, "judge").note is None


# --- the recorded recipe ---------------------------------------------------------------------------------------------


def test_the_recorded_recipe_has_the_fingerprints_and_the_order_of_the_run_wherever_one_is(run, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "elsewhere").mkdir()
    stages = {"zeta": {"trainer": "sft"}, "alpha": {"trainer": "dpo", "init": "zeta"}}
    recipe = plain_recipe(data={"source": "pairs.jsonl"}, stages=stages, judge=None)
    monkeypatch.chdir(tmp_path)
    expected = {step: recipe.fingerprint(step) for step in recipe.plan}
    run.write_provenance(recipe)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "pairs.jsonl").unlink()
    recorded = run.recorded_recipe()
    assert recorded.plan == recipe.plan and list(recorded.stages) == ["zeta", "alpha"]
    assert {step: recorded.fingerprint(step) for step in recorded.plan} == expected


def test_a_folder_that_is_no_run_and_a_run_of_another_version_are_refused(run, recipe):
    with pytest.raises(UserError, match=r"is no run: recipe.json is missing"):
        run.recorded_recipe()
    run.write_provenance(recipe)
    write_json(run.env, {key: value for key, value in read_json(run.env).items() if key != "plan"})
    with pytest.raises(UserError, match=r"env.json cannot be read: plan: field required(.|\n)*another version"):
        run.recorded_recipe()
    run.recipe.write_text("{}")
    with pytest.raises(UserError, match=r"recipe.json cannot be read(.|\n)*another version"):
        run.recorded_recipe()


# --- damaged documents -----------------------------------------------------------------------------------------------


def test_whatever_stands_in_a_state_file_status_and_run_say_so(run, recipe, tmp_path):
    """Changes of every document: `status` tells the states or refuses the run, and every step can be run again."""
    import fuzz

    tally = fuzz.Tally("states", seed=1)
    fuzz.states(tally, 150, tmp_path)
    assert not tally.faults and 0 < tally.refused < tally.inputs
    begin(run, recipe, 14, 9)
    for path in (run.started("dpo"), run.training_stats("dpo")):
        path.write_text("{")
        run.begin(recipe, "dpo")
        assert read_json(run.started("dpo"))["fingerprint"] == recipe.fingerprint("dpo")


@pytest.mark.parametrize(("name", "content"), [("done", "{"), ("done", "[]"), ("started", "{}"), ("started", "\xff")])
def test_a_state_file_that_cannot_be_read_is_named_and_means_not_done(name, content, run, recipe):
    finish(run, recipe, "dpo")
    if name == "started":
        run.done("dpo").unlink()
    getattr(run, name)("dpo").write_bytes(content.encode("latin-1"))
    state = state_of(recipe, run)
    assert state.state == "damaged" and state.note.startswith(f"dpo/{name}.json cannot be read: ")
    assert not run.is_done(recipe, "dpo")
