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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, PrivateAttr, ValidationError

from rlhf_trl.document import NotRun as NotRun
from rlhf_trl.document import Problem as Problem
from rlhf_trl.document import RecipeError as RecipeError
from rlhf_trl.document import UserError as UserError
from rlhf_trl.document import meant, read_document
from rlhf_trl.options import nearest, show
from rlhf_trl.sections import (
    Alarms,
    Comparison,
    Data,
    Decoding,
    Errors,
    Evaluation,
    Judge,
    Name,
    Price,
    Samples,
    Stage,
    Strict,
    Trainer,
    Worst,
)

POLICY_TRAINERS = ("dpo", "grpo", "ppo")
# The steps that are not stages; training comes after `prepare`.
STEPS = ("explore", "prepare", "evaluate", "judge", "compare", "errors", "samples", "report")
# Names of other directories and words of a run; a stage that took one would write over it.
RESERVED = {*STEPS, "data", "exploration", "evaluation", "comparison", "samples", "base", "reference", "judge", "run"}
RESERVED |= {"logs", "replaced", "report.html", "recipe.json", "env.json"}
MAX_STAGES = 100


class Recipe(Strict):
    """One experiment, resolved: sweeps are expanded and every link names a stage."""

    name: Name
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: dict[str, Any]
    data: Data = Data()
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    judge: Judge | None = None
    """Without this section no judge is asked."""
    comparison: Comparison = Comparison()
    errors: Errors = Errors()
    samples: Samples = Samples()
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def policies(self) -> list[str]:
        """The stages that align a policy, in recipe order."""
        return [name for name, stage in self.stages.items() if stage.trainer in POLICY_TRAINERS]

    @property
    def reward_stages(self) -> list[str]:
        """The stages that train a reward model, in recipe order."""
        return [name for name, stage in self.stages.items() if stage.trainer == "reward"]

    @property
    def plan(self) -> list[str]:
        """Every step and stage of this recipe, in the order in which `run` takes them."""
        errors, samples = ["errors"] * bool(self.reward_stages), ["samples"] * bool(self.policies)
        judge = ["judge"] * bool(self.judge and self.policies)
        return ["explore", "prepare", *self.stages, "evaluate", *judge, "compare", *errors, *samples, "report"]

    @property
    def compared(self) -> list[str]:
        """The stages that `compare` lays beside each other: those asked for, or all policies, or else every stage."""
        return self.comparison.stages or self.policies or list(self.stages)

    @property
    def groups(self) -> dict[str, list[str]]:
        """The stages that differ in their seed alone, under what their names have in common, in recipe order."""
        alike: dict[tuple[str, int], list[str]] = {}
        seen: Counter[str] = Counter()
        for name, stage in self.stages.items():
            args = {key: value for key, value in self.args_of(name).items() if key != "seed"}
            settings = json.dumps([stage.model_dump(exclude={"args"}), args], sort_keys=True)
            own = f"{settings} {self.args_of(name)['seed']}"
            alike.setdefault((settings, seen[own]), []).append(name)  # one seed twice is not two seeds
            seen[own] += 1
        groups: dict[str, list[str]] = {}
        for names in alike.values():
            common = re.sub(r"-seed=\d+", "", names[0])
            shared = len(names) > 1 and common not in self.stages and common not in groups
            groups[common if shared else names[0]] = names
        return groups

    def parents(self, stage: str) -> dict[str, str]:
        """The stages that a stage rests on, each after its own, and how: one it starts from (`init`), or its
        `reward`."""
        found: dict[str, str] = {}
        for relation, name in (("init", self.stages[stage].init), ("reward", self.stages[stage].reward)):
            if name is not None:
                for parent, how in {**self.parents(name), name: relation}.items():
                    found.setdefault(parent, how)
        return found

    def half_of(self, stage: str) -> str | None:
        """The half of the training prompts that a stage learns from; None is all of them.

        A gold reward model is independent of what it measures only if no preference that it learned from has trained
        the other reward models or a policy; so these take the other half.
        """
        own, gold = self.stages[stage], self.stages.get(self.evaluation.gold or "")
        if own.half is None and gold is not None and gold.half is not None and own.trainer in ("reward", "dpo"):
            return "first" if gold.half == "second" else "second"
        return own.half

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

    @property
    def sources(self) -> dict[str, str]:
        """The hash of the content of every source outside the run: data, base model, reward models."""
        judges = [name for name in (self.evaluation.reward, self.evaluation.gold) if name and name not in self.stages]
        names = (self.data.source, str(self.model.get("model_name_or_path")), *judges)
        return {name: self._hash(name) for name in names}

    def read_from(self, sources: Mapping[str, str]) -> Recipe:
        """Take the sources to be what they were when these hashes were taken, wherever they lie and whatever is there
        now."""
        self._hashes.update(sources)
        return self

    def _dependencies(self, step: str) -> dict[str, Any]:
        base = {key: self.model.get(key) for key in ("model_name_or_path", "model_revision")}
        if step in ("explore", "prepare"):
            hashes = [self._hash(self.data.source), self._hash(str(base["model_name_or_path"]))]
            return {"step": step, "seed": self.seed, "data": self.data.model_dump(), "base": base, "hashes": hashes}
        if step == "evaluate":
            judges = [name for name in (self.evaluation.reward, self.evaluation.gold) if name]
            inputs = {
                name: self.fingerprint(name) if name in self.stages else self._hash(name)
                for name in (*self.policies, *judges)
            }
            return {"step": step, "seed": self.seed, "evaluation": self.evaluation.model_dump(),
                    "data": self.fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "judge":
            judge = self.judge and self.judge.model_dump()
            return {"step": step, "seed": self.seed, "judge": judge, "inputs": self.fingerprint("evaluate")}
        if step == "compare":
            inputs = {name: self.fingerprint(name) for name in self.compared}
            return {"step": step, "seed": self.seed, "comparison": self.comparison.model_dump(), "inputs": inputs,
                    "evaluation": self.fingerprint("evaluate"), "judge": self.fingerprint("judge")}  # fmt: skip
        if step == "errors":
            inputs = {name: self.fingerprint(name) for name in self.reward_stages}
            return {"step": step, "seed": self.seed, "errors": self.errors.model_dump(),
                    "data": self.fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "samples":
            return {"step": step, "samples": self.samples.model_dump(), "inputs": self.fingerprint("evaluate")}
        if step == "report":
            inputs = {name: self.fingerprint(name) for name in self.plan[:-1]}
            return {"step": step, "name": self.name, "inputs": inputs}
        stage = self.stages[step]
        return {
            "trainer": stage.trainer,
            "args": self.args_of(step),
            "model": self.model_block(step),
            "data": self.fingerprint("prepare"),
            "init": stage.init and self.fingerprint(stage.init),
            "reward": stage.reward and self.fingerprint(stage.reward),
            "half": self.half_of(step),
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
    asked = recipe.comparison.stages
    swept = {name: [full_name for full_name, _ in combinations(name, recipe.stages[name])] for name in recipe.stages}
    compared = dict.fromkeys(full_name for name in asked for full_name in swept.get(name, [name]))
    comparison = recipe.comparison.model_copy(update={"stages": list(compared)})
    return recipe.model_copy(update={"stages": stages, "comparison": comparison})


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


SECTIONS: dict[str, type[Strict]] = {"data": Data, "evaluation": Evaluation, "judge": Judge,
                                      "comparison": Comparison, "errors": Errors, "samples": Samples}  # fmt: skip
NESTED: dict[str, type[Strict]] = {"judge_decoding": Decoding, "worst": Worst, "alarms": Alarms, "price": Price}
EXAMPLES = {
    "name": "`name: my-run`, the folder of the run",
    "model": "`model: {model_name_or_path: ...}`",
    "stages": "`stages:` with at least one stage below it",
    "trainer": f"`trainer:` (one of {', '.join(get_args(Trainer))})",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "trainer": get_args(Trainer),
    "half": ("first", "second"),
    "dtype": ("float32", "bfloat16", "float16"),
    "kind": ("openai", "reward", "offline"),
    "pairs": ("reference", "all"),
    "max_tokens_name": ("max_tokens", "max_completion_tokens"),
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
        choices = CHOICES[loc[-1]]
        near = nearest(str(error["input"]), choices)
        remedy = f"did you mean {near!r}?" if near else f"choose one of: {', '.join(choices)}"
        problem = f"{value} is not a trainer" if loc[-1] == "trainer" else f"{value} is not valid"
        return Problem(place, problem, remedy)
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
    if loc[0] in ("evaluation", "judge") and len(loc) > 2:
        section = NESTED[loc[1]]
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
