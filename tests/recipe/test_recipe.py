"""Recipes: every mistake is named with place and remedy, all at once; sweeps and fingerprints keep their promise."""

import itertools
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NO_PPO, ROOT, python
from ruamel.yaml import YAML

from rlhf_trl.recipe import rules
from rlhf_trl.recipe.errors import Problem, UserError
from rlhf_trl.recipe.library import BATCH, CLASSES
from rlhf_trl.recipe.load import load_recipe, locate
from rlhf_trl.recipe.recipe import STEPS, Recipe
from rlhf_trl.run.layout import RunDir

GOOD = """\
name: good
seed: 1
model:
  model_name_or_path: builtin:tiny
  use_peft: true
  lora_dropout: 0.0
data:
  source: builtin:demo
  max_length: 128
  test_fraction: 0.2
stages:
  sft:
    trainer: sft
    model:
      lora_r: 4
    args:
      learning_rate: 3e-3
  rm:
    trainer: reward
    init: sft
    args:
      center_rewards_coefficient: 0.01
  dpo:
    trainer: dpo
    init: sft
    args:
      beta: 0.1
  grpo:
    trainer: grpo
    init: sft
    reward: rm
    args:
      num_generations: 4
      max_completion_length: 64
  ppo:
    trainer: ppo
    init: sft
    reward: rm
    args:
      gradient_accumulation_steps: 2
      num_mini_batches: 2
      kl_coef: 0.05
evaluation:
  reward: rm
  prompts: 20
  max_new_tokens: 64
"""
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
TOKEN = "hf_" + "aB3dE5gH" * 4
TABLE = {
    part: {name: row for name, row in rows.items() if "ppo" in CLASSES or "ppo" not in str(row)}
    for part, rows in YAML(typ="safe", pure=True).load(Path(__file__).with_name("mistakes.yaml")).items()
}


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def refuse(recipe_file):
    """Load a recipe that must be refused and return the problems, each place without the path of the file."""

    def load(text: str | bytes, *overrides: str, processes: int = 1) -> list[Problem]:
        path = recipe_file(text)
        with pytest.raises(UserError) as caught:
            load_recipe(path, [*overrides, *NO_PPO], processes)
        return [replace(p, place=p.place.replace(str(path), "")) for p in caught.value.problems]

    return load


@pytest.fixture
def accept(recipe_file):
    def load(text: str = GOOD, *overrides: str) -> Recipe:
        return load_recipe(recipe_file(text), [*overrides, *NO_PPO])

    return load


def change(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def add(after: str, line: str, text: str = GOOD) -> str:
    """Put a line below another one, as deeply indented."""
    above = next(item for item in text.splitlines() if item.strip() == after)
    return change(f"{above}\n", f"{above}\n{above[: len(above) - len(above.lstrip())]}{line}\n", text)


def edited(edits: list) -> str:
    """The good recipe with the edits of a row of the table."""
    text = GOOD
    for old, new in edits if isinstance(edits[0], list) else [edits]:
        text = add(old, new[1:], text) if new.startswith("+") else change(old, new, text)
    return text


def says(problem: Problem) -> str:
    return f"{problem.problem} -> {problem.remedy}"


def keys(problems: list[Problem]) -> list[str]:
    return [problem.place.partition(": ")[2] or problem.place for problem in problems]


# --- one mistake, one message ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE["mistakes"].values(), ids=TABLE["mistakes"])
def test_a_mistake_is_named_with_its_line_its_key_and_the_remedy(row, refuse):
    text = edited(row["edit"])
    (problem,) = refuse(text)  # one mistake is told once, and nothing that only follows from it
    pairs = zip(text.splitlines(), [*GOOD.splitlines(), *[""] * 50], strict=False)
    first = next(number for number, (new, old) in enumerate(pairs, 1) if new != old)
    assert problem.place == f":{row.get('line', first)}: {row['place']}"
    assert row["says"] in says(problem)


@pytest.mark.parametrize("row", TABLE["libraries"].values(), ids=TABLE["libraries"])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_libraries_say_is_named_before_the_first_step(row, processes, recipe_file, tmp_path):
    from rlhf_trl.train.check import check_stages

    path = recipe_file(edited(row["edit"]))
    with pytest.raises(UserError) as caught:
        check_stages(load_recipe(path, NO_PPO, processes), RunDir(tmp_path / "run"), processes)
    (problem,) = locate(caught.value, path, ()).problems
    assert problem.place.endswith(f": {row['place']}") and row["says"] in says(problem)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_every_shipped_recipe_is_valid_and_its_updates_do_not_depend_on_the_processes(path, processes, installed):
    recipe = load_recipe(path, NO_PPO if "trainer: ppo" in path.read_text() else [], processes)
    for name, stage in recipe.stages.items() if path.stem != "demo" else ():
        rows, steps = (recipe.args_of(name, processes)[key] for key in BATCH)
        assert rows * steps * processes == stage.global_batch_size


def test_a_trl_without_ppo_is_named_and_the_stage_can_be_left_out(recipe_file, monkeypatch):
    monkeypatch.delitem(CLASSES, "ppo", raising=False)
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(GOOD))
    (problem,) = caught.value.problems
    assert problem.place.endswith(":36: stages.ppo.trainer") and "constraints.txt" in problem.remedy
    assert "--without ppo" in problem.remedy and "ppo" not in load_recipe(recipe_file(GOOD), ["stages.ppo=null"]).plan


@pytest.mark.parametrize("other", ["use_peft=false", "load_in_4bit=true", "use_dora=true"])
def test_vllm_answers_for_plain_lora_alone(other, refuse, installed):
    refused = refuse(GOOD, "evaluation.backend=vllm", f"stages.dpo.model.{other}")
    assert ["the stage dpo trains none" in problem.problem for problem in refused] == [True]


def test_use_kernels_is_taken_where_its_package_is_there(refuse, accept, monkeypatch):
    asked = "stages.dpo.args.model_init_kwargs={use_kernels: true}"
    for found in (None, "kernels"):
        monkeypatch.setattr(rules, "find_spec", {"kernels": found}.get)
        (problem,) = accept(GOOD, asked) and [None] if found else refuse(GOOD, asked)
        assert found or problem.remedy == "pip install kernels"


def test_vllm_needs_a_gpu(accept, installed, tmp_path):
    from rlhf_trl.train.check import check_stages

    with pytest.raises(UserError, match="vLLM needs a GPU"):
        check_stages(accept(GOOD, "evaluation.backend=vllm"), RunDir(tmp_path / "run"), 1)


@pytest.mark.parametrize("row", TABLE["missing"].values(), ids=TABLE["missing"])
def test_what_is_missing_is_named_at_its_section(row, refuse):
    problem = next(p for p in refuse(edited(row["edit"])) if p.place.endswith(row["place"]))
    assert problem.place == (f":{row['line']}: {row['place']}" if row["line"] else f": {row['place']}")
    assert row["says"] in problem.remedy


def test_dropout_that_a_trainer_turns_off_is_named_for_each_trainer(refuse):
    problems = refuse(change("lora_dropout: 0.0", "lora_dropout: 0.05"))
    assert {p.place for p in problems} == {":6: model.lora_dropout"}
    assert [p.problem.split()[0] for p in problems] == ["reward", "dpo", "ppo"]


def test_what_ppos_loop_does_not_read_is_refused(refuse):
    values = {"fp16": "true", "max_steps": 3, "data_seed": 2, "eval_strategy": "steps", "save_strategy": "epoch",
              "load_best_model_at_end": "true", "neftune_noise_alpha": 5,
              "gradient_checkpointing_kwargs": "{use_reentrant: true}"}  # fmt: skip
    problems = refuse(GOOD, *(f"stages.ppo.args.{name}={value}" for name, value in values.items()))
    assert {problem.place.rpartition(".")[2] for problem in problems} == {*values}


def test_a_batch_is_judged_for_the_number_of_processes(refuse, recipe_file):
    text = change("num_generations: 4", "num_generations: 4\n      per_device_train_batch_size: 2")
    load_recipe(recipe_file(text), processes=2)
    for processes in (1, 3):
        assert f"x {processes} process" in refuse(text, processes=processes)[0].problem


def test_one_batch_is_spread_over_any_number_of_processes(accept, refuse):
    """And PPO's mini-batches with it; a number that does not divide it is refused."""
    sets = [f"stages.{name}.global_batch_size=64" for name in ("dpo", "grpo", "ppo")]
    text = change("      gradient_accumulation_steps: 2\n", "      per_device_train_batch_size: 16\n")
    recipe = accept(text, *sets, "stages.dpo.args.per_device_train_batch_size=12")
    for processes in (1, 2, 4, 8):
        for name, most in (("dpo", 8), ("grpo", 8), ("ppo", 16 if processes < 4 else 32 // processes)):
            rows, steps = (recipe.args_of(name, processes)[key] for key in BATCH)
            assert rows * steps * processes == 64 and rows == most and not (name == "ppo" and steps % 2)
    with pytest.raises(UserError, match="64 does not divide among 3 processes"):
        recipe.args_of("dpo", 3)
    problems = refuse(text, *sets, processes=3)
    assert [p.place for p in problems] == [f"--set stages.{name}.global_batch_size" for name in ("dpo", "grpo", "ppo")]
    assert {p.remedy for p in problems} == {"give a multiple of it, or launch 2 or 4 process(es)"}


def test_positions_are_read_from_the_config_of_a_local_folder(tmp_path, refuse, accept):
    config, text = tmp_path / "config.json", change("builtin:tiny", str(tmp_path))
    config.write_text(json.dumps({"n_positions": 100}))
    (problem,) = refuse(text)
    assert problem.place == ":9: data.max_length" and "100 positions" in problem.problem
    config.write_text(json.dumps({"max_position_embeddings": 192, "n_positions": 10}))
    assert accept(text)
    for unusable in ("{", "[]", "{}", '{"n_positions": "many"}', "\udcff"):
        config.write_text(unusable, errors="surrogateescape")
        assert accept(text)


# --- files that are no recipe ----------------------------------------------------------------------------------------

UNREADABLE = {
    **{name: (row.get("text") or (edited(row["edit"]) if "edit" in row else ""), row["place"], row["says"])
       for name, row in TABLE["unreadable"].items()},
    "two-documents": (GOOD + "---\nname: x\n", ":47", "remove the `---`"),
    "utf-16": (GOOD.encode("utf-16"), "", "not UTF-8"),
    "latin-1": (change("good", "gøød").encode("latin-1"), "", "not UTF-8"),
    "deep": (GOOD + "more: " + "[" * 900 + "]" * 900, "", "too deep"),
    "digits": (change("beta: 0.1", f"beta: {'9' * 5000}"), ":27: stages.dpo.args.beta", "not a finite number"),
    "large": ("# " + "x" * 300_000 + "\n" + GOOD, "", "larger than"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "place", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_recipe_is_refused_with_the_line(text, place, words, refuse):
    (problem,) = refuse(text)
    assert problem.place == place and words in says(problem)


def test_line_ends_and_byte_order_marks_do_not_matter(accept, recipe_file):
    expected = accept().model_dump()
    for text in (GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, GOOD.rstrip("\n"), "---\n" + GOOD + "...\n"):
        assert load_recipe(recipe_file(text.encode())).model_dump() == expected


def test_yaml_is_version_1_2_and_dates_are_text(accept):
    assert accept(change("name: good", "name: 2026-11-22")).name == "2026-11-22"
    recipe = accept(add("beta: 0.1", "save_strategy: no\n      learning_rate: 1e-6\n      run_name: off"))
    assert recipe.stages["dpo"].args == {"beta": 0.1, "save_strategy": "no", "learning_rate": 1e-6, "run_name": "off"}


def test_anchors_are_refused_before_they_grow_or_circle(refuse):
    pairs = itertools.pairwise("abcdefghi")
    laughs = "a: &a [x]\n" + "".join(f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in pairs)
    start = time.perf_counter()
    assert all("not read" in problem.problem for problem in refuse(laughs + GOOD))
    assert "not read" in refuse(change("beta: 0.1", "beta: &x [*x]"))[0].problem
    circle = refuse(change("    args:\n      beta: 0.1", "    args: &x {<<: *x}"))
    assert {p.place for p in circle} == {":26: stages.dpo.args"}
    (merged,) = refuse(change("      beta: 0.1", "      <<: {beta: 0.1}"))
    assert merged.place == ":27: stages.dpo.args.<<" and "merge keys" in merged.problem
    assert time.perf_counter() - start < 5


def test_a_path_that_cannot_be_read_is_named(tmp_path, recipe_file):
    path = recipe_file(GOOD)
    for place, words in {
        tmp_path / "recipe.yml": "No such file",
        tmp_path / "none" / "recipe.yaml": "give the path of a YAML file",
        tmp_path: "Is a directory",
        path / "x": "Not a directory",
    }.items():
        with pytest.raises(UserError) as caught:
            load_recipe(place)
        assert caught.value.problems[0].place == str(place) and words in str(caught.value)


# --- all at once -----------------------------------------------------------------------------------------------------


AT_ONCE = ("seed-range", "above-one-dropout", "own-range-low", "key-data", "negative", "key-reward", "duplicate",
           "bool-for-float-default", "trainer-sized", "other-start", "mini-batches", "key-evaluation")  # fmt: skip


def test_all_mistakes_are_reported_in_one_go(refuse):
    rows = [TABLE["mistakes"][name] for name in AT_ONCE]
    overrides = {"stages.dpp.args.beta": "1", "model.lora_r": "x", "evaluation.max_new_tokens": TOKEN}
    problems = refuse(edited([row["edit"] for row in rows]), *(f"{key}={value}" for key, value in overrides.items()))
    assert sorted(keys(problems)) == sorted([*(row["place"] for row in rows), *(f"--set {key}" for key in overrides)])


def test_no_mistake_hides_an_independent_one(refuse):
    problems = refuse(change("beta: 0.1", "beta: x", add("beta: 0.1", "bta: 1")))
    assert keys(problems) == ["stages.dpo.args.beta", "stages.dpo.args.bta"]
    text = "name: x\nmodel: {model_name_or_path: builtin:tiny, lora_rr: 1}\nstages: {a: {trainer: foo}}\n"
    assert keys(refuse(text)) == ["stages.a.trainer", "model.lora_rr"]


# --- one letter wrong in any key of any shipped recipe ---------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_wrong_letter_in_any_key_is_refused_with_the_right_key(path, refuse):
    text, draw = path.read_text(), random.Random(5)
    stages = YAML(typ="safe", pure=True).load(text)["stages"]  # the user's own words
    found = [match for match in re.finditer(r"^ *(\w+):", text, re.MULTILINE) if match[1] not in stages]
    for match in found:
        key, letter = match[1], draw.randrange(len(match[1]))
        wrong = key[:letter] + ("z" if key[letter] != "z" else "q") + key[letter + 1 :]
        place = re.compile(rf":{text.count(chr(10), 0, match.start(1)) + 1}: (.+\.)?{wrong}")
        problems = refuse(text[: match.start(1)] + wrong + text[match.end(1) :])
        assert [p.remedy for p in problems if place.fullmatch(p.place)] == [f"did you mean {key!r}?"], problems
    assert len(found) > 40


# --- access tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (add("beta: 0.1", f"hub_token: {TOKEN}"), []),
        (add("beta: 0.1", f"{TOKEN}: 1"), []),
        (change("name: good", f"name: {TOKEN}"), []),
        (change("beta: 0.1", f"beta: [1, {{a: {TOKEN}}}]"), []),
        (change("builtin:demo", f"https://user:{TOKEN}@hub/x"), []),
        (change("init: sft\n    args:\n      beta", f"init: {TOKEN}\n    args:\n      beta"), []),
        (change("name: good", "name: sk-proj-abcdefghijklmnop"), []),
        (change("name: good", f"name: good: {TOKEN}"), []),
        (f"{TOKEN}\n", []),
        *((GOOD, [text]) for text in (f"name={TOKEN}", f"{TOKEN}=1", TOKEN, f"model.x=[{TOKEN}")),
        (GOOD, [f"stages.{TOKEN}.x=1"]),
    ],
)
def test_an_access_token_is_refused_and_not_shown(text, overrides, refuse):
    shown = "\n".join(str(problem) for problem in refuse(text, *overrides))
    assert TOKEN not in shown and "sk-proj" not in shown


def test_a_token_is_told_once_and_names_that_look_like_one_are_not_tokens(refuse, accept):
    (problem,) = refuse(change("beta: 0.1", f"beta: {TOKEN}"))
    assert "access token" in problem.problem and ".env.example" in problem.remedy
    for source in ("hf_preferences/pairs.jsonl", "me/hf_dataset", "data/task-sk-1", "risk-assessment-of-models"):
        assert accept(change("builtin:demo", source))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", TABLE["overrides"])
def test_a_bad_override_is_named_as_one(override, refuse):
    row = TABLE["overrides"][override]
    (problem,) = refuse(GOOD, override)
    assert problem.place == f"--set {row['place']}" and row["says"] in says(problem)


def test_overrides_are_read_as_yaml_and_change_one_key(accept):
    values = ["beta=0.3", "loss_type=[sigmoid, sft]", "bf16 = false"]
    others = ["stages.dpo.sweep.seed=[1, 2]", "stages.sft.model.lora_r=2", "data.subsets=[a]", "seed=7"]
    recipe = accept(GOOD, *(f"stages.dpo.args.{value}" for value in values), *others, "evaluation.reward=null")
    assert recipe.stages["dpo-seed=2"].args == {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "bf16": False, "seed": 2}
    assert recipe.data.subsets == ["a"] and recipe.seed == 7 and recipe.evaluation.reward is None
    assert recipe.model_block("sft")["lora_r"] == 2 and "lora_r" not in recipe.model
    dotted = accept(change("  dpo:\n", "  dpo-v1.5:\n"), "stages.dpo-v1.5.args.beta=0.3")
    assert dotted.stages["dpo-v1.5"].args["beta"] == 0.3


def test_a_stage_is_left_out_together_with_what_names_it(accept, refuse):
    others = "comparison: {stages: [dpo, ppo]}\njudge: {kind: reward}\n"
    gold = change("  prompts: 20", "  gold: gold") + others
    gold = change("  dpo:\n", "  gold: {trainer: reward, init: sft, half: second}\n  dpo:\n", gold)
    recipe = accept(gold, "stages.ppo=null", "stages.gold=null")
    assert list(recipe.stages) == ["sft", "rm", "dpo", "grpo"] and recipe.compared == ["dpo"]
    assert (recipe.evaluation.reward, recipe.evaluation.gold, recipe.judge) == ("rm", None, None)
    swept = add("trainer: reward", "sweep: {seed: [1, 2]}").replace("reward: rm", "reward: rm-seed=1")
    assert accept(swept, *(f"stages.{name}=null" for name in ("rm", "grpo", "ppo"))).evaluation.reward is None
    (problem,) = refuse(swept, "stages.rm=null", "stages.ppo=null")
    assert problem.place == "--without rm" and problem.remedy == "leave out these, too: --without grpo"


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_expands_to_ordinary_stages_with_stable_names(accept):
    recipe = accept(add("trainer: dpo", "sweep: {beta: [0.03, 1e-1], seed: [1, 2]}"))
    names = ["dpo-beta=0.03-seed=1", "dpo-beta=0.03-seed=2", "dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"]
    assert recipe.policies == [*names, "grpo", "ppo"]
    assert list(recipe.stages) == ["sft", "rm", *names, "grpo", "ppo"]
    stage = recipe.stages["dpo-beta=0.1-seed=2"]  # a swept value takes the place of the one in args
    assert stage.args == {"beta": 0.1, "seed": 2} and stage.sweep == {} and stage.init == "sft"
    assert recipe.args_of("dpo-beta=0.1-seed=2")["seed"] == 2 and recipe.args_of("grpo")["seed"] == recipe.seed
    assert recipe.groups["dpo-beta=0.03"] == names[:2]


def test_a_link_names_one_stage_of_a_sweep(accept, refuse):
    swept = change("trainer: reward", "trainer: reward\n    sweep: {seed: [1, 2], learning_rate: [1e-4]}")
    problems = refuse(swept)
    places = [":32: stages.grpo.reward", ":39: stages.ppo.reward", ":45: evaluation.reward"]
    names = "rm-seed=1-learning_rate=0.0001, rm-seed=2-learning_rate=0.0001"
    assert [(p.place, p.remedy) for p in problems] == [(place, f"name one of: {names}") for place in places]
    linked = swept.replace("reward: rm", "reward: rm-seed=2-learning_rate=0.0001")
    assert accept(linked).stages["ppo"].reward == "rm-seed=2-learning_rate=0.0001"
    misspelt = swept.replace("reward: rm", "reward: rm-seed=2-learning_rate=0.001")
    assert {p.remedy for p in refuse(misspelt)} == {"did you mean 'rm-seed=2-learning_rate=0.0001'?"}
    dpo = add("trainer: dpo", "sweep: {beta: [0.1, 0.3]}")
    (problem,) = refuse(change("  reward: rm\n  prompts", "  reward: dpo-beta=0.1\n  prompts", dpo))
    assert "is not a reward stage: its trainer is dpo" in problem.problem
    twin = change("  grpo:\n", "  dpo-beta=0.3: {trainer: dpo, init: sft}\n  grpo:\n", dpo)
    assert refuse(twin)[0].place == ":29: stages.dpo-beta=0.3"


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprints(recipe: Recipe) -> dict[str, str]:
    return {step: recipe.fingerprint(step) for step in recipe.plan}


def changed(first: Recipe, second: Recipe) -> set[str]:
    before, after = fingerprints(first), fingerprints(second)
    return {step for step in before if before[step] != after[step]}


ALL = {"explore", "prepare", "sft", "rm", "dpo", "grpo", "ppo", "evaluate", "compare", "errors", "samples", "report"}
TRAINED = ALL - {"explore", "prepare"}
MEASURED = {"evaluate", "compare", "samples", "report"}
CHANGES = {
    "stages.dpo.args.beta=0.3": {"dpo", *MEASURED},
    "stages.dpo.args.seed=5": {"dpo", *MEASURED},
    "stages.dpo.half=first": {"dpo", *MEASURED},
    "stages.dpo.global_batch_size=16": {"dpo", *MEASURED},
    "stages.rm.args.learning_rate=1e-4": {"rm", "grpo", "ppo", "errors", *MEASURED},
    "evaluation.alarms.length_ratio=2.0": MEASURED,
    "errors.pairs=50": {"errors", "report"},
    "judge={prompts: 5}": {"compare", "report"},  # a step more, which these read
    "comparison.hold=5": {"compare", "report"},
    "samples.per_model=5": {"samples", "report"},
    "stages.sft.args.learning_rate=1e-4": TRAINED,
    "stages.sft.model.lora_r=8": TRAINED,
    "model.lora_alpha=8": TRAINED,
    "model.model_name_or_path=x/y": ALL,
    "data.max_length=100": ALL,
    "data.test_fraction=0.3": ALL,
    "seed=2": ALL,
    "evaluation.prompts=30": MEASURED,
    "name=other": {"report"},
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(override, accept):
    assert changed(accept(), accept(GOOD, override)) == CHANGES[override]


def test_the_other_half_goes_to_all_that_learns_preferences(accept):
    text = change("  dpo:\n", "  gold: {trainer: reward, init: sft, half: second}\n  dpo:\n")
    recipe, without = accept(change("  prompts: 20", "  gold: gold", text)), accept(text)
    halves = {"sft": None, "rm": "first", "gold": "second", "dpo": "first", "grpo": None, "ppo": None}
    assert {stage: recipe.half_of(stage) for stage in recipe.stages} == halves
    # a half of its own, and nothing for the others to keep away from
    assert {stage: without.half_of(stage) for stage in without.stages} == {**dict.fromkeys(halves), "gold": "second"}
    assert changed(without, recipe) == {"rm", "dpo", "grpo", "ppo", "errors", *MEASURED}


def test_a_reward_model_from_elsewhere_is_named_by_its_path(accept, tmp_path):
    recipe = accept(change("  prompts: 20", "  gold: someone/reward-model"))
    assert recipe.evaluation.gold == "someone/reward-model"
    (tmp_path / "config.json").write_text("{}")
    local = change("  prompts: 20", f"  gold: {tmp_path}/")
    before = accept(local).fingerprint("evaluate")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert accept(local).fingerprint("evaluate") != before


def test_each_fingerprint_of_a_long_chain_is_computed_once(monkeypatch):
    stages = {"p0": {"trainer": "sft"}}
    for number in range(1, 25):
        stages[f"rm{number}"] = {"trainer": "reward", "init": f"p{number - 1}"}
        stages[f"p{number}"] = {"trainer": "ppo", "init": f"p{number - 1}", "reward": f"rm{number}"}
    recipe = Recipe.model_validate({"name": "chain", "model": {"model_name_or_path": "x/y"}, "stages": stages})
    asked, dependencies = [], Recipe._dependencies
    monkeypatch.setattr(
        Recipe, "_dependencies", lambda self, step, *rest: asked.append(step) or dependencies(self, step, *rest)
    )
    assert len(recipe.fingerprint("report")) == 64
    assert len(asked) == len(set(asked))


def test_the_order_of_keys_and_comments_change_nothing(accept):
    raw = YAML(typ="safe", pure=True).load(GOOD)

    def turn(value):
        return {key: turn(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    turned = {key: turn(raw[key]) for key in reversed(raw)}
    turned["stages"] = {name: turn(raw["stages"][name]) for name in ("sft", "rm", "ppo", "dpo", "grpo")}
    expected = fingerprints(accept())
    assert fingerprints(accept(json.dumps(turned))) == expected
    assert fingerprints(accept(GOOD.replace("\n", "  # why\n"))) == expected
    renamed = fingerprints(accept(change("  dpo:", "  dpo2:")))
    assert expected["dpo"] == renamed["dpo2"] and expected["evaluate"] != renamed["evaluate"]


def test_loading_imports_no_heavy_library_and_fingerprints_do_not_depend_on_the_hash_seed(recipe_file):
    code = (
        "import pathlib, sys; from rlhf_trl.recipe.load import load_recipe\n"
        f"r = load_recipe(pathlib.Path({str(recipe_file(GOOD))!r}), ['stages.dpo.sweep.beta=[0.1, 0.2]'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'scipy'}\n"
        "print([r.fingerprint(s) for s in r.plan], sorted(heavy & set(sys.modules)))"
    )
    said = [python(code, PYTHONHASHSEED=seed).stdout for seed in "01"]
    assert said[0] == said[1] and said[0].endswith(" []\n")


def test_the_content_of_a_local_source_counts(tmp_path, accept):
    folder = tmp_path / "pairs"
    for subset in "ab":
        (folder / subset).mkdir(parents=True)
        (folder / subset / "train.jsonl").write_text(f"{subset}\n")
    text = change("builtin:demo", str(folder))
    seen = [accept(text).fingerprint("dpo")]
    (folder / "b" / "train.jsonl").write_text("3\n")
    recipe = accept(text)
    seen.append(recipe.fingerprint("dpo"))
    (folder / "b").rename(folder / "c")  # the folder's name is the subset's
    # A source that changes under a running step is not taken for what was read.
    assert recipe.fingerprint("dpo") == seen[-1]
    seen.append(accept(text).fingerprint("dpo"))
    (folder / "c" / "test.jsonl").write_text("")
    seen.append(accept(text).fingerprint("dpo"))
    assert len(set(seen)) == 4 and accept(text).fingerprint("dpo") == seen[-1]


def test_the_content_of_a_local_model_counts_weights_included(tmp_path, accept):
    (tmp_path / "config.json").write_text("{}")
    text = change("builtin:tiny", str(tmp_path))
    seen = set()
    for content in (b"12", b"34", b"567"):
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(accept(text).fingerprint("prepare"))
        seen.add(accept(change("lora_r: 4", f"model_name_or_path: {tmp_path}")).fingerprint("sft"))  # its own base
    assert len(seen) == 6
    assert accept(change("builtin:demo", "x/" * 3000)).fingerprint("prepare")  # no path: its own name


# --- whatever is typed -----------------------------------------------------------------------------------------------


def test_any_recipe_and_any_override_is_taken_or_refused(tmp_path):
    import fuzz

    tally = fuzz.Tally("recipes", seed=1)
    fuzz.recipes(tally, 90, tmp_path)
    assert not tally.faults and 0 < tally.refused < tally.inputs


def test_a_run_of_an_older_version_is_measured_again_and_not_trained(accept, monkeypatch):
    recipe = accept()
    steps = (*STEPS, *recipe.stages)
    before = {step: recipe.fingerprint(step) for step in steps}
    monkeypatch.setattr("rlhf_trl.recipe.recipe.DOCUMENTS", 0)
    again = {step for step in steps if recipe.fingerprint(step) != before[step]}
    assert again == {"evaluate", "judge", "compare", "errors", "samples", "report"}
