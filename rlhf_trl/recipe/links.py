"""Every check on a recipe that needs more than its schema: the libraries' options, and the links between stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.health import check_health
from rlhf_trl.recipe.library import CLASSES, check_value, nearest, read_options, suggest
from rlhf_trl.recipe.recipe import MAX_STAGES, Recipe, combinations
from rlhf_trl.recipe.rules import Values, check_values
from rlhf_trl.recipe.schema import NAME, Stage

# Options of the libraries that this project sets itself, and what to use instead.
OWNED = {
    "output_dir": "the run directory holds every output; choose it with `--runs`",
    "model_init_kwargs": "put dtype, attention and quantisation in the `model:` block",
    "sft_model_path": "name the stage to start from with `init:`",
    "reward_model_path": "name the reward stage with `reward:`",
    "lora_task_type": "it follows from the trainer of the stage",
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), "one tokenizer serves all stages"),
    "trust_remote_code": "code from a model repository is not run",
    "resume_from_checkpoint": "an unfinished stage resumes by itself",
    "push_to_hub": "nothing leaves the machine while training",
    "hub_token": "keep tokens in the environment (see .env.example)",
    "model_adapter_name": "a stage trains one adapter",
    "ref_adapter_name": "the reference is the base with the adapter off",
    "num_sample_generations": "sample answers are part of the evaluation",
    "save_only_model": "a checkpoint holds what an interrupted stage goes on from",
    "skip_memory_metrics": "peak memory is always recorded",
    "use_cpu": "an accelerator is used where there is one; to hide it, set CUDA_VISIBLE_DEVICES= in the environment",
    "logging_nan_inf_filter": "a loss that is not finite is never hidden",
    "world_size": "the launcher sets it: `--processes`",
    "num_total_batches": "it follows from total_episodes",
    **dict.fromkeys(
        ("batch_size", "mini_batch_size", "micro_batch_size", "local_batch_size", "local_mini_batch_size"),
        "PPOTrainer computes it from per_device_train_batch_size",
    ),
}
# Names of one thing in several trainers, older releases and other projects ...
ALIKE = (
    {"beta", "kl_coef", "init_kl_coef"}, {"max_completion_length", "response_length", "max_new_tokens"},
    {"num_iterations", "num_ppo_epochs", "ppo_epochs"}, {"epsilon", "cliprange", "clip_range"},
    {"eval_strategy", "evaluation_strategy"}, {"dtype", "torch_dtype"}, {"learning_rate", "lr"},
    {"num_train_epochs", "epochs"}, {"num_generations", "group_size"}, {"lora_r", "r", "rank"},
    {"lora_target_modules", "target_modules"}, {"lora_modules_to_save", "modules_to_save"},
    {"train_sampling_strategy", "group_by_length"},
)  # fmt: skip
# ... and what a recipe says in a section of its own.
MOVED = {
    **dict.fromkeys(("max_prompt_length", "max_seq_length", "max_target_length"), "data.max_length"),
    **dict.fromkeys(("dataset_name", "dataset_config", "train_file"), "data.source"),
    **dict.fromkeys(("reward_model", "reward_funcs", "reward_model_name_or_path"), "`reward:` of the stage"),
}


def check_recipe(recipe: Recipe, known: Sequence[str], wrong: Set[str], processes: int) -> list[Problem]:
    """Find every problem of a recipe that its schema does not.

    Args:
        recipe: parsed, sweeps not yet expanded; may lack keys and stages that are wrong themselves.
        known: the names of all stages, those included.
        wrong: places of the problems found so far; what depends on these values is not checked.
        processes: number of training processes that the batch sizes are checked for.
    """
    base = recipe.model.get("model_name_or_path")
    problems = list(check_block("model", "model", recipe.model))
    if not base and "model" not in wrong:
        remedy = "give a Hub id, a folder, or builtin:tiny"
        problems.append(Problem("model.model_name_or_path", "is missing", remedy))
    problems += _check_source("model.model_name_or_path", base, "builtin:tiny")
    problems += _check_source("data.source", recipe.data.source, "builtin:demo")
    for name, stage in recipe.stages.items():
        place = f"stages.{name}"
        problems += check_block(f"{place}.model", "model", stage.model)
        problems += check_block(f"{place}.args", stage.trainer, stage.args)
        problems += check_health(place, stage)
        for key, values in stage.sweep.items():
            unknown = key in OWNED or key not in read_options(stage.trainer)
            for index, value in enumerate(values):
                for problem in check_block(f"{place}.sweep", stage.trainer, {key: value}):
                    problems.append(problem if unknown else replace(problem, place=f"{problem.place}.{index}"))
    origins: dict[str, str] = {}
    problems += _expand_names(recipe, origins)
    links = Links(recipe, known, origins)
    for name, stage in recipe.stages.items():
        problems += _check_links(links, name, stage)
    bad = {*wrong, *(place for problem in problems for place in (problem.place, problem.meant_place))}
    problems += [*_check_judges(links), *_check_starts(recipe, bad)]
    for index, name in enumerate(recipe.comparison.stages):
        if name not in {*known, *origins}:
            problems.append(Problem(f"comparison.stages.{index}", *links.unknown(name)))
    for name, stage in recipe.stages.items():
        for _, args in combinations(name, stage) if f"stages.{name}.sweep" not in bad else ():
            problems += check_values(Values(recipe, name, args, bad, processes))
    return problems


def check_block(place: str, kind: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the keys and values of one block against the options of a trainer, or of `model`."""
    options = read_options(kind)
    for key, value in values.items():
        where = f"{place}.{key}"
        if key in OWNED:
            yield Problem(where, f"{key!r} is not set in a recipe", OWNED[key])
        elif key not in options:
            owner = "trl.ModelConfig" if kind == "model" else f"the {kind} trainer"
            alike = next((sorted(names & options.keys()) for names in ALIKE if key in names), [])
            near = next(iter(alike), nearest(key, [name for name in options if name not in OWNED]))
            elsewhere = None if alike else _elsewhere(key)
            remedy = f"did you mean {near!r}?" if near else "see TRL's documentation for its options"
            meant = "" if elsewhere else near or ""
            yield Problem(where, f"unknown key {key!r}: {owner} has no such option", elsewhere or remedy, meant)
        elif texts := check_value(kind, key, value):
            yield Problem(where, *texts)


def _check_source(place: str, source: Any, builtin: str) -> Iterator[Problem]:
    if isinstance(source, str) and source.startswith("builtin:") and source != builtin:
        yield Problem(place, f"there is no {source!r}", f"did you mean {builtin!r}?")
    elif isinstance(source, str) and source.startswith("~"):
        yield Problem(place, "the sign ~ is not expanded", "write the whole path")


def _elsewhere(key: str) -> str | None:
    """Where a key belongs that is a real one, but not of this block."""
    if key in MOVED:
        return f"set it by {MOVED[key]}"
    if key in Stage.model_fields and key != "args":
        return f"`{key}:` stands beside `args:`, not below it"
    kinds = [kind for kind in CLASSES if key in read_options(kind)]
    if "model" in kinds:
        return "it is a key of a `model:` block"
    return f"it is an option of {', '.join(kinds)}: it belongs in the `args:` of such a stage" if kinds else None


def _expand_names(recipe: Recipe, origins: dict[str, str]) -> Iterator[Problem]:
    """Note in `origins`, for the name of each stage after its sweep is expanded, its name in the recipe.

    Names that differ in case alone clash: some file systems take them for one.
    """
    folded: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        place = f"stages.{name}.sweep" if stage.sweep else f"stages.{name}"
        count = math.prod(len(values) for values in stage.sweep.values())
        if count > MAX_STAGES:
            problem = f"expands to {count} stages, more than {MAX_STAGES}"
            yield Problem(place, problem, "sweep over fewer values")
            continue
        for full_name, _ in combinations(name, stage):
            if full_name.casefold() in folded:
                remedy = "give each value once, and each stage a name of its own"
                other = "" if full_name in origins else f" (also as {folded[full_name.casefold()]!r})"
                yield Problem(place, f"there are two stages {full_name!r}{other}", remedy)
                break
            if stage.sweep and not NAME.fullmatch(full_name):
                remedy = "sweep over fewer options, or over values of letters, digits and . _ -"
                yield Problem(place, f"{full_name!r} cannot be the name of a stage", remedy)
                break
            origins[full_name] = folded[full_name.casefold()] = name
    for full_name, name in origins.items():
        other, _, step = full_name.casefold().rpartition("-step-")
        if step.isdigit() and other in folded:
            problem = f"{full_name!r} is also the name of what {folded[other]!r} answers at step {step}"
            yield Problem(f"stages.{name}", problem, "give the stage another name")


class Links(NamedTuple):
    """What the links between the stages are checked against."""

    recipe: Recipe
    known: Sequence[str]
    origins: Mapping[str, str]  # name of each expanded stage -> its name in the recipe

    def origin(self, name: str) -> str:
        return self.origins.get(name, name)

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, expanded or not; None where there is none or its own keys are wrong."""
        return self.recipe.stages.get(self.origin(name))

    @property
    def rewards(self) -> list[str]:
        return [name for name, origin in self.origins.items() if self.recipe.stages[origin].trainer == "reward"]

    def unknown(self, name: str) -> tuple[str, str]:
        remedy = suggest(name, [*self.known, *self.origins], f"the stages are: {', '.join(self.known)}")
        return f"there is no stage {name!r}", remedy

    def rest_on(self, name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        """The stages that a stage starts from or is scored by, at any distance; a circle holds the stage itself."""
        stage = self.stage(name)
        for link in (stage.init, stage.reward) if stage else ():
            if link is not None and self.origin(link) not in seen:
                seen = self.rest_on(self.origin(link), seen | {self.origin(link)})
        return seen


def _check_links(links: Links, name: str, stage: Stage) -> Iterator[Problem]:
    place, online = f"stages.{name}", stage.trainer in ("grpo", "ppo")
    if stage.init is not None:
        yield from _check_link(f"{place}.init", stage.init, links, before=name)
        start = links.stage(stage.init)
        if start is not None and start.trainer == "reward":
            remedy = "start from an sft stage or another policy"
            yield Problem(f"{place}.init", f"{stage.init!r} is a reward model", remedy)
        if "model_name_or_path" in stage.model:
            problem = "a stage cannot have both `init` and a base model of its own"
            yield Problem(f"{place}.init", problem, "leave out one of the two")
    if stage.reward is not None and online:
        yield from _check_reward(f"{place}.reward", stage.reward, links, before=name)
    elif stage.reward is not None:
        yield Problem(f"{place}.reward", f"{stage.trainer} uses no reward model", "remove the key")
    elif online:
        remedy = "add a stage with `trainer: reward` and name it here"
        remedy = f"add `reward: {links.rewards[0]}`" if links.rewards else remedy
        yield Problem(f"{place}.reward", f"is missing: {stage.trainer} needs a reward model", remedy)
    if stage.half is not None and online:
        yield Problem(f"{place}.half", f"{stage.trainer} learns from prompts, not from pairs", "remove the key")


def _check_link(place: str, target: str, links: Links, before: str | None) -> Iterator[Problem]:
    origin, order = links.origin(target), list(links.known)
    if target in links.recipe.stages and links.recipe.stages[target].sweep:
        options = ", ".join(name for name, origin in links.origins.items() if origin == target)
        remedy = f"name one of: {options}" if options else "name one of the stages it expands to"
        yield Problem(place, f"{target!r} is swept, so the link is not clear", remedy)
    elif origin == before:
        yield Problem(place, "the stage links to itself", "name an earlier stage, or remove the key")
    elif origin not in order:
        yield Problem(place, *links.unknown(target))
    elif before in links.rest_on(origin):
        remedy = "break the circle: one of them starts without"
        yield Problem(place, f"{before!r} and {target!r} wait for each other", remedy)
    elif before is not None and order.index(origin) > order.index(before):
        yield Problem(place, f"the stage {target!r} comes later", f"move {origin!r} above {before!r}")


def _check_reward(place: str, target: str, links: Links, before: str | None = None) -> Iterator[Problem]:
    yield from _check_link(place, target, links, before)
    stage = links.stage(target)
    if stage is not None and stage.trainer != "reward":
        remedy = f"did you mean {links.rewards[0]!r}?" if links.rewards else "add a stage with `trainer: reward`"
        yield Problem(place, f"{target!r} is not a reward stage: its trainer is {stage.trainer}", remedy)


def _check_judges(links: Links) -> Iterator[Problem]:
    """The evaluation's reward models; a gold one that has seen the pairs of what it measures shares its mistakes."""
    recipe, reward, gold = links.recipe, links.recipe.evaluation.reward, links.recipe.evaluation.gold
    for key, name in (("reward", reward), ("gold", gold)):
        if name is not None and "/" not in name:
            yield from _check_reward(f"evaluation.{key}", name, links)
    if gold is None:
        if recipe.judge and recipe.judge.kind == "reward":
            remedy = "set evaluation.gold; the model that the policies were trained with is no judge"
            yield Problem("judge.kind", "there is no gold reward model", remedy)
        return
    if reward is None:
        remedy = "name the reward model there, or leave gold out"
        yield Problem("evaluation.gold", "there is no evaluation.reward to compare it with", remedy)
        return
    own = links.stage(gold)
    if own is not None and own is links.stage(reward):
        yield Problem("evaluation.gold", "is the reward model itself", "train a second one with `half: second`")
    elif own is not None and own.half is None:
        remedy = f"add `half: second` to the stage {gold!r}"
        yield Problem(f"stages.{gold}.half", "is missing: a gold model learns from pairs of its own", remedy)
    for name, stage in recipe.stages.items():
        if own and own.half and stage is not own and stage.half == own.half and stage.trainer in ("reward", "dpo"):
            problem = f"is that of the gold model {gold!r}"
            yield Problem(f"stages.{name}.half", problem, "give the two different halves")


def _check_starts(recipe: Recipe, wrong: Set[str]) -> Iterator[Problem]:
    starts: dict[Any, str] = {}
    for name in recipe.policies:
        if not {f"stages.{name}.init", f"stages.{name}.model.model_name_or_path"} & wrong:
            base = recipe.stages[name].model.get("model_name_or_path")
            starts.setdefault((recipe.stages[name].init, base), name)
    if len(starts) > 1:
        first, second, *_ = starts.values()
        problem = f"{first!r} and {second!r} start from different models: KL and reward gain have no common reference"
        yield Problem(f"stages.{second}.init", problem, "give all policies the same `init`")
