"""Memory and time of PPO on one shared base against TRL's stock set-up, for `make bench`.

Stock: a LoRA policy, a full value model and a separate reward model, in TRL's trainer as it is. Both run 3 updates on
the same prompts (64 to 96 tokens) of batches of 4 x 2, with answers of 32 tokens and 2 PPO epochs, each in a process
of its own. Peak is resident memory minus that of a process with the imports alone (on a GPU, what was allocated).
State is the bytes of weights, gradients and optimizer alone.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from bench_evaluate import SHARED, clock, compare, open_run, save_adapter

RECIPE = """
name: bench
model: {{model_name_or_path: {model}, dtype: {dtype}, use_peft: true, lora_r: 16, lora_alpha: 32, lora_dropout: 0.0,
         lora_target_modules: all-linear}}
data: {{source: {data}, max_length: 256, max_rows: 1200, test_fraction: 0.1}}
stages:
  rm: {{trainer: reward, args: {{max_length: 256}}}}
  ppo:
    trainer: ppo
    reward: rm
    args: {{per_device_train_batch_size: 4, gradient_accumulation_steps: 2, total_episodes: 24, num_ppo_epochs: 2,
            response_length: 32, stop_token: eos, temperature: 1.0, gradient_checkpointing: false, bf16: {bf16},
            save_strategy: "no", logging_steps: 1, learning_rate: 1.0e-5}}
"""


def main(model: str) -> dict[str, dict[str, float]]:
    """Peak memory, state and seconds of an update of ours, as ratios to stock, by precision."""
    ratios = {}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.yaml"
            data, bf16 = SHARED / "hh-rlhf", str(dtype != "float32").lower()
            path.write_text(RECIPE.format(model=model, dtype=dtype, data=data, bf16=bf16))
            ratios[dtype] = compare(__file__, path, "stock")
    return ratios


def resident() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(path: str) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from rlhf_trl.data.preprocess import prepare

    recipe, run = open_run(path)
    prepare(recipe, run)
    table = pq.read_table(run.tokens("train"))
    lengths = pc.list_value_length(table["prompt"])
    alike = pc.and_(pc.greater_equal(lengths, 64), pc.less_equal(lengths, 96))
    pq.write_table(table.filter(alike), run.tokens("train"))
    save_adapter(recipe, run, "rm")


def measure(trainer, start: int) -> None:
    from transformers import TrainerCallback

    from rlhf_trl.train.callbacks import peak_memory

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(clock())

    trainer.add_callback(Clock())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    peak = peak_memory() - start
    models = [model for model in (trainer.model, trainer.reward_model, trainer.ref_model) if model is not None]
    params = {id(param): param for model in models for param in model.parameters()}
    weights = sum(param.numel() * param.element_size() for param in params.values())
    trained = sum(param.numel() * param.element_size() for param in params.values() if param.requires_grad)
    state = weights + 3 * trained  # gradient and two moments
    print(json.dumps({"peak_mb": round(peak / 1e6), "state_mb": round(state / 1e6),
                      "seconds_per_update": round((marks[-1] - marks[0]) / (len(marks) - 1), 2)}))  # fmt: skip


def build(path: str, ours: bool):
    """The trainer of the stage, and the resident memory before any model was loaded."""
    from transformers import set_seed
    from trl.experimental.ppo import PPOTrainer

    from rlhf_trl.train import step as train

    recipe, run = open_run(path)
    start = resident()
    config = train.build_stage_config(recipe, run, "ppo")
    set_seed(config.seed)
    if ours:
        return train.build_trainer(recipe, run, "ppo", config), start
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_trl.models.tokenizer import recorded_tokenizer

    tokenizer = recorded_tokenizer(recipe, run)
    base, dtype = recipe.model["model_name_or_path"], getattr(torch, recipe.model["dtype"])
    config.bf16 = False  # which it ignores
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    policy = get_peft_model(policy, lora)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype, num_labels=1) for _ in "12")
    reward = PeftModel.from_pretrained(reward, run.adapter("rm")).merge_and_unload()
    for model in (policy, value, reward):
        model.config.pad_token_id = tokenizer.pad_token_id
    data = train.load_view(run, "train", "ppo")
    return PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
                      value_model=value, train_dataset=data, eval_dataset=data), start  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        measure(*build(sys.argv[2], sys.argv[1] == "ours"))
