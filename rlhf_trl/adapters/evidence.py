"""How good an exported adapter is: what the run has measured of it, gathered in one JSON document.

Reads the JSON and JSONL files of a run directory; writes nothing. Each part of the document has, under `sources`, the
address of where it was read. A measurement that is older than the stage it is of is left out, and said to be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.format import pointer

SAMPLES = 3
# Parts of a summary that are for figures.
NOT_CARRIED = ("distributions",)
TRAINING = ("steps", "rows", "seconds", "seed", "device", "processes", "trainable_parameters")


def gather(recipe: Recipe, run: RunDir, stage: str) -> dict[str, Any]:
    """Gather the evidence for the adapter of a stage.

    Returns:
        `training`; for a policy `policy`, `reference`, `decoding`, `definitions`, `alarms`, `alarms_checked`, `front`,
        `reward_model`, `gold_model`, `judge`, `samples`; for a reward model `analysis`. A part that was not measured
        is None, and `missing` says why. `sources` has the address of each part in the run directory.
    """
    document = _Document(run)
    stats = read_json(run.training_stats(stage))["summary"]
    document.add("training", {key: stats[key] for key in TRAINING}, run.training_stats(stage), "summary")
    word = recipe.stages[stage].trainer
    if word == "reward":
        _add_analysis(document, run, stage)
    elif word == "sft":
        document.missing["policy"] = "it is what the policies of its run start from, and are compared with"
        document.parts |= dict.fromkeys(("policy", "judge", "reward_model", "gold_model"))
    else:
        _add_evaluation(document, run, stage)
        _add_judge(document, run, stage)
    return {**document.parts, "missing": document.missing, "sources": document.sources}


def without_paths(value: Any) -> Any:
    """Replace every text that is a path by `local:` and its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or ("/" in value and Path(value).exists())):
        return f"local:{Path(value).name}"
    return value


class _Document:
    """What was found so far."""

    def __init__(self, run: RunDir):
        self.root = run.root
        self.parts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def add(self, name: str, value: Any, file: Any, *keys: str | int) -> None:
        self.parts[name] = value
        self.sources[name] = pointer(file.relative_to(self.root).as_posix(), keys)


def _add_analysis(document: _Document, run: RunDir, stage: str) -> None:
    document.parts["analysis"] = None
    if reason := _stale(run, "errors", stage):
        document.missing["analysis"] = reason
        return
    found = read_json(run.error_analysis(stage))
    analysis = {key: found[key] for key in ("overall", "pairs", "findings", "definitions")}
    analysis["subsets"] = found["breakdowns"]["subset"]
    analysis["gap"] = found["calibration"]["gap"]
    document.add("analysis", analysis, run.error_analysis(stage))


def _add_evaluation(document: _Document, run: RunDir, stage: str) -> None:
    if reason := _stale(run, "evaluate", stage):
        document.missing["policy"] = reason
        document.parts |= dict.fromkeys(("policy", "reward_model", "gold_model"))
        return
    metrics = read_json(run.metrics)
    for part, name in (("policy", stage), ("reference", REFERENCE)):
        summary = {key: value for key, value in metrics["policies"][name].items() if key not in NOT_CARRIED}
        document.add(part, summary, run.metrics, "policies", name)
    for key in ("decoding", "definitions", "reward_model", "gold_model", "reward_stage", "gold_stage"):
        document.add(key, metrics[key], run.metrics, key)
    alarms = read_json(run.over_optimisation)["alarms"] if run.over_optimisation.exists() else []
    own = [alarm for alarm in alarms if alarm["policy"] == stage and alarm["step"] is None]
    document.add("alarms", own, run.over_optimisation, "alarms")
    judged = sum(alarm["value"] is not None for alarm in own)
    document.add("alarms_checked", judged, run.over_optimisation, "alarms")
    front = read_json(run.final_results)["policies"][stage]["on_front"]
    document.add("front", {key: front.get(key, False) for key in ("reward", "gold")}, run.final_results,
                 "policies", stage, "on_front")  # fmt: skip
    rows = read_jsonl(run.completions(stage))[:SAMPLES]
    starts = {row["id"]: row["answer"] for row in read_jsonl(run.completions(REFERENCE))}
    samples = [{**{key: row[key] for key in ("id", "subset", "prompt", "answer")},
                "reference": starts[row["id"]]} for row in rows]  # fmt: skip
    document.add("samples", samples, run.completions(stage))


def _add_judge(document: _Document, run: RunDir, stage: str) -> None:
    document.parts["judge"] = None
    if not run.winrate.exists():
        document.missing["judge"] = "no judge was asked"
        return
    found = read_json(run.winrate)
    if found["status"] != "complete":
        document.missing["judge"] = f"the judge was not run to its end: {found['reason']}"
        return
    if document.parts["policy"] is None or found["evaluation"] != run.fingerprint_of("evaluate"):
        document.missing["judge"] = "the judge has seen other answers"
        return
    for place, entry in enumerate(found["win_rates"]):
        if (entry["a"], entry["b"]) == (stage, REFERENCE):
            rate = {key: entry[key] for key in ("win_rate", "n", "length_controlled")}
            parts = {
                "judge": without_paths(found["judge"]),
                "calibration": found["calibration"],
                "habits": found["habits"],
            }
            document.add("judge", {**parts, "rate": rate}, run.winrate, "win_rates", place)


def _stale(run: RunDir, step: str, stage: str) -> str | None:
    """Why a step's results are not of the stage as it is now; None if they are."""
    if not run.done(step).exists():
        return f"the step {step!r} was not run"
    stale = run.finished(step) < run.finished(stage)
    return f"the stage was trained again after the step {step!r}" if stale else None
