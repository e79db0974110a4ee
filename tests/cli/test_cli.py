"""The command line: what a user's mistake looks like, exit statuses, launches of fewer processes than asked for."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, python

from rlhf_trl import __version__
from rlhf_trl.cli import run as run_cli
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run import launch
from rlhf_trl.run.launch import launch_command, require_processes, run_command, start_logged
from rlhf_trl.run.layout import RunDir

RECIPE = """\
name: cli
model: {model_name_or_path: builtin:tiny}
data: {source: builtin:demo, max_length: 128}
stages:
  sft: {trainer: sft}
  dpo: {trainer: dpo, init: sft}
"""
COMMANDS = {word: [] for word in ("validate", "explore", "prepare", "evaluate", "report", "run")} | {"train": ["sft"]}
# A stage that says what a real one says, and what it makes of its name.
STAGE = """\
import pathlib, sys
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.layout import RunDir
recipe, run, stage = load_recipe(pathlib.Path(sys.argv[1])), RunDir(pathlib.Path(sys.argv[2])), sys.argv[3]
print("{'loss': '0.5'}")
print("a warning", file=sys.stderr)
if stage in sys.argv[4:]:
    sys.exit(2)
run.replace(stage)
run.mark_done(recipe, stage, 3.0)
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_recipe_is_place_problem_and_remedy_with_status_2(command, call, recipe_file):
    recipe_file.write_text(RECIPE.replace("max_length", "max_lenght"))
    status, out, err = call(command, recipe_file, *COMMANDS[command])
    assert (status, out) == (2, "")
    problem = f"  {recipe_file}:3: data.max_lenght: unknown key 'max_lenght'"
    assert err.splitlines() == ["", "error", problem, "    -> did you mean 'max_length'?"]
    assert not Path("runs").exists()


def test_several_mistakes_are_counted_and_each_is_shown(call, recipe_file):
    status, _, err = call("validate", recipe_file, "--set", "seed=-1", "--set", "stages.dpo.args.bta=1", "--set", "x")
    assert status == 2
    assert err.startswith("\n3 problems found\n") and err.count("\n    -> ") == 3 and "Traceback" not in err
    assert all(f"  --set {key}: " in err for key in ("seed", "stages.dpo.args.bta", "x"))


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("dmeo", "there is no such file, and none of that name ships in recipes/", "did you mean 'demo'?"),
        ("recip.yaml", "there is no such file", "did you mean 'recipe.yaml'?"),
        ("zzzzz", "there is no such file", "give a path, or one of: demo, "),
        ("", "is a folder", "give a path, or one of: demo, "),
        ("/dev/null", "is no file that can be read twice", "save the text in a file"),
    ],
)
def test_an_unknown_recipe_suggests(name, problem, remedy, call, recipe_file):
    status, _, err = call("validate", name)
    assert status == 2 and f"  {name}: {problem}" in err and f"-> {remedy}" in err


def test_a_recipe_that_ships_is_found_by_name_and_any_by_its_path(call, recipe_file, tmp_path):
    (tmp_path / "demo").mkdir()
    assert call("validate", "demo") == (0, "demo: a valid recipe with the stages sft, rm, gold, dpo, grpo, ppo\n", "")
    assert call("validate", "--without", "ppo")[1] == "demo: a valid recipe with the stages sft, rm, gold, dpo, grpo\n"
    assert call("validate", recipe_file.rename(tmp_path / "my recipe (1).yaml"))[0] == 0
    status, _, err = call("train", "my recipe (1).yaml", "dop")
    assert status == 2 and "there is no stage 'dop'" in err and "did you mean 'dpo'?" in err


def test_validate_print_is_the_resolved_recipe(call, recipe_file):
    status, out, err = call("validate", recipe_file, "--print", "--set", "stages.dpo.sweep.beta=[0.1, 0.3]")
    assert (status, err) == (0, "")
    recipe = Recipe.model_validate(json.loads(out))
    assert list(recipe.stages) == ["sft", "dpo-beta=0.1", "dpo-beta=0.3"]
    assert recipe.stages["dpo-beta=0.3"].args == {"beta": 0.3}


def test_processes_need_a_profile_and_batches_are_judged_for_them(call, recipe_file):
    for command in ("train", "run"):
        status, _, err = call(command, recipe_file, *COMMANDS[command], "--processes", "2")
        assert status == 2 and "--processes: needs a profile" in err and "--accelerate ddp" in err
    status, out, _ = call("validate", "demo", "--processes", "2", "--set", "stages.rm.global_batch_size=48")
    assert status == 0 and "\nrm: 48 = 24 a device x 1 accumulated x 2 processes\n" in out
    assert "\ndpo: 64 = 32 a device x 1 accumulated x 2 processes\n" in out
    status, _, err = call("validate", "demo", "--set", "stages.grpo.args.num_generations=128")
    assert status == 2 and "num_generations" in err
    status, _, err = call("validate", "demo", "--set", "data.source=nowhere.csv")
    assert status == 2 and "data.source=nowhere.csv" not in err and "no such file or folder: nowhere.csv" in err
    assert call("validate", "demo", "--set", "stages.grpo.args.num_generations=128", "--processes", "2")[0] == 0


@pytest.mark.parametrize("arguments", [["nonsense"], ["validate", "--nonsense"], ["train"], ["validate", "demo", "x"]])
def test_a_wrong_command_line_has_status_2_and_no_traceback(arguments, call):
    status, _, err = call(*arguments)
    assert status == 2 and "Traceback" not in err and err


def test_version_and_help_and_what_the_libraries_warn_of_always(call, caplog):
    assert call("--version") == (0, f"{__version__}\n", "")
    status, out, _ = call("--help")
    assert status == 0 and all(command in out for command in COMMANDS)
    lines = (out + call("adapter", "--help")[1]).splitlines()
    assert not [line for line in lines if line.endswith("...") and "Usage" not in line]  # each purpose fits its line
    for message in ("The following layers were not sharded: a", "another"):
        logging.getLogger("transformers.distributed.tensor_parallel").warning(message)
    assert [record.message for record in caplog.records] == ["another"]


def test_any_other_error_keeps_its_traceback_and_has_status_1(recipe_file):
    code = (
        "import sys; from rlhf_trl.cli import app, run as run_cli\n"
        "def fail(*_): raise ZeroDivisionError('a defect')\n"
        f"run_cli.load_recipe = fail; sys.argv = ['rlhf-trl', 'validate', {str(recipe_file)!r}]; app.main()"
    )
    done = python(code)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "ZeroDivisionError: a defect" in done.stderr


def test_a_step_without_its_input_names_the_command_and_runs_that_cannot_be_written_to(call, recipe_file, tmp_path):
    status, _, err = call("train", recipe_file, "dpo", "--runs", "elsewhere")
    assert status == 3 and "the step 'prepare' is not finished" in err and "run `rlhf-trl prepare " in err
    (tmp_path / "runs").write_text("a file")
    status, _, err = call("explore", recipe_file)
    assert status == 2 and "runs/cli/.locks: is a file where a folder is needed" in err and "--runs" in err


# --- launching -------------------------------------------------------------------------------------------------------


def test_a_launch_names_the_profile_and_what_was_asked_for():
    for processes, asked in ((None, "2"), (3, "3")):
        command, env = launch_command(["train", "demo", "sft"], "ddp", processes)
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        assert command[-5:] == ["-m", "rlhf_trl", "train", "demo", "sft"]
        assert command[command.index("--config_file") + 1].endswith("accelerate_configs/ddp.yaml")
        assert command[command.index("--num_processes") + 1] == env[launch.ASKED] == asked
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30  # else torch kills what has not saved by then
    assert launch_command(["x"], None, None)[0] == [sys.executable, "-m", "rlhf_trl", "x"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[", "mine.yaml: not valid YAML"),
        (b"- 1\n", "is not a profile"),
        (b"\xff\xfe", "not valid YAML"),
        ("dpd", "did you mean 'ddp'"),
        ("xyzxyz", "give a path, or one of: cpu, ddp, "),
    ],
)
def test_a_broken_or_unknown_profile_is_named(content, says, tmp_path):
    path = tmp_path / "mine.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        launch_command([], content if isinstance(content, str) else str(path), None)


def test_fewer_processes_than_asked_for_are_refused(monkeypatch):
    monkeypatch.delenv(launch.ASKED, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    require_processes()  # without a launcher one process is right
    for asked, running in (("2", "1"), ("4", "3"), ("2", "2"), ("1", "1")):
        monkeypatch.setenv(launch.ASKED, asked)
        monkeypatch.setenv("WORLD_SIZE", running)
        if asked == running:
            require_processes()
            continue
        with pytest.raises(UserError, match=f"{asked} processes were asked for and {running} (is|are) running"):
            require_processes()
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a cluster sets it for its machines
    with pytest.raises(UserError, match="no launcher has started this one"):
        require_processes()


def test_the_status_of_a_child_is_its_own_and_a_signal_counts_from_128():
    environment = dict(os.environ)
    assert run_command([sys.executable, "-c", "raise SystemExit(7)"], environment) == 7
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], environment) == 143


# --- run and status --------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch, recipe_file, tmp_path):
    """Steps that only mark themselves done, and stages in processes that do so, too; those in `bad` fail."""
    bad: list[str] = []
    ran: list[str] = []
    (tmp_path / "stage.py").write_text(STAGE)

    def step(recipe, run, name, asked=None):
        ran.append(name)
        run.replace(name)
        run.mark_done(recipe, name, 1.0)
        return True

    def start_in(self, recipe, run):
        def start(stage, place):
            command = [sys.executable, "stage.py", str(recipe_file), str(run.root), stage, *bad]
            return start_logged(command, {**os.environ, "PYTHONPATH": str(ROOT), **place}, run.log(stage))

        return start

    monkeypatch.setattr(run_cli, "run_step", step)
    monkeypatch.setattr(run_cli, "launch", lambda *_: None)
    monkeypatch.setattr(run_cli.Launcher, "start_in", start_in)
    return SimpleNamespace(bad=bad, ran=ran, run=RunDir(Path("runs") / "cli"))


def columns(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_run_shows_its_plan_trains_and_says_what_it_took(stub, call, recipe_file):
    status, out, err = call("run", recipe_file)
    assert status == 0 and stub.ran == ["explore", "prepare", "evaluate", "compare", "samples", "report"]
    lines, names = columns(out), [step.split()[0] for step in PLAN]
    assert lines[:2] == ["run runs/cli: 8 steps, 0 done already", "step trainer state time"]
    assert lines[2:10] == [f"{number} {step} to do –" for number, step in enumerate(PLAN, 1)]
    assert re.findall(r"=== (\w+) \((\d)", out) == [(name, str(at)) for at, name in enumerate(names, 1)]
    assert [line.split()[0] for line in lines if re.fullmatch(r"\w+ [\d.]+ s", line)] == [*names, "total"]
    assert lines[-2:] == ["samples: runs/cli/samples", "logs: runs/cli/logs"]
    assert err == "  a warning\n" * 2 and "'loss'" in stub.run.log("sft").read_text()


PLAN = ["explore", "prepare", "sft sft", "dpo dpo", "evaluate", "compare", "samples", "report"]


def test_a_second_run_does_nothing_and_a_changed_one_says_what_and_how_long(stub, call, recipe_file):
    call("run", recipe_file)
    stub.ran.clear()
    status, out, _ = call("run", recipe_file)
    assert status == 0 and stub.ran == [] and "8 steps, 8 done already" in out and "total" not in out
    _, out, _ = call("run", recipe_file, "--set", "stages.dpo.args.beta=0.3")
    assert "4 dpo dpo to do again: settings changed about 3.0 s (last time)" in columns(out)
    assert "about 7.0 s for the 5 steps that were timed before" in out
    assert stub.ran == ["evaluate", "compare", "samples", "report"]


def test_a_stage_that_fails_ends_the_run_with_its_status_and_its_words(stub, call, recipe_file):
    stub.bad.append("sft")
    status, out, err = call("run", recipe_file, "--jobs", "2")
    assert status == 2 and stub.ran == ["explore", "prepare"]
    assert "--jobs 2: " in out and "sft: failed with status 2 after" in out
    assert err.splitlines() == [
        *("  a warning", "sft failed with status 2; its output: runs/cli/logs/sft.log", "not begun: dpo")
    ]


def test_a_stage_of_a_run_refuses_a_recipe_that_was_replaced_meanwhile(stub, call, recipe_file):
    call("run", recipe_file)
    fingerprint = stub.run.recorded_recipe().fingerprint("dpo")
    arguments = ("train", stub.run.root, "dpo", "--recorded", fingerprint)
    assert call(*arguments)[:2] == (0, "dpo: done already, nothing to do\n")
    stub.run.write_provenance(stub.run.recorded_recipe().model_copy(update={"seed": 7}))
    status, _, err = call(*arguments)
    assert status == 2 and "was replaced by another command" in err


def test_a_run_that_another_process_makes_is_not_run_twice(stub, call, recipe_file):
    with stub.run.lock("run"):
        status, _, err = call("run", recipe_file)
    assert status == 7 and f"held by process {os.getpid()}" in err and stub.ran == []


def test_status_takes_a_directory_or_a_name_and_changes_nothing(stub, call, recipe_file, tmp_path):
    call("run", recipe_file)
    before = {path: path.stat().st_mtime_ns for path in stub.run.root.rglob("*")}
    status, out, _ = call("status", "runs/cli")
    assert status == 0 and columns(out)[0] == "run runs/cli" and columns(out)[-1] == "finished"
    assert [line.split()[1] for line in columns(out)[2:-1]] == [step.split()[0] for step in PLAN]
    assert call("status", "cli")[1] == out
    (tmp_path / "cli").mkdir()  # a folder of that name that is no run
    assert call("status", "cli")[1] == out
    assert {path: path.stat().st_mtime_ns for path in stub.run.root.rglob("*")} == before
    status, out, _ = call("status", "cli", "--json")
    assert status == 0 and [step["state"] for step in json.loads(out)["steps"]] == ["done"] * 8
    status, out, err = call("status", "nothing")
    assert (status, out) == (2, "") and "nothing: is no run" in err and "--runs" in err
