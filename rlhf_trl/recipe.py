"""The recipe: one YAML file that describes one experiment.

Reads the file and the `--set` overrides, expands sweeps and finds every problem at once, without importing torch. What the
libraries own (`model:` and every stage's `args:`) stays verbatim; `rlhf_trl.checks` looks it over against their source.

    recipe = load_recipe(Path("recipes/demo.yaml"), ["stages.dpo.args.beta=0.3"])
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Trainer = Literal["sft", "reward", "dpo", "grpo", "ppo"]
POLICY_TRAINERS = ("dpo", "grpo", "ppo")
STEPS = ("explore", "prepare", "evaluate", "report")
# Names of other directories and words of a run; a stage that took one would write over it.
RESERVED = {*STEPS, "data", "exploration", "evaluation", "comparison", "samples", "base", "reference", "judge", "run"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,63}")
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,})")
MAX_BYTES = 1_000_000


class Problem(NamedTuple):
    """Where something is wrong, what is wrong, and what to do about it."""

    place: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}\n    -> {self.remedy}"


class UserError(Exception):
    """Something that the user can mend; shown as place, problem and remedy, without a traceback."""

    def __init__(self, place: str, problem: str, remedy: str):
        self.problems: tuple[Problem, ...] = (Problem(place, problem, remedy),)
        super().__init__(str(self.problems[0]))


class RecipeError(UserError):
    """Every mistake of one recipe."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        Exception.__init__(self, "\n".join(str(problem) for problem in self.problems))


def _valid_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("a name starts with a letter or digit and holds only letters, digits and . _ = - (at most 64)")
    return name


Name = Annotated[str, AfterValidator(_valid_name)]
Scalar = bool | int | float | str


class Strict(BaseModel):
    """Refuse unknown keys and silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Strict):
    """Where the preference pairs come from and how they are cleaned and split."""

    source: str = Field("Anthropic/hh-rlhf", min_length=1)
    """A Hub id, a local file or folder (.jsonl, .jsonl.gz, .json, .parquet, .csv), or `builtin:demo`."""
    revision: str = "main"
    """Branch, tag or commit of a Hub source."""
    subsets: list[str] = []
    """Folders of the Hub source, or files (without their extension) of a local folder; empty means all."""
    max_rows: int | None = Field(None, ge=1)
    """Keep this many rows, chosen by a seeded hash, so that the choice does not depend on their order."""
    max_length: int = Field(512, ge=16)
    """Tokens of prompt and answer together."""
    min_answer_chars: int = Field(1, ge=1)
    """Answers with fewer characters are dropped."""
    tie_threshold: float = Field(0.98, gt=0, le=1)
    """Pairs whose answers are at least this similar (normalised Indel similarity, 0-1) are ties and are dropped."""
    test_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts that is held out."""
    max_dropped_fraction: float = Field(0.2, ge=0, le=1)
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
    prompts: int = Field(200, ge=2)
    max_new_tokens: int = Field(128, ge=1)
    generation_batch_size: int = Field(16, ge=1)
    score_batch_size: int = Field(16, ge=1)


class Recipe(Strict):
    """One experiment, resolved: sweeps are expanded and every link names a stage."""

    name: Name
    seed: int = Field(42, ge=0, lt=2**32)
    model: dict[str, Any]
    data: Data = Data()
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()

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
            return {"step": step, "seed": self.seed, "data": self.data.model_dump(), "base": base,
                    "source": source_hash(self.data.source), "model": source_hash(str(base["model_name_or_path"]))}  # fmt: skip
        if step == "evaluate":
            inputs = [self.fingerprint(name) for name in (*self.policies, self.evaluation.reward) if name]
            return {"step": step, "seed": self.seed, "evaluation": self.evaluation.model_dump(),
                    "data": self.fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "report":
            inputs = [self.fingerprint(name) for name in ("explore", "prepare", *self.stages, "evaluate")]
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


def source_hash(source: str) -> str:
    """Hash the content of a local file or folder (of a model folder: all but its weights); a Hub id is its own name."""
    path = Path(source)
    if source.startswith("builtin:"):
        path = Path(__file__).parent / "data" / "demo.jsonl.gz"
    if not path.exists():
        return source
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and file.suffix not in (".safetensors", ".bin"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
        elif file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
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
    from rlhf_trl.checks import check_recipe

    raw, lines = _read_yaml(path)
    problems: list[Problem] = []
    for override in overrides:
        problems += _apply_override(raw, override)
    problems += _find_secrets(raw)
    recipe, found = _parse(raw)
    problems += found
    if recipe is not None:
        problems += check_recipe(recipe, known_stages=list(raw.get("stages") or {}), processes=processes)
    if problems:
        overridden = [override.partition("=")[0] for override in overrides]
        raise RecipeError(_with_line(problem, path, lines, overridden) for problem in dict.fromkeys(problems))
    assert recipe is not None
    return expand_sweeps(recipe)


def expand_sweeps(recipe: Recipe) -> Recipe:
    """Turn every swept stage into one ordinary stage for each combination: `dpo` -> `dpo-beta=0.1`, `dpo-beta=0.3`."""
    stages: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        for values in itertools.product(*stage.sweep.values()):
            chosen = dict(zip(stage.sweep, values, strict=True))
            suffix = "".join(f"-{key}={value}" for key, value in chosen.items())
            stages[name + suffix] = stage.model_copy(update={"args": {**stage.args, **chosen}, "sweep": {}})
    return recipe.model_copy(update={"stages": stages})


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the document and the line number of every dotted key."""
    place = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(place, f"cannot read the recipe: {error.strerror}", "give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(place, "the recipe is not UTF-8 text", "save it as UTF-8") from None
    if len(text) > MAX_BYTES:
        raise UserError(place, f"the recipe is larger than {MAX_BYTES} bytes", "a recipe is a page of YAML")
    yaml = YAML(typ="safe", pure=True)
    try:
        raw = yaml.load(text)
        lines = dict(_key_lines(YAML(typ="safe", pure=True).compose(text)))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}:{mark.line + 1}" if mark else place
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(where, f"not valid YAML: {reason}", "mend the line; a key may stand only once") from None
    if not isinstance(raw, dict):
        raise UserError(place, "the recipe is not a mapping", "begin with `name:`, `model:`, `data:` and `stages:`")
    return raw, lines


def _key_lines(node: Node | None, prefix: str = "") -> Iterable[tuple[str, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, path)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}.{index}", value.start_mark.line + 1


def _with_line(problem: Problem, path: Path, lines: dict[str, int], overridden: Sequence[str]) -> Problem:
    if problem.place.startswith("--set"):
        return problem
    for key in overridden:
        if problem.place == key or problem.place.startswith(key + "."):
            return problem._replace(place=f"--set {problem.place}")
    parts = problem.place.split(".")
    for end in range(len(parts), 0, -1):
        key = ".".join(parts[:end])
        if key in lines:
            return problem._replace(place=f"{path}:{lines[key]}: {problem.place}")
    return problem._replace(place=f"{path}: {problem.place}")


def _apply_override(raw: dict[str, Any], override: str) -> list[Problem]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [Problem(f"--set {override}", "not of the form path.to.key=value", "e.g. --set stages.dpo.args.beta=0.3")]
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except YAMLError:
        return [Problem(f"--set {override}", f"{text!r} is not valid YAML", "quote the value")]
    node: Any = raw
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return [Problem(f"--set {override}", f"{part!r} is a value, not a section", "check the path of the key")]
    node[parts[-1]] = value
    return []


def _find_secrets(raw: Any, place: str = "") -> list[Problem]:
    if isinstance(raw, dict):
        return [p for key, value in raw.items() for p in _find_secrets(value, f"{place}.{key}" if place else str(key))]
    if isinstance(raw, list):
        return [p for item in raw for p in _find_secrets(item, place)]
    if isinstance(raw, str) and SECRET.search(raw):
        return [Problem(place, "holds what looks like an access token", "keep tokens in the environment (see .env.example)")]
    return []


def _parse(raw: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Parse the document; on mistakes, also try it without them so that the later checks can find more."""
    try:
        return Recipe.model_validate(raw), _reserved_names(raw)
    except ValidationError as error:
        rest = copy.deepcopy(raw)
        problems = _reserved_names(raw)
        for item in error.errors():
            problems.append(_describe(item, raw))
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


def _describe(error: Any, raw: dict[str, Any]) -> Problem:
    from rlhf_trl.options import nearest

    loc = [str(part) for part in error["loc"] if part != "[key]"]
    place = ".".join(loc)
    section = Stage if loc[0] == "stages" and len(loc) > 2 else SECTIONS.get(loc[0], Recipe) if len(loc) > 1 else Recipe
    known = list(section.model_fields)
    if error["type"] == "extra_forbidden":
        near = nearest(loc[-1], known)
        remedy = f"did you mean {near!r}?" if near else f"the keys here are: {', '.join(known)}"
        if section is Stage and not near and loc[-1] not in known:
            remedy += "; options of the trainer go under `args:`"
        return Problem(place, f"unknown key {loc[-1]!r}", remedy)
    if error["type"] == "missing":
        example = {"trainer": ", ".join(get_args(Trainer)), "name": "a name for the run", "model": "trl.ModelConfig values",
                   "stages": "at least one stage"}  # fmt: skip
        return Problem(place, "is missing", f"add `{loc[-1]}:` ({example.get(loc[-1], 'required')})")
    value = json.dumps(error["input"], default=str)
    value = value if len(value) <= 60 else value[:57] + "..."
    if error["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(Trainer)]
        near = nearest(str(error["input"]), choices)
        remedy = f"did you mean {near!r}?" if near else f"choose one of: {', '.join(choices)}"
        return Problem(place, f"{value} is not a trainer", remedy)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(place, f"{value} is not valid", message if message.startswith("a name") else f"the value {message}")


def _remove(raw: Any, loc: list[str]) -> None:
    """Delete the offending key, or the whole stage where its trainer is the offence."""
    loc = [part for part in loc if part != "[key]"]
    if loc[0] == "stages" and loc[2:] == ["trainer"]:
        loc = loc[:2]
    for part in loc[:-1]:
        if not isinstance(raw, dict) or part not in raw:
            return
        raw = raw[part]
    if isinstance(raw, dict):
        raw.pop(loc[-1], None)
