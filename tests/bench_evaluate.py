"""Time and memory of the evaluation against the plain way, for `make bench`.

The plain way holds the reference, three policies and the reward model as five full models, takes the prompts in the
order of the file, and compares the logits of all positions in a second pass. Both sample one answer to each prompt
from each model, measure its KL and score it. Each runs in a process of its own; the adapters are random ones, since
speed does not depend on what was learned.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).parent.parent.parent / "shared"
RECIPE = """
name: bench
model: {{model_name_or_path: {model}, dtype: bfloat16, use_peft: true, lora_r: 16, lora_dropout: 0.0}}
data: {{source: {data}, max_length: 512, test_fraction: 0.1}}
stages:
  rm: {{trainer: reward, args: {{max_length: 512}}}}
  dpo: {{trainer: dpo, args: {{max_length: 512}}}}
  grpo: {{trainer: grpo, reward: rm}}
  ppo: {{trainer: ppo, reward: rm}}
evaluation: {{reward: rm, prompts: {prompts}, max_new_tokens: {tokens}, generation_batch_size: {batch}}}
"""
POLICIES = ("dpo", "grpo", "ppo")


def main(model: str, prompts: int, tokens: int, batch: int) -> dict[str, float]:
    """Seconds and peak memory of ours, as ratios to the plain way's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        data = SHARED / "hh-rlhf"
        path.write_text(RECIPE.format(model=model, data=data, prompts=prompts, tokens=tokens, batch=batch))
        return compare(__file__, path, "plain")


def compare(script: str, path: Path, other: str) -> dict[str, float]:
    """Run ours and the other way of a script at the same time, each on a core: what ours prints, by what that does."""
    command = [sys.executable, script]
    subprocess.run([*command, "make", path], stdout=subprocess.DEVNULL, check=True)
    running = {way: subprocess.Popen([*command, way, path], stdout=subprocess.PIPE, text=True)
               for way in ("ours", other)}  # fmt: skip
    results = {}
    for way, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{script} {way} ended with {process.returncode}")
        results[way] = json.loads(output.splitlines()[-1])
        print(way, results[way], flush=True)
    return {key: results["ours"][key] / results[other][key] for key in results["ours"]}


def open_run(path: str):
    from rlhf_trl.recipe.load import load_recipe
    from rlhf_trl.run.layout import RunDir

    recipe = load_recipe(Path(path))
    return recipe, RunDir(Path(path).parent / recipe.name)


def make(path: str) -> None:
    """Prepare the data, and save adapters whose effect is small."""
    from rlhf_trl.data.preprocess import prepare

    recipe, run = open_run(path)
    prepare(recipe, run)
    for stage in ("rm", *POLICIES):
        save_adapter(recipe, run, stage)


def save_adapter(recipe, run, stage: str) -> None:
    """Save a random adapter, with a head if it is a reward stage's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(sum(map(ord, stage)))
    reward = stage == "rm"
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    more = {"num_labels": 1} if reward else {}
    base = auto.from_pretrained(recipe.model["model_name_or_path"], dtype=torch.bfloat16, **more)
    task = "SEQ_CLS" if reward else "CAUSAL_LM"
    adapted = get_peft_model(base, LoraConfig(task_type=task, r=16, target_modules="all-linear"))
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=2e-3)
    adapted.save_pretrained(run.adapter(stage))


def clock() -> float:
    """Seconds: of a GPU's machine, or of this process alone, since on a CPU whatever else runs would count."""
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def report(seconds: float) -> None:
    # ru_maxrss is in KiB on Linux; what the libraries take is part of it on both sides.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": round(seconds, 1), "peak_gb": round(peak, 2)}))


def ours(path: str) -> None:
    from rlhf_trl.evaluate.measure import Measurements
    from rlhf_trl.models.base import Policies
    from rlhf_trl.models.rewards import load_reward_model
    from rlhf_trl.models.tokenizer import recorded_tokenizer

    recipe, run = open_run(path)
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    measurements = Measurements(recipe, run, policies, {"reward": load_reward_model(recipe, run, "rm", policies)})
    start, reference = clock(), None
    for name in ("reference", *POLICIES):
        before = clock()
        records = measurements.measure_policy(name, reference)
        reference = reference or records
        mean = sum(row["kl"] for row in records) / len(records)
        tokens = sum(row["answer_tokens"] for row in records) / len(records)
        print(name, f"{clock() - before:.1f} s, KL {mean:.3f}, {tokens:.1f} tokens", file=sys.stderr)
    report(clock() - start)


def plain(path: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_trl.evaluate.measure import choose_prompts
    from rlhf_trl.models.tokenizer import recorded_tokenizer

    recipe, run = open_run(path)
    tokenizer = recorded_tokenizer(recipe, run)
    base, settings = recipe.model["model_name_or_path"], recipe.evaluation

    def load(auto, stage=None, **more):
        model = auto.from_pretrained(base, dtype=torch.bfloat16, **more)
        model.config.pad_token_id = tokenizer.pad_token_id
        if stage:
            model = PeftModel.from_pretrained(model, run.adapter(stage)).merge_and_unload()
        return model.eval()

    models = {name: load(AutoModelForCausalLM, name) for name in POLICIES}
    models["reference"] = load(AutoModelForCausalLM)
    reward = load(AutoModelForSequenceClassification, "rm", num_labels=1)
    prompts = [row["prompt"] for row in choose_prompts(run, settings.prompts, recipe.seed)]
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    start = clock()
    with torch.no_grad():
        for model in models.values():
            answers = []
            for at in range(0, len(texts), settings.generation_batch_size):
                batch = tokenizer(texts[at : at + settings.generation_batch_size], return_tensors="pt", padding=True)
                output = model.generate(**batch, max_new_tokens=settings.max_new_tokens, do_sample=True, top_k=0,
                                        temperature=1.0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
                answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            whole = [text + answer for text, answer in zip(texts, answers, strict=True)]
            for at in range(0, len(whole), 4):
                batch = tokenizer(whole[at : at + 4], return_tensors="pt", padding=True)
                log_p = model(**batch).logits.float().log_softmax(-1)
                log_q = models["reference"](**batch).logits.float().log_softmax(-1)
                (log_p.exp() * (log_p - log_q)).sum(-1).sum(-1)
            for at in range(0, len(whole), settings.score_batch_size):
                batch = tokenizer(whole[at : at + settings.score_batch_size], return_tensors="pt", padding=True)
                reward(**batch)
    report(clock() - start)


if __name__ == "__main__":
    {"make": make, "plain": plain, "ours": ours}[sys.argv[1]](sys.argv[2])
