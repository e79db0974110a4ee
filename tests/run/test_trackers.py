"""Trackers: the final numbers go to the run that the training was reported to. Trackio is a stub here."""

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from report_fixtures import STAGES, write_run

from rlhf_trl.cli import run as run_cli
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.trackers import log_results, name_projects


@pytest.fixture
def logged(monkeypatch):
    """What a stand-in for trackio is told."""
    calls, stub = [], ModuleType("trackio")
    stub.__spec__ = ModuleSpec("trackio", None)
    stub.init = lambda **words: calls.append(words)
    stub.log, stub.finish = calls.append, lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", stub)
    return calls


@pytest.fixture
def tracked(tmp_path):
    """An evaluated, judged and compared run; two of its policies report to trackio, one under names of its own."""
    args = {"dpo": {"report_to": ["trackio"]}, "grpo": {"report_to": "trackio", "run_name": "mine", "project": "p"}}
    stages = {name: {**stage, "args": {**stage["args"], **args.get(name, {})}} for name, stage in STAGES.items()}
    return write_run(tmp_path / "a-run", stages, judge="good")


def test_the_final_numbers_go_to_the_run_that_was_reported_to(tracked, logged, monkeypatch):
    recipe, run = tracked
    monkeypatch.setattr(run_cli, "_load_step", lambda _: lambda *_: None)
    monkeypatch.setattr(RunDir, "replace", lambda *_: None)
    for step in ("evaluate", "judge", "compare"):
        assert run_cli.run_step(recipe, run, step)
    names = [call for call in logged if "project" in call]
    ours = {"project": "rlhf-trl", "name": "a-run/dpo", "space_id": None, "resume": "allow"}
    assert names == [ours, {**ours, "project": "p", "name": "mine"}] * 3 and logged.count("finish") == 6
    measured, judged, compared = [logged[at + 1] for at, call in enumerate(logged) if call == ours]
    policy = read_json(run.metrics)["policies"]["dpo"]
    assert [measured[f"final/{key}"] for key in ("kl", "kl_low")] == [policy["kl"][part] for part in ("mean", "low")]
    assert measured["final/reward_gain"] == policy["reward_gain"]["mean"]
    rates = {row["a"]: row["win_rate"]["mean"] for row in read_json(run.winrate)["win_rates"]}
    assert judged["final/win_rate"] == rates["dpo"]
    assert compared == {"final/verdict": read_json(run.comparison)["verdict"]["sentence"]}


def test_a_tracker_that_fails_ends_nothing_and_is_named(tracked, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    log_results(*tracked, "evaluate")
    assert "trackio: evaluate of dpo is not logged" in caplog.text and "of grpo" in caplog.text
    caplog.clear()
    log_results(*tracked, "errors")
    assert not caplog.text


def test_a_project_of_the_environment_stays(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    name_projects(["wandb", "mlflow"], "ours")
    assert (os.environ["WANDB_PROJECT"], os.environ.pop("MLFLOW_EXPERIMENT_NAME")) == ("theirs", "ours")
