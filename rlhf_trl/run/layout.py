"""A run directory: every path in it, the locks on its steps, and the done-markers of these.

The run directory is the interface between the steps: each step reads files of earlier ones and writes only its own
directory. `done.json`, written last, holds the fingerprint of what the step depended on.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.recipe import STEPS, Recipe
from rlhf_trl.run.checkpoints import Hashes, broken, list_checkpoints, set_aside_damaged
from rlhf_trl.run.documents import Done, Env, Started, Stats, environment, now, read_document, seal_outputs
from rlhf_trl.run.files import by_umask, remove, write_json

logger = logging.getLogger(__name__)

# The directory of each step that is not a stage; the report lies in the run's root.
STEP_DIRS = dict.fromkeys(STEPS, ".") | {
    "explore": "exploration", "prepare": "data", "evaluate": "evaluation", "judge": "judge",
    "compare": "comparison", "errors": "errors", "samples": "samples",
}  # fmt: skip
# What `done.json` vouches for, below the step's directory. Other files belong to another step or hold own hashes.
OUTPUTS = dict.fromkeys(STEPS, ("**/*",)) | {
    "judge": ("winrate.json", "prompt_scores.json"), "report": ("report.html", "answers.html"),
    "stage": ("*.json", "*.png", "adapter/**/*"), "whole stage": ("*.json", "*.png", "model/**/*"),
}  # fmt: skip
UNVOUCHED = ("done.json", "started.json")
# The name of the model that all policies of a run start from.
REFERENCE = "reference"


@dataclass
class _One:
    """A file or folder of a run: where it lies below the run's root, and what it holds."""

    path: str
    holds: str

    def __get__(self, run: RunDir, _: type[RunDir]) -> Path:
        return run.root / self.path


class _Each(_One):
    """One for each stage, split, policy, judge or step; its name stands in the place of `{}`."""

    def __get__(self, run: RunDir, _: type[RunDir]) -> Callable[[str], Path]:  # type: ignore[override]
        return lambda name: run.root / self.path.format(name)


class RunDir:
    """The paths of one run, `<root>/<recipe name>/`; `docs/files.md` is the same table."""

    report = _One("report.html", "the page to read: one file, no script")
    answers_page = _One("answers.html", "beside it: the answers, adversarial prompts, errors of reward models")
    recipe = _One("recipe.json", "the resolved recipe")
    env = _One("env.json", "versions, git state, hardware, order of the steps, hashes of outside data and models")
    base = _One("base", "the tiny model, where the recipe asks for `builtin:tiny`")
    start = _Each("starts/{}", "base and adapter merged, where an `init` is a folder; named by the folder's hash")
    exploration = _One("exploration", "`statistics.json`, figures, `samples.md`: lengths, depth, biases of the pairs")
    data = _One("data", "everything that `prepare` writes")
    pairs = _Each("data/{}.jsonl", "`train`, `test`: pairs as `prompt`, `chosen`, `rejected`, `subset`, `row`")
    prompts = _Each("data/prompts_{}.jsonl", "`train`, `test`: every prompt once, as `prompt`, `subset`, `id`")
    tokens = _Each("data/tokens_{}.parquet", "`train`, `test`: token ids of the pairs, row by row, for the stages")
    summary = _One("data/summary.json", "counts of kept and dropped rows, lengths, the split")
    quarantine = _One("data/quarantine.jsonl", "rows that were dropped, each with its reason")
    tokenizer = _One("data/tokenizer", "the tokenizer of all stages")
    adapter = _Each("{}/adapter", "the LoRA adapter of a stage (safetensors) with its tokenizer")
    model = _Each("{}/model", "the full model of a stage: fine-tuned whole, or merged for stages that start from it")
    checkpoints = _Each("{}/checkpoints", "whole checkpoints of a stage, each with a manifest of hashes")
    training_stats = _Each("{}/training_stats.json", "a stage's every logged value, what each means, time and memory")
    training_curves = _Each("{}/training_curves.png", "the same as curves")
    reward_scale = _Each("{}/reward_scale.json", "mean and spread that PPO normalised the reward with")
    tensorboard = _Each("{}/tensorboard", "what a stage reports to tensorboard, and its policy's final numbers")
    started = _Each("{}/started.json", "the fingerprint that the checkpoints of an unfinished stage belong to")
    log = _Each("logs/{}.log", "what a stage's processes printed under `run`, one attempt after the other")
    logs = _One("logs", "the logs of all stages")
    evaluation = _One("evaluation", "everything that `evaluate` writes")
    unfinished = _One(".evaluation", "what an `evaluate` that was interrupted has measured; it goes on from there")
    metrics = _One("evaluation/metrics.json", "every policy, checkpoint and the reference: rewards, gains, KL, length")
    final_results = _One("evaluation/final_results.json", "the main numbers of each policy in one small file")
    answers = _Each("evaluation/completions-{}.jsonl", "the answers, with rewards and KL of each")
    judge_answers = _Each("evaluation/judge-answers-{}.jsonl", "answers of the second decoding, for the judge")
    best_of_n = _One("evaluation/best_of_n.jsonl", "the reference's many answers to each prompt, scored")
    pareto = _One("evaluation/pareto.json", "frontier, hypervolume, best-of-n, gains at equal KL")
    over_optimisation = _One("evaluation/over_optimisation.json", "curves over checkpoints, alarms")
    adversarial = _One("evaluation/adversarial.json", "refusals and unsafe patterns by category")
    adversarial_answers = _One("evaluation/adversarial.jsonl", "the adversarial prompts with all answers")
    figure = _Each("evaluation/{}.png", "figures: scores, KL, Pareto front, over-optimisation, training, trade-off")
    winrate = _One("judge/winrate.json", "win rates and all that qualifies them")
    prompt_scores = _One("judge/prompt_scores.json", "each policy's score against the reference, by prompt")
    judge_replies = _Each("judge/{}.jsonl", "every raw reply of a judge; paid for, so kept when the step runs again")
    comparison = _One("comparison/comparison_results.json", "the methods and the training runs compared")
    comparison_report = _One("comparison/comparison_report.txt", "the same as text")
    comparison_figure = _One("comparison/comparison.png", "the same as a figure")
    error_analysis = _Each("{}/evaluation/error_analysis.json", "the error analysis of a reward stage")
    error_report = _Each("{}/evaluation/error_analysis_report.txt", "the same as text")
    error_plots = _Each("{}/evaluation/error_analysis_plots.png", "the same as figures")
    error_examples = _Each("{}/evaluation/error_examples.jsonl", "the pairs that it shows in full")
    scores = _Each("{}/evaluation/scores.jsonl", "every analysed pair with its scores, lengths and margin")
    reward_comparison = _One("errors/comparison.json", "the reward models side by side")
    samples = _One("samples", "prompts with the answers of each model, JSONL and Markdown")
    known_hashes = _One(".hashes.json", "hashes of files, so that none is read twice to check it; may be deleted")
    holder = _Each(".locks/{}", "who holds a step; left behind by a process that was killed")

    def __init__(self, root: Path):
        self.root = root

    def completions(self, policy: str, step: int | None = None) -> Path:
        """Answers of one policy or of `reference` to the held-out prompts; of its checkpoint at `step`."""
        return self.answers(policy if step is None else f"{policy}-step-{step}")

    def step(self, step: str) -> Path:
        """The directory that a step owns."""
        return self.root / STEP_DIRS.get(step, step)

    def done(self, step: str) -> Path:
        return self.step(step) / "done.json"

    @functools.cached_property
    def hashes(self) -> Hashes:
        return Hashes(self.known_hashes)

    # --- locks: held by one process, released by the operating system when it dies

    def model_lock(self, stage: str) -> FileLock:
        """Held while the adapter of a stage is merged, or `base` is built; no step has an @ in its name."""
        path = self.holder(f"{stage}@model.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    @contextlib.contextmanager
    def lock(self, step: str) -> Iterator[None]:
        """Hold a step for this process, which `holder` names meanwhile; UserError where another process holds it."""
        holder = self.holder(step)
        lock = FileLock(f"{holder}.lock")
        try:
            holder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0.3, poll_interval=0.05)  # longer than the instant for which `is_held` has it
        except Timeout:
            other = read_holder(holder) or "another process"
            problem = f"the step {step!r} is held by {other}"
            raise UserError(str(self.step(step)), problem, "wait for it, or stop it", Exit.DAMAGED) from None
        try:
            holder.write_text(f"process {os.getpid()} on {platform.node()} since {now()}", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def is_held(self, step: str) -> bool:
        """Return whether a process holds the step: try a shared lock, which does not block another reader.

        A process id would not do: it may belong to another machine, or have been reused.
        """
        try:
            with Path(f"{self.holder(step)}.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (FileNotFoundError, NotADirectoryError):
            pass
        return False

    # --- markers

    def fingerprint_of(self, step: str) -> str | None:
        """The fingerprint that the step last finished with, or None."""
        done, _ = self.marker(step)
        return done.fingerprint if done else None

    def marker(self, step: str) -> tuple[Done | None, str | None]:
        """Read the step's `done.json`; and what is wrong with it, if it cannot be read."""
        done, fault = read_document(self.done(step), Done)
        return (done if done and done.step == step else None), fault

    def is_done(self, recipe: Recipe, step: str) -> bool:
        """Return whether the step has finished with exactly what it depends on now, and its outputs are whole."""
        return self.fingerprint_of(step) == recipe.fingerprint(step) and self.fault(step) is None

    def fault(self, step: str) -> str | None:
        """Say what is wrong with a step that was finished: its marker, or the first output that is not whole."""
        done, fault = self.marker(step)
        return next(iter(self._damage(done).values()), None) if done else fault

    def _damage(self, done: Done | None) -> dict[str, str]:
        """The outputs that are not as they were written, each with a sentence."""
        damage = dict(broken(self.root, done.outputs if done else {}, self.hashes.of))
        self.hashes.save()
        return damage

    def finished(self, step: str) -> datetime:
        """When a step that is done was finished."""
        done, fault = self.marker(step)
        if done is None:
            raise UserError(str(self.done(step)), fault or "is missing", f"run the step {step!r} again", Exit.DAMAGED)
        return done.finished

    def mark_done(self, recipe: Recipe, step: str, seconds: float) -> None:
        """Write the step's `done.json` with the hashes of its outputs; the step's last act."""
        folders = [self.step(step)]
        if step == "errors":
            folders += [self.error_analysis(stage).parent for stage in recipe.reward_stages]
        kind = step if step in STEPS else "stage" if self.adapter(step).exists() else "whole stage"
        outputs = {}
        for folder in folders:
            files = {path for pattern in OUTPUTS[kind] for path in folder.glob(pattern) if path.is_file()}
            for file in sorted(files):
                hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
                if not hidden and file.name not in UNVOUCHED:
                    by_umask(file)
                    outputs[file.relative_to(self.root).as_posix()] = self.hashes.of(file)
        marker = {"step": step, "fingerprint": recipe.fingerprint(step), "seconds": round(seconds, 3)}
        marker |= {"finished": now(), "outputs": outputs, "sealed": seal_outputs(outputs)}
        write_json(self.done(step), marker)
        self.hashes.save()

    def require(self, recipe: Recipe, step: str, command: str) -> None:
        """Refuse (UserError) to go on without an earlier step that is finished, current and whole, and the stages that
        it rests on; `command` runs it."""
        for stage in recipe.parents(step) if step in recipe.stages else ():
            self.require(recipe, stage, f"train RECIPE {stage}")
        fingerprint = self.fingerprint_of(step)
        if fingerprint in (None, recipe.fingerprint(step)):
            self.require_whole(step, command)
        if fingerprint != recipe.fingerprint(step):
            state = "is not finished" if fingerprint is None else "was made with other settings"
            remedy = f"run `rlhf-trl {command}` first"
            raise UserError(str(self.step(step)), f"the step {step!r} {state}", remedy, Exit.NOT_RUN)

    def require_whole(self, step: str, command: str) -> None:
        """Refuse (UserError) to read a step whose marker or outputs are damaged; one that is not finished may pass."""
        if fault := self.fault(step):
            problem = f"the step {step!r} has to be made again: {fault}"
            raise UserError(str(self.step(step)), problem, f"run `rlhf-trl {command}` first", Exit.DAMAGED)

    # --- beginning a step

    def begin(self, recipe: Recipe, stage: str) -> None:
        """Prepare the directory of a stage: new, or as an attempt with the same settings left it.

        Such an attempt goes on from its checkpoints, also where its result has been damaged since.
        """
        started, unknown = read_document(self.started(stage), Started)
        stats, unreadable = read_document(self.training_stats(stage), Stats)
        for sentence in filter(None, (unknown, unreadable, self.fault(stage))):
            logger.warning("%s: the stage is made again", sentence)
        # A checkpoint is of no use without what was logged before it.
        logged = stats is not None or not list_checkpoints(self.checkpoints(stage))
        logged &= str(self.training_stats(stage).relative_to(self.root)) not in self._damage(self.marker(stage)[0])
        begun = logged and started is not None and started.fingerprint == recipe.fingerprint(stage)
        if not begun or self.is_done(recipe, stage):
            self.replace(stage)
            write_json(self.started(stage), {"fingerprint": recipe.fingerprint(stage)})
            return
        self.done(stage).unlink(missing_ok=True)
        remove(self.adapter(stage))
        remove(self.model(stage))
        for sentence in set_aside_damaged(self.checkpoints(stage), recipe.stages[stage].trainer):
            logger.warning("passed over an unusable checkpoint: %s", sentence)

    def replace(self, step: str) -> Path:
        """Give a step an empty directory; what a finished stage left there is kept under `replaced/`."""
        path = self.step(step)
        if step not in STEPS and self.done(step).exists():
            (self.root / "replaced").mkdir(exist_ok=True)
            moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}"
            path.rename(self.root / "replaced" / f"{step}-{moment}")
        self.done(step).unlink(missing_ok=True)
        if step != "judge" and path != self.root:
            remove(path)
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- what the run was made with

    def write_provenance(self, recipe: Recipe) -> None:
        """Write the resolved recipe, the environment, the order of the steps and the hashes of the sources."""
        write_json(self.recipe, recipe.model_dump())
        write_json(self.env, {**environment(), "plan": recipe.plan, "sources": recipe.sources})
        self.hashes.save()

    def recorded_recipe(self) -> Recipe:
        """Read the recipe that the run was made with.

        Its fingerprints come from the recorded hashes: they do not depend on the current folder, nor on what has
        become of the sources. UserError where this is no run, or one that is damaged or of a version that differs.
        """
        for path in (self.recipe, self.env):
            if not path.exists():
                remedy = "give the directory of a run, or its name and --runs"
                raise UserError(str(self.root), f"is no run: {path.name} is missing", remedy)
        (recipe, fault), (env, env_fault) = read_document(self.recipe, Recipe), read_document(self.env, Env)
        if recipe and env:
            # Sorted by name in the file; the order in which they train is the plan's.
            stages = {name: recipe.stages[name] for name in env.plan if name in recipe.stages}
            recipe = recipe.model_copy(update={"stages": stages}).hash_by(self.hashes.of, env.sources)
            if recipe.is_linked() and recipe.plan == env.plan and {*recipe.source_names} <= env.sources.keys():
                return recipe
        problem = fault or env_fault or "recipe.json and env.json do not fit together"
        remedy = "`rlhf-trl run RECIPE` writes it again; or it is of another version, which `env.json` names"
        raise UserError(str(self.root), problem, remedy, Exit.DAMAGED)


def read_holder(holder: Path) -> str | None:
    """Who holds a step, or was killed while holding it."""
    with contextlib.suppress(OSError):
        return holder.read_text(encoding="utf-8", errors="replace")
    return None


PLACES = {name: place for name, place in vars(RunDir).items() if isinstance(place, _One)}
"""Every path of a run, with what it holds."""
