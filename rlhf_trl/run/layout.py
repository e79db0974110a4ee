"""A run directory: every path in it, and the done-markers of its steps.

The run directory is the interface between the steps: each step reads files of earlier ones and writes only its own
directory. `done.json`, written last, holds the fingerprint of what the step depended on.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import STEPS, Recipe
from rlhf_trl.run import locks
from rlhf_trl.run.environment import MOMENT, environment, now
from rlhf_trl.run.files import read_json, write_json

# The directory of each step that is not a stage; the report lies in the run's root.
STEP_DIRS = dict.fromkeys(STEPS, ".") | {
    "explore": "exploration", "prepare": "data", "evaluate": "evaluation", "judge": "judge",
    "compare": "comparison", "errors": "errors", "samples": "samples",
}  # fmt: skip
# What the policies of a run start from is called, beside their own names.
REFERENCE = "reference"


class RunDir:
    """The paths of one run, `<root>/<recipe name>/`."""

    def __init__(self, root: Path):
        self.root = root
        self.recipe = root / "recipe.json"
        self.env = root / "env.json"
        self.report = root / "report.html"
        self.base = root / "base"  # the tiny model of `builtin:tiny`
        self.exploration = root / "exploration"
        self.data = root / "data"
        self.summary = self.data / "summary.json"
        self.quarantine = self.data / "quarantine.jsonl"
        self.tokenizer = self.data / "tokenizer"
        self.evaluation = root / "evaluation"
        self.metrics = self.evaluation / "metrics.json"
        self.best_of_n = self.evaluation / "best_of_n.jsonl"
        self.pareto = self.evaluation / "pareto.json"
        self.over_optimisation = self.evaluation / "over_optimisation.json"
        self.adversarial = self.evaluation / "adversarial.json"
        self.adversarial_answers = self.evaluation / "adversarial.jsonl"
        self.final_results = self.evaluation / "final_results.json"
        self.winrate = root / "judge" / "winrate.json"
        self.prompt_scores = root / "judge" / "prompt_scores.json"
        self.comparison_folder = root / "comparison"
        self.comparison = self.comparison_folder / "comparison_results.json"
        self.comparison_report = self.comparison_folder / "comparison_report.txt"
        self.comparison_figure = self.comparison_folder / "comparison.png"
        self.errors_folder = root / "errors"
        self.reward_comparison = self.errors_folder / "comparison.json"
        self.samples = root / "samples"
        self.logs = root / "logs"

    def pairs(self, split: str) -> Path:
        """Preference view (`prompt`, `chosen`, `rejected`, `subset`, `row`) of `train` or `test`."""
        return self.data / f"{split}.jsonl"

    def prompts(self, split: str) -> Path:
        """Prompt view (`prompt`, `subset`, `id`) of `train` or `test`: every prompt once."""
        return self.data / f"prompts_{split}.jsonl"

    def completions(self, policy: str, step: int | None = None) -> Path:
        """Answers of one policy or of `reference` to the held-out prompts; of its checkpoint at `step`."""
        return self.evaluation / f"completions-{policy}{'' if step is None else f'-step-{step}'}.jsonl"

    def judge_replies(self, judge: str) -> Path:
        """Every reply of a judge; kept when the step is run again, since it was paid for."""
        return self.root / "judge" / f"{judge}.jsonl"

    def judge_answers(self, policy: str) -> Path:
        """Answers with the second decoding."""
        return self.evaluation / f"judge-answers-{policy}.jsonl"

    def figure(self, name: str) -> Path:
        """A figure of the evaluation."""
        return self.evaluation / f"{name}.png"

    def error_analysis(self, stage: str) -> Path:
        """What the error analysis of a reward stage found; beside it a report, figures, examples and all scores."""
        return self.root / stage / "evaluation" / "error_analysis.json"

    def error_report(self, stage: str) -> Path:
        return self.root / stage / "evaluation" / "error_analysis_report.txt"

    def error_plots(self, stage: str) -> Path:
        return self.root / stage / "evaluation" / "error_analysis_plots.png"

    def error_examples(self, stage: str) -> Path:
        return self.root / stage / "evaluation" / "error_examples.jsonl"

    def scores(self, stage: str) -> Path:
        """Every analysed pair with its scores, lengths and margin."""
        return self.root / stage / "evaluation" / "scores.jsonl"

    def step(self, step: str) -> Path:
        """The directory that a step owns."""
        return self.root / STEP_DIRS.get(step, step)

    def adapter(self, stage: str) -> Path:
        """The LoRA adapter of a stage."""
        return self.root / stage / "adapter"

    def model(self, stage: str) -> Path:
        """The full model of a stage: fine-tuned whole, or its adapter merged for the stages that start from it."""
        return self.root / stage / "model"

    def checkpoints(self, stage: str) -> Path:
        return self.root / stage / "checkpoints"

    def training_stats(self, stage: str) -> Path:
        return self.root / stage / "training_stats.json"

    def training_curves(self, stage: str) -> Path:
        return self.root / stage / "training_curves.png"

    def reward_scale(self, stage: str) -> Path:
        """Mean and spread of the reward model's scores, which PPO normalised them with."""
        return self.root / stage / "reward_scale.json"

    def started(self, stage: str) -> Path:
        """Marks the fingerprint that the checkpoints of an unfinished stage belong to."""
        return self.root / stage / "started.json"

    def log(self, stage: str) -> Path:
        """Everything that a stage has printed under `run`, one attempt after the other."""
        return self.logs / f"{stage}.log"

    def holder(self, step: str) -> Path:
        """Says who holds the step; left behind by a process that was killed."""
        return self.root / ".locks" / step

    def model_lock(self, stage: str) -> FileLock:
        """Held while the adapter of a stage is merged, or `base` is built; no step has an @ in its name."""
        path = self.root / ".locks" / f"{stage}@model.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def done(self, step: str) -> Path:
        return self.step(step) / "done.json"

    def is_done(self, recipe: Recipe, step: str) -> bool:
        """Tell whether the step has finished with exactly what it depends on now."""
        return self.fingerprint_of(step) == recipe.fingerprint(step)

    def fingerprint_of(self, step: str) -> str | None:
        """The fingerprint that the step last finished with, or None."""
        return _read_marker(self.done(step), step).get("fingerprint")

    def last_seconds(self, step: str) -> float | None:
        """Tell how long the step took when it last finished here, with whatever settings, or None."""
        kept = (self.root / "replaced").glob(f"{step}-*/done.json")
        for path in (self.done(step), *sorted(kept, key=lambda path: path.stat().st_mtime_ns, reverse=True)):
            marker = _read_marker(path, step)
            if marker:
                # Of a stage that was interrupted, the marker has the seconds since it went on alone.
                stats = path.with_name(self.training_stats(step).name)
                trained = read_json(stats)["summary"]["seconds"] if step not in STEPS and stats.exists() else 0.0
                return max(marker["seconds"], trained)
        return None

    def finished(self, step: str) -> datetime:
        """When a step that is done was finished."""
        return datetime.strptime(read_json(self.done(step))["finished"], MOMENT)

    def mark_done(self, recipe: Recipe, step: str, seconds: float) -> None:
        """Write the step's `done.json`; the step's last act."""
        marker = {
            "step": step,
            "fingerprint": recipe.fingerprint(step),
            "seconds": round(seconds, 3),
            "finished": now(),
        }
        write_json(self.done(step), marker)

    def require(self, recipe: Recipe, step: str, command: str) -> None:
        """Refuse to go on without an earlier step that is finished and current.

        Raises:
            UserError: naming the command that runs the missing step.
        """
        if not self.is_done(recipe, step):
            state = "is not finished" if self.fingerprint_of(step) is None else "was made with other settings"
            raise UserError(str(self.step(step)), f"the step {step!r} {state}", f"run `rlhf-trl {command}` first")

    def replace(self, step: str) -> Path:
        """Give a step an empty directory; what a finished stage left there is kept under `replaced/`."""
        path = self.step(step)
        if step in STEPS:
            self.done(step).unlink(missing_ok=True)
            if step != "judge" and path != self.root and path.exists():
                shutil.rmtree(path)
        elif self.done(step).exists():
            (self.root / "replaced").mkdir(exist_ok=True)
            moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}"
            path.rename(self.root / "replaced" / f"{step}-{moment}")
        elif path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def lock(self, step: str) -> contextlib.AbstractContextManager[None]:
        """Hold a step for this process; raises UserError where another process holds it."""
        return locks.hold(self.holder(step), self.step(step))

    def is_held(self, step: str) -> bool:
        """Return whether a process holds the step."""
        return locks.is_held(self.holder(step))

    def write_provenance(self, recipe: Recipe) -> None:
        """Write the resolved recipe, and beside it the environment, the order of the steps and the hashes of the
        sources."""
        write_json(self.recipe, recipe.model_dump())
        write_json(self.env, {**environment(), "plan": recipe.plan, "sources": recipe.sources})

    def recorded_recipe(self) -> Recipe:
        """Read the recipe that the run was made with, as `write_provenance` left it.

        Its fingerprints come from the recorded hashes: they do not depend on the current folder, nor on what has
        become of the sources.

        Raises:
            UserError: the directory is no run, or one of a version whose recipes differ.
        """
        try:
            recipe, env = Recipe.model_validate(read_json(self.recipe)), read_json(self.env)
            # Sorted by name in the file; the order in which they train is the plan's.
            stages = {name: recipe.stages[name] for name in env["plan"] if name in recipe.stages}
            return recipe.model_copy(update={"stages": stages}).read_from(env["sources"])
        except OSError as error:
            problem = f"is no run: {self.recipe.name}: {error.strerror}"
            raise UserError(str(self.root), problem, "give the directory of a run, or its name and --runs") from None
        except (ValueError, KeyError):
            remedy = "look at it with the version that `env.json` names"
            raise UserError(str(self.root), "was made by another version of rlhf-trl", remedy) from None


def _read_marker(path: Path, step: str) -> dict[str, Any]:
    try:
        marker = read_json(path)
    except FileNotFoundError:  # or it is being replaced at this moment
        return {}
    return marker if marker["step"] == step else {}
