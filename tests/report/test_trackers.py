"""Trackers: the final numbers go to the run that the training was reported to. Trackio is a stub here."""

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from report_fixtures import STAGES, write_run

from rlhf_trl.cli import run as run_cli
from rlhf_trl.evaluate.figures import plot_pareto
from rlhf_trl.figures.style import save
from rlhf_trl.report.trackers import RESULTS, log_results
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.trackers import name_projects


@pytest.fixture
def logged(monkeypatch):
    """What a stand-in for trackio is told."""
    calls, stub = [], ModuleType("trackio")
    stub.__spec__ = ModuleSpec("trackio", None)
    stub.init = lambda **words: calls.append(words)
    stub.log, stub.finish = calls.append, lambda: calls.append("finish")
    stub.Image, stub.Table = (lambda path: ("image", path)), (lambda **words: words)
    monkeypatch.setitem(sys.modules, "trackio", stub)
    return calls


@pytest.fixture
def tracked(tmp_path):
    """An evaluated, judged and compared run; two policies report to trackio, one of them under names of its own, and
    the other to tensorboard, too."""
    args = {"dpo": {"report_to": ["trackio", "tensorboard"]},
            "grpo": {"report_to": "trackio", "run_name": "mine", "project": "p"}}  # fmt: skip
    stages = {name: {**stage, "args": {**stage["args"], **args.get(name, {})}} for name, stage in STAGES.items()}
    recipe, run = write_run(tmp_path / "a-run", stages, judge="good")
    save(plot_pareto(read_json(run.pareto)), run.figure("pareto"))
    return recipe, run


def log_all(recipe, run, monkeypatch):
    monkeypatch.setattr(run_cli, "_load_step", lambda _: lambda *_: None)
    monkeypatch.setattr(RunDir, "replace", lambda *_: None)
    for step in ("evaluate", "judge", "compare"):
        assert run_cli.run_step(recipe, run, step)


def test_the_final_numbers_go_to_the_run_that_was_reported_to(tracked, logged, monkeypatch):
    recipe, run = tracked
    log_all(recipe, run, monkeypatch)
    names = [call for call in logged if "project" in call]
    ours = {"project": "rlhf-trl", "name": "a-run/dpo", "space_id": None, "resume": "allow"}
    assert names == [ours, {**ours, "project": "p", "name": "mine"}] * 3 and logged.count("finish") == 6
    measured, judged, compared = [logged[at + 1] for at, call in enumerate(logged) if call == ours]
    policy = read_json(run.metrics)["policies"]["dpo"]
    assert [measured[f"final/{key}"] for key in ("kl", "kl_low")] == [policy["kl"][part] for part in ("mean", "low")]
    assert measured["final/reward_gain"] == policy["reward_gain"]["mean"]
    assert measured["final/pareto"] == ("image", run.figure("pareto"))
    table = measured["final/policies"]
    assert table["columns"] == ["policy", "reward_gain", "kl"] and [row[0] for row in table["data"]] == recipe.policies
    rates = {row["a"]: row["win_rate"]["mean"] for row in read_json(run.winrate)["win_rates"]}
    assert judged["final/win_rate"] == rates["dpo"]
    verdict = read_json(run.comparison)["verdict"]["sentence"]
    assert compared["final/verdict"].startswith(f"{verdict} Careful: grpo and ppo were trained to raise")


def test_tensorboard_goes_on_in_the_folder_of_the_stage(tracked, logged, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    recipe, run = tracked
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    log_all(recipe, run, monkeypatch)
    events = reader.EventAccumulator(str(run.tensorboard("dpo"))).Reload()
    (gain,), steps = events.Scalars("final/reward_gain"), read_json(run.training_stats("dpo"))["summary"]["steps"]
    assert gain.value == pytest.approx(read_json(run.metrics)["policies"]["dpo"]["reward_gain"]["mean"])
    assert gain.step == steps and events.Scalars("final/win_rate") and events.Images("final/pareto")[0].width > 300
    (table,), (verdict,) = (events.Tensors(f"final/{key}/text_summary") for key in ("policies", "verdict"))
    assert b"| policy | reward_gain | kl |" in table.tensor_proto.string_val[0]
    sentence = read_json(run.comparison)["verdict"]["sentence"]
    assert verdict.tensor_proto.string_val[0].decode().startswith(sentence)
    assert not run.tensorboard("grpo").exists()


def test_a_judge_without_a_verdict_has_no_win_rate(tmp_path):
    _, run = write_run(tmp_path / "a-run", STAGES, judge="silent")
    assert [*RESULTS["judge"](run, "dpo")] == []


def test_a_tracker_that_fails_ends_nothing_and_is_named(tracked, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    log_results(*tracked, "evaluate")
    assert "trackio: evaluate of dpo is not logged" in caplog.text and "of grpo" in caplog.text
    caplog.clear()
    log_results(*tracked, "errors")
    assert not caplog.text


def test_a_name_of_the_environment_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"WANDB_PROJECT": "theirs"})
    name_projects(["wandb", "mlflow", "tensorboard"], "ours", tmp_path)
    assert os.environ == {"WANDB_PROJECT": "theirs", "MLFLOW_EXPERIMENT_NAME": "ours",
                          "TENSORBOARD_LOGGING_DIR": str(tmp_path)}  # fmt: skip
