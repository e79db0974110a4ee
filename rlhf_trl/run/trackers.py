"""The names under which a stage reports its training to a tracker (`report_to`); the libraries do the reporting."""

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_trl.recipe.recipe import Recipe

PROJECT = "rlhf-trl"


def names_of(recipe: Recipe, stage: str) -> dict[str, str]:
    """The names of a stage's run in a tracker, where its `args` give none."""
    return {"run_name": f"{recipe.name}/{stage}", "project": PROJECT}


def name_projects(report_to: Sequence[str], project: str, folder: Path) -> None:
    """Give project and folder to the trackers that read them from the environment, where that has none."""
    names = {"wandb": ("WANDB_PROJECT", project), "mlflow": ("MLFLOW_EXPERIMENT_NAME", project),
             "tensorboard": ("TENSORBOARD_LOGGING_DIR", str(folder))}  # fmt: skip
    for tracker in names.keys() & {*report_to}:
        os.environ.setdefault(*names[tracker])
