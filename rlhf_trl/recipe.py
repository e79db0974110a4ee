"""The recipe: one YAML file that describes one experiment.

Reads the file and the `--set` overrides, expands sweeps and finds every problem at once, without importing torch.
What the libraries own (`model:` and every stage's `args:`) stays verbatim; `rlhf_trl.checks` looks it over against
their source.

    recipe = load_recipe(Path("recipes/demo.yaml"), ["stages.dpo.args.beta=0.3"])
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from rlhf_trl.document import Problem as Problem
from rlhf_trl.document import RecipeError as RecipeError
from rlhf_trl.document import UserError as UserError
from rlhf_trl.document import meant, read_document
from rlhf_trl.options import nearest, show

Trainer = Literal["sft", "reward", "dpo", "grpo", "ppo"]
POLICY_TRAINERS = ("dpo", "grpo", "ppo")
STEPS = ("explore", "prepare", "evaluate", "report")
# Names of other directories and words of a run; a stage that took one would write over it.
RESERVED = {*STEPS, "data", "exploration", "evaluation", "comparison", "samples", "base", "reference", "judge", "run"}
RESERVED |= {"replaced", "report.html", "recipe.json", "env.json"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")
MAX_STAGES = 100


def _valid_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("a name starts with a letter or digit and holds only letters, digits and . _ = - (up to 128)")
    return name


def _single_value(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("a sweep lists single values: numbers, texts, true or false")
    return value


Name = Annotated[str, AfterValidator(_valid_name)]
Scalar = Annotated[Any, AfterValidator(_single_value)]


class Strict(BaseModel):
    """Refuse unknown keys and silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Strict):
    """Where the preference pairs come from and how they are cleaned and split."""

    source: str = Field(default="Anthropic/hh-rlhf", min_length=1)
    """A Hub id, a local file or folder (.jsonl, .jsonl.gz, .json, .parquet, .csv), or `builtin:demo`."""
    revision: str = "main"
    """Branch, tag or commit of a Hub source."""
    subsets: list[str] = []
    """Folders of the Hub source, or files (without their extension) of a local folder; empty means all."""
    max_rows: int | None = Field(default=None, ge=1)
    """Keep this many rows, chosen by a seeded hash, so that the choice does not depend on their order."""
    max_length: int = Field(default=512, ge=16)
    """Tokens of prompt and answer together."""
    min_answer_chars: int = Field(default=1, ge=1)
    """Answers with fewer characters are dropped."""
    tie_threshold: float = Field(default=0.98, gt=0, le=1)
    """Pairs whose answers are at least this similar (normalised Indel similarity, 0-1) are ties and are dropped."""
    test_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the prompts that is held out."""
    max_dropped_fraction: float = Field(default=0.2, ge=0, le=1)
    """`prepare` stops when a larger share of the rows is dropped."""


class Stage(Strict):
    """One training run."""

    trainer: Trainer
    init: Name | None = None
    """The stage whose model this one starts from; its reference, too. Without it, the recipe's base model."""
    reward: Name | None = None
    """The reward stage that scores the answers (grpo and ppo)."""
    model: dict[str, Any] = {}
    """Keys of the recipe's `model` block that differ for this stage."""
    args: dict[str, Any] = {}
    """Options of the trainer's own config class, verbatim."""
    sweep: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = {}
    """Option -> values; expands to one stage for each combination."""


class Evaluation(Strict):
    """What is measured on held-out prompts, for the reference and for every policy."""

    reward: Name | None = None
    """The reward stage that scores the answers."""
    prompts: int = Field(default=200, ge=2)
    max_new_tokens: int = Field(default=128, ge=1)
    generation_batch_size: int = Field(default=16, ge=1)
    score_batch_size: int = Field(default=16, ge=1)


class Recipe(Strict):
    """One experiment, resolved: sweeps are expanded and every link names a stage."""

    name: Name
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: dict[str, Any]
    data: Data = Data()
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def policies(self) -> list[str]:
        """The stages that align a policy, in recipe order."""
        return [name for name, stage in self.stages.items() if stage.trainer in POLICY_TRAINERS]

    def model_block(self, stage: str) -> dict[str, Any]:
        """The `trl.ModelConfig` values of a stage."""
        return {**self.model, **self.stages[stage].model}

    def args_of(self, stage: str) -> dict[str, Any]:
        """The trainer options of a stage; the recipe's seed is the default."""
        return {"seed": self.seed, **self.stages[stage].args}

    def fingerprint(self, step: str) -> str:
        """Hash exactly what a step depends on.

        Args:
            step: one of `STEPS`, or the name of a stage.

        Returns:
            64 hexadecimal digits (SHA-256).
        """
        text = json.dumps(self._dependencies(step), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _dependencies(self, step: str) -> dict[str, Any]:
        base = {key: self.model.get(key) for key in ("model_name_or_path", "model_revision")}
        if step in ("explore", "prepare"):
            hashes = [self._hash(self.data.source), self._hash(str(base["model_name_or_path"]))]
            return {"step": step, "seed": self.seed, "data": self.data.model_dump(), "base": base, "hashes": hashes}
        if step == "evaluate":
            inputs = {name: self.fingerprint(name) for name in (*self.policies, self.evaluation.reward) if name}
            return {"step": step, "seed": self.seed, "evaluation": self.evaluation.model_dump(),
                    "data": self.fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "report":
            inputs = {name: self.fingerprint(name) for name in ("explore", "prepare", *self.stages, "evaluate")}
            return {"step": step, "name": self.name, "inputs": inputs}
        stage = self.stages[step]
        return {
            "trainer": stage.trainer,
            "args": self.args_of(step),
            "model": self.model_block(step),
            "data": self.fingerprint("prepare"),
            "init": stage.init and self.fingerprint(stage.init),
            "reward": stage.reward and self.fingerprint(stage.reward),
        }

    def _hash(self, source: str) -> str:
        # Once for each loaded recipe: a source that changes while a step reads it is not taken for what was read.
        if source not in self._hashes:
            self._hashes[source] = source_hash(source)
        return self._hashes[source]


def source_hash(source: str) -> str:
    """Hash the content of a local file or folder (of weights, their size alone); a Hub id is its own name."""
    path = Path(source)
    if source.startswith("builtin:"):
        path = Path(__file__).parent / "data" / "demo.jsonl.gz"
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    except OSError:  # no path at all, such as a text that is too long for one
        files = []
    if not files:
        return source
    digest = hashlib.sha256()
    for file in files:
        weights = file.suffix in (".safetensors", ".bin")
        content = f"{file.stat().st_size} bytes".encode() if weights else hashlib.sha256(file.read_bytes()).digest()
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def load_recipe(path: Path, overrides: Sequence[str] = (), processes: int = 1) -> Recipe:
    """Read a recipe, lay the overrides over it, and check it whole.

    Args:
        path: the YAML file.
        overrides: `path.to.key=value` texts; the value is read as YAML.
        processes: number of training processes, for the checks on batch sizes.

    Raises:
        RecipeError: with every problem found, each with its place (file, line and key).
    """
    from rlhf_trl.checks import check_block, check_recipe

    document = read_document(path)
    for override in overrides:
        document.override(override)
    document.find_secrets()
    recipe, problems = _parse(document.raw)
    if recipe is not None:
        wrong = {problem.place for problem in (*document.problems, *problems)} | meant(problems)
        problems += check_recipe(recipe, list(document.raw["stages"]), wrong, processes)
    elif isinstance(document.raw.get("model"), dict):
        problems += check_block("model", "model", document.raw["model"])
    if problems or document.problems:
        raise document.error(problems)
    assert recipe is not None
    return expand_sweeps(recipe)


def combinations(name: str, stage: Stage) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the options of each stage that a swept stage stands for."""
    for values in itertools.product(*stage.sweep.values()):
        chosen = dict(zip(stage.sweep, values, strict=True))
        yield name + "".join(f"-{key}={value}" for key, value in chosen.items()), {**stage.args, **chosen}


def expand_sweeps(recipe: Recipe) -> Recipe:
    """Turn every swept stage into one ordinary stage for each combination: `dpo` -> `dpo-beta=0.1`, `dpo-beta=0.3`."""
    stages = {
        full_name: stage.model_copy(update={"args": args, "sweep": {}})
        for name, stage in recipe.stages.items()
        for full_name, args in combinations(name, stage)
    }
    return recipe.model_copy(update={"stages": stages})


def _parse(raw: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Parse the document; on mistakes, also try it without them so that the later checks can find more."""
    try:
        return Recipe.model_validate(raw), _reserved_names(raw)
    except ValidationError as error:
        rest = copy.deepcopy(raw)
        problems = _reserved_names(raw)
        for item in error.errors():
            problems.append(_describe(item))
            _remove(rest, [str(part) for part in item["loc"]])
        try:
            return Recipe.model_validate({"name": "unnamed", "model": {}, **rest}), problems
        except ValidationError:
            return None, problems


def _reserved_names(raw: dict[str, Any]) -> list[Problem]:
    stages = raw.get("stages")
    return [
        Problem(f"stages.{name}", f"{name!r} is the name of another part of a run", f"call the stage {name}_stage")
        for name in (stages if isinstance(stages, dict) else ())
        if str(name) in RESERVED
    ]


SECTIONS: dict[str, type[Strict]] = {"data": Data, "evaluation": Evaluation}
EXAMPLES = {
    "name": "`name: my-run`, the folder of the run",
    "model": "`model: {model_name_or_path: ...}`",
    "stages": "`stages:` with at least one stage below it",
    "trainer": f"`trainer:` (one of {', '.join(get_args(Trainer))})",
}
# Kind of pydantic's error -> what to do.
TYPE_REMEDIES = {
    "string_type": "give a text; put quotes around it",
    "int_type": "give a whole number",
    "float_type": "give a number",
    "list_type": "give a list, such as [a, b]",
    "dict_type": "write `key: value` lines here, or remove the key",
    "model_type": "write `key: value` lines here, or remove the key",
    "string_too_short": "give a text",
    "too_short": "give at least one value",
}


def _describe(error: Any) -> Problem:
    loc = [str(part) for part in error["loc"] if part != "[key]"]
    place = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return Problem(place, f"unknown key {loc[-1]!r}", _key_remedy(loc))
    if error["type"] == "missing":
        return Problem(place, "is missing", f"add {EXAMPLES[loc[-1]]}")
    value = show(error["input"])
    if error["type"] == "literal_error":
        choices = get_args(Trainer)
        near = nearest(str(error["input"]), choices)
        remedy = f"did you mean {near!r}?" if near else f"choose one of: {', '.join(choices)}"
        return Problem(place, f"{value} is not a trainer", remedy)
    if error["type"] == "value_error":
        return Problem(place, f"{value} is not valid", error["msg"].removeprefix("Value error, "))
    if error["input"] in (None, {}) and place in EXAMPLES:
        return Problem(place, "is empty", f"add {EXAMPLES[place]}")
    if error["type"] in TYPE_REMEDIES:
        problem = "is empty" if error["input"] in (None, "", [], {}) else f"{value} is not valid"
        remedy = f"write {EXAMPLES[place]}" if place in ("model", "stages") else TYPE_REMEDIES[error["type"]]
        return Problem(place, problem, remedy)
    return Problem(place, f"{value} is not valid", f"it {error['msg'].removeprefix('Input ')}")


def _key_remedy(loc: list[str]) -> str:
    section = Stage if loc[0] == "stages" else SECTIONS.get(loc[0], Recipe)
    known = list(section.model_fields)
    near = nearest(loc[-1], known)
    if near:
        return f"did you mean {near!r}?"
    hint = "; options of the trainer go under `args:`" if section is Stage else ""
    return f"the keys here are: {', '.join(known)}{hint}"


def _remove(raw: Any, loc: list[str]) -> None:
    """Delete the offending key, with it a whole list, or the whole stage where its trainer is the offence."""
    loc = [part for part in loc if part != "[key]"]
    if loc[0] == "stages" and loc[2:] == ["trainer"]:
        loc = loc[:2]
    for part in loc[:-1]:
        if not isinstance(raw.get(part), dict):
            raw.pop(part, None)
            return
        raw = raw[part]
    raw.pop(loc[-1], None)
