"""The command line, and the only place that configures logging or turns a user's mistake into a message.

A command imports its step inside, so that `--help` and `validate` answer without torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rlhf_trl import __version__
from rlhf_trl.cli import options
from rlhf_trl.cli.adapters import adapter_app, answer, chat, score
from rlhf_trl.cli.options import RUNS
from rlhf_trl.cli.run import (
    find_run,
    keep_traceback,
    launch,
    load_env,
    open_run,
    opened,
    overriding,
    planned_processes,
    run,
    run_step,
    run_with,
    status,
    timed,
)
from rlhf_trl.cli.tables import printable
from rlhf_trl.recipe.errors import RecipeError, UserError
from rlhf_trl.recipe.library import suggest
from rlhf_trl.recipe.load import locate
from rlhf_trl.run.faults import FAULTS, explain
from rlhf_trl.run.launch import require_processes, shipped
from rlhf_trl.run.layout import RunDir

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From preference pairs to shared LoRA adapters with the evidence attached.",
)
app.add_typer(adapter_app, name="adapter")


def main() -> None:
    """Run the command line; a user's mistake and a fault of the machine become place, problem and remedy."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    logging.getLogger().handlers[0].setFormatter(Printable("%(message)s"))
    logging.getLogger("rlhf_trl").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import that an optional kernel is absent
    for library in ("DeepSpeed", "transformers.distributed.tensor_parallel"):
        logging.getLogger(library).addFilter(_is_news)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # The libraries' own use of names that their next release drops.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        app()
    except (UserError, *FAULTS) as error:
        told = error if isinstance(error, UserError) else explain(error, str(opened[-1].root) if opened else "")
        if told is None:
            raise
        if told is not error:
            keep_traceback(error)
        count = len(told.problems)
        rank = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"\n{count} problems found" if count > 1 else f"\nerror{rank}", file=sys.stderr)
        for problem in told.problems:
            print(printable(f"  {problem}"), file=sys.stderr)
        sys.exit(told.exit)
    except SystemExit as end:
        if not end.code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # All is written. A thread of the process group that outlives the interpreter aborts the process
            # ("terminate called without an active exception"), and the launcher calls a finished run a failure.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise


class Printable(logging.Formatter):
    """Log records may hold words of a server or of data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what the libraries warn of on every CPU, and of every model that is not split over devices."""
    return not str(record.msg).startswith(("Setting accelerator to CPU", "The following layers were not sharded"))


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def validate(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    without: options.Without = None,
    processes: options.Processes = None,
    show: Annotated[bool, typer.Option("--print", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Check a recipe and report every problem. Nothing is run or written."""
    overrides = overriding(overrides, without)
    loaded, directory = open_run(recipe, overrides, RUNS, processes or 1)
    from rlhf_trl.train.check import check_stages

    try:
        check_stages(loaded, directory, processes or 1)
    except RecipeError as error:
        raise locate(error, shipped("recipes", recipe), overrides) from error
    if show:
        print(json.dumps(loaded.model_dump(), indent=2))
    else:
        print(f"{recipe}: a valid recipe with the stages {', '.join(loaded.stages)}")


def add_step(step: str, purpose: str) -> None:
    """Register the command of a step that has no options of its own."""

    def command(
        recipe: options.Recipe = "demo", overrides: options.Overrides = None, runs: options.Runs = RUNS
    ) -> None:
        run_with(recipe, overrides, runs, step)

    app.command(step, help=purpose)(command)


add_step("explore", "Describe the preference data: lengths, biases, patterns.")
add_step("prepare", "Clean the pairs, split them by prompt, write the training data.")


@app.command()
def train(
    recipe: options.Recipe,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The name of a stage.")],
    overrides: options.Overrides = None,
    without: options.Without = None,
    runs: options.Runs = RUNS,
    accelerate: options.Accelerate = None,
    processes: options.Processes = None,
    recorded: options.Recorded = None,
) -> None:
    """Train one stage. Also under `accelerate launch -m rlhf_trl train RECIPE STAGE`."""
    planned_processes(accelerate, processes)
    overrides = overriding(overrides, without)
    if accelerate:
        with timed(stage):
            launch(["train", recipe, stage, "--runs", str(runs)], overrides, accelerate, processes)
        return
    require_processes()
    loaded, run = find_run(recipe, overrides, runs, stage, recorded)
    if stage not in loaded.stages:
        remedy = suggest(stage, loaded.stages, f"the stages are: {', '.join(loaded.stages)}")
        raise UserError(recipe, f"there is no stage {stage!r}", remedy)
    if run.is_done(loaded, stage):
        print(f"{stage}: done already, nothing to do")
        return
    with run.lock(stage) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        from rlhf_trl.train.step import train as train_stage

        train_stage(loaded, run, stage)


@app.command()
def evaluate(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    accelerate: options.Accelerate = None,
    processes: options.Processes = None,
    recorded: options.Recorded = None,
) -> None:
    """Measure reward, KL and alarms on held-out prompts. Also under `accelerate launch`."""
    planned_processes(accelerate, processes)
    if accelerate:
        launch(["evaluate", recipe, "--runs", str(runs)], overrides, accelerate, processes)
        return
    require_processes()
    run_step(*find_run(recipe, overrides, runs, "evaluate", recorded), "evaluate")


@app.command()
def judge(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    env_file: options.EnvFile = None,
    calibrate: Annotated[
        int | None,
        typer.Option(min=0, help="Labelled pairs of each subset to check the judge on, instead of judge.calibrate."),
    ] = None,
) -> None:
    """Ask a judge which answers are better, and measure the judge. Each pair is asked in both orders."""
    load_env(env_file)
    run_with(recipe, overrides, runs, "judge", None if calibrate is None else f"judge.calibrate={calibrate}")


@app.command()
def compare(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    stages: Annotated[
        str | None,
        typer.Option("--stages", metavar="A,B,...", help="Compare these stages, instead of comparison.stages."),
    ] = None,
) -> None:
    """Compare stability, compute, samples, and gain at equal KL."""
    names = None if stages is None else json.dumps([name.strip() for name in stages.split(",")])
    run_with(recipe, overrides, runs, "compare", None if names is None else f"comparison.stages={names}")


add_step("errors", "Analyse the errors of every reward model, with examples.")


@app.command()
def samples(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    per_model: Annotated[
        int | None, typer.Option("--per-model", min=1, help="Pairs of each model, instead of samples.per_model.")
    ] = None,
) -> None:
    """Export prompt/response pairs as JSONL and Markdown."""
    run_with(recipe, overrides, runs, "samples", None if per_model is None else f"samples.per_model={per_model}")


@app.command()
def report(
    recipe: options.Recipe = "demo",
    beside: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Another run: both are directories, and one page holds the two."),
    ] = None,
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page says first as JSON.")] = False,
) -> None:
    """Write report.html of a run, or one page of two finished runs."""
    if beside is not None:
        from rlhf_trl.report.beside import lay_beside

        page = lay_beside(RunDir(Path(recipe)), RunDir(beside))
        print(page.with_suffix(".json").read_text(encoding="utf-8") if as_json else page)
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        run_with(recipe, overrides, runs, "report")
    if as_json:
        from rlhf_trl.report.step import summarise

        print(json.dumps(summarise(*open_run(recipe, overrides, runs)), indent=2))


for command in (run, status, chat, answer, score):
    app.command()(command)
