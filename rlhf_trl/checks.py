"""Every check on a recipe that needs more than its schema: library options, links between stages, sizes that must fit.

Works on the parsed recipe before its sweeps are expanded; imports neither torch nor the libraries it checks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.options import check_value, nearest, read_options, value_of
from rlhf_trl.recipe import Problem, Recipe, Stage

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
    "skip_memory_metrics": "peak memory is always recorded",
}
# Sizes that PPOTrainer computes from the batch and the number of processes.
COMPUTED = "world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size"
OWNED |= dict.fromkeys(COMPUTED.split(), "PPOTrainer computes it from per_device_train_batch_size")


def check_recipe(recipe: Recipe, known_stages: Sequence[str], processes: int) -> list[Problem]:
    """Find every problem of a recipe that its schema does not.

    Args:
        recipe: parsed, sweeps not yet expanded; may lack stages whose own keys are wrong.
        known_stages: the names of all stages, those included.
        processes: number of training processes that the batch sizes are checked for.
    """
    problems = list(_check_block("model", "model", recipe.model))
    if not recipe.model.get("model_name_or_path"):
        remedy = "give a Hub id, a folder, or builtin:tiny"
        problems.append(Problem("model.model_name_or_path", "is missing", remedy))
    for name, stage in recipe.stages.items():
        place = f"stages.{name}"
        problems += _check_block(f"{place}.model", "model", stage.model)
        problems += _check_block(f"{place}.args", stage.trainer, stage.args)
        for key, values in stage.sweep.items():
            for index, value in enumerate(values):
                found = _check_block(f"{place}.sweep", stage.trainer, {key: value})
                problems += [p._replace(place=f"{p.place}.{index}") if "unknown" not in p.problem else p for p in found]
        problems += _check_links(recipe, name, stage, known_stages)
    problems += _check_evaluation(recipe, known_stages)
    # Sizes are compared only where the values themselves are good, so that one mistake is not told twice.
    wrong = [problem.place for problem in problems if not problem.problem.startswith("unknown")]
    for name, stage in recipe.stages.items():
        blocks = ("model.", *(f"stages.{name}.{block}." for block in ("model", "args", "sweep")))
        if not any(place.startswith(blocks) for place in wrong):
            for values in _combinations(stage):
                problems += _check_sizes(recipe, name, stage, values, processes)
    return problems


def _check_block(place: str, kind: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    options = read_options(kind)
    for key, value in values.items():
        where = f"{place}.{key}"
        if key in OWNED:
            yield Problem(where, f"{key!r} is not set in a recipe", OWNED[key])
        elif key not in options:
            near = nearest(str(key), [name for name in options if name not in OWNED])
            owner = "trl.ModelConfig" if kind == "model" else f"the {kind} trainer"
            yield Problem(where, f"unknown key {key!r}: {owner} has no such option",
                          f"did you mean {near!r}?" if near else "see the documentation of TRL 1.12 for its options")  # fmt: skip
        elif found := check_value(kind, str(key), value):
            yield Problem(where, *found)


def _combinations(stage: Stage) -> Iterator[dict[str, Any]]:
    """The values of a stage, once for each value that a sweep gives one of its options."""
    yield dict(stage.args)
    for key, values in stage.sweep.items():
        yield from ({**stage.args, key: value} for value in values)


def _check_links(recipe: Recipe, name: str, stage: Stage, known: Sequence[str]) -> Iterator[Problem]:
    place = f"stages.{name}"
    if stage.init is not None:
        yield from _check_link(f"{place}.init", stage.init, recipe, known, before=name)
        if stage.init in recipe.stages and recipe.stages[stage.init].trainer == "reward":
            yield Problem(f"{place}.init", f"{stage.init!r} is a reward model", "start from an sft stage or another policy")
        if "model_name_or_path" in stage.model:
            remedy = "leave out one of the two"
            yield Problem(f"{place}.init", "a stage cannot have both `init` and a base model of its own", remedy)
    if stage.trainer in ("grpo", "ppo"):
        if stage.reward is None:
            rewards = [other for other, item in recipe.stages.items() if item.trainer == "reward"]
            remedy = f"add `reward: {rewards[0]}`" if rewards else "add a stage with `trainer: reward` and name it here"
            yield Problem(f"{place}.reward", f"is missing: {stage.trainer} needs a reward model", remedy)
        else:
            yield from _check_reward(f"{place}.reward", stage.reward, recipe, known, before=name)
    elif stage.reward is not None:
        yield Problem(f"{place}.reward", f"{stage.trainer} uses no reward model", "remove the key")


def _check_link(place: str, target: str, recipe: Recipe, known: Sequence[str], before: str | None) -> Iterator[Problem]:
    expanded = [f"{name}-{key}={value}" for name, stage in recipe.stages.items()
                for key, values in stage.sweep.items() for value in values]  # fmt: skip
    if target in recipe.stages and recipe.stages[target].sweep:
        options = [name for name in expanded if name.startswith(target)]
        yield Problem(place, f"{target!r} is swept, so the link is not clear", f"name one of: {', '.join(options)}")
    elif target == before:
        yield Problem(place, "the stage links to itself", "name an earlier stage, or remove the key")
    elif target not in known and target not in expanded:
        near = nearest(target, [*known, *expanded])
        remedy = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(known)}"
        yield Problem(place, f"there is no stage {target!r}", remedy)
    elif before is not None and target in recipe.stages and before in _ancestors(recipe, target):
        yield Problem(place, f"{before!r} and {target!r} wait for each other", "break the circle: one of them starts without")
    elif before is not None and target in known and list(known).index(target) > list(known).index(before):
        yield Problem(place, f"the stage {target!r} comes later", f"move {target!r} above {before!r}")


def _ancestors(recipe: Recipe, name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        stage = recipe.stages.get(waiting.pop())
        for link in (stage.init, stage.reward) if stage else ():
            if link is not None and link not in found:
                found.add(link)
                waiting.append(link)
    return found


def _check_reward(
    place: str, target: str, recipe: Recipe, known: Sequence[str], before: str | None = None
) -> Iterator[Problem]:
    yield from _check_link(place, target, recipe, known, before)
    if target in recipe.stages and recipe.stages[target].trainer != "reward":
        rewards = [name for name, stage in recipe.stages.items() if stage.trainer == "reward"]
        remedy = f"did you mean {rewards[0]!r}?" if rewards else "add a stage with `trainer: reward`"
        yield Problem(place, f"{target!r} is not a reward stage but {recipe.stages[target].trainer}", remedy)


def _check_evaluation(recipe: Recipe, known: Sequence[str]) -> Iterator[Problem]:
    if recipe.evaluation.reward is not None:
        yield from _check_reward("evaluation.reward", recipe.evaluation.reward, recipe, known)
    starts: dict[Any, str] = {}
    for name in recipe.policies:
        block = recipe.model_block(name)
        starts.setdefault((recipe.stages[name].init, block.get("model_name_or_path")), name)
    if len(starts) > 1:
        first, second, *_ = starts.values()
        yield Problem(f"stages.{second}.init", f"{first!r} and {second!r} start from different models, so that their KL and "
                      "reward gain have no common reference", "give all policies the same `init`")  # fmt: skip


def _check_sizes(recipe: Recipe, name: str, stage: Stage, args: Mapping[str, Any], processes: int) -> Iterator[Problem]:
    place, kind = f"stages.{name}.args", stage.trainer

    def get(key: str) -> Any:
        return value_of(kind, args, key)

    block = recipe.model_block(name)
    yield from _check_model_block(name, stage, block, args)
    batch = get("per_device_train_batch_size")
    if kind == "grpo":
        steps = get("steps_per_generation") or get("gradient_accumulation_steps")
        rollout = get("generation_batch_size") or batch * processes * steps
        group = get("num_generations")
        if rollout % group:
            divisors = [size for size in range(2, rollout + 1) if rollout % size == 0]
            best = min(divisors, key=lambda size: abs(size - group), default=None)
            remedy = "set per_device_train_batch_size or gradient_accumulation_steps to a multiple of it"
            yield Problem(f"{place}.num_generations", f"{group} does not divide the {rollout} answers of a rollout (batch "
                          f"{batch} x {steps} steps x {processes} process{'es'[: 2 * (processes > 1)]})",
                          f"use num_generations: {best}, or {remedy}" if best else remedy)  # fmt: skip
    if kind == "ppo":
        local = batch * get("gradient_accumulation_steps")
        parts = get("num_mini_batches")
        if local % parts or (local // parts) % batch:
            yield Problem(f"{place}.num_mini_batches", f"{parts} does not divide the {get('gradient_accumulation_steps')} "
                          "gradient accumulation steps", "make gradient_accumulation_steps a multiple of it")  # fmt: skip
        if get("whiten_rewards") and local // parts < 8:
            yield Problem(f"{place}.whiten_rewards", f"needs mini-batches of at least 8 answers, not {local // parts}",
                          "raise per_device_train_batch_size or gradient_accumulation_steps, or turn it off")  # fmt: skip
    if kind in ("sft", "reward", "dpo"):
        limit = get("max_length")
        if limit is not None and limit < recipe.data.max_length:
            given = "" if "max_length" in args else ", TRL's default"
            yield Problem(f"{place}.max_length", f"{limit}{given}, is below data.max_length {recipe.data.max_length}: rows "
                          "would be cut or dropped without a word", f"set it to {recipe.data.max_length}")  # fmt: skip
    if kind == "dpo" and "exo_pair" in (get("loss_type") or ()) and get("label_smoothing") <= 0:
        yield Problem(f"{place}.label_smoothing", "the loss exo_pair needs it above 0", "set label_smoothing: 0.001")
    yield from _check_positions(recipe, name, kind, get)


def _check_model_block(name: str, stage: Stage, block: Mapping[str, Any], args: Mapping[str, Any]) -> Iterator[Problem]:
    place = f"stages.{name}.model" if stage.model else "model"
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if block.get(key)]
    if quantised and not block.get("use_peft"):
        yield Problem(f"{place}.{quantised[0]}", "a quantised model can be trained only through an adapter", "set use_peft: true")
    if len(quantised) == 2:
        yield Problem(f"{place}.load_in_8bit", "cannot stand beside load_in_4bit", "choose one of the two")
    disables_dropout = stage.trainer == "ppo" or (
        stage.trainer in ("reward", "dpo", "grpo") and value_of(stage.trainer, args, "disable_dropout")
    )
    if block.get("use_peft") and block.get("lora_dropout", 0) > 0 and disables_dropout:
        yield Problem(f"{place}.lora_dropout", f"{stage.trainer} turns every dropout off, LoRA's too",
                      "set lora_dropout: 0" + ("" if stage.trainer == "ppo" else ", or disable_dropout: false in the args"))  # fmt: skip


def _check_positions(recipe: Recipe, name: str, kind: str, get: Any) -> Iterator[Problem]:
    positions = max_positions(str(recipe.model_block(name).get("model_name_or_path")))
    if positions is None:
        return
    longest = recipe.data.max_length
    if longest > positions:
        yield Problem("data.max_length", f"{longest} tokens are more than the {positions} positions of the model",
                      f"set it to {positions} or less")  # fmt: skip
        return
    answers = {"grpo": "max_completion_length", "ppo": "response_length"}
    if kind in answers and longest + (get(answers[kind]) or 0) > positions:
        yield Problem(f"stages.{name}.args.{answers[kind]}", f"{get(answers[kind])} tokens after a prompt of up to {longest} "
                      f"(data.max_length) are more than the {positions} positions of the model",
                      f"set it to {positions - longest} or less, or lower data.max_length")  # fmt: skip
    if kind in ("dpo", "grpo", "ppo") and longest + recipe.evaluation.max_new_tokens > positions:
        yield Problem("evaluation.max_new_tokens", f"{recipe.evaluation.max_new_tokens} tokens after a prompt of up to "
                      f"{longest} are more than the {positions} positions of the model",
                      f"set it to {positions - longest} or less, or lower data.max_length")  # fmt: skip


def max_positions(model: str) -> int | None:
    """The longest input of a model whose config is at hand (a local folder, or the Hub's cache), else None."""
    if model == "builtin:tiny":
        return 512
    config = Path(model) / "config.json"
    if not config.exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    values = json.loads(config.read_text(encoding="utf-8"))
    return values.get("max_position_embeddings") or values.get("n_positions")
