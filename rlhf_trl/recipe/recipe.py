"""The recipe: one experiment, what each of its steps depends on, and the stages that its sweeps stand for.

What the libraries own (`model:` and every stage's `args:`) stays verbatim; `rlhf_trl.recipe.links` checks it against
their source.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PrivateAttr

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file, source_hash
from rlhf_trl.recipe.library import parts_of, spread_batch
from rlhf_trl.recipe.schema import Comparison, Data, Errors, Evaluation, Judge, Name, Samples, Stage, Strict

POLICY_TRAINERS = ("dpo", "grpo", "ppo")
# The steps that are not stages; training comes after `prepare`.
STEPS = ("explore", "prepare", "evaluate", "judge", "compare", "errors", "samples", "report")
# Names of other files and words of a run, in small letters; a stage that took one would write over it.
RESERVED = {*STEPS, "data", "exploration", "evaluation", "comparison", "samples", "base", "reference", "judge", "run"}
RESERVED |= {"logs", "replaced", "starts", "report.html", "answers.html"}
RESERVED |= {"recipe.json", "env.json", "done.json", "side_by_side"}
MAX_STAGES = 100
# Changes with the shape of what `evaluate` and `errors` write: an older run is measured again, and not trained again.
DOCUMENTS = 3


def _free_name(name: str) -> str:
    if name.casefold() in RESERVED or name.casefold().endswith(".lock"):
        raise ValueError(f"another part of a run has this name: call the stage {name}_stage")
    return name


class Recipe(Strict):
    """One experiment, resolved: sweeps are expanded and every link names a stage."""

    name: Name
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: dict[str, Any]
    data: Data = Data()
    stages: Annotated[dict[Annotated[Name, AfterValidator(_free_name)], Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    judge: Judge | None = None
    """Without this section no judge is asked."""
    comparison: Comparison = Comparison()
    errors: Errors = Errors()
    samples: Samples = Samples()
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)
    _hash_file: Callable[[Path], str] = PrivateAttr(default_factory=lambda: hash_file)

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
    def links(self) -> dict[str, set[str]]:
        """The stages that each stage starts from or is scored by."""
        return {name: {link for link in (stage.parent, stage.reward) if link} for name, stage in self.stages.items()}

    @property
    def groups(self) -> dict[str, list[str]]:
        """The stages that differ in their seed alone, under what their names have in common, in recipe order."""
        alike: dict[tuple[str, int], list[str]] = {}
        seen: Counter[str] = Counter()
        for name, stage in self.stages.items():
            args = self.args_of(name)
            seed = args.pop("seed")
            settings = json.dumps([stage.model_dump(exclude={"args"}), args], sort_keys=True)
            alike.setdefault((settings, seen[f"{settings} {seed}"]), []).append(name)  # one seed twice: two groups
            seen[f"{settings} {seed}"] += 1
        groups: dict[str, list[str]] = {}
        for names in alike.values():
            common = re.sub(r"-seed=\d+", "", names[0])
            shared = len(names) > 1 and common not in self.stages and common not in groups
            groups[common if shared else names[0]] = names
        return groups

    def parents(self, stage: str) -> dict[str, str]:
        """The stages that a stage rests on, each after its own, and how: by its `init` or its `reward`."""
        parents: dict[str, str] = {}
        for relation, name in (("init", self.stages[stage].parent), ("reward", self.stages[stage].reward)):
            if name is not None:
                parents = {**parents, **self.parents(name), name: relation, **parents}
        return parents

    def root(self, stage: str) -> str:
        """The stage without a parent that a stage starts from, at any distance."""
        while (parent := self.stages[stage].parent) is not None:
            stage = parent
        return stage

    def maker(self, stage: str) -> str:
        """The stage, or folder, where the adapter of a stage was new: the stage itself, unless it continues one."""
        while stage in self.stages and self.stages[stage].continue_:
            stage = str(self.stages[stage].init)
        return stage

    def below(self, stage: str) -> str | None:
        """The `init` whose whole model the adapter of a stage, or of a folder, lies on; None is the base."""
        maker = self.maker(stage)
        return self.stages[maker].init if maker in self.stages else None

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

    def args_of(self, stage: str, processes: int | None = None) -> dict[str, Any]:
        """The trainer options of a stage; the recipe's seed is the default.

        With a number of processes, also what `global_batch_size` comes to.

        UserError where the batch does not divide among so many."""
        own = self.stages[stage]
        args, size = {"seed": self.seed, **own.args}, own.global_batch_size
        if processes is None or size is None:
            return args
        if size % (processes * parts_of(own.trainer, args)):
            problem = f"{size} does not divide among {processes} processes"
            remedy = f"rlhf-trl validate RECIPE --processes {processes} names the numbers that do"
            raise UserError(f"stages.{stage}.global_batch_size", problem, remedy)
        return args | spread_batch(own.trainer, args, size, processes)

    @property
    def _judges(self) -> list[str]:
        return [name for name in (self.evaluation.reward, self.evaluation.gold) if name]

    def inputs(self, step: str) -> list[str]:
        """The steps and stages that a step which is no stage cannot do without."""
        judged = ["evaluate"] * bool(self.judge)
        own = {"evaluate": ["prepare", *self.policies, *self._judges], "judge": judged, "samples": ["evaluate"],
               "errors": ["prepare", *self.reward_stages], "compare": self.compared}  # fmt: skip
        return [name for name in own.get(step, []) if name in {*self.stages, *STEPS}]

    @property
    def source_names(self) -> set[str]:
        """Every source outside the run: data, base models, reward models."""
        bases = {str(self.model_block(stage).get("model_name_or_path")) for stage in self.stages}
        base = str(self.model.get("model_name_or_path"))
        starts = {stage.outside for stage in self.stages.values() if stage.outside}
        return {self.data.source, base, *bases, *starts, *(name for name in self._judges if name not in self.stages)}

    @property
    def sources(self) -> dict[str, str]:
        """The hash of the content of every source outside the run."""
        return {name: self._hash(name) for name in sorted(self.source_names)}

    def is_linked(self) -> bool:
        """Whether every link of a resolved recipe names a stage, and one before the stage that it belongs to."""
        order = list(self.stages)
        earlier = all(links <= {*order[: order.index(name)]} for name, links in self.links.items())
        return earlier and {*self.comparison.stages} <= {*order}

    def hash_by(self, hash_file: Callable[[Path], str], known: Mapping[str, str]) -> Recipe:
        """Hash files by a function that remembers their hashes; the sources whose hash is `known` not again."""
        self._hash_file = hash_file
        self._hashes.update(known)
        return self

    def _hash(self, source: str) -> str:
        # Once for each loaded recipe: a source that changes while a step reads it is not taken for what was read.
        if source not in self._hashes:
            self._hashes[source] = source_hash(source, self._hash_file)
        return self._hashes[source]

    def identify(self, name: str) -> str:
        """The fingerprint of a stage or step, or the hash of what lies outside the run."""
        return self.fingerprint(name) if name in {*self.stages, *STEPS} else self._hash(name)

    def fingerprint(self, step: str) -> str:
        """Hash (SHA-256, hexadecimal) exactly what one of the `STEPS` or a stage depends on."""

        @functools.cache
        def fingerprint(name: str) -> str:
            text = json.dumps(self._dependencies(name, fingerprint), sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()

        return fingerprint(step)

    def _dependencies(self, step: str, fingerprint: Callable[[str], str]) -> dict[str, Any]:
        def fingerprints(names: Iterable[str]) -> dict[str, str]:
            return {name: fingerprint(name) if name in {*self.stages, *STEPS} else self._hash(name) for name in names}

        seeded = {"step": step, "seed": self.seed}
        measured = {**seeded, "documents": DOCUMENTS}
        if step in ("explore", "prepare"):
            base = {key: self.model.get(key) for key in ("model_name_or_path", "model_revision")}
            hashes = [self._hash(self.data.source), self._hash(str(base["model_name_or_path"]))]
            return {**seeded, "data": self.data.model_dump(), "base": base, "hashes": hashes}
        if step == "evaluate":
            inputs = fingerprints([*self.policies, *self._judges])
            own = self.evaluation.model_dump()
            return {**measured, "evaluation": own, "data": fingerprint("prepare"), "inputs": inputs}
        if step == "judge":
            return {**seeded, "judge": self.judge and self.judge.model_dump(), "inputs": fingerprint("evaluate")}
        if step == "compare":
            own = {"comparison": self.comparison.model_dump(), "inputs": fingerprints(self.compared)}
            return {**seeded, **own, "evaluation": fingerprint("evaluate"), "judge": fingerprint("judge")}
        if step == "errors":
            own = {"errors": self.errors.model_dump(), "inputs": fingerprints(self.reward_stages)}
            return {**measured, **own, "data": fingerprint("prepare")}
        if step == "samples":
            return {"step": step, "samples": self.samples.model_dump(), "inputs": fingerprint("evaluate")}
        if step == "report":
            return {"step": step, "name": self.name, "inputs": fingerprints(self.plan[:-1])}
        stage = self.stages[step]
        own_base = stage.model.get("model_name_or_path")  # the recipe's counts in `prepare`
        return {
            **({"base": self._hash(str(own_base))} if own_base else {}),
            **({"global_batch_size": stage.global_batch_size} if stage.global_batch_size else {}),
            "trainer": stage.trainer,
            "args": self.args_of(step),
            "model": self.model_block(step),
            "data": fingerprint("prepare"),
            "init": self._hash(stage.outside) if stage.outside else stage.parent and fingerprint(stage.parent),
            **({"continue": True} if stage.continue_ else {}),
            "reward": stage.reward and fingerprint(stage.reward),
            "half": self.half_of(step),
        }


def combinations(name: str, stage: Stage) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the options of each stage that a swept stage stands for."""
    for values in itertools.product(*stage.sweep.values()):
        chosen = dict(zip(stage.sweep, values, strict=True))
        yield name + "".join(f"-{key}={value}" for key, value in chosen.items()), {**stage.args, **chosen}


def expand_sweeps(recipe: Recipe) -> Recipe:
    """Turn every swept stage into one ordinary stage for each combination: `dpo` -> `dpo-beta=0.1`, `dpo-beta=0.3`."""
    stages: dict[str, Stage] = {}
    swept: dict[str, list[str]] = {}
    for name, stage in recipe.stages.items():
        args_of = dict(combinations(name, stage))
        stages |= {full: stage.model_copy(update={"args": args, "sweep": {}}) for full, args in args_of.items()}
        swept[name] = list(args_of)
    compared = dict.fromkeys(full for name in recipe.comparison.stages for full in swept.get(name, [name]))
    comparison = recipe.comparison.model_copy(update={"stages": list(compared)})
    return recipe.model_copy(update={"stages": stages, "comparison": comparison})
