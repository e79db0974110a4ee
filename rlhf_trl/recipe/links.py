"""Every check on a recipe that needs more than its schema: the libraries' options, and the links between stages.

Works on the parsed recipe before its sweeps are expanded; imports neither torch nor the libraries it checks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from rlhf_trl.recipe.errors import Kind, Problem
from rlhf_trl.recipe.library import CLASSES, check_value, nearest, read_options
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
    "chat_template_path": "one tokenizer serves all stages; its template is recorded in the run",
    "eos_token": "one tokenizer serves all stages",
    "pad_token": "one tokenizer serves all stages",
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
}
# Sizes that PPOTrainer computes from the batch and the number of processes.
for _size in ("batch_size", "mini_batch_size", "micro_batch_size", "local_batch_size", "local_mini_batch_size"):
    OWNED[_size] = "PPOTrainer computes it from per_device_train_batch_size"
OWNED |= {"world_size": "the launcher sets it: `--processes`", "num_total_batches": "it follows from total_episodes"}


def check_recipe(recipe: Recipe, known_stages: Sequence[str], wrong: Set[str], processes: int) -> list[Problem]:
    """Find every problem of a recipe that its schema does not.

    Args:
        recipe: parsed, sweeps not yet expanded; may lack keys and stages that are wrong themselves.
        known_stages: the names of all stages, those included.
        wrong: places of the problems found so far; what depends on these values is not checked.
        processes: number of training processes that the batch sizes are checked for.
    """
    problems = list(check_block("model", "model", recipe.model))
    if not recipe.model.get("model_name_or_path") and "model" not in wrong:
        remedy = "give a Hub id, a folder, or builtin:tiny"
        problems.append(Problem("model.model_name_or_path", "is missing", remedy))
    problems += _check_source("model.model_name_or_path", recipe.model.get("model_name_or_path"), "builtin:tiny")
    problems += _check_source("data.source", recipe.data.source, "builtin:demo")
    for name, stage in recipe.stages.items():
        place = f"stages.{name}"
        problems += check_block(f"{place}.model", "model", stage.model)
        problems += check_block(f"{place}.args", stage.trainer, stage.args)
        for key, values in stage.sweep.items():
            for index, value in enumerate(values):
                found = check_block(f"{place}.sweep", stage.trainer, {key: value})
                unknown = key in OWNED or key not in read_options(stage.trainer)
                problems += [p if unknown else replace(p, place=f"{p.place}.{index}") for p in found]
    origins, problems_of_names = _expanded_names(recipe)
    problems += problems_of_names
    links = Links(recipe, known_stages, origins)
    for name, stage in recipe.stages.items():
        problems += _check_links(links, name, stage)
    bad = {*wrong, *(problem.place for problem in problems)}
    bad |= {problem.meant_place for problem in problems if problem.meant_place}
    problems += _check_evaluation(links, bad)
    for index, name in enumerate(recipe.comparison.stages):
        if name not in {*known_stages, *origins}:
            near = nearest(name, [*known_stages, *origins])
            remedy = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(known_stages)}"
            problems.append(Problem(f"comparison.stages.{index}", f"there is no stage {name!r}", remedy))
    for name, stage in recipe.stages.items():
        if f"stages.{name}.sweep" in bad:
            continue
        for _, args in combinations(name, stage):
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
            near = nearest(key, [name for name in options if name not in OWNED])
            elsewhere = _elsewhere(key)
            remedy = f"did you mean {near!r}?" if near else "see the documentation of TRL 1.12 for its options"
            problem = f"unknown key {key!r}: {owner} has no such option"
            yield Problem(where, problem, elsewhere or remedy, Kind.UNKNOWN_KEY, None if elsewhere else near)
        elif found := check_value(kind, key, value):
            yield Problem(where, *found)


def _check_source(place: str, source: Any, builtin: str) -> Iterator[Problem]:
    if isinstance(source, str) and source.startswith("builtin:") and source != builtin:
        yield Problem(place, f"there is no {source!r}", f"did you mean {builtin!r}?")
    elif isinstance(source, str) and source.startswith("~"):
        yield Problem(place, "the sign ~ is not expanded", "write the whole path")


def _elsewhere(key: str) -> str | None:
    """Where a key belongs that is a real one, but not of this block."""
    if key in Stage.model_fields and key != "args":
        return f"`{key}:` stands beside `args:`, not below it"
    kinds = [kind for kind in CLASSES if key in read_options(kind)]
    if "model" in kinds:
        return "it is a key of a `model:` block"
    return f"it is an option of {', '.join(kinds)}: it belongs in the `args:` of such a stage" if kinds else None


def _expanded_names(recipe: Recipe) -> tuple[dict[str, str], list[Problem]]:
    """Name of each stage after its sweep is expanded -> its name in the recipe."""
    origins: dict[str, str] = {}
    problems = []
    for name, stage in recipe.stages.items():
        place = f"stages.{name}.sweep"
        count = math.prod(len(values) for values in stage.sweep.values())
        if count > MAX_STAGES:
            problem = f"expands to {count} stages, more than {MAX_STAGES}"
            problems.append(Problem(place, problem, "sweep over fewer values"))
            continue
        for full_name, _ in combinations(name, stage):
            if full_name in origins:
                remedy = "give each value once, and each stage a name of its own"
                where = place if stage.sweep else f"stages.{name}"
                problems.append(Problem(where, f"there are two stages {full_name!r}", remedy))
                break
            if stage.sweep and not NAME.fullmatch(full_name):
                remedy = "sweep over fewer options, or over values of letters, digits and . _ -"
                problems.append(Problem(place, f"{full_name!r} cannot be the name of a stage", remedy))
                break
            origins[full_name] = name
    return origins, problems


class Links(NamedTuple):
    """What the links between the stages are checked against."""

    recipe: Recipe
    known: Sequence[str]
    origins: Mapping[str, str]

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, expanded or not; None where there is none or its own keys are wrong."""
        return self.recipe.stages.get(self.origins.get(name, name))

    @property
    def rewards(self) -> list[str]:
        return [name for name, origin in self.origins.items() if self.recipe.stages[origin].trainer == "reward"]


def _check_links(links: Links, name: str, stage: Stage) -> Iterator[Problem]:
    place = f"stages.{name}"
    if stage.init is not None:
        yield from _check_link(f"{place}.init", stage.init, links, before=name)
        start = links.stage(stage.init)
        if start is not None and start.trainer == "reward":
            remedy = "start from an sft stage or another policy"
            yield Problem(f"{place}.init", f"{stage.init!r} is a reward model", remedy)
        if "model_name_or_path" in stage.model:
            remedy = "leave out one of the two"
            yield Problem(f"{place}.init", "a stage cannot have both `init` and a base model of its own", remedy)
    if stage.trainer in ("grpo", "ppo"):
        if stage.reward is None:
            remedy = "add a stage with `trainer: reward` and name it here"
            remedy = f"add `reward: {links.rewards[0]}`" if links.rewards else remedy
            yield Problem(f"{place}.reward", f"is missing: {stage.trainer} needs a reward model", remedy)
        else:
            yield from _check_reward(f"{place}.reward", stage.reward, links, before=name)
    elif stage.reward is not None:
        yield Problem(f"{place}.reward", f"{stage.trainer} uses no reward model", "remove the key")
    if stage.half is not None and stage.trainer in ("grpo", "ppo"):
        yield Problem(f"{place}.half", f"{stage.trainer} learns from prompts, not from pairs", "remove the key")


def _check_link(place: str, target: str, links: Links, before: str | None) -> Iterator[Problem]:
    origin = links.origins.get(target, target)
    order = list(links.known)
    if target in links.recipe.stages and links.recipe.stages[target].sweep:
        options = [name for name, origin in links.origins.items() if origin == target]
        remedy = f"name one of: {', '.join(options)}" if options else "name one of the stages it expands to"
        yield Problem(place, f"{target!r} is swept, so the link is not clear", remedy)
    elif origin == before:
        yield Problem(place, "the stage links to itself", "name an earlier stage, or remove the key")
    elif origin not in order:
        near = nearest(target, [*order, *links.origins])
        remedy = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(order)}"
        yield Problem(place, f"there is no stage {target!r}", remedy)
    elif before is not None and before in _ancestors(links, origin):
        remedy = "break the circle: one of them starts without"
        yield Problem(place, f"{before!r} and {target!r} wait for each other", remedy)
    elif before is not None and order.index(origin) > order.index(before):
        yield Problem(place, f"the stage {target!r} comes later", f"move {origin!r} above {before!r}")


def _ancestors(links: Links, name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        stage = links.stage(waiting.pop())
        for link in (stage.init, stage.reward) if stage else ():
            origin = None if link is None else links.origins.get(link, link)
            if origin is not None and origin not in found:
                found.add(origin)
                waiting.append(origin)
    return found


def _check_reward(place: str, target: str, links: Links, before: str | None = None) -> Iterator[Problem]:
    yield from _check_link(place, target, links, before)
    stage = links.stage(target)
    if stage is not None and stage.trainer != "reward":
        remedy = f"did you mean {links.rewards[0]!r}?" if links.rewards else "add a stage with `trainer: reward`"
        yield Problem(place, f"{target!r} is not a reward stage: its trainer is {stage.trainer}", remedy)


def _check_evaluation(links: Links, wrong: Set[str]) -> Iterator[Problem]:
    recipe = links.recipe
    for key, judge in (("reward", recipe.evaluation.reward), ("gold", recipe.evaluation.gold)):
        if judge is not None and "/" not in judge:
            yield from _check_reward(f"evaluation.{key}", judge, links)
    yield from _check_gold(links)
    if recipe.judge and recipe.judge.kind == "reward" and recipe.evaluation.gold is None:
        remedy = "set evaluation.gold; the model that the policies were trained with is no judge"
        yield Problem("judge.kind", "there is no gold reward model", remedy)
    starts: dict[Any, str] = {}
    for name in recipe.policies:
        if not {f"stages.{name}.init", f"stages.{name}.model.model_name_or_path"} & wrong:
            base = recipe.stages[name].model.get("model_name_or_path")
            starts.setdefault((recipe.stages[name].init, base), name)
    if len(starts) > 1:
        first, second, *_ = starts.values()
        problem = f"{first!r} and {second!r} start from different models: KL and reward gain have no common reference"
        yield Problem(f"stages.{second}.init", problem, "give all policies the same `init`")


def _check_gold(links: Links) -> Iterator[Problem]:
    """A gold reward model that has seen the pairs of what it measures would share its mistakes."""
    gold, reward = links.recipe.evaluation.gold, links.recipe.evaluation.reward
    if gold is None:
        return
    if reward is None:
        remedy = "name the reward model there, or leave gold out"
        yield Problem("evaluation.gold", "there is no evaluation.reward to compare it with", remedy)
        return
    own, other = (links.stage(name) for name in (gold, reward))
    if own is not None and own is other:
        yield Problem("evaluation.gold", "is the reward model itself", "train a second one with `half: second`")
    elif own is not None and own.half is None:
        remedy = f"add `half: second` to the stage {gold!r}"
        yield Problem(f"stages.{gold}.half", "is missing: a gold model learns from pairs of its own", remedy)
    if own is None or own.half is None:
        return
    for name, stage in links.recipe.stages.items():
        if stage is not own and stage.half == own.half and stage.trainer in ("reward", "dpo"):
            remedy = "give the two different halves"
            yield Problem(f"stages.{name}.half", f"is that of the gold model {gold!r}", remedy)
