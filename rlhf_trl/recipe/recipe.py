"""The recipe: one YAML file that describes one experiment.

Reads the file and the `--set` overrides, expands sweeps and finds every problem at once, without importing torch.
What the libraries own (`model:` and every stage's `args:`) stays verbatim; `rlhf_trl.recipe.links` checks it against
their source.

    recipe = load_recipe(Path("recipes/demo.yaml"), ["stages.dpo.args.beta=0.3"])
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from rlhf_trl.recipe.fingerprint import source_hash
from rlhf_trl.recipe.schema import (
    Comparison,
    Data,
    Errors,
    Evaluation,
    Judge,
    Name,
    Samples,
    Stage,
    Strict,
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
        return self._fingerprint(step, {})

    def _fingerprint(self, step: str, known: dict[str, str]) -> str:
        """Compute a fingerprint; `known` holds those that this call has computed, so that each is computed once."""
        if step not in known:
            text = json.dumps(
                self._dependencies(step, functools.partial(self._fingerprint, known=known)), sort_keys=True
            )
            known[step] = hashlib.sha256(text.encode()).hexdigest()
        return known[step]

    @property
    def sources(self) -> dict[str, str]:
        """The hash of the content of every source outside the run: data, base model, reward models."""
        judges = [name for name in (self.evaluation.reward, self.evaluation.gold) if name and name not in self.stages]
        names = (self.data.source, str(self.model.get("model_name_or_path")), *judges)
        return {name: self._hash(name) for name in names}

    def read_from(self, sources: Mapping[str, str]) -> Recipe:
        """Use recorded source hashes instead of hashing the sources again."""
        self._hashes.update(sources)
        return self

    def _dependencies(self, step: str, fingerprint: Callable[[str], str]) -> dict[str, Any]:
        base = {key: self.model.get(key) for key in ("model_name_or_path", "model_revision")}
        if step in ("explore", "prepare"):
            hashes = [self._hash(self.data.source), self._hash(str(base["model_name_or_path"]))]
            return {"step": step, "seed": self.seed, "data": self.data.model_dump(), "base": base, "hashes": hashes}
        if step == "evaluate":
            judges = [name for name in (self.evaluation.reward, self.evaluation.gold) if name]
            inputs = {
                name: fingerprint(name) if name in self.stages else self._hash(name)
                for name in (*self.policies, *judges)
            }
            return {"step": step, "seed": self.seed, "evaluation": self.evaluation.model_dump(),
                    "data": fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "judge":
            judge = self.judge and self.judge.model_dump()
            return {"step": step, "seed": self.seed, "judge": judge, "inputs": fingerprint("evaluate")}
        if step == "compare":
            inputs = {name: fingerprint(name) for name in self.compared}
            return {"step": step, "seed": self.seed, "comparison": self.comparison.model_dump(), "inputs": inputs,
                    "evaluation": fingerprint("evaluate"), "judge": fingerprint("judge")}  # fmt: skip
        if step == "errors":
            inputs = {name: fingerprint(name) for name in self.reward_stages}
            return {"step": step, "seed": self.seed, "errors": self.errors.model_dump(),
                    "data": fingerprint("prepare"), "inputs": inputs}  # fmt: skip
        if step == "samples":
            return {"step": step, "samples": self.samples.model_dump(), "inputs": fingerprint("evaluate")}
        if step == "report":
            inputs = {name: fingerprint(name) for name in self.plan[:-1]}
            return {"step": step, "name": self.name, "inputs": inputs}
        stage = self.stages[step]
        return {
            "trainer": stage.trainer,
            "args": self.args_of(step),
            "model": self.model_block(step),
            "data": fingerprint("prepare"),
            "init": stage.init and fingerprint(stage.init),
            "reward": stage.reward and fingerprint(stage.reward),
            "half": self.half_of(step),
        }

    def _hash(self, source: str) -> str:
        # Once for each loaded recipe: a source that changes while a step reads it is not taken for what was read.
        if source not in self._hashes:
            self._hashes[source] = source_hash(source)
        return self._hashes[source]


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
