"""The command line, and the only place that configures logging or turns a user's mistake into a message.

A command imports its step inside, so that `--help` and `validate` answer without torch.
"""

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from rlhf_trl import __version__
from rlhf_trl.cli import options, run
from rlhf_trl.cli.adapters import adapter_app, answer, chat, score
from rlhf_trl.cli.options import RUNS
from rlhf_trl.cli.tables import batch_line, memory_plan, printable
from rlhf_trl.cli.tables import show as show_tables
from rlhf_trl.recipe.errors import RecipeError, UserError
from rlhf_trl.recipe.library import suggest
from rlhf_trl.recipe.load import locate
from rlhf_trl.run.faults import FAULTS, explain
from rlhf_trl.run.launch import shipped
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
        told = (
            error if isinstance(error, UserError) else explain(error, str(run.opened[-1].root) if run.opened else "")
        )
        if told is None:
            raise
        if told is not error:
            run.keep_traceback(error)
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
    version: Annotated[bool, Option("--version", help="Show the version and exit.")] = False,
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
    show: Annotated[bool, Option("--print", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Check a recipe and report every problem. Nothing is run or written."""
    overrides = run.overriding(overrides, without)
    loaded, directory = run.open_run(recipe, overrides, RUNS, processes or 1)
    with run.importing():
        from rlhf_trl.adapters.start import check_starts
        from rlhf_trl.data.sources import require_source
        from rlhf_trl.train.check import check_stages

    problems = check_starts(loaded)
    for check in (lambda: require_source(loaded.data.source), lambda: check_stages(loaded, directory, processes or 1)):
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise locate(RecipeError(problems), shipped("recipes", recipe), overrides)
    if show:
        print(json.dumps(loaded.model_dump(), indent=2))
    else:
        print(f"{recipe}: a valid recipe with the stages {', '.join(loaded.stages)}")
        if processes:
            print(*(batch_line(loaded, stage, processes) for stage in loaded.stages), sep="\n")


@app.command()
def plan(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    without: options.Without = None,
    runs: options.Runs = RUNS,
    accelerate: options.Accelerate = None,
    processes: options.Processes = None,
    memory: Annotated[
        str | None,
        Option("--memory", metavar="SIZE", help="Memory of one device, e.g. 24GB, if not this one's."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Estimate the memory, steps and tokens of each stage."""
    count = run.planned_processes(accelerate, processes)
    loaded, directory = run.open_run(recipe, run.overriding(overrides, without), runs, count)
    with run.importing():
        from rlhf_trl.train.plan import plan as plan_stages

    profile = shipped("accelerate_configs", accelerate) if accelerate else None
    stages = plan_stages(loaded, directory, profile, count, memory)
    if as_json:
        print(json.dumps(stages, indent=2))
    else:
        show_tables(*memory_plan(stages))


def add_step(step: str, purpose: str, setting: str = "", own: Any = None) -> None:
    """Register the command of a step; the option `own` fills a setting of the recipe that `run` does not ask for."""

    def plain(recipe: options.Recipe = "demo", overrides: options.Overrides = None, runs: options.Runs = RUNS) -> None:
        run.run_with(recipe, overrides, runs, step)

    def asking(
        recipe: options.Recipe = "demo",
        overrides: options.Overrides = None,
        runs: options.Runs = RUNS,
        value: own = None,
    ) -> None:
        run.run_with(recipe, overrides, runs, step, None if value is None else setting.format(value))

    app.command(step, help=purpose)(asking if own else plain)


add_step("explore", "Describe the preference data: lengths, biases, patterns.")
add_step("prepare", "Clean the pairs, split them by prompt, write the training data.")


@app.command()
def train(
    recipe: options.Recipe,
    stage: Annotated[str, Argument(metavar="STAGE", help="The name of a stage.")],
    overrides: options.Overrides = None,
    without: options.Without = None,
    runs: options.Runs = RUNS,
    accelerate: options.Accelerate = None,
    processes: options.Processes = None,
    recorded: options.Recorded = None,
) -> None:
    """Train one stage. Also under `accelerate launch -m rlhf_trl train RECIPE STAGE`."""
    overrides = run.overriding(overrides, without)
    if run.launched(["train", recipe, stage, "--runs", str(runs)], overrides, accelerate, processes):
        return
    loaded, directory = run.find_run(recipe, overrides, runs, stage, recorded)
    if stage not in loaded.stages:
        remedy = suggest(stage, loaded.stages, f"the stages are: {', '.join(loaded.stages)}")
        raise UserError(recipe, f"there is no stage {stage!r}", remedy)
    if directory.is_done(loaded, stage):
        print(f"{stage}: done already, nothing to do")
        return
    with directory.lock(stage) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        with run.importing():
            from rlhf_trl.adapters.start import check_starts
            from rlhf_trl.train.step import train as train_stage

        if problems := check_starts(loaded, stage):
            raise RecipeError(problems)
        train_stage(loaded, directory, stage)


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
    if not run.launched(["evaluate", recipe, "--runs", str(runs)], overrides or [], accelerate, processes):
        run.run_step(*run.find_run(recipe, overrides, runs, "evaluate", recorded), "evaluate")


@app.command()
def judge(
    recipe: options.Recipe = "demo",
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    env_file: options.EnvFile = None,
    calibrate: Annotated[int | None, Option(min=0, help="For judge.calibrate: labelled pairs of each subset.")] = None,
) -> None:
    """Ask a judge which answers are better, and measure the judge. Each pair is asked in both orders."""
    run.load_env(env_file)
    run.run_with(recipe, overrides, runs, "judge", None if calibrate is None else f"judge.calibrate={calibrate}")


add_step("compare", "Compare stability, compute, samples, and gain at equal KL.", "comparison.stages=[{}]",
         Annotated[str | None, Option("--stages", metavar="A,B,...", help="For comparison.stages")])  # fmt: skip
add_step("errors", "Analyse the errors of every reward model, with examples.")
add_step("samples", "Export prompt/response pairs as JSONL and Markdown.", "samples.per_model={}",
         Annotated[int | None, Option("--per-model", min=1, help="For samples.per_model")])  # fmt: skip


@app.command()
def report(
    recipe: options.Recipe = "demo",
    beside: Annotated[Path | None, Argument(metavar="RUN", help="Another run; then RECIPE is one, too.")] = None,
    overrides: options.Overrides = None,
    runs: options.Runs = RUNS,
    as_json: options.AsJson = False,
) -> None:
    """Write report.html of a run, or one page of two finished runs."""
    if beside is not None:
        from rlhf_trl.report.beside import lay_beside

        page = lay_beside(RunDir(Path(recipe)), RunDir(beside))
        print(page.with_suffix(".json").read_text(encoding="utf-8") if as_json else page)
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        run.run_with(recipe, overrides, runs, "report")
    if as_json:
        from rlhf_trl.report.step import summarise

        print(json.dumps(summarise(*run.open_run(recipe, overrides, runs)), indent=2))


for command in (run.run, run.status, chat, answer, score):
    app.command()(command)
