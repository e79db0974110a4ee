"""The command line, and the only place that configures logging or turns a user's mistake into a message.

A command imports its step inside, so that `--help` and `validate` answer without torch.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rlhf_trl import __version__
from rlhf_trl.jobs import Launcher, find_places, links, train_stages
from rlhf_trl.launch import (
    launch_command,
    profile_processes,
    require_one_machine,
    require_processes,
    run_command,
    shipped,
)
from rlhf_trl.live import Live
from rlhf_trl.options import nearest
from rlhf_trl.progress import plan_table, status_end, status_table, summary_table
from rlhf_trl.recipe import NotRun, Recipe, UserError, load_recipe
from rlhf_trl.rundir import RunDir
from rlhf_trl.states import step_states

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From preference pairs to shared LoRA adapters with the evidence attached.",
)

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


def main() -> None:
    """Run the command line; a user's mistake becomes place, problem and remedy, and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("rlhf_trl").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import that an optional kernel is absent
    # The libraries' own use of names that their next release drops.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        app()
    except UserError as error:
        count = len(error.problems)
        rank = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"\n{count} problems found" if count > 1 else f"\nerror{rank}", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _open(recipe: str, overrides: list[str] | None, runs: Path, processes: int | None = None) -> tuple[Recipe, RunDir]:
    loaded = load_recipe(shipped("recipes", recipe), overrides or [], processes or 1)
    return loaded, RunDir(runs / loaded.name)


@app.command()
def validate(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    processes: ProcessesOption = None,
    show: Annotated[bool, typer.Option("--print", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Check a recipe and report every problem at once; nothing is run or written."""
    loaded, directory = _open(recipe, overrides, RUNS, processes)
    if (processes or 1) == 1:  # the libraries check batch sizes for the processes that are running
        from rlhf_trl.train import build_configs

        build_configs(loaded, directory)
    if show:
        print(json.dumps(loaded.model_dump(), indent=2))
    else:
        print(f"{recipe}: a valid recipe with the stages {', '.join(loaded.stages)}")


@app.command()
def explore(recipe: RecipeArg = "demo", overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Describe the preference data: lengths, depth, biases, patterns; figures and samples."""
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "explore")


@app.command()
def prepare(recipe: RecipeArg = "demo", overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Clean the pairs, split them by prompt, and write the views that training reads."""
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "prepare")


@app.command()
def train(
    recipe: RecipeArg,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The name of a stage.")],
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Train one stage; also under `accelerate launch -m rlhf_trl train RECIPE STAGE`."""
    _planned_processes(accelerate, processes)
    if accelerate:
        with _timed(stage):
            _run_child(["train", recipe, stage, "--runs", str(runs), *_as_options(overrides)], accelerate, processes)
        return
    require_processes()
    loaded, run = _open(recipe, overrides, runs, int(os.environ.get("WORLD_SIZE", "1")))
    if stage not in loaded.stages:
        near = nearest(stage, loaded.stages)
        remedy = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(loaded.stages)}"
        raise UserError(recipe, f"there is no stage {stage!r}", remedy)
    if run.is_done(loaded, stage):
        print(f"{stage}: done already, nothing to do")
        return
    with run.lock(stage) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        from rlhf_trl.train import train as train_stage

        train_stage(loaded, run, stage)


@app.command()
def evaluate(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Measure reward, KL, frontier and alarms of every policy on held-out prompts; also under `accelerate launch`."""
    _planned_processes(accelerate, processes)
    if accelerate:
        _run_child(["evaluate", recipe, "--runs", str(runs), *_as_options(overrides)], accelerate, processes)
        return
    require_processes()
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "evaluate")


EnvFileOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--env-file", exists=True, dir_okay=False, help="File with OPENAI_API_KEY and the like."),
]


@app.command()
def judge(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    env_file: EnvFileOption = None,
    calibrate: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Labelled pairs of each subset to check the judge on, instead of judge.calibrate."),
    ] = None,
) -> None:
    """Ask a judge which answers are better, in both orders: win rates, ratings, and how good the judge is."""
    _load_env(env_file)
    loaded, run = _open(recipe, overrides, runs)
    if loaded.judge and calibrate is not None:
        asked = loaded.model_copy(update={"judge": loaded.judge.model_copy(update={"calibrate": calibrate})})
    else:
        asked = loaded
    if not _run_step(loaded, run, "judge", asked):
        raise typer.Exit(3)


@app.command()
def compare(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    stages: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--stages", metavar="A,B,...", help="Compare these stages, instead of comparison.stages."),
    ] = None,
) -> None:
    """Compare the runs: stability, convergence, compute, sample quality, and which method was better at equal KL."""
    loaded, run = _open(recipe, overrides, runs)
    asked = loaded
    if stages is not None:
        chosen = json.dumps([name.strip() for name in stages.split(",")])
        asked, _ = _open(recipe, [*(overrides or []), f"comparison.stages={chosen}"], runs)
    _run_step(loaded, run, "compare", asked)


@app.command()
def errors(recipe: RecipeArg = "demo", overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Analyse the errors of every reward stage: accuracy, biases, calibration, examples, probes."""
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "errors")


@app.command()
def samples(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    per_model: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--per-model", min=1, help="Pairs of each model, instead of samples.per_model."),
    ] = None,
) -> None:
    """Export prompt/response pairs of every model as JSONL and Markdown."""
    loaded, run = _open(recipe, overrides, runs)
    update = {} if per_model is None else {"per_model": per_model}
    asked = loaded.model_copy(update={"samples": loaded.samples.model_copy(update=update)})
    _run_step(loaded, run, "samples", asked)


@app.command()
def report(
    recipe: RecipeArg = "demo",
    beside: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="RUN", help="Another run: both are directories, and one page holds the two."),
    ] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write report.html from the results of the run; or lay two finished runs beside each other."""
    if beside is not None:
        from rlhf_trl.report_beside import lay_beside

        print(lay_beside(RunDir(Path(recipe)), RunDir(beside)))
        return
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "report")


@app.command()
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
    _load_env(env_file)
    planned = _planned_processes(accelerate, processes)
    if accelerate and jobs > 1:
        require_one_machine(shipped("accelerate_configs", accelerate))
    loaded, directory = _open(recipe, overrides, runs, planned)
    plan = loaded.plan
    waiting = [step for step in plan if not directory.is_done(loaded, step)]
    # Its verdicts are the only results that may change while the settings do not.
    renewed = {"compare", "report"} if "judge" in waiting else {"report"} if waiting else set()
    waiting = [step for step in plan if step in {*waiting, *renewed}]
    print(f"run {directory.root}: {len(plan)} steps, {len(plan) - len(waiting)} done already")
    print(plan_table(step_states(loaded, directory), waiting), flush=True)
    options = ["--runs", str(runs), *_as_options(overrides)]
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    with directory.lock("run") if waiting else contextlib.nullcontext():
        if any(step in loaded.stages for step in waiting):
            # In a process of its own, which gives the accelerator back.
            _run_child(["validate", recipe, "--processes", str(planned), *_as_options(overrides)])
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
                    _run_child(["evaluate", recipe, *options], "ddp", planned)
                else:
                    _run_step(loaded, directory, step)
                seconds[step] = time.perf_counter() - start
    if seconds:
        print(f"\n{summary_table(seconds, time.perf_counter() - began)}")
    looks = {"report": directory.report, "samples": directory.samples, "alarms": directory.over_optimisation,
             "logs": directory.logs}  # fmt: skip
    print("\n" + "\n".join(f"{name}: {path}" for name, path in looks.items() if path.exists()))


@app.command()
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


def _planned_processes(accelerate: str | None, processes: int | None) -> int:
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
def _timed(step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{step}: {time.perf_counter() - start:.1f} s", flush=True)


def _run_step(recipe: Recipe, run: RunDir, step: str, asked: Recipe | None = None) -> bool:
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
    with run.lock(step), _timed(step):
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


def _load_env(path: Path | None) -> None:
    """Set what an env file holds, where the environment does not have it already."""
    if path is not None:
        from dotenv import load_dotenv

        load_dotenv(path)


def _load_step(step: str) -> Any:
    module = {"explore": "data.explore", "prepare": "data.preprocess"}.get(step, step)
    return getattr(importlib.import_module(f"rlhf_trl.{module}"), step)


def _as_options(overrides: list[str] | None) -> list[str]:
    return [word for override in overrides or [] for word in ("--set", override)]


def _run_child(arguments: list[str], accelerate: str | None = None, processes: int | None = None) -> None:
    """Run a command of this program in processes of its own.

    Raises:
        typer.Exit: with the status of a child that failed; it has said why.
    """
    code = run_command(*launch_command(arguments, accelerate, processes))
    if code != 0:
        raise typer.Exit(code)
