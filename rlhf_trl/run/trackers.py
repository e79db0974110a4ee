"""The tracker that a stage reports its training to (`report_to`): names by default, and its policy's final numbers.

The libraries report the training. The final numbers go to trackio alone, the one tracker that goes on with a run by
its name; reads what `evaluate`, `judge` and `compare` have written, and writes no file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_trl.recipe.library import value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.display import first_line

logger = logging.getLogger(__name__)
Row = dict[str, Any]
PROJECT = "rlhf-trl"
# The step is done, whatever its tracker says: its failures, of the network too, have no class in common.
FOREIGN = (Exception,)
# Trackers that take the project from the environment alone.
ENVIRONMENT = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}


def names_of(recipe: Recipe, stage: str) -> dict[str, str]:
    """The names of a stage's run in a tracker, where its `args` give none."""
    return {"run_name": f"{recipe.name}/{stage}", "project": PROJECT}


def name_projects(report_to: Sequence[str], project: str) -> None:
    """Give the project to the trackers that read it from the environment, where that has none."""
    for tracker in ENVIRONMENT.keys() & {*report_to}:
        os.environ.setdefault(ENVIRONMENT[tracker], project)


def log_results(recipe: Recipe, run: RunDir, step: str) -> None:
    """Log what a step has found of each policy to its stage's run of the tracker; a tracker that fails is named."""
    for stage in recipe.policies if step in RESULTS else ():
        args = {**names_of(recipe, stage), **recipe.args_of(stage)}
        given = value_of(recipe.stages[stage].trainer, args, "report_to") or []
        for tracker in LOG.keys() & {*([given] if isinstance(given, str) else given)}:
            values = {f"final/{key}": value for key, value in RESULTS[step](run, stage)}
            try:
                LOG[tracker](args, values)
            except FOREIGN as error:
                logger.warning("%s: %s of %s is not logged: %s", tracker, step, stage, first_line(error))


def _log_to_trackio(args: Mapping[str, Any], values: Row) -> None:
    import trackio

    space = args.get("trackio_space_id")
    trackio.init(project=args["project"], name=args["run_name"], space_id=space, resume="allow")
    trackio.log(values)
    trackio.finish()


def _measured(run: RunDir, stage: str) -> Iterator[tuple[str, float]]:
    policy = read_json(run.metrics)["policies"][stage]
    for key in ("gold_gain", "reward_gain", "kl"):
        yield from _with_interval(key, policy.get(key))


def _judged(run: RunDir, stage: str) -> Iterator[tuple[str, float]]:
    for row in read_json(run.winrate).get("win_rates", []):
        if (row["a"], row["b"]) == (stage, REFERENCE):
            yield from _with_interval("win_rate", row["win_rate"])


def _compared(run: RunDir, stage: str) -> Iterator[tuple[str, str]]:
    found = read_json(run.comparison)
    if found["verdict"] and stage in found["stages"]:
        yield "verdict", found["verdict"]["sentence"]


def _with_interval(key: str, of: Mapping[str, float] | None) -> Iterator[tuple[str, float]]:
    return ((key + end, of[part]) for part, end in (("mean", ""), ("low", "_low"), ("high", "_high")) if of)


RESULTS: dict[str, Callable[[RunDir, str], Iterator[tuple[str, Any]]]] = {
    "evaluate": _measured, "judge": _judged, "compare": _compared,
}  # fmt: skip
LOG: dict[str, Callable[[Mapping[str, Any], Row], None]] = {"trackio": _log_to_trackio}
