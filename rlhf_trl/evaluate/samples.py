"""Step `samples`: what every model answers to the same prompts, for programs and for people.

Reads the answers of `evaluation/`: those of the second decoding where the recipe has one, else those that were scored.
Writes `samples/<policy>.jsonl` and `samples/<policy>.md` for each policy and the reference, and
`samples/side_by_side.md` with the answers of all to one prompt below each other.

    rlhf-trl samples recipes/demo.yaml --per-model 20
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl, write_jsonl, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.display import fence, inline, take_turns

SCORES = ("reward", "reward_gain", "gold", "gold_gain", "kl")
NOTE = """{} held-out prompts, one response of each model, sampled at temperature {temperature:g}, top_k {top_k}, top_p
{top_p:g}, up to {max_new_tokens} tokens.{}

The prompts are the first of each subset in turn, in evaluation's own random order: none was picked for its answers.
The texts stand as they are, and some may offend; a character that would be invisible, or act, is shown by its code.
"""


def samples(recipe: Recipe, run: RunDir) -> None:
    """Export `samples.per_model` prompt/response pairs of every model, the same prompts for all.

    UserError where the evaluation is missing or was made with other settings, or the recipe trains no policy."""
    run.require(recipe, "evaluate", "evaluate RECIPE")
    if not recipe.policies:
        raise UserError("stages", "there is no policy to take samples of", "add a dpo, grpo or ppo stage")
    second, asked = recipe.evaluation.judge_decoding, recipe.samples.per_model
    decoding = read_json(run.metrics)["decoding"] | (second.model_dump() if second else {})
    decoding = {key: decoding[key] for key in ("temperature", "top_k", "top_p", "max_new_tokens")}
    names = [REFERENCE, *recipe.policies]
    answers = {name: read_jsonl(run.judge_answers(name) if second else run.completions(name)) for name in names}
    rows = answers[REFERENCE]
    chosen = [rows[index]["id"] for index in take_turns([row["subset"] for row in rows], asked)]
    pairs = {}
    for name, of in answers.items():
        by_id = {row["id"]: row for row in of}
        pairs[name] = [as_pair(by_id[key], decoding) for key in chosen]
    few = f" `samples.per_model` is {asked}; the evaluation has only {len(chosen)} prompts, and all of them are here."
    note = NOTE.format(len(chosen), few if len(chosen) < asked else "", **decoding)
    for name in names:
        write_jsonl(run.samples / f"{name}.jsonl", pairs[name])
        write_text(run.samples / f"{name}.md", render(f"Samples of {inline(name)}", note, {name: pairs[name]}))
    write_text(run.samples / "side_by_side.md", render("Samples of all models, side by side", note, pairs))


def as_pair(row: Mapping[str, Any], decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Select what the export keeps of an answer; `scores` is empty where it was not scored."""
    return {
        **{key: row[key] for key in ("id", "subset", "prompt", "finished")},
        "response": row["answer"],
        "response_tokens": row["answer_tokens"],
        "decoding": decoding,
        "scores": {key: row[key] for key in SCORES if key in row},
    }


def render(title: str, note: str, pairs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write the page: each prompt, and below it the response of each model; every text in a fence of its own."""
    parts = [f"# {title}\n", note]
    for number, rows in enumerate(zip(*pairs.values(), strict=True), start=1):
        parts.append(f"## {number}. Prompt {inline(rows[0]['id'])} of {inline(rows[0]['subset'])}\n")
        for message in rows[0]["prompt"]:
            parts.append(f"**{message['role']}**\n\n{_block(message['content'])}")
        for name, row in zip(pairs, rows, strict=True):
            parts.append(f"### Response of {inline(name)}\n\n{_facts(row)}\n\n{_block(row['response'])}")
    return "\n".join(parts)


def _facts(row: Mapping[str, Any]) -> str:
    scores = [f"{key.replace('_', ' ')} {round(value, 2) + 0.0:.2f}" for key, value in row["scores"].items()]
    state = "" if row["finished"] else ", cut at the limit"
    return ", ".join([f"{row['response_tokens']} tokens{state}", *scores])


def _block(text: str) -> str:
    return fence(text) if text else "*an empty text*\n"
