"""What has become of each step of a run, from files: fresh, finished, changed, running, stopped and killed ones."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import Progress, read_progress, step_states

STEPS = ["explore", "prepare", "sft", "rm", "dpo", "evaluate", "judge", "compare", "errors", "samples", "report"]


def build(**changes) -> Recipe:
    content = {
        "name": "small",
        "model": {"model_name_or_path": "builtin:tiny"},
        "data": {"source": "builtin:demo"},
        "stages": {
            "sft": {"trainer": "sft"},
            "rm": {"trainer": "reward", "init": "sft"},
            "dpo": {"trainer": "dpo", "init": "sft"},
        },
        "judge": {},
    }
    return Recipe.model_validate({**content, **changes})


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "runs" / "small")


def finish(run: RunDir, recipe: Recipe, *steps: str, seconds: float = 2.0) -> None:
    for step in steps:
        run.replace(step)
        run.mark_done(recipe, step, seconds)


def begin(run: RunDir, recipe: Recipe, stage: str, step: int, checkpoint: int | None = None) -> None:
    """Leave what a stage leaves that has come to a step, half a second each."""
    run.replace(stage)
    write_json(run.started(stage), {"fingerprint": recipe.fingerprint(stage)})
    history = [{"step": step, "seconds": step / 2, "loss": 0.5, "kl": 1.5, "log": {}}] if step else []
    write_json(run.training_stats(stage), {"max_steps": 40, "history": history})
    if checkpoint is not None:
        (run.checkpoints(stage) / f"checkpoint-{checkpoint}").mkdir(parents=True)


def states(recipe: Recipe, run: RunDir) -> dict:
    return {state.step: state for state in step_states(recipe, run)}


def test_a_fresh_run_has_all_to_do_and_no_estimate(run):
    found = step_states(build(), run)
    assert [state.step for state in found] == STEPS
    assert {state.state for state in found} == {"to do"}
    assert {state.seconds_left for state in found} == {None}
    assert [state.trainer for state in found if state.trainer] == ["sft", "reward", "dpo"]
    assert not run.root.exists()


def test_a_finished_run_and_one_whose_settings_changed(run):
    recipe = build()
    finish(run, recipe, *STEPS)
    assert {(state.state, state.last_seconds, state.seconds_left) for state in step_states(recipe, run)} == {
        ("done", 2.0, 0.0)
    }
    other = build(
        stages={**recipe.model_dump()["stages"], "rm": {"trainer": "reward", "init": "sft", "args": {"seed": 1}}}
    )
    found = states(other, run)
    assert [step for step in STEPS if found[step].state == "changed"] == ["rm", "errors", "report"]
    assert found["rm"].seconds_left == 2.0


def test_the_time_of_a_replaced_stage_counts_until_there_is_a_newer_one(run):
    recipe = build()
    finish(run, recipe, "dpo", seconds=5.0)
    finish(run, recipe, "dpo", seconds=3.0)
    assert run.last_seconds("dpo") == 3.0
    run.replace("dpo")
    assert states(recipe, run)["dpo"].last_seconds == 3.0
    assert run.last_seconds("dp") is None


def test_the_time_of_a_stage_that_went_on_is_that_of_all_its_training(run):
    """Its marker has the seconds since it went on, here 2 of 30."""
    recipe = build()
    finish(run, recipe, "dpo")
    write_json(run.training_stats("dpo"), {"summary": {"seconds": 30.0}})
    assert run.last_seconds("dpo") == 30.0


def test_a_stage_that_stopped_goes_on_at_its_newest_checkpoint(run):
    recipe = build()
    finish(run, recipe, "dpo", seconds=99.0)
    begin(run, recipe, "dpo", 14, 9)
    (run.checkpoints("dpo") / "checkpoint-10").mkdir()
    state = states(recipe, run)["dpo"]
    assert (state.state, state.checkpoint, state.progress.step) == ("stopped", 10, 14)
    assert state.progress.values == {"loss": 0.5, "kl": 1.5}
    assert state.seconds_left == 30 * 0.5
    begin(run, recipe, "dpo", 0)
    state = states(recipe, run)["dpo"]
    assert (state.state, state.checkpoint, state.progress.step) == ("stopped", None, 0)
    assert state.seconds_left == 99.0


def test_checkpoints_of_other_settings_do_not_count_as_progress(run):
    begin(run, build(seed=7), "dpo", 14, 10)
    state = states(build(), run)["dpo"]
    assert (state.state, state.checkpoint, state.progress) == ("changed", 10, None)


def test_a_running_stage_shows_its_progress_and_how_old_it_is(run):
    recipe = build()
    with run.lock("dpo"):
        begin(run, recipe, "dpo", 14)
        os.utime(run.training_stats("dpo"), (time.time() - 720, time.time() - 720))
        os.utime(run.holder("dpo"), (time.time() - 900, time.time() - 900))
        state = states(recipe, run)["dpo"]
        assert (state.state, state.seconds_left, state.progress.seconds_per_step) == ("running", 13.0, 0.5)
        assert state.progress.log_age == pytest.approx(720, abs=30)
        assert state.holder.startswith(f"process {os.getpid()} on ")
        assert json.loads(json.dumps(state.as_dict()))["progress"]["step"] == 14
    assert states(recipe, run)["dpo"].state == "stopped"
    assert states(recipe, run)["dpo"].holder is None


def test_what_an_earlier_attempt_logged_is_not_the_progress_of_this_one(run):
    recipe = build()
    begin(run, recipe, "dpo", 14, 10)
    os.utime(run.training_stats("dpo"), (time.time() - 5, time.time() - 5))
    with run.lock("dpo"):
        state = states(recipe, run)["dpo"]
        assert (state.state, state.progress, state.checkpoint) == ("running", None, 10)
    finish(run, recipe, "rm")
    with run.lock("rm"):
        assert states(recipe, run)["rm"].progress is None


def test_the_holder_of_a_killed_step_is_named(run):
    recipe = build()
    code = (
        "import pathlib, time; from rlhf_trl.run.layout import RunDir\n"
        f"with RunDir(pathlib.Path({str(run.root)!r})).lock('evaluate'): print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        assert states(recipe, run)["evaluate"].state == "running"
        child.send_signal(signal.SIGKILL)
    state = states(recipe, run)["evaluate"]
    assert state.state == "to do" and state.holder.startswith(f"process {child.pid} on ")


def test_a_look_never_makes_a_step_fail_that_begins_at_that_moment(run):
    """A look holds the lock for an instant: here for a tenth of a second."""
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'rb'); fcntl.flock(file, fcntl.LOCK_SH)\n"
        "print('ready', flush=True); time.sleep(0.1)"
    )
    with run.lock("dpo"):
        pass
    path = run.holder("dpo").with_name("dpo.lock")
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        assert not run.is_held("dpo")
        with run.lock("dpo"):
            assert run.is_held("dpo")


def test_a_judge_that_was_stopped_says_why(run):
    recipe = build()
    write_json(run.winrate, {"status": "partial", "reason": "max_cost", "evaluation": recipe.fingerprint("evaluate")})
    assert states(recipe, run)["judge"].note == "partial: max_cost"
    assert states(build(seed=7), run)["judge"].note is None
    finish(run, recipe, "judge")
    assert states(recipe, run)["judge"].note is None


def test_progress_is_the_pace_so_far(run):
    begin(run, build(), "dpo", 8)
    progress = read_progress(run.training_stats("dpo"))
    assert (progress.seconds_per_step, progress.seconds_from(8), progress.seconds_from(41)) == (0.5, 16.0, 0.0)
    assert Progress(0, 40, 0.0, {}, 0.0).seconds_from(0) is None
    assert read_progress(run.training_stats("rm")) is None


# --- the recorded recipe ---------------------------------------------------------------------------------------------


def test_the_recorded_recipe_has_the_fingerprints_and_the_order_of_the_run_wherever_one_is(run, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    stages = {"zeta": {"trainer": "sft"}, "alpha": {"trainer": "dpo", "init": "zeta"}}
    recipe = build(data={"source": "pairs.jsonl"}, stages=stages, judge=None)
    monkeypatch.chdir(tmp_path)
    expected = {step: recipe.fingerprint(step) for step in recipe.plan}
    run.write_provenance(recipe)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "pairs.jsonl").unlink()
    found = run.recorded_recipe()
    assert found.plan == recipe.plan and list(found.stages) == ["zeta", "alpha"]
    assert {step: found.fingerprint(step) for step in found.plan} == expected


def test_a_folder_that_is_no_run_and_a_run_of_another_version_are_refused(run):
    with pytest.raises(UserError, match=r"is no run: recipe.json: No such file"):
        run.recorded_recipe()
    run.write_provenance(build())
    env = read_json(run.env)
    del env["plan"]
    write_json(run.env, env)
    with pytest.raises(UserError, match="another version"):
        run.recorded_recipe()
    run.recipe.write_text("{}")
    with pytest.raises(UserError, match="another version"):
        run.recorded_recipe()
