"""How a command runs a step or a stage, and the commands `run` and `status`. A step is imported when it runs."""

import contextlib
import gc
import importlib
import itertools
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_trl.cli import options
from rlhf_trl.cli.options import RUNS
from rlhf_trl.cli.tables import Live, plan_table, printable, show, status_end, status_table, summary_table
from rlhf_trl.recipe.errors import Exit, NotRun, UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import STEPS, Recipe
from rlhf_trl.report.trackers import log_results
from rlhf_trl.run import signals
from rlhf_trl.run.documents import now
from rlhf_trl.run.files import read_json
from rlhf_trl.run.launch import (
    Launcher,
    find_slots,
    launch_command,
    profile_processes,
    require_processes,
    require_profile,
    run_command,
    shipped,
    train_stages,
)
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states
from rlhf_trl.text.redact import redact

opened: list[RunDir] = []
"""The runs that this process works on; the last one keeps the traceback of what ends it."""
# The room and module of each step whose name is not that of its room.
MODULES = {"explore": "data.explore", "prepare": "data.preprocess", "samples": "evaluate.samples"}


def run(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    without: options.Without = None,
    runs: options.Runs = RUNS,
    accelerate: options.Accelerate = None,
    processes: options.Processes = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages that train at once, on their own GPUs or cores.")] = 1,
    env_file: options.EnvFile = None,
) -> None:
    """Run every step of a recipe; finished steps are skipped."""
    load_env(env_file)
    planned = planned_processes(accelerate, processes)
    if accelerate:
        require_profile(shipped("accelerate_configs", accelerate), jobs)
    overrides = overriding(overrides, without)
    loaded, directory = open_run(recipe, overrides, runs, planned)
    waiting = steps_to_run(loaded, directory)
    print(f"run {directory.root}: {len(loaded.plan)} steps, {len(loaded.plan) - len(waiting)} done already")
    show(*plan_table(step_states(loaded, directory), waiting))
    if waiting:
        began = time.perf_counter()
        with directory.lock("run"):
            if any(step in loaded.stages for step in waiting):
                # In a process of its own, so that this one holds no memory of the GPU.
                launch(["validate", recipe, "--processes", str(planned)], overrides)
            seconds = execute(loaded, directory, waiting, Launcher(accelerate, processes, jobs), planned)
        print()
        show(summary_table(seconds, time.perf_counter() - began))
    print()
    if directory.comparison.exists() and directory.is_done(loaded, "compare"):
        verdict = read_json(directory.comparison)["verdict"]
        print(verdict["sentence"] if verdict else "no policies were compared")
    for name, path in (("report", directory.report), ("samples", directory.samples),
                       ("alarms", directory.over_optimisation), ("logs", directory.logs)):  # fmt: skip
        if path.exists():
            print(f"{name}: {path}")
    if not all(directory.is_done(loaded, step) for step in loaded.plan):
        raise typer.Exit(Exit.NOT_RUN)


def steps_to_run(recipe: Recipe, run: RunDir) -> list[str]:
    """List the steps that are not done, and those whose inputs running them may change."""
    waiting = [step for step in recipe.plan if not run.is_done(recipe, step)]
    # The judge's verdicts may change while the settings do not.
    renewed = {"compare", "report"} if "judge" in waiting else {"report"} if waiting else set()
    if {*waiting} & {*recipe.reward_stages}:  # a stage that begins anew takes its error analysis with it
        renewed |= {"errors"}
    return [step for step in recipe.plan if step in {*waiting, *renewed}]


def execute(recipe: Recipe, run: RunDir, waiting: list[str], launcher: Launcher, processes: int) -> dict[str, float]:
    """Run steps and stages in the order of the plan; return the seconds of each, or exit with a stage's status."""
    seconds: dict[str, float] = {}
    for trained, steps in itertools.groupby(waiting, key=recipe.stages.__contains__):
        if trained:
            run.write_provenance(recipe)
            with contextlib.closing(Live(run, recipe.plan, sys.stdout, sys.stderr)) as live:
                slots = find_slots(launcher.jobs, processes, live.say)
                code = train_stages(list(steps), recipe.links, slots, launcher.start_in(recipe, run), live)
            if code != 0:
                raise typer.Exit(code)
            seconds |= live.seconds
            continue
        for step in steps:
            print(f"\n=== {step} ({recipe.plan.index(step) + 1} of {len(recipe.plan)})", flush=True)
            start = time.perf_counter()
            if step == "evaluate" and processes > 1:
                run.write_provenance(recipe)
                # Each process holds whole models, whatever profile sharded them in training.
                launch(["evaluate", str(run.root), "--recorded", recipe.fingerprint(step)], None, "ddp", processes)
            else:
                run_step(recipe, run, step)
            seconds[step] = time.perf_counter() - start
    return seconds


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run, or its name.")],
    runs: options.Runs = RUNS,
    as_json: options.AsJson = False,
) -> None:
    """Show which steps of a run are done, running or stopped."""
    named, directory = RunDir(runs / run), RunDir(Path(run))
    if named.recipe.exists() and not directory.recipe.exists():
        directory = named
    states = step_states(directory.recorded_recipe(), directory)
    if as_json:
        print(json.dumps({"run": str(directory.root), "steps": [state.as_dict() for state in states]}, indent=2))
    else:
        print(f"run {directory.root}")
        show(status_table(states), status_end(states, directory.is_held("run")))


def overriding(overrides: list[str] | None, without: list[str] | None) -> list[str]:
    """The overrides, with those that leave stages out."""
    return [*(overrides or []), *(f"stages.{stage}=null" for stage in without or [])]


def open_run(recipe: str, overrides: list[str] | None, runs: Path, processes: int = 1) -> tuple[Recipe, RunDir]:
    loaded = load_recipe(shipped("recipes", recipe), overrides or [], processes)
    opened.append(RunDir(runs / loaded.name))
    return loaded.hash_by(opened[-1].hashes.of, {}), opened[-1]


def find_run(
    recipe: str, overrides: list[str] | None, runs: Path, step: str, recorded: str | None
) -> tuple[Recipe, RunDir]:
    """Load a recipe; or read the one that `run` recorded for its processes, if its fingerprint is still `recorded`."""
    if recorded is None:
        processes = 1 if step in STEPS else int(os.environ.get("WORLD_SIZE", "1"))
        return open_run(recipe, overrides, runs, processes)
    run = RunDir(Path(recipe))
    opened.append(run)
    loaded = run.recorded_recipe()
    if step not in loaded.plan or loaded.fingerprint(step) != recorded:
        problem = "was replaced by another command while `run` was at work"
        raise UserError(str(run.recipe), problem, "start `run` again")
    return loaded, run


def keep_traceback(error: BaseException) -> None:
    """Append a traceback to `run.log` of the run that this process works on, if there is one that can be written."""
    with contextlib.suppress(OSError):
        for run in opened[-1:]:
            run.logs.mkdir(exist_ok=True)
            with run.log("run").open("a", encoding="utf-8") as file:
                told = "".join(traceback.format_exception(error))
                file.write(redact(f"=== {now()} {shlex.join(sys.argv)}\n{told}"))


def planned_processes(accelerate: str | None, processes: int | None) -> int:
    """The number of processes that a launch will ask for."""
    if accelerate is not None:
        return processes or profile_processes(shipped("accelerate_configs", accelerate)) or 1
    if processes is not None:
        raise UserError("--processes", "needs a profile to launch with", "add --accelerate ddp")
    return 1


def run_step(recipe: Recipe, run: RunDir, step: str, asked: Recipe | None = None) -> bool:
    """Run one step that is not a stage, under its lock, and mark it done; other processes of a launch take part.

    `asked` is the recipe with what the command line asks for beyond it; the step counts as done for `recipe` itself,
    so that `run` and `report` take its result. Returns False where the step could not run; later steps continue.
    """
    if os.environ.get("RANK", "0") != "0":
        _load_step(step)(recipe, run)
        return True
    with run.lock(step):
        start = time.perf_counter()
        for name in recipe.inputs(step):  # before its last result is removed
            run.require(recipe, name, f"train RECIPE {name}" if name in recipe.stages else f"{name} RECIPE")
        action = _load_step(step)
        run.write_provenance(recipe)
        run.replace(step)
        if step == "judge":  # what it says now is not what was compared
            run.done("compare").unlink(missing_ok=True)
        try:
            with signals.cleaning_up():
                action(asked or recipe, run)
        except NotRun as reason:
            print(printable(f"{step}: not run: {reason}"), file=sys.stderr, flush=True)
            return False
        run.mark_done(recipe, step, seconds := time.perf_counter() - start)
        print(f"{step}: {seconds:.1f} s", flush=True)
        log_results(recipe, run, step)
        return True


def run_with(recipe: str, overrides: list[str] | None, runs: Path, step: str, own: str | None = None) -> None:
    """Load a recipe and run a step, with one more override from an option of its command; exit with 3 if not run."""
    loaded, run = open_run(recipe, overrides, runs)
    asked = loaded
    if own is not None and (step != "judge" or loaded.judge):  # no option turns the judge on
        asked, _ = open_run(recipe, [*(overrides or []), own], runs)
    if not run_step(loaded, run, step, asked):
        raise typer.Exit(Exit.NOT_RUN)
    if asked is not loaded:
        print(f"{step}: with {own} in place of the recipe's; `rlhf-trl {step} {recipe}` goes back to it")


def _load_step(step: str) -> Any:
    with importing():
        return getattr(importlib.import_module(f"rlhf_trl.{MODULES.get(step, f'{step}.step')}"), step)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import without the search for garbage, which is a sixth of the time; later searches pass over what there is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if not gc.get_freeze_count():  # later, it would keep what the step before has left
            gc.freeze()


def load_env(path: Path | None) -> None:
    """Set what an env file holds, where the environment does not have it already."""
    if path is not None:
        from dotenv import load_dotenv

        load_dotenv(path)


def launched(arguments: list[str], overrides: list[str], accelerate: str | None, processes: int | None) -> bool:
    """Run a command in training processes, if it is to be; else see that this is one of as many as were asked for."""
    planned_processes(accelerate, processes)
    if accelerate:
        require_profile(shipped("accelerate_configs", accelerate))
        launch(arguments, overrides, accelerate, processes)
    else:
        require_processes()
    return bool(accelerate)


def launch(
    arguments: list[str], overrides: list[str] | None, accelerate: str | None = None, processes: int | None = None
) -> None:
    """Run a command of this program in processes of its own; exit with the status of one that failed."""
    sets = [word for override in overrides or [] for word in ("--set", override)]
    code = run_command(*launch_command([*arguments, *sets], accelerate, processes))
    if code != 0:
        raise typer.Exit(code)
