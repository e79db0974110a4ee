"""From one start of the weights and on the same rows, our stages and TRL's own trainers log the same losses.

TRL's trainer gets the conversations as its documentation has them and encodes them itself. What differs at equal
settings in a run is where the random stream stands when LoRA and the head are drawn; here they are copied over.
"""

import pytest
import torch
import trl
from accelerate.utils import set_seed
from conftest import reset_accelerate
from datasets import Dataset

from rlhf_trl.models.base import load_causal, load_classifier, start_path
from rlhf_trl.models.tokenizer import recorded_tokenizer
from rlhf_trl.run.files import read_jsonl
from rlhf_trl.train.step import build_stage_config, build_trainer

OWN = {"sft": trl.SFTTrainer, "rm": trl.RewardTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}


def conversations(run, stage) -> Dataset:
    """The training rows of a stage, as TRL's documentation writes them."""
    if stage == "grpo":
        return Dataset.from_list([{"prompt": row["prompt"]} for row in read_jsonl(run.prompts("train"))])
    rows = [{side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
            | {"prompt": row["prompt"]} for row in read_jsonl(run.pairs("train"))]  # fmt: skip
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return Dataset.from_list(rows)


def trl_trainer(recipe, run, stage, config, ours):
    """TRL's own trainer of a stage, on our start; the reward of grpo is our function, which both call."""
    tokenizer = recorded_tokenizer(recipe, run, stage)
    task, load = ("SEQ_CLS", load_classifier) if stage == "rm" else ("CAUSAL_LM", load_causal)
    block = trl.ModelConfig(**recipe.model_block(stage), lora_task_type=task)
    more = {"reward_funcs": ours.reward_funcs} if stage == "grpo" else {}
    data = conversations(run, stage)
    trainer = OWN[stage](load(start_path(recipe, run, stage), block, tokenizer), args=config, train_dataset=data,
                         processing_class=tokenizer, peft_config=trl.get_peft_config(block), **more)  # fmt: skip
    trainer.model.load_state_dict(ours.model.state_dict())
    return trainer


def losses(trainer) -> list[float]:
    set_seed(11)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("stage", OWN)
def test_losses_are_those_of_the_library(trained, stage, tmp_path):
    recipe, run = trained
    overrides = {"max_steps": 3, "eval_strategy": "no", "logging_steps": 1}

    def config():
        made = build_stage_config(recipe, run, stage, **overrides)
        made.output_dir = str(tmp_path)
        return made

    ours = build_trainer(recipe, run, stage, config())
    start = {name: value.clone() for name, value in ours.model.state_dict().items()}
    theirs = trl_trainer(recipe, run, stage, config(), ours)
    expected = losses(theirs)
    reset_accelerate()
    ours = build_trainer(recipe, run, stage, config())
    ours.model.load_state_dict(start)
    got = losses(ours)
    assert len(got) == 3 and len(set(expected)) == 3
    assert got == pytest.approx(expected, rel=1e-6)
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name], rtol=1e-5, atol=1e-7)
