"""The command line, and the only place that configures logging or turns a user's mistake into a message.

A command imports its step inside, so that `--help` and `validate` answer without torch.
"""

from __future__ import annotations

import contextlib
import importlib
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
from rlhf_trl.adapters_cli import adapter_app, chat, score
from rlhf_trl.recipe import STEPS, NotRun, Recipe, UserError, load_recipe
from rlhf_trl.rundir import RunDir

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From preference pairs to shared LoRA adapters with the evidence attached.",
)

app.add_typer(adapter_app, name="adapter")

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
    from rlhf_trl.launch import shipped

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
        _train_in_child(recipe, overrides, runs, stage, accelerate, processes)
        return
    from rlhf_trl.launch import require_processes
    from rlhf_trl.options import nearest

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
        _run_child(["evaluate", recipe, "--runs", str(runs)], overrides, accelerate, processes)
        return
    from rlhf_trl.launch import require_processes

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
def report(recipe: RecipeArg = "demo", overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write report.html from the results of the run."""
    loaded, run = _open(recipe, overrides, runs)
    _run_step(loaded, run, "report")


@app.command()
def run(
    recipe: RecipeArg = "demo",
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    env_file: EnvFileOption = None,
) -> None:
    """Run every step of a recipe, from the pairs to the report; finished steps are skipped."""
    _load_env(env_file)
    planned = _planned_processes(accelerate, processes)
    loaded, directory = _open(recipe, overrides, runs, planned)
    plan = loaded.plan
    waiting = [step for step in plan if not directory.is_done(loaded, step)]
    if waiting and waiting[-1] != "report":  # the judge may have new verdicts
        waiting.append("report")
    print(f"run {directory.root}: {len(plan)} steps, {len(plan) - len(waiting)} done already")
    if any(step in loaded.stages for step in waiting):
        # In a process of its own, which gives the accelerator back.
        _run_child(["validate", recipe, "--processes", str(planned)], overrides)
    for step in waiting:
        print(f"\n=== {step} ({plan.index(step) + 1} of {len(plan)})", flush=True)
        if step == "evaluate" and planned > 1:
            # Each process holds whole models, whatever profile sharded them in training.
            _run_child(["evaluate", recipe, "--runs", str(runs)], overrides, "ddp", planned)
        elif step in STEPS:
            _run_step(loaded, directory, step)
        else:
            _train_in_child(recipe, overrides, runs, step, accelerate, processes)
    print(f"\nreport: {directory.report}")


app.command()(chat)
app.command()(score)


def _planned_processes(accelerate: str | None, processes: int | None) -> int:
    """The number of processes that a launch will ask for.

    Raises:
        UserError: `--processes` without a profile, or a profile that does not exist.
    """
    if accelerate is not None:
        from rlhf_trl.launch import profile_processes, shipped

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


def _train_in_child(
    recipe: str, overrides: list[str] | None, runs: Path, stage: str, accelerate: str | None, processes: int | None
) -> None:
    """Train a stage in processes of its own: memory is returned, and each has the launcher it needs."""
    with _timed(stage):
        _run_child(["train", recipe, stage, "--runs", str(runs)], overrides, accelerate, processes)


def _run_child(
    arguments: list[str], overrides: list[str] | None, accelerate: str | None = None, processes: int | None = None
) -> None:
    """Run a command of this program in processes of its own.

    Raises:
        typer.Exit: with the status of a child that failed; it has said why.
    """
    from rlhf_trl.launch import launch_command, run_command

    options = [word for override in overrides or [] for word in ("--set", override)]
    status = run_command(*launch_command([*arguments, *options], accelerate, processes))
    if status != 0:
        raise typer.Exit(status)
