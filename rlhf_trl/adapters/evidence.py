"""What an exported adapter is: `lineage.json` (where it comes from) and `evidence.json` (how good it is).

What is recorded names no path of the machine. A measurement that is older than the stage that it is of is left out,
and said to be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.base import Base
from rlhf_trl.adapters.files import ADAPTER, CONFIG, TEMPLATE
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.format import pointer, resolve

FORMAT = 1
# Keys of a `model` block that say with what precision the base was held in training.
PRECISION = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
SAMPLES = 3
TRAINING = ("steps", "rows", "seconds", "seed", "device", "processes", "trainable_parameters")
# Parts of the evidence for a policy that stand in `metrics.json` as they are.
METRICS = ("decoding", "definitions", "reward_model", "gold_model", "reward_stage", "gold_stage")


def describe(recipe: Recipe, run: RunDir, stages: Sequence[str], base: Base, folder: Path) -> dict[str, Any]:
    """Describe where an export comes from that holds the adapters of `stages`, the lowest first."""
    stage, data = stages[-1], recipe.data
    block, trainer, document = recipe.model_block(stage), recipe.stages[stage].trainer, recipe.model_dump()
    if document["judge"]:
        document["judge"]["base_url"] = None  # the address of a server of the house
    return {
        "format": FORMAT, "run": recipe.name, "stage": stage, "trainer": trainer, "kind": kind_of(recipe, stage),
        "base": {"id": base.id, "revision": base.revision, "shipped": base.id is None, "stage": base.stage,
                 "weights": base.weights, "model_type": read_json(base.folder / "config.json")["model_type"],
                 "held_in": {key: block.get(key) for key in PRECISION}},
        "combined": list(stages),
        "rank": read_json(folder / CONFIG)["r"],
        "parents": [_parent(recipe, run, name, relation) for name, relation in recipe.parents(stage).items()],
        "weights": {name: hash_file(run.adapter(name) / ADAPTER) for name in stages},
        "recipe": _without_paths(document),
        "fingerprint": run.fingerprint_of(stage),
        "data": {"source": _without_paths(data.source), "revision": data.revision, "half": recipe.half_of(stage),
                 "train": hash_file(run.pairs("train")), "test": hash_file(run.pairs("test")),
                 "rows_kept": read_json(run.summary)["rows_kept"], "fingerprint": run.fingerprint_of("prepare")},
        "template": hash_file(folder / TEMPLATE),
        "seed": recipe.args_of(stage)["seed"],
        "trained_with": read_json(run.training_stats(stage))["summary"]["environment"],
    }  # fmt: skip


def kind_of(recipe: Recipe, stage: str) -> str:
    """Return what a stage trains: a `reward` model or a `policy`."""
    return "reward" if recipe.stages[stage].trainer == "reward" else "policy"


def _parent(recipe: Recipe, run: RunDir, name: str, relation: str) -> dict[str, Any]:
    adapted = bool(recipe.model_block(name).get("use_peft"))
    weights = sorted((run.adapter(name) if adapted else run.model(name)).glob("*.safetensors"))
    return {
        "stage": name, "trainer": recipe.stages[name].trainer, "relation": relation, "adapter": adapted,
        "files": {file.name: hash_file(file) for file in weights},
        "fingerprint": run.fingerprint_of(name),
        "seed": recipe.args_of(name)["seed"],
    }  # fmt: skip


def _without_paths(value: Any) -> Any:
    """Replace every text that is a path by `local:` and its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or ("/" in value and Path(value).exists())):
        return f"local:{Path(value).name}"
    return value


def gather(recipe: Recipe, run: RunDir, stage: str) -> dict[str, Any]:
    """Gather the evidence for the adapter of a stage.

    A part that was not measured is None, and `missing` says why; `sources` has the address of each part in the run.
    """
    evidence = _Evidence(run)
    summary = evidence.add("training", run.training_stats(stage), "summary")
    evidence.parts["training"] = {key: summary[key] for key in TRAINING}
    if kind_of(recipe, stage) == "reward":
        _add_analysis(evidence, run, stage)
    elif recipe.stages[stage].trainer == "sft":
        reason = "it is what the policies of its run start from, and are compared with"
        evidence.miss(reason, "policy", "judge", "reward_model", "gold_model")
    else:
        _add_evaluation(evidence, run, stage)
        _add_judge(evidence, run, stage)
    return {**evidence.parts, "missing": evidence.missing, "sources": evidence.sources}


class _Evidence:
    """The parts gathered so far, the address of each, and why others are missing."""

    def __init__(self, run: RunDir):
        self.root, self.parts = run.root, dict[str, Any]()
        self.missing, self.sources = dict[str, str](), dict[str, str]()

    def add(self, name: str, file: Path, *keys: str | int) -> Any:
        """Add and return the value at an address in the run; of JSON lines, the first rows."""
        content = {"": read_jsonl(file)[:SAMPLES] if file.suffix == ".jsonl" else read_json(file)}
        self.parts[name] = resolve(content, "", keys)
        self.sources[name] = pointer(file.relative_to(self.root).as_posix(), keys)
        return self.parts[name]

    def miss(self, reason: str, name: str, *others: str) -> None:
        """Leave parts out, for a reason that is told under the name of the first."""
        self.missing[name] = reason
        self.parts |= dict.fromkeys((name, *others))


def _add_analysis(evidence: _Evidence, run: RunDir, stage: str) -> None:
    if reason := _stale(run, "errors", stage):
        evidence.miss(reason, "analysis")
        return
    found = evidence.add("analysis", run.error_analysis(stage))
    analysis = {key: found[key] for key in ("overall", "pairs", "findings", "definitions")}
    more = {"subsets": found["breakdowns"]["subset"], "gap": found["calibration"]["gap"]}
    evidence.parts["analysis"] = analysis | more


def _add_evaluation(evidence: _Evidence, run: RunDir, stage: str) -> None:
    if reason := _stale(run, "evaluate", stage):
        evidence.miss(reason, "policy", "reward_model", "gold_model")
        return
    for part, name in (("policy", stage), ("reference", REFERENCE)):
        evidence.add(part, run.metrics, "policies", name).pop("distributions", None)  # which are for figures
    for key in METRICS:
        evidence.add(key, run.metrics, key)
    alarms = evidence.add("alarms", run.over_optimisation, "alarms")
    evidence.parts["alarms"] = [alarm for alarm in alarms if alarm["policy"] == stage]
    evidence.add("alarms_checked", run.over_optimisation, "alarms")
    evidence.parts["alarms_checked"] = sum(alarm["value"] is not None for alarm in evidence.parts["alarms"])
    front = evidence.add("front", run.final_results, "policies", stage, "on_front")
    evidence.parts["front"] = {key: front.get(key, False) for key in ("reward", "gold")}
    starts = {row["id"]: row["answer"] for row in read_jsonl(run.completions(REFERENCE))}
    rows = evidence.add("samples", run.completions(stage))
    kept = [{key: row[key] for key in ("id", "subset", "prompt", "answer")} for row in rows]
    evidence.parts["samples"] = [row | {"reference": starts[row["id"]]} for row in kept]


def _add_judge(evidence: _Evidence, run: RunDir, stage: str) -> None:
    run.require_whole("judge", "judge RECIPE")
    found = read_json(run.winrate) if run.winrate.exists() else None
    evidence.parts["judge"] = None
    if found is None:
        evidence.miss("no judge was asked", "judge")
    elif found["status"] != "complete":
        evidence.miss("the judge was not run to its end", "judge")  # its reason may name a server of one's own
    elif evidence.parts["policy"] is None or found["evaluation"] != run.fingerprint_of("evaluate"):
        evidence.miss("the judge has seen other answers", "judge")
    else:
        for place, entry in enumerate(found["win_rates"]):
            if (entry["a"], entry["b"]) == (stage, REFERENCE):
                evidence.add("judge", run.winrate, "win_rates", place)
                rate = {key: entry[key] for key in ("win_rate", "n", "length_controlled")}
                judge = {"judge": _without_paths(found["judge"]), "rate": rate}
                evidence.parts["judge"] = judge | {key: found[key] for key in ("calibration", "habits")}


def _stale(run: RunDir, step: str, stage: str) -> str | None:
    """Why a step's results are not of the stage as it is now; None if they are."""
    if not run.done(step).exists():
        return f"the step {step!r} was not run"
    run.require_whole(step, f"{step} RECIPE")
    stale = run.finished(step) < run.finished(stage)
    return f"the stage was trained again after the step {step!r}" if stale else None
