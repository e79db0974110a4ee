"""The run directory: writes that are whole or not there, steps held by one process, markers, what `replace` keeps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, finish

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import source_hash
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run import documents
from rlhf_trl.run import files as atomic
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from rlhf_trl.run.layout import PLACES


@pytest.fixture
def start(tmp_path):
    """Start a Python process that says `ready`, and end it with the test."""
    started = []

    def run_code(code: str) -> subprocess.Popen:
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout.readline().strip() == "ready"
        return child

    yield run_code
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_sorted(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"text": "ø \u2028 \U0001f680 \n"}}
    write_json(tmp_path / "deep" / "er" / "x.json", value)
    assert read_json(tmp_path / "deep" / "er" / "x.json") == value
    text = (tmp_path / "deep" / "er" / "x.json").read_text(encoding="utf-8")
    assert text.index('"a"') < text.index('"b"') and text.endswith("}\n") and "ø" in text
    rows = [{"text": "one\u2028two\r\n"}, {}, {"text": "\x85\x0b"}]
    write_jsonl(tmp_path / "x.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert files(tmp_path) == {"deep/er/x.json", "x.jsonl"}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, 1)
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"loss": number})
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_jsonl(path, [{}, number])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, 2)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == 1 and files(tmp_path) == {"x.json"}


def test_a_writer_that_is_killed_leaves_the_old_file_whole(tmp_path, start):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    child = start(
        "import os, time, pathlib; from rlhf_trl.run import files\n"
        "def stop(_): print('ready', flush=True); time.sleep(60)\n"
        "files.os.fsync = stop\n"
        f"files.write_json(pathlib.Path({str(path)!r}), {{'new': list(range(10000))}})"
    )
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert read_json(path) == {"old": True}


# --- paths -----------------------------------------------------------------------------------------------------------


def test_no_two_things_of_a_run_share_a_path():
    paths = [re.sub("{}", "name", place.path) for place in PLACES.values()]
    assert len(set(paths)) == len(paths) > 40
    assert not any(Path(path).is_absolute() or ".." in path for path in paths)


def test_the_page_about_files_is_the_table_of_the_code():
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = [f"| `{place.path.replace('{}', '<name>')}` | {place.holds} |" for place in PLACES.values()]
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


# --- done markers ----------------------------------------------------------------------------------------------------


def test_a_step_is_done_for_exactly_what_it_depends_on(run, recipe):
    for step in ("prepare", "evaluate", "report", "sft", "rm"):
        assert not run.is_done(recipe, step) and run.fingerprint_of(step) is None
        finish(run, recipe, step)
        assert run.is_done(recipe, step) and run.fingerprint_of(step) == recipe.fingerprint(step)
        assert read_json(run.done(step)).keys() == {"step", "fingerprint", "seconds", "finished", "outputs", "sealed"}
        changed = recipe.model_copy(update={"seed": 7})
        assert not run.is_done(changed, step) and run.fingerprint_of(step) is not None
    run.step("rm").rename(run.step("dpo"))
    assert not run.is_done(recipe, "dpo")


def test_require_names_the_command_that_runs_the_step(run, recipe):
    with pytest.raises(UserError, match="is not finished") as caught:
        run.require(recipe, "sft", "train RECIPE sft")
    (problem,) = caught.value.problems
    assert problem.place == str(run.step("sft")) and "`rlhf-trl train RECIPE sft`" in problem.remedy
    finish(run, recipe, "sft")
    run.require(recipe, "sft", "train RECIPE sft")
    with pytest.raises(UserError, match="was made with other settings"):
        run.require(recipe.model_copy(update={"seed": 7}), "sft", "train RECIPE sft")


# --- replacing -------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_kept_each_time_it_is_replaced(run, recipe):
    finish(run, recipe, "sft", "sft", "sft")
    assert run.replace("sft") == run.step("sft") and files(run.step("sft")) == set()
    kept = sorted((run.root / "replaced").iterdir())
    assert len(kept) == 3 and all(path.name.startswith("sft-") for path in kept)
    assert all(files(path) == {"result", "done.json"} for path in kept)


def test_an_unfinished_stage_and_a_step_are_replaced_without_a_trace(run, recipe):
    """The report is replaced without touching the run, and a judge keeps its replies."""
    (run.replace("sft") / "half").write_text("")
    run.replace("sft")
    finish(run, recipe, "evaluate")
    run.replace("evaluate").rmdir()
    disk = run.root.parent / "disk"
    (disk / "other").mkdir(parents=True)
    run.step("evaluate").symlink_to(disk)
    assert not run.replace("evaluate").is_symlink() and (disk / "other").exists()  # the link alone
    assert files(run.root) == set()
    finish(run, recipe, "prepare", "sft", "report", "judge")
    run.report.write_text("old")
    for step in ("report", "judge"):
        run.replace(step)
        assert not run.is_done(recipe, step)
    assert run.is_done(recipe, "prepare") and run.is_done(recipe, "sft") and files(run.step("judge")) == {"result"}


# --- locks -----------------------------------------------------------------------------------------------------------

HOLD = (
    "import pathlib, time; from rlhf_trl.run.layout import RunDir\n"
    "with RunDir(pathlib.Path({root!r})).lock('sft'): print('ready', flush=True); time.sleep(60)"
)


def test_a_step_held_by_another_process_is_refused_and_taken_over_when_that_is_killed(run, start):
    child = start(HOLD.format(root=str(run.root)))
    before = time.perf_counter()
    with pytest.raises(UserError) as caught, run.lock("sft"):
        pass
    (problem,) = caught.value.problems
    assert problem.place == str(run.step("sft")) and f"held by process {child.pid} on " in problem.problem
    assert time.perf_counter() - before < 2
    with run.lock("dpo"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with run.lock("sft"):
        (left,) = [path for path in (run.root / ".locks").iterdir() if path.suffix != ".lock"]
        assert f"process {os.getpid()} " in left.read_text()


# --- provenance ------------------------------------------------------------------------------------------------------


def test_provenance_is_the_resolved_recipe_and_the_versions(run, recipe):
    run.write_provenance(recipe)
    assert Recipe.model_validate(read_json(run.recipe)).model_dump() == recipe.model_dump()
    env = read_json(run.env)
    assert env["versions"]["trl"] == "1.12.0" and env["versions"]["torch"].startswith("2.13.0")
    assert env.keys() == {"versions", "git", "git_dirty", "platform", "cpus", "gpus", "plan", "sources"}
    assert env["plan"] == recipe.plan
    assert env["sources"] == {name: source_hash(name) for name in ("builtin:demo", "builtin:tiny")}
    assert files(run.root) == {"recipe.json", "env.json"}


def test_the_commit_is_that_of_the_package_wherever_one_is_and_empty_without_git(tmp_path, monkeypatch):
    here = documents.environment()["git"]
    monkeypatch.chdir(tmp_path)
    assert documents.environment()["git"] == here
    monkeypatch.setenv("PATH", "")
    assert json.dumps(documents.environment()) and documents.environment()["git"] == ""
