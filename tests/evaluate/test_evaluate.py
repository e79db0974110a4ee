"""Evaluation: the numbers in metrics.json are what a plain computation gives, and a whole recipe ends in a report."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, reset_accelerate, shared, small_recipe, train_all
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_trl.cli.run import run_step
from rlhf_trl.errors.step import errors
from rlhf_trl.evaluate.engine import require_same
from rlhf_trl.evaluate.measure import Measurements
from rlhf_trl.evaluate.step import evaluate
from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.models.sampling import Completion, sample
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import RunDir


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The small run, evaluated. Read only: a test that evaluates again takes `copied`."""
    recipe, source = trained
    run = RunDir(shutil.copytree(source.root, tmp_path_factory.mktemp("evaluated") / "run"))
    evaluate(recipe, run)
    return recipe, run, read_json(run.metrics)


@pytest.fixture
def copied(evaluated, tmp_path):
    """A copy to evaluate again, without the adversarial prompts."""
    recipe, source, metrics = evaluated
    settings = recipe.evaluation.model_copy(update={"adversarial": False})
    recipe = recipe.model_copy(update={"evaluation": settings})
    return recipe, RunDir(shutil.copytree(source.root, tmp_path / "run")), metrics


def test_every_policy_is_measured_on_the_same_prompts(evaluated):
    recipe, run, metrics = evaluated
    assert list(metrics["policies"]) == sorted(["reference", *recipe.policies])
    rows = {name: read_jsonl(run.completions(name)) for name in metrics["policies"]}
    assert len({tuple(row["id"] for row in answers) for answers in rows.values()}) == 1
    assert metrics["policies"]["reference"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 12}
    for name in recipe.policies:
        entry, answers = metrics["policies"][name], rows[name]
        assert entry["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in answers) / 12)
        assert all(row["kl"] >= 0 for row in answers)
        assert entry["kl"]["low"] <= entry["kl"]["mean"] <= entry["kl"]["high"]
        gains = [row["reward"] - start["reward"] for row, start in zip(answers, rows["reference"], strict=True)]
        assert entry["reward_gain"]["mean"] == pytest.approx(sum(gains) / 12)
        assert [row["reward_gain"] for row in answers] == pytest.approx(gains)


def score_rows(model, rows, key="answer", *how):
    finished = [row.get("finished", True) for row in rows]
    return model.score([row["prompt"] for row in rows], [row[key] for row in rows], finished, *how)


def test_scores_and_accuracy_are_those_of_the_reward_model(evaluated):
    recipe, run, metrics = evaluated
    model = load_reward_model(recipe, run, "rm")
    answers = read_jsonl(run.completions("dpo"))
    assert [row["reward"] for row in answers] == pytest.approx(score_rows(model, answers).tolist(), abs=1e-4)
    pairs = read_jsonl(run.pairs("test"))
    side = {name: score_rows(model, pairs, name, 1) for name in ("chosen", "rejected")}
    accuracy = (side["chosen"] > side["rejected"]).double().mean().item()
    found = metrics["reward_model"]
    assert found["accuracy"]["mean"] == pytest.approx(accuracy)
    assert found["accuracy"]["n"] == len(pairs) == sum(entry["accuracy"]["n"] for entry in found["subsets"].values())
    lengths = [[len(encode(model.tokenizer, p["prompt"], p[s])[1]) for s in side] for p in pairs]
    assert found["length_baseline"]["mean"] == sum((a > b) + (a == b) / 2 for a, b in lengths) / len(pairs)
    errors(recipe, run)
    analysis = read_json(run.error_analysis("rm"))
    cells = {"all": analysis["overall"], **{cell["name"]: cell for cell in analysis["breakdowns"]["subset"]}}
    for name, cell in {"all": found, **found["subsets"]}.items():
        for key in ("n", "ties", "accuracy", "strict", "length_baseline", "over_baseline", "mean_margin"):
            assert cell[key] == pytest.approx(cells[name][key], abs=1e-5), "the error analysis has the same numbers"


def test_kl_and_its_estimators_are_those_of_a_plain_computation(evaluated):
    """The policy by itself and its reference by itself, one answer at a time."""
    recipe, run, _ = evaluated
    tokenizer = recorded_tokenizer(recipe, run)
    base = AutoModelForCausalLM.from_pretrained(run.model("sft"))
    for row in read_jsonl(run.completions("ppo"))[:3]:
        prompt, answer = encode(tokenizer, row["prompt"], row["answer"], row["finished"])
        if len(answer) != row["answer_tokens"]:  # its text is tokenised in another way
            continue
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_q = base(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            policy = PeftModel.from_pretrained(base, run.adapter("ppo"))
            log_p = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            base = policy.unload()
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        k1 = (log_p - log_q).gather(1, torch.tensor(answer)[:, None]).sum().item()
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["kl_k1"] == pytest.approx(k1, abs=1e-3)
        assert row["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-4)


def flat(value, key="") -> dict[str, float]:
    """Every number of a JSON document by its address."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = {k: v for name, part in pairs for k, v in flat(part, f"{key}/{name}").items()}
    return below | ({key: float(value)} if isinstance(value, int | float) else {})


def test_best_of_n_takes_the_reference_s_answers(evaluated):
    _, run, _ = evaluated
    rows = read_jsonl(run.best_of_n)
    reference = read_jsonl(run.completions("reference"))
    assert [row["id"] for row in rows] == [row["id"] for row in reference]
    for row, answer in zip(rows, reference, strict=True):
        assert (row["answers"][0], row["reward"][0]) == (answer["answer"], answer["reward"])
        assert len(row["answers"]) == len(row["reward"]) == 4
        assert len(set(row["answers"])) > 1
    curve = read_json(run.pareto)["axes"]["reward"]["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 4]
    best = [max(row["reward"]) - sum(row["reward"]) / 4 for row in rows]
    assert curve[-1]["gain"]["mean"] == pytest.approx(sum(best) / len(best))
    assert (curve[0]["gain"]["mean"], curve[0]["kl"]) == (pytest.approx(0), 0)


def test_adversarial_prompts_are_answered_by_all(evaluated):
    recipe, run, _ = evaluated
    rows, rates = read_jsonl(run.adversarial_answers), read_json(run.adversarial)
    names = {"reference", *recipe.policies}
    assert all(set(row["answers"]) == names for row in rows)
    assert set(rates["policies"]) == names
    for of in rates["policies"].values():
        assert of["all"]["refusal"]["n"] == len(rows)
        assert set(of) == {"all", *rates["categories"]} == {"all", *(row["category"] for row in rows)}


def test_a_killed_evaluation_goes_on_from_what_it_has_sampled(copied, monkeypatch):
    recipe, run, metrics = copied
    calls, last = [], 3

    def counted(*args, **more):
        calls.append(more["progress"])
        if len(calls) > last:
            raise KeyboardInterrupt
        return sample(*args, **more)

    monkeypatch.setattr("rlhf_trl.evaluate.measure.sample", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, run)
    first, last = calls.copy(), math.inf
    files = sorted(run.unfinished.iterdir())
    assert len(files) == 3
    damaged = files[0]
    damaged.write_text(damaged.read_text().replace("e", "f", 1))  # and is sampled again
    calls.clear()
    evaluate(recipe, run)
    assert read_json(run.metrics) == metrics
    assert len(set(first[:3]) & set(calls)) == 1
    assert first[3] in calls
    assert not run.unfinished.exists()


def test_what_is_kept_belongs_to_its_policy(copied, monkeypatch):
    """After a kill and a change of one policy, the others go on."""
    recipe, run, _ = copied
    monkeypatch.setattr("rlhf_trl.evaluate.step.build_pareto", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(recipe, run)
    calls = []
    monkeypatch.undo()
    monkeypatch.setattr(
        "rlhf_trl.evaluate.measure.sample", lambda *a, **k: calls.append(k["progress"]) or sample(*a, **k)
    )
    changed = recipe.stages["dpo"].model_copy(update={"args": {**recipe.stages["dpo"].args, "beta": 0.2}})
    other = recipe.model_copy(update={"stages": {**recipe.stages, "dpo": changed}})
    run.mark_done(other, "dpo", 0.0)
    evaluate(other, run)
    assert {label.partition(":")[0] for label in calls} == {"dpo"}


def test_what_is_missing_or_not_finite_is_found_before_anything_is_sampled(copied, monkeypatch):
    recipe, run, _ = copied
    monkeypatch.setattr("rlhf_trl.evaluate.measure.sample", lambda *_, **__: pytest.fail("sampled"))
    for stage, tensor in (("rm", ".score."), ("ppo", "lora_B")):
        file = run.adapter(stage) / "adapter_model.safetensors"
        weights = load_file(file)
        name = next(key for key in weights if tensor in key)
        save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file)
        run.mark_done(recipe, stage, 0.0)
        with pytest.raises(UserError, match=rf"{stage}/adapter/adapter_model.safetensors: the tensor .* not finite"):
            evaluate(recipe, run)
        save_file(weights, file)
        run.mark_done(recipe, stage, 0.0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="whole models"):
        evaluate(recipe, run)
    run.done("ppo").unlink()
    with pytest.raises(UserError, match="train RECIPE ppo"):
        evaluate(recipe, run)


# --- answers by vLLM, with a stand-in that answers from the folders that it is given


@pytest.fixture
def vllm(monkeypatch):
    """A module `vllm` whose engine is transformers and peft; with `obeys = False` the base answers every request."""
    engine = SimpleNamespace(obeys=True, settings={}, asked=[])

    class LLM:
        def __init__(self, **settings):
            engine.settings |= settings
            self.base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=settings["dtype"])

        @torch.no_grad()
        def generate(self, prompts, params, use_tqdm, lora_request):
            engine.asked.append(lora_request and lora_request.path)
            adapted = lora_request and engine.obeys and PeftModel.from_pretrained(self.base, lora_request.path)
            outputs = [self.answer(adapted or self.base, row["prompt_token_ids"], of)
                       for row, of in zip(prompts, params, strict=True)]  # fmt: skip
            self.base = adapted.unload() if adapted else self.base
            return [SimpleNamespace(outputs=[output]) for output in outputs]

        def answer(self, model, ids, params):
            draw, start, total = torch.Generator().manual_seed(params.seed), len(ids), 0.0
            while len(ids) < start + params.max_tokens and ids[-1] not in params.stop_token_ids:
                log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                token = torch.multinomial(log_p.exp(), 1, generator=draw) if params.temperature else log_p.argmax()
                ids, total = [*ids, int(token)], total + float(log_p[int(token)])
            return SimpleNamespace(token_ids=tuple(ids[start:]), cumulative_logprob=total)

    modules = {"vllm": {"LLM": LLM, "SamplingParams": SimpleNamespace},
               "vllm.lora.request": {"LoRARequest": namedtuple("LoRARequest", "name number path")}}  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return engine


@pytest.fixture
def by_vllm(copied):
    """What to evaluate, with vLLM in the place of the models."""
    recipe, run, _ = copied
    changes = {"backend": "vllm", "prompts": 6, "max_new_tokens": 6, "best_of_n": 2}
    settings = recipe.evaluation.model_copy(update={**changes, "judge_decoding": Decoding(temperature=0)})
    return recipe.model_copy(update={"evaluation": settings}), run


def test_the_adapter_that_answers_is_the_adapter_that_is_measured(by_vllm, vllm):
    recipe, run = by_vllm
    evaluate(recipe, run)
    assert set(vllm.asked) == {None, *(str(run.adapter(name)) for name in recipe.policies)}
    assert vllm.settings["model"] == str(run.model("sft")) and vllm.settings["max_lora_rank"] == 8
    assert vllm.settings["max_model_len"] == recipe.data.max_length + 6
    metrics, best = read_json(run.metrics), read_jsonl(run.best_of_n)
    assert all(metrics["policies"][name]["kl"]["mean"] > 0 for name in recipe.policies)
    assert {len(row["answers"]) for row in best} == {2}
    greedy, tokenizer = read_jsonl(run.judge_answers("dpo")), recorded_tokenizer(recipe, run)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model("sft")), run.adapter("dpo"))
    prompts = [row["prompt"] for row in greedy]
    expected = sample(policy, tokenizer, prompts, 6, 4, recipe.seed, recipe.evaluation.judge_decoding)
    assert [row["answer"] for row in greedy] == [answer.text for answer in expected]


def test_a_base_that_answers_in_place_of_the_adapter_is_caught(by_vllm, vllm):
    vllm.obeys = False
    with pytest.raises(UserError, match=r"dpo: vLLM has answered without the adapter"):
        evaluate(*by_vllm)


@pytest.mark.parametrize(
    ("way", "off", "says"),
    [
        (1.0, 0.0, None),
        (1.0, 1.0, "without the adapter"),
        (0.0, 0.0, None),  # the reference itself
        (0.0, 0.5, "nats a token"),  # another model
        (1e-3, 0.0, None),  # a policy that has hardly moved, and noise of the engine
    ],
)
def test_noise_of_the_engine_is_told_from_another_model(way, off, says):
    draw = np.random.default_rng(0)
    own, ratio = -20 + draw.normal(size=200), way * draw.normal(size=200)
    engine = own - off * (ratio if way else 40 * np.ones(200)) + 0.3 * draw.normal(size=200)
    answers = [Completion([0] * 40, "", True, log_prob=value) for value in engine]
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        require_same("dpo", answers, own, ratio)


# --- a gold model, checkpoints ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A recipe with a gold model and saved checkpoints, evaluated."""
    folder = tmp_path_factory.mktemp("watched")
    recipe = small_recipe(folder, text=WATCHED)
    run = RunDir(folder / "runs" / recipe.name)
    train_all(recipe, run)
    evaluate(recipe, run)
    reset_accelerate()
    return recipe, run


ARGS = """bf16: false, gradient_checkpointing: false, logging_steps: 1, per_device_train_batch_size: 8,
      learning_rate: 1e-3"""
WATCHED = f"""
name: watched
model: {{model_name_or_path: builtin:tiny, use_peft: true, lora_r: 4, lora_dropout: 0.0}}
data: {{source: builtin:demo, max_rows: 240, max_length: 192, test_fraction: 0.2}}
stages:
  rm: {{trainer: reward, args: {{{ARGS}, max_steps: 2, save_strategy: "no"}}}}
  gold: {{trainer: reward, half: second, args: {{{ARGS}, max_steps: 2, save_strategy: "no"}}}}
  dpo: {{trainer: dpo, args: {{{ARGS}, max_steps: 6, save_steps: 1}}}}
evaluation: {{reward: rm, gold: gold, checkpoints: 2, prompts: 12, max_new_tokens: 12, best_of_n: 4,
  adversarial: false, judge_decoding: {{temperature: 0.7, top_p: 0.9}}}}
"""


def test_checkpoints_are_measured_along_the_run(watched):
    recipe, run = watched
    metrics, over = read_json(run.metrics), read_json(run.over_optimisation)
    assert [entry["step"] for entry in metrics["checkpoints"]["dpo"]] == [2, 4, 6]
    assert {**metrics["policies"]["dpo"], "step": 6} == metrics["checkpoints"]["dpo"][-1]
    kls = [entry["kl"]["mean"] for entry in metrics["checkpoints"]["dpo"]]
    assert 0 < kls[0] < kls[1] < kls[2]
    points = over["stages"]["dpo"]["points"]
    assert [point["step"] for point in points] == [2, 4, 6]
    assert [point["kl"]["mean"] for point in points] == kls
    assert [point["gold"] for point in points] == [entry["gold_gain"] for entry in metrics["checkpoints"]["dpo"]]
    assert over["stages"]["dpo"]["fit"]["proxy"] is not None
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.base), run.checkpoints("dpo") / "checkpoint-2"
    )
    rows = read_jsonl(run.completions("dpo", 2))
    tokenizer = recorded_tokenizer(recipe, run)
    with torch.no_grad():
        expected = sample(policy, tokenizer, [row["prompt"] for row in rows], 12, 4, recipe.seed)
    assert [row["answer"] for row in rows] == [answer.text for answer in expected]


def test_gold_and_reward_model_share_no_pair(watched):
    _, run = watched
    pairs = read_jsonl(run.pairs("train"))
    halves = {
        half: {json.dumps(row["prompt"]) for row in pairs if row["half"] == half} for half in ("first", "second")
    }
    assert not halves["first"] & halves["second"]
    assert 0.35 < len(halves["first"]) / (len(halves["first"]) + len(halves["second"])) < 0.65
    for stage, half in (("rm", "first"), ("gold", "second"), ("dpo", "first")):
        state = read_json(run.training_stats(stage))["summary"]
        assert state["rows"] == sum(row["half"] == half for row in pairs)


def test_gold_scores_are_its_own(watched):
    recipe, run = watched
    rows = read_jsonl(run.completions("dpo"))
    gold = load_reward_model(recipe, run, "gold")
    scores = score_rows(gold, rows)
    assert [row["gold"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-4)
    pairs = {row["id"]: row for row in reversed(read_jsonl(run.pairs("test")))}
    over = (scores - score_rows(gold, [pairs[row["id"]] for row in rows], "chosen")).tolist()
    assert [row["gold_over_chosen"] for row in rows] == pytest.approx(over, abs=1e-4)
    assert set(read_json(run.pareto)["axes"]) == {"reward", "gold"}
    second = read_jsonl(run.judge_answers("dpo"))  # of the second decoding
    assert [row["id"] for row in rows] == [row["id"] for row in second]
    assert [row["answer"] for row in rows] != [row["answer"] for row in second]


def test_a_damaged_checkpoint_is_not_measured(watched, tmp_path, caplog):
    recipe, source = watched
    run = RunDir(shutil.copytree(source.root, tmp_path / "run"))
    (run.checkpoints("dpo") / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    evaluate(recipe, run)
    assert "damaged checkpoint of step 2" in caplog.text
    assert [entry["step"] for entry in read_json(run.metrics)["checkpoints"]["dpo"]] == [1, 4, 6]


def test_a_checkpoint_of_an_interruption_is_not_measured(watched):
    """Without the interruption it would not be there."""
    recipe, run = watched
    stage = recipe.stages["dpo"]
    stage = stage.model_copy(update={"args": stage.args | {"save_steps": 2}})
    every_second = recipe.model_copy(update={"stages": recipe.stages | {"dpo": stage}})
    found = Measurements.choose_checkpoints(
        SimpleNamespace(
            recipe=every_second, run=run, settings=recipe.evaluation.model_copy(update={"checkpoints": 5})
        ),
        "dpo",
    )
    assert [step for step, _ in found] == [2, 4]


def test_two_processes_measure_what_one_does(watched, tmp_path):
    """Several batches, so that both processes have some."""
    _, source = watched
    run = RunDir(shutil.copytree(source.root, tmp_path / "runs" / "watched"))
    shutil.rmtree(run.evaluation)
    (tmp_path / "watched.yaml").write_text(WATCHED)
    options = ["--set", "evaluation.generation_batch_size=3", "--set", "evaluation.score_batch_size=2"]
    command = [sys.executable, "-m", "rlhf_trl", "evaluate", str(tmp_path / "watched.yaml"), *options]
    command += ["--runs", str(run.root.parent), "--accelerate", "ddp", "--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics", "pareto", "over_optimisation"):
        found, expected = (flat(read_json(getattr(of, name))) for of in (run, source))
        assert found == pytest.approx(expected, abs=1e-4)
    assert run.done("evaluate").exists()


# --- whole recipes ---------------------------------------------------------------------------------------------------


GPT2 = ROOT / "recipes" / "hh_gpt2.yaml"


QUICK = """
evaluation.prompts=4 evaluation.max_new_tokens=8 evaluation.checkpoints=0 evaluation.best_of_n=2
evaluation.adversarial=false errors.pairs=8 data.max_rows=120 data.max_length=160 data.test_fraction=0.2
"""
EACH = "per_device_train_batch_size=4 eval_strategy=no save_strategy=no warmup_steps=0 logging_steps=1"
SHORT = {
    **dict.fromkeys(("sft", "reward", "dpo"), "max_steps=1 max_length=1024"),
    "grpo": "max_steps=1 max_completion_length=8 num_generations=4",
    "ppo": "total_episodes=8 response_length=8 num_ppo_epochs=1",
}


def quick(path, *overrides: str) -> Recipe:
    """Load a recipe with overrides that make every stage a step or two on a few short rows."""
    values = [*overrides, *QUICK.split()]
    for name, stage in load_recipe(path).stages.items():
        effective = "global_batch_size=8" if stage.global_batch_size else "args.gradient_accumulation_steps=2"
        options = f"{EACH} {SHORT[stage.trainer]}".split()
        values += [f"stages.{name}.{effective}", *(f"stages.{name}.args.{option}" for option in options)]
    return load_recipe(path, values)


# test_demo runs the demo, and test_gpt2_on_real_hh_text hh_gpt2 where the real text is there. The recipes for other
# sizes differ from these in values alone, which tests/recipe loads and checks.
RECIPES = [ROOT / "recipes" / f"hh_{name}.yaml" for name in ("smollm2_135m", "llama3.1_8b_qlora_24gb")]
RECIPES += [] if (SHARED / "hh-rlhf").exists() else [GPT2]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_from_pairs_to_report(path, tmp_path):
    tiny = "model.model_name_or_path=builtin:tiny", "data.source=builtin:demo", "data.subsets=[]"
    run_whole(quick(path, *tiny), RunDir(tmp_path / "run"))


def run_whole(recipe, run):
    train_all(recipe, run)
    for step in recipe.plan[recipe.plan.index("evaluate") :]:
        run_step(recipe, run, step)  # a judge without key or server is not run
        reset_accelerate()
    assert run.report.stat().st_size > 20_000
    assert set(read_json(run.comparison)["stages"]) == set(recipe.compared)
    assert set(read_json(run.metrics)["policies"]) == {"reference", *recipe.policies}
    assert len(read_jsonl(run.samples / "reference.jsonl")) == 4
    for stage in recipe.reward_stages:
        assert "accuracy" in run.error_report(stage).read_text()
        assert run.error_plots(stage).stat().st_size > 20_000


def test_gpt2_on_real_hh_text(tmp_path):
    """The assignment's setting: GPT-2's tokenizer, a small random GPT-2, Anthropic's pairs, every stage of hh_gpt2."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = tmp_path / "gpt2"
    AutoTokenizer.from_pretrained(shared("gpt2-tokenizer")).save_pretrained(model)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2)).save_pretrained(model)
    run = RunDir(tmp_path / "run")
    run_whole(quick(GPT2, f"model.model_name_or_path={model}", f"data.source={shared('hh-rlhf')}"), run)
    summary = read_json(run.summary)
    assert summary["rows_in"] == 120
    saved = read_json(run.adapter("dpo") / "tokenizer_config.json")
    assert (saved["pad_token"], saved["eos_token"]) == ("ÿ", "<|endoftext|>")


def test_a_policy_recipe_without_reward_model(tmp_path):
    others = [f"stages.{name}=null" for name in ("sft", "rm", "grpo", "ppo")]
    changes = ["stages.dpo.init=null", "stages.dpo.args.max_steps=1", "evaluation.prompts=4", "evaluation.best_of_n=0"]
    recipe = small_recipe(tmp_path, [*others, *changes])
    run_whole(recipe, RunDir(tmp_path / "run"))
    metrics = read_json(tmp_path / "run" / "evaluation" / "metrics.json")
    assert metrics["reward_model"] is None
    assert "reward" not in metrics["policies"]["dpo"]
