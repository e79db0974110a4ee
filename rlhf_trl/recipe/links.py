"""Every check on a recipe that needs more than its schema: the libraries' options, and the links between stages."""

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

BASE = ("model_name_or_path", "model_revision")  # of a `model` block: which weights it names
# Options of the libraries that this project sets itself, and what to use instead.
OWNED = {
    "output_dir": "the run directory holds every output; choose it with `--runs`",
    "model_init_kwargs": "put dtype, attention and quantisation in the `model:` block; here stands use_kernels alone",
    "sft_model_path": "name the stage to start from with `init:`",
    "reward_model_path": "name the reward stage with `reward:`",
    "lora_task_type": "it follows from the trainer of the stage",
    "lora_modules_to_save": "an adapter is LoRA alone: the base's own weights are every policy's, and the reference's",
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), "one tokenizer serves all stages"),
    "chat_template_kwargs": "one template serves all stages",
    "trust_remote_code": "code from a model repository is not run",
    "resume_from_checkpoint": "an unfinished stage resumes by itself",
    "push_to_hub": "nothing leaves the machine while training",
    "hub_token": "keep tokens in the environment (see .env.example)",
    "model_adapter_name": "a stage trains one adapter",
    "ref_adapter_name": "the reference is the base with the adapter off",
    "stop_token_id": "an answer ends on its end token wherever it is read: set stop_token: eos",
    "num_sample_generations": "sample answers are part of the evaluation",
    "save_only_model": "a checkpoint holds what an interrupted stage goes on from",
    "auto_find_batch_size": "the batch of an update would follow from the memory; `plan` says what fits",
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
    {"lora_target_modules", "target_modules"}, {"train_sampling_strategy", "group_by_length"},
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
        problems += links.check_stage(name, stage)
    problems += [*links.check_judges(), *links.check_compared()]
    bad = {*wrong, *(place for problem in problems for place in (problem.place, problem.meant_place))}
    problems += links.check_starts(bad)
    for name, stage in recipe.stages.items():
        for _, args in combinations(name, stage) if f"stages.{name}.sweep" not in bad else ():
            problems += check_values(Values(recipe, name, args, bad, processes))
    return problems


def check_block(place: str, kind: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the keys and values of one block against the options of a trainer, or of `model`."""
    options = read_options(kind)
    for key, value in values.items():
        where = f"{place}.{key}"
        if key in OWNED and (key, value) != ("model_init_kwargs", {"use_kernels": True}):
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
    if key in Stage.names() and key != "args":
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
            yield Problem(place, f"expands to {count} stages, more than {MAX_STAGES}", "sweep over fewer values")
            continue
        for full_name, _ in combinations(name, stage):
            first = folded.get(full_name.casefold())
            if first is not None:
                remedy = "give each value once, and each stage a name of its own"
                yield Problem(place, f"there are two stages {full_name!r} (also from {first!r})", remedy)
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
    """The links between the stages, and the checks on them."""

    recipe: Recipe
    known: Sequence[str]
    origins: Mapping[str, str]  # name of each expanded stage -> its name in the recipe

    def stage(self, name: str | None) -> Stage | None:
        """The stage of that name, expanded or not; None where there is none or its own keys are wrong."""
        return self.recipe.stages.get(self.origins.get(name or "", name or ""))

    @property
    def rewards(self) -> list[str]:
        return [name for name, origin in self.origins.items() if self.recipe.stages[origin].trainer == "reward"]

    def _unknown(self, name: str) -> tuple[str, str]:
        remedy = suggest(name, [*self.known, *self.origins], f"the stages are: {', '.join(self.known)}")
        return f"there is no stage {name!r}", remedy

    def check_stage(self, name: str, stage: Stage) -> Iterator[Problem]:
        online = stage.trainer in ("grpo", "ppo")
        yield from _check_source(f"stages.{name}.init", stage.outside, "")
        if stage.parent is not None:
            goes_on = stage.continue_ and stage.trainer == "reward"
            yield from self._check_link(f"stages.{name}.init", stage.parent, name, reward=None if goes_on else False)
        if stage.continue_:
            yield from self._check_continue(name, stage)
        if stage.reward is not None and online:
            yield from self._check_link(f"stages.{name}.reward", stage.reward, name, reward=True)
        missing = f"add `reward: {self.rewards[0]}`" if self.rewards else "add a stage with `trainer: reward`"
        yield from _broken(
            (f"stages.{name}.init", stage.init and {*BASE} & {*stage.model},
             "a stage cannot have both `init` and a base model of its own", "leave out one of the two"),
            (f"stages.{name}.reward", stage.reward and not online,
             f"{stage.trainer} uses no reward model", "remove the key"),
            (f"stages.{name}.reward", online and not stage.reward,
             f"is missing: {stage.trainer} needs a reward model", missing),
            (f"stages.{name}.half", stage.half and online,
             f"{stage.trainer} learns from prompts, not from pairs", "remove the key"),
        )  # fmt: skip

    def _check_continue(self, name: str, stage: Stage) -> Iterator[Problem]:
        """Check that there is an adapter to train further, of the right kind, and that nothing else describes one."""
        parent, keys = self.stage(stage.parent), [key for key in stage.model if key.startswith(("lora_", "use_dora"))]
        own = "has no effect: the continued adapter has its own"
        whole = parent and not {**self.recipe.model, **parent.model}.get("use_peft")
        yield from _broken(
            (f"stages.{name}.continue", stage.init is None,
             "there is no adapter to continue", "name a stage, or the folder of an adapter, with `init:`"),
            (f"stages.{name}.continue", stage.trainer == "ppo",
             "PPO trains a new adapter on its reference", "leave it out: the stage starts from `init`, merged"),
            (f"stages.{name}.continue", whole,
             f"{stage.init!r} was fine-tuned whole and has no adapter", "leave it out"),
            (f"stages.{name}.continue", not whole and not {**self.recipe.model, **stage.model}.get("use_peft"),
             "the stage is fine-tuned whole", "set use_peft: true, or leave it out"),
            (f"stages.{name}.init", stage.trainer == "reward" and parent and parent.trainer != "reward",
             f"{stage.init!r} is no reward model: its adapter has no head to continue", "leave out `continue`"),
            *((f"stages.{name}.model.{key}", stage.init, own, "remove the key") for key in keys),
        )  # fmt: skip

    def _check_link(
        self, place: str, target: str, before: str | None, reward: bool | None = False
    ) -> Iterator[Problem]:
        """Check that a link names one stage, that it stands before `before`, and, unless `reward` is None, that it has
        the right trainer."""
        origin, order, own = self.origins.get(target, target), list(self.known), self.stage(target)
        if target in self.recipe.stages and self.recipe.stages[target].sweep:
            options = ", ".join(name for name, origin in self.origins.items() if origin == target)
            yield Problem(place, f"{target!r} is swept, so the link is not clear", f"name one of: {options}")
        elif origin not in order:
            yield Problem(place, *self._unknown(target))
        elif before is not None and order.index(origin) >= order.index(before):
            remedy = "name an earlier stage, or change their order"
            yield Problem(place, f"{target!r} does not stand before {before!r}", remedy)
        instead = f"did you mean {self.rewards[0]!r}?" if self.rewards else "add a stage with `trainer: reward`"
        yield from _broken(
            (place, own and reward and own.trainer != "reward",
             f"{target!r} is not a reward stage: its trainer is {own and own.trainer}", instead),
            (place, own and reward is False and own.trainer == "reward",
             f"{target!r} is a reward model", "start from an sft stage or another policy"),
        )  # fmt: skip

    def check_judges(self) -> Iterator[Problem]:
        """A gold reward model that has seen the pairs of what it measures shares its mistakes."""
        reward, gold, judge = self.recipe.evaluation.reward, self.recipe.evaluation.gold, self.recipe.judge
        for key, name in (("reward", reward), ("gold", gold)):
            if name is not None and "/" not in name:
                yield from self._check_link(f"evaluation.{key}", name, None, reward=True)
        own = self.stage(gold)
        itself = own is not None and own is self.stage(reward)
        yield from _broken(
            ("judge.kind", judge and judge.kind == "reward" and gold is None, "there is no gold reward model",
             "set evaluation.gold; the model that the policies were trained with is no judge"),
            ("evaluation.gold", gold and reward is None,
             "there is no evaluation.reward to compare it with", "name the reward model there, or leave gold out"),
            ("evaluation.gold", itself, "is the reward model itself", "train a second one with `half: second`"),
            (f"stages.{gold}.half", own and reward and not itself and own.half is None,
             "is missing: a gold model learns from pairs of its own", f"add `half: second` to the stage {gold!r}"),
        )  # fmt: skip
        for name, stage in self.recipe.stages.items():
            if own and own.half and stage is not own and stage.half == own.half and stage.trainer in ("reward", "dpo"):
                problem = f"is that of the gold model {gold!r}"
                yield Problem(f"stages.{name}.half", problem, "give the two different halves")

    def check_compared(self) -> Iterator[Problem]:
        for index, name in enumerate(self.recipe.comparison.stages):
            if name not in {*self.known, *self.origins}:
                yield Problem(f"comparison.stages.{index}", *self._unknown(name))

    def check_starts(self, wrong: Set[str]) -> Iterator[Problem]:
        starts: dict[Any, str] = {}
        for name in self.recipe.policies:
            stage = self.recipe.stages[name]
            if not {f"stages.{name}.init", *(f"stages.{name}.model.{key}" for key in BASE)} & wrong:
                starts.setdefault((stage.init, *map(self.recipe.model_block(name).get, BASE)), name)
        if len(starts) > 1:
            first, second, *_ = starts.values()
            problem = f"{first!r} and {second!r} start from different models: KL has no common reference"
            yield Problem(f"stages.{second}.init", problem, "give all policies the same `init`")


def _broken(*rules: tuple[str, Any, str, str]) -> Iterator[Problem]:
    """The problems of the rules that are broken: place, whether it is, problem and remedy."""
    return (Problem(place, problem, remedy) for place, broken, problem, remedy in rules if broken)
