"""What an exported adapter is: `lineage.json` (its base and its stages) and `evidence.json` (how good it is).

What is recorded names no path of the machine. A base has a public id, or is shipped with the adapter. A measurement
that is older than the stage that it is of is left out, and said to be missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.check import ADAPTER, CONFIG, LINEAGE, REPOSITORY
from rlhf_trl.compare.evidence import read_winrate
from rlhf_trl.data.files import SUFFIXES
from rlhf_trl.models.base import adapter_path, fetch
from rlhf_trl.models.tokenizer import TINY, base_path
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.safetensors import hash_weights, read_weights
from rlhf_trl.text.format import pointer, resolve

# A base of up to this many bytes is shipped without being asked for.
SMALL = 200_000_000
# Keys of a `model` block that say with what precision the base was held in training.
PRECISION = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
SAMPLES = 3
OWN = ("run", "stage", "parents")  # of the lineage of an adapter from outside the run
TRAINING = ("steps", "rows", "seconds", "seed", "device", "processes", "trainable_parameters")
# Parts of the evidence for a policy that stand in `metrics.json` as they are.
METRICS = ("decoding", "definitions", "reward_model", "gold_model", "reward_stage", "gold_stage")


@dataclass(frozen=True)
class Base:
    """The model below an adapter; without an `id` its files have to be shipped."""

    folder: Path
    id: str | None
    revision: str | None
    stage: str | None  # that fine-tuned it whole, if one did


def require_stage(run: RunDir, stage: str) -> Recipe:
    """Return the recipe of a run; a UserError where it has no such stage, or has not finished it."""
    recipe = run.recorded_recipe()
    if stage not in recipe.stages:
        raise UserError(str(run.root), f"there is no stage {stage!r}", f"the stages are: {', '.join(recipe.stages)}")
    run.require(recipe, stage, f"train RECIPE {stage}")
    return recipe


def require_current(run: RunDir, stage: str) -> Recipe:
    """As `require_stage`, for it and all that it rests on; refuse one that is older than its own parent, too."""
    recipe = require_stage(run, stage)
    names = [*recipe.parents(stage), stage]
    for name in names:
        require_stage(run, name)
    for name in names:
        for parent in (recipe.stages[name].parent, recipe.stages[name].reward):
            if parent is not None and run.finished(name) < run.finished(parent):
                problem = f"its parent {parent!r} was trained again afterwards"
                raise UserError(str(run.step(name)), problem, f"train {name!r} again")
    return recipe


def lora_chain(recipe: Recipe, stage: str) -> list[str]:
    """List the stages whose adapters lie on one base, the lowest first, up to `stage`, which must have one.

    The lowest may be the folder of an adapter outside the run. A continued stage takes the place of what it continues.
    """
    if not recipe.model_block(stage).get("use_peft"):
        problem = "the stage was fine-tuned whole: it is a model, and has no adapter"
        raise UserError(f"stages.{stage}", problem, "share its folder `model/`, or export a stage that starts from it")
    chain = [stage]
    while (init := recipe.below(chain[0])) and (init not in recipe.stages or recipe.model_block(init).get("use_peft")):
        chain.insert(0, init)
    return chain


def find_base(
    recipe: Recipe, run: RunDir, first: str, base_id: str | None, revision: str | None, with_base: bool
) -> Base:
    """Find the base that the adapter of `first`, as in `lora_chain`, lies on, and decide: is it named or shipped?

    UserError where the base cannot be reached, or is large, has no public id, and `with_base` is not given."""
    maker, stage = recipe.maker(first), recipe.below(first)
    block = recipe.model_block(maker) if maker in recipe.stages else recipe.model
    name = str(block["model_name_or_path"])
    if base_id is not None and not REPOSITORY.fullmatch(base_id):
        raise UserError("--base-id", f"{base_id!r} is not the id of a model", "give OWNER/NAME, as on the Hub")
    if stage is not None:
        folder = run.model(stage)
    elif name == TINY or Path(name).is_dir():
        folder = Path(base_path(block, run))
    else:
        folder = fetch(name, str(block.get("model_revision", "main")))
        base_id, revision = name, folder.name
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    if not with_base and base_id is None and size > SMALL:
        problem = f"the base has no public id that is known, and its {size / 1e6:,.0f} MB would have to be shipped"
        remedy = "name it with --base-id ID (and --revision), or ship it with --with-base"
        raise UserError(str(folder), problem, remedy)
    return Base(folder, None, None, stage) if with_base or base_id is None else Base(folder, base_id, revision, stage)


def describe(recipe: Recipe, run: RunDir, stages: Sequence[str], base: Base, folder: Path) -> dict[str, Any]:
    """Describe where an export comes from that holds the adapters of `stages`, the lowest first."""
    stage, data, document = stages[-1], recipe.data, recipe.model_dump()
    block, config = recipe.model_block(stage), read_json(folder / CONFIG)
    source = f"./{data.source}" if Path(data.source).exists() else data.source  # named as one of the Hub is, or not
    if document["judge"]:
        document["judge"]["base_url"] = None  # the address of a server of the house
    return {
        "run": recipe.name, "stage": stage, "trainer": recipe.stages[stage].trainer,
        "kind": kind_of(recipe, stage),
        "base": {"id": base.id, "revision": base.revision, "shipped": base.id is None, "stage": base.stage,
                 "weights": hash_weights(read_weights(base.folder)),
                 "held_in": {key: block.get(key) for key in PRECISION}},
        "combined": [label(recipe, name) for name in stages],
        "continued": label(recipe, str(own.init)) if (own := recipe.stages[stage]).continue_ else None,
        "rank": config["r"], "dora": config["use_dora"],
        "parents": [*_outsiders(recipe, run, stage),
                    *(_parent(recipe, run, name, relation) for name, relation in recipe.parents(stage).items())],
        "weights": {label(recipe, name): hash_file(adapter_path(recipe, run, name) / ADAPTER) for name in stages},
        "recipe": without_paths(document),
        "fingerprint": run.fingerprint_of(stage),
        "data": {"source": without_paths(source), "revision": data.revision, "half": recipe.half_of(stage),
                 "train": hash_file(run.pairs("train")), "test": hash_file(run.pairs("test")),
                 "rows_kept": read_json(run.summary)["rows_kept"], "fingerprint": run.fingerprint_of("prepare")},
        "seed": recipe.args_of(stage)["seed"],
        "trained_with": read_json(run.training_stats(stage))["summary"]["environment"],
    }  # fmt: skip


def kind_of(recipe: Recipe, stage: str) -> str:
    """Return what a stage trains: a `reward` model or a `policy`."""
    return "reward" if recipe.stages[stage].trainer == "reward" else "policy"


def _parent(recipe: Recipe, run: RunDir, name: str, relation: str) -> dict[str, Any]:
    adapted = bool(recipe.model_block(name).get("use_peft"))
    weights = sorted((run.adapter(name) if adapted else run.model(name)).glob("*.safetensors"))
    return {"stage": name, "trainer": recipe.stages[name].trainer, "relation": relation, "adapter": adapted,
            "files": {file.name: hash_file(file) for file in weights}, "fingerprint": run.fingerprint_of(name),
            "seed": recipe.args_of(name)["seed"]}  # fmt: skip


def label(recipe: Recipe, name: str) -> str:
    """What an export calls a stage, or the folder of an adapter outside the run, whose place it does not tell."""
    return name if name in recipe.stages else f"local:{Path(name).name}"


def _outsiders(recipe: Recipe, run: RunDir, stage: str) -> Iterator[dict[str, Any]]:
    """The adapters outside the run that a stage rests on; one that was exported brings its own lineage."""
    stages = [recipe.stages[name] for name in (*recipe.parents(stage), stage)]
    for init in dict.fromkeys(own.outside for own in stages if own.outside):
        folder = adapter_path(recipe, run, init)
        made = read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else {}
        yield {"stage": label(recipe, init), "trainer": made.get("trainer"), "relation": "init", "adapter": True,
               "files": {ADAPTER: hash_file(folder / ADAPTER)}, "fingerprint": made.get("fingerprint"),
               "seed": made.get("seed"),
               "lineage": made and {"file": hash_file(folder / LINEAGE), **{key: made.get(key) for key in OWN}},
               }  # fmt: skip


def without_paths(value: Any) -> Any:
    """Replace every text that is a path by `local:` and its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", ".")) or value.endswith(SUFFIXES) or ("/" in value and Path(value).exists())
    ):
        return f"local:{Path(value).name}"
    return value


def gather(recipe: Recipe, run: RunDir, stage: str) -> dict[str, Any]:
    """Gather the evidence for the adapter of a stage.

    A part that was not measured is None, and `missing` says why; `sources` has the address of each part in the run.
    """
    evidence = _Evidence(run, stage)
    summary = evidence.add("training", run.training_stats(stage), "summary")
    evidence.parts["training"] = {key: summary[key] for key in TRAINING}
    if kind_of(recipe, stage) == "reward":
        evidence.add_analysis()
    elif recipe.stages[stage].trainer == "sft":
        reason = "it is what the policies of its run start from, and are compared with"
        evidence.miss(reason, "policy", "judge", "reward_model", "gold_model")
    elif not evidence.is_stale("evaluate", "policy", "reward_model", "gold_model", "judge"):
        evidence.add_evaluation()
        evidence.add_judge()
    return {**evidence.parts, "missing": evidence.missing, "sources": evidence.sources}


class _Evidence:
    """The parts gathered so far, the address of each, and why others are missing."""

    def __init__(self, run: RunDir, stage: str):
        self.run, self.stage, self.parts = run, stage, dict[str, Any]()
        self.missing, self.sources = dict[str, str](), dict[str, str]()

    def add(self, name: str, file: Path, *keys: str | int) -> Any:
        """Add and return the value at an address in the run; of JSON lines, the first rows."""
        content = {"": read_jsonl(file)[:SAMPLES] if file.suffix == ".jsonl" else read_json(file)}
        self.parts[name] = resolve(content, "", keys)
        self.sources[name] = pointer(file.relative_to(self.run.root).as_posix(), keys)
        return self.parts[name]

    def miss(self, reason: str, name: str, *others: str) -> None:
        """Leave parts out, for a reason that is told under the name of the first."""
        self.missing[name] = reason
        self.parts |= dict.fromkeys((name, *others))

    def is_stale(self, step: str, *parts: str) -> bool:
        """Tell whether a step has no results of the stage as it is now, and leave their parts out."""
        if not self.run.done(step).exists():
            self.miss(f"the step {step!r} was not run", *parts)
            return True
        self.run.require_whole(step, f"{step} RECIPE")
        stale = self.run.finished(step) < self.run.finished(self.stage)
        if stale:
            self.miss(f"the stage was trained again after the step {step!r}", *parts)
        return stale

    def add_analysis(self) -> None:
        if not self.is_stale("errors", "analysis"):
            found = self.add("analysis", self.run.error_analysis(self.stage))
            more = {"subsets": found["breakdowns"]["subset"], "gap": found["calibration"]["gap"]}
            kept = {key: found[key] for key in ("overall", "pairs", "findings", "definitions")}
            self.parts["analysis"] = kept | more

    def add_evaluation(self) -> None:
        run, stage = self.run, self.stage
        for part, name in (("policy", stage), ("reference", REFERENCE)):
            self.add(part, run.metrics, "policies", name).pop("distributions", None)  # which are for figures
        for key in METRICS:
            self.add(key, run.metrics, key)
        alarms = [alarm for alarm in self.add("alarms", run.over_optimisation, "alarms") if alarm["policy"] == stage]
        self.parts["alarms"], self.sources["alarms_checked"] = alarms, self.sources["alarms"]
        self.parts["alarms_checked"] = sum(alarm["value"] is not None for alarm in alarms)
        front = self.add("front", run.final_results, "policies", stage, "on_front")
        self.parts["front"] = {key: front.get(key, False) for key in ("reward", "gold")}
        starts = {row["id"]: row["answer"] for row in read_jsonl(run.completions(REFERENCE))}
        kept = ("id", "subset", "prompt", "answer")
        rows = [{key: row[key] for key in kept} for row in self.add("samples", run.completions(stage))]
        self.parts["samples"] = [row | {"reference": starts[row["id"]]} for row in rows]

    def add_judge(self) -> None:
        run = self.run
        found = read_winrate(run)
        self.parts["judge"] = None
        if found is None:
            self.miss("no judge was asked", "judge")
        elif found["status"] != "complete":
            self.miss("the judge was not run to its end", "judge")  # its reason may name a server of one's own
        elif found["evaluation"] != run.fingerprint_of("evaluate"):
            self.miss("the judge has seen other answers", "judge")
        else:
            for place, entry in enumerate(found["win_rates"]):
                if (entry["a"], entry["b"]) == (self.stage, REFERENCE):
                    self.add("judge", run.winrate, "win_rates", place)
                    rate = {key: entry[key] for key in ("win_rate", "n", "length_controlled")}
                    judge = {"judge": without_paths(found["judge"]), "rate": rate}
                    self.parts["judge"] = judge | {key: found[key] for key in ("calibration", "habits")}
