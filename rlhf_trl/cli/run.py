"""How a command runs a step or a stage, and the commands that run many: `run` and `status`.

A part of the command line: `cli` takes it over. A step is imported when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rlhf_trl.cli.live import Live
from rlhf_trl.cli.tables import plan_table, status_end, status_table, summary_table
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.jobs import Launcher, find_places, links, train_stages
from rlhf_trl.run.launch import launch_command, profile_processes, require_one_machine, run_command, shipped
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states

RecipeArg = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships (demo).")
]
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set stages.dpo.args.beta=0.3. Repeatable."
    ),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]
AccelerateOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--accelerate", metavar="PROFILE", help="Launch training with a profile of accelerate_configs/, e.g. ddp."
    ),
]
ProcessesOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--processes", min=1, help="Number of training processes; overrides the profile's."),
]
RUNS = Path("runs")
EnvFileOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--env-file", exists=True, dir_okay=False, help="File with OPENAI_API_KEY and the like."),
]


def run(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Stages that train side by side, where there is a place for them.")
    ] = 1,
    env_file: EnvFileOption = None,
) -> None:
    """Run every step of a recipe, from the pairs to the report; finished steps are skipped."""
    load_env(env_file)
    planned = planned_processes(accelerate, processes)
    if accelerate and jobs > 1:
        require_one_machine(shipped("accelerate_configs", accelerate))
    loaded, directory = open_run(recipe, overrides, runs, planned)
    plan = loaded.plan
    waiting = [step for step in plan if not directory.is_done(loaded, step)]
    # Its verdicts are the only results that may change while the settings do not.
    renewed = {"compare", "report"} if "judge" in waiting else {"report"} if waiting else set()
    waiting = [step for step in plan if step in {*waiting, *renewed}]
    print(f"run {directory.root}: {len(plan)} steps, {len(plan) - len(waiting)} done already")
    print(plan_table(step_states(loaded, directory), waiting), flush=True)
    options = ["--runs", str(runs), *as_options(overrides)]
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    with directory.lock("run") if waiting else contextlib.nullcontext():
        if any(step in loaded.stages for step in waiting):
            # In a process of its own, which gives the accelerator back.
            run_child(["validate", recipe, "--processes", str(planned), *as_options(overrides)])
        for trained, steps in itertools.groupby(waiting, key=loaded.stages.__contains__):
            if trained:
                directory.write_provenance(loaded)
                launcher = Launcher(recipe, options, accelerate, processes, jobs)
                live = Live(directory, plan, sys.stdout, sys.stderr)
                places = find_places(jobs, planned, live.say)
                code = train_stages([*steps], links(loaded), places, launcher.start_in(directory), live)
                if code != 0:
                    raise typer.Exit(code)
                seconds |= live.seconds
                continue
            for step in steps:
                print(f"\n=== {step} ({plan.index(step) + 1} of {len(plan)})", flush=True)
                start = time.perf_counter()
                if step == "evaluate" and planned > 1:
                    # Each process holds whole models, whatever profile sharded them in training.
                    run_child(["evaluate", recipe, *options], "ddp", planned)
                else:
                    run_step(loaded, directory, step)
                seconds[step] = time.perf_counter() - start
    if seconds:
        print(f"\n{summary_table(seconds, time.perf_counter() - began)}")
    looks = {"report": directory.report, "samples": directory.samples, "alarms": directory.over_optimisation,
             "logs": directory.logs}  # fmt: skip
    print("\n" + "\n".join(f"{name}: {path}" for name, path in looks.items() if path.exists()))


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run, or its name.")],
    runs: RunsOption = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the states as JSON.")] = False,
) -> None:
    """Tell how far a run has come, from its files: what is done, what is running, what has stopped and where."""
    named = RunDir(runs / run)
    directory = named if named.recipe.exists() and not RunDir(Path(run)).recipe.exists() else RunDir(Path(run))
    states = step_states(directory.recorded_recipe(), directory)
    if as_json:
        print(json.dumps({"run": str(directory.root), "steps": [state.as_dict() for state in states]}, indent=2))
    else:
        print(f"run {directory.root}\n{status_table(states)}\n{status_end(states, directory.is_held('run'))}")


def open_run(
    recipe: str, overrides: list[str] | None, runs: Path, processes: int | None = None
) -> tuple[Recipe, RunDir]:
    loaded = load_recipe(shipped("recipes", recipe), overrides or [], processes or 1)
    return loaded, RunDir(runs / loaded.name)


def planned_processes(accelerate: str | None, processes: int | None) -> int:
    """The number of processes that a launch will ask for.

    Raises:
        UserError: `--processes` without a profile, or a profile that does not exist.
    """
    if accelerate is not None:
        return processes or profile_processes(shipped("accelerate_configs", accelerate)) or 1
    if processes is not None:
        raise UserError("--processes", "needs a profile to launch with", "add --accelerate ddp")
    return 1


@contextlib.contextmanager
def timed(step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{step}: {time.perf_counter() - start:.1f} s", flush=True)


def run_step(recipe: Recipe, run: RunDir, step: str, asked: Recipe | None = None) -> bool:
    """Run one step that is not a stage, under its lock, and mark it done; other processes of a launch take part.

    Args:
        asked: the recipe with what the command line asks for beyond it. The step counts as done for the recipe, so
            that `run` and `report` take its result.

    Returns:
        False where the step could not run, and the steps after it go on without it.
    """
    if os.environ.get("RANK", "0") != "0":
        _load_step(step)(recipe, run)
        return True
    with run.lock(step), timed(step):
        start = time.perf_counter()
        action = _load_step(step)
        run.write_provenance(recipe)
        run.replace(step)
        if step == "judge":  # what it says now is not what was compared
            run.done("compare").unlink(missing_ok=True)
        try:
            action(asked or recipe, run)
        except NotRun as reason:
            print(f"{step}: not run: {reason}", file=sys.stderr, flush=True)
            return False
        run.mark_done(recipe, step, time.perf_counter() - start)
        return True


def load_env(path: Path | None) -> None:
    """Set what an env file holds, where the environment does not have it already."""
    if path is not None:
        from dotenv import load_dotenv

        load_dotenv(path)


def _load_step(step: str) -> Any:
    module = {"explore": "data.explore", "prepare": "data.preprocess", "samples": "evaluate.samples"}
    return getattr(importlib.import_module(f"rlhf_trl.{module.get(step, f'{step}.step')}"), step)


def as_options(overrides: list[str] | None) -> list[str]:
    return [word for override in overrides or [] for word in ("--set", override)]


def run_child(arguments: list[str], accelerate: str | None = None, processes: int | None = None) -> None:
    """Run a command of this program in processes of its own.

    Raises:
        typer.Exit: with the status of a child that failed; it has said why.
    """
    code = run_command(*launch_command(arguments, accelerate, processes))
    if code != 0:
        raise typer.Exit(code)
