"""The final numbers of each policy, logged to the tracker's run that its stage has reported its training to.

Reads what `evaluate`, `judge` and `compare` have written. Writes to trackio and tensorboard, which go on with a run by
its name or folder; the others get the training alone.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.library import value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.trackers import names_of
from rlhf_trl.text.display import first_line
from rlhf_trl.text.format import format_estimate

logger = logging.getLogger(__name__)
Row = dict[str, Any]
MAIN = ("gold_gain", "reward_gain", "kl")
# The step is done, whatever its tracker says: its failures, of the network too, have no class in common.
FOREIGN = (Exception,)


def log_results(recipe: Recipe, run: RunDir, step: str) -> None:
    """Log what a step has found of each policy: numbers, texts, tables (lists of rows) and figures (paths of images).

    A tracker that fails is named.
    """
    for stage in recipe.policies if step in RESULTS else ():
        args = {**names_of(recipe, stage), **recipe.args_of(stage)}
        given = value_of(recipe.stages[stage].trainer, args, "report_to") or []
        for tracker in LOG.keys() & {*([given] if isinstance(given, str) else given)}:
            values = {f"final/{key}": value for key, value in RESULTS[step](run, stage)}
            try:
                LOG[tracker](run, stage, args, values)
            except FOREIGN as error:
                logger.warning("%s: %s of %s is not logged: %s", tracker, step, stage, first_line(error))


def _log_to_trackio(run: RunDir, stage: str, args: Mapping[str, Any], values: Row) -> None:
    import trackio

    space = args.get("trackio_space_id")
    trackio.init(project=args["project"], name=args["run_name"], space_id=space, resume="allow")
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = trackio.Image(value)
        elif isinstance(value, list):
            values[key] = trackio.Table(columns=[*value[0]], data=[[*row.values()] for row in value])
    trackio.log(values)
    trackio.finish()


def _log_to_tensorboard(run: RunDir, stage: str, args: Mapping[str, Any], values: Row) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    steps = read_json(run.training_stats(stage))["summary"]["steps"]
    with SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR", str(run.tensorboard(stage)))) as writer:
        for key, value in values.items():
            if isinstance(value, Path):
                writer.add_image(key, np.asarray(Image.open(value).convert("RGB")), steps, dataformats="HWC")
            elif isinstance(value, list):
                rows = [[*value[0]], ["---"] * len(value[0]), *([*row.values()] for row in value)]
                writer.add_text(key, "\n".join(f"| {' | '.join(row)} |" for row in rows), steps)
            elif isinstance(value, str):
                writer.add_text(key, value, steps)
            else:
                writer.add_scalar(key, value, steps)


def _measured(run: RunDir, stage: str) -> Iterator[tuple[str, Any]]:
    policies = read_json(run.metrics)["policies"]
    keys = [key for key in MAIN if key in policies[stage]]
    for key in keys:
        yield from _with_interval(key, policies[stage][key])
    others = [(name, of) for name, of in policies.items() if name != REFERENCE]
    yield "policies", [{"policy": name, **{key: format_estimate(of[key]) for key in keys}} for name, of in others]
    if run.figure("pareto").exists():  # where there is a reward model
        yield "pareto", run.figure("pareto")


def _judged(run: RunDir, stage: str) -> Iterator[tuple[str, float]]:
    for row in read_json(run.winrate).get("win_rates", []):
        if (row["a"], row["b"]) == (stage, REFERENCE) and row["win_rate"]["mean"] is not None:
            yield from _with_interval("win_rate", row["win_rate"])


def _compared(run: RunDir, stage: str) -> Iterator[tuple[str, str]]:
    found = read_json(run.comparison)
    if (verdict := found["verdict"]) and stage in found["stages"]:
        yield "verdict", " ".join([verdict["sentence"], *(f"Careful: {of}." for of in verdict["warnings"])])


def _with_interval(key: str, of: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    return ((key + end, of[part]) for part, end in (("mean", ""), ("low", "_low"), ("high", "_high")))


RESULTS: dict[str, Callable[[RunDir, str], Iterator[tuple[str, Any]]]] = {
    "evaluate": _measured, "judge": _judged, "compare": _compared,
}  # fmt: skip
LOG: dict[str, Callable[[RunDir, str, Mapping[str, Any], Row], None]] = {
    "trackio": _log_to_trackio, "tensorboard": _log_to_tensorboard,
}  # fmt: skip
