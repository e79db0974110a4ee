"""The model card: every number in it resolves to the export's JSON, and what was not measured is said."""

import contextlib
import re
from typing import Any

import pytest
from report_fixtures import follow, write_run

from rlhf_trl.adapters.card import ACTIVE, render_card
from rlhf_trl.adapters.evidence import gather
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.text.format import STYLES

SHOWN = re.compile(r"<!-- (\w+\.json)#(\S*) -->")
BASE = {"id": "openai-community/gpt2", "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e", "shipped": False,
        "stage": None, "weights": "0" * 64, "held_in": {"load_in_4bit": None, "load_in_8bit": None}}  # fmt: skip


def lineage_of(name: str, trainer: str, **changes: Any) -> dict[str, Any]:
    kind = "reward" if trainer == "reward" else "policy"
    versions = dict.fromkeys(("rlhf-trl", "trl", "peft", "transformers", "torch"), "1.2.3")
    verification = {"rows": 4, "outputs": 611, "difference": 3.1e-6, "largest": 34.2}
    return {"run": "hh", "stage": name, "trainer": trainer, "kind": kind, "base": BASE, "combined": [name],
            "rank": 16, "dora": False, "continued": None,
            "parents": [{"stage": "rm", "trainer": "reward"}], "seed": 42, "trained_with": {"versions": versions},
            "data": {"source": "Anthropic/hh-rlhf", "rows_kept": 4321}, "verification": verification,
            **changes}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished run with policies, a gold model and a judge: its recipe and directory."""
    recipe, run = write_run(tmp_path / "hh", judge="chance")
    policies = read_json(run.metrics)["policies"]
    found = {name: {"on_front": {"reward": True, "gold": False}} for name in policies}
    write_json(run.final_results, {"policies": found})
    return recipe, run


def render(recipe, directory, name: str, **changes: Any):
    lineage = lineage_of(name, recipe.stages[name].trainer, **changes)
    evidence = gather(recipe, directory, name)
    return render_card(lineage, evidence, True), {"lineage.json": lineage, "evidence.json": evidence}


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_every_number_resolves_to_the_json(run, kind):
    recipe, directory = run
    stage = recipe.policies[0] if kind == "policy" else recipe.reward_stages[0]
    card, documents = render(recipe, directory, stage)
    rest = card
    addresses = SHOWN.findall(card)
    assert len(addresses) > (20 if kind == "policy" else 12)
    assert kind == "reward" or "no other policy of its run has more reward gain at less KL" in card
    assert kind == "reward" or "pairs that people have labelled it agrees with them in" in card
    assert "more gold gain at less KL" not in card
    for file, address in addresses:
        before, _, after = rest.partition(f"<!-- {file}#{address} -->")
        printed = [text for text in spellings(follow(documents[file], address)) if before.endswith(text)]
        assert printed, (address, before[-60:])
        rest = before[: -len(max(printed, key=len))] + after
    # Beside them, only the front matter, code, names, texts of models and the wording itself hold a digit.
    for held in (r"\A---.*?^---", r"```.*?```", r"`[^`\n]*`", "95 %", "float32"):
        rest = re.sub(held, "", rest, flags=re.S | re.M)
    assert not re.search(r".*\d.*", rest)


def spellings(value: Any) -> list[str]:
    """Every way in which a value may be printed."""
    found = ["–"] if value is None or (isinstance(value, dict) and value["mean"] is None) else []
    for style in STYLES.values():
        with contextlib.suppress(TypeError, ValueError, KeyError, IndexError):
            found.append(style(value))
    return [*found, *(ACTIVE.sub(r"\\\1", text) for text in found if isinstance(value, str))]


def test_a_number_without_an_address_cannot_be_printed(run):
    recipe, directory = run
    evidence = gather(recipe, directory, recipe.policies[0])
    with pytest.raises(TypeError, match="printed without its source"):
        render_card(lineage_of("dpo", "dpo", run=7), evidence, False)


def test_the_evidence_says_where_it_was_read(run):
    recipe, directory = run
    policy = recipe.policies[0]
    evidence = gather(recipe, directory, policy)
    file, _, address = evidence["sources"]["policy"].partition("#")
    whole = follow(read_json(directory.root / file), address)
    assert {key: whole[key] for key in evidence["policy"]} == evidence["policy"]
    assert evidence["policy"]["kl"] == read_json(directory.metrics)["policies"][policy]["kl"]


def test_what_is_of_another_training_or_of_other_answers_is_not_carried(run):
    recipe, directory = run
    policy = recipe.policies[0]
    write_json(directory.winrate, {**read_json(directory.winrate), "evaluation": "0" * 64})
    assert "Not measured: the judge has seen other answers" in render(recipe, directory, policy)[0]
    write_json(directory.done(policy), {**read_json(directory.done(policy)), "finished": "2027-01-01T00:00:00+0000"})
    card, documents = render(recipe, directory, policy)
    assert "Not measured: the stage was trained again after the step 'evaluate'" in card
    assert documents["evidence.json"]["policy"] is None
    assert "Win rate" not in card


ALARM = {"policy": "dpo", "step": None, "raised": False, "alarm": "length", "value": 1.0, "says": "as long"}
UNJUDGED = {**ALARM, "alarm": "gold", "value": None, "says": "not judged: there is no gold model"}


@pytest.mark.parametrize(
    ("alarms", "checked", "said"),
    [
        ([{**ALARM, "raised": True}], 1, ["- length<!--"]),
        ([ALARM, UNJUDGED], 1, ["that could be judged was raised", UNJUDGED["says"]]),
        ([UNJUDGED], 0, ["None could be judged.", UNJUDGED["says"]]),
    ],
)
def test_alarms_are_listed_where_raised_and_counted_where_judged(run, alarms, checked, said):
    recipe, directory = run
    assert recipe.policies[0] == "dpo"
    write_json(directory.over_optimisation, {**read_json(directory.over_optimisation), "alarms": alarms})
    card, documents = render(recipe, directory, "dpo")
    assert documents["evidence.json"]["alarms_checked"] == checked
    assert all(text in card for text in said)


def test_texts_cannot_act_in_the_card(run):
    recipe, directory = run
    policy = recipe.policies[0]
    rows = read_jsonl(directory.completions(policy))
    rows[0]["answer"] = "```\n# a heading <script>alert(1)</script> \x1b[31m"
    write_jsonl(directory.completions(policy), rows)
    card, _ = render(recipe, directory, policy, run="<b>x</b>", stage="[a](b)")
    assert "````text\n```\n# a heading" in card
    assert "\x1b" not in card
    assert r"# \<b\>x\</b\>: \[a\](b)" in card


@pytest.mark.parametrize(
    ("rank", "dora", "said"),
    [(8, False, "--max-lora-rank 8 "), (24, False, "--max-lora-rank 32 "), (600, False, "only merged"),
     (8, True, "only merged")],
)  # fmt: skip
def test_what_vllm_needs_is_said(run, rank, dora, said):
    assert said in render(*run, run[0].policies[0], rank=rank, dora=dora)[0]


def test_the_front_matter_is_what_the_hub_reads(run):
    from huggingface_hub import ModelCard

    card = render(*run, run[0].policies[0])[0]
    front = ModelCard(card).data.to_dict()
    assert (front["base_model"], front["datasets"]) == (BASE["id"], ["Anthropic/hh-rlhf"])
    assert front["base_model_relation"] == "adapter"
    results = front["model-index"][0]["results"]
    found = {metric["type"]: metric for result in results for metric in result["metrics"]}
    assert set(found) == {"reward_gain", "kl", "win_rate"}
    assert found["kl"]["value"] == read_json(run[1].metrics)["policies"][run[0].policies[0]]["kl"]["mean"]
    assert all(re.search(r": .*\[.*, .*\]$", one["name"]) for one in found.values())
    assert results[0]["dataset"] == {"name": "Anthropic/hh-rlhf", "type": "Anthropic/hh-rlhf"}
    front = ModelCard(render(*run, run[0].reward_stages[0])[0]).data.to_dict()
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    card = render(*run, run[0].policies[0], base={**BASE, "id": None, "shipped": True, "stage": "sft"})[0]
    assert "base_model" not in ModelCard(card).data.to_dict() and "fine-tuned it whole" in card
