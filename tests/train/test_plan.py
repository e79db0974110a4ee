"""The plan of a recipe: bytes that follow from its settings, and the steps that its training takes."""

import pytest
import torch
from conftest import NO_PPO
from torch._subclasses.fake_tensor import FakeTensorMode
from trl import ModelConfig

from rlhf_trl.models.tokenizer import tiny_config
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import write_json
from rlhf_trl.run.launch import shipped, zero_stage
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.plan import Peak, Setting, estimate, plan
from rlhf_trl.train.step import build_stage_config


def needed(tmp_path, *overrides, zero=0, processes=1):
    """Bytes of the demo's dpo stage."""
    recipe = load_recipe(shipped("recipes", "demo"), list(overrides))
    args, model = build_stage_config(recipe, RunDir(tmp_path), "dpo"), ModelConfig(**recipe.model_block("dpo"))
    setting = Setting(args, model, recipe.data.max_length, zero, processes)
    return vars(estimate(tiny_config(), setting, "dpo", 0.0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return needed(tmp_path_factory.mktemp("plain"))


def test_the_peak_is_of_the_tensors_that_are_alive():
    peak = Peak()
    with FakeTensorMode(), peak:
        kept = torch.zeros(1000)  # 4 kB
        (kept + kept).sum()  # 4 kB more, for a moment
        view = kept[:10]
    assert (peak.now, peak.highest // 1000, len(view)) == (4000, 8, 10)


@pytest.mark.parametrize(("part", "factor", "override"), [
    ("weights", (0.4, 0.6), "model.dtype=bfloat16"),
    ("weights", (0.2, 0.9), "stages.dpo.model.load_in_4bit=true"),
    ("optimizer", (0.2, 0.3), "stages.dpo.args.optim=adamw_8bit"),
    ("activations", (0.1, 0.7), "stages.dpo.args.gradient_checkpointing=true"),
    ("activations", (0.45, 0.55), "stages.dpo.args.per_device_train_batch_size=16"),
    ("activations", (0.4, 0.6), "data.max_length=96"),
])  # fmt: skip
def test_a_setting_lowers_the_part_that_it_is_about(tmp_path, plain, part, factor, override):
    assert factor[0] < needed(tmp_path, override)[part] / plain[part] < factor[1]


def test_sharding_divides_what_it_shards(tmp_path):
    alone, *sharded = (
        needed(tmp_path, zero=name and zero_stage(shipped("accelerate_configs", name)), processes=4)
        for name in (0, "zero2", "fsdp2")
    )
    quarters = [{part: alone[part] / shard[part] for part in ("weights", "trained", "optimizer")} for shard in sharded]
    assert quarters == [{"weights": 1, "trained": 1, "optimizer": 4}, {"weights": 4, "trained": 4, "optimizer": 4}]


def test_the_plan_of_a_finished_run_has_its_steps_beside_what_was_measured(trained):
    recipe, run = trained
    rows = {row["stage"]: row for row in plan(recipe, run, None, 1, "1GB")}
    assert {name: row["steps"] for name, row in rows.items()} == {"sft": 12, "rm": 6, "dpo": 4, "grpo": 2, "ppo": 2}
    for row in rows.values():
        assert row["fits"] == (row["bytes"]["total"] <= 1e9)
        assert row["measured_bytes"] > 1e8 and row["seconds"] > 0
        assert row["bytes_then"] < row["bytes"]["total"]
    assert rows["grpo"]["bytes"]["rollout"] > 0 == rows["dpo"]["bytes"]["rollout"]
    assert rows["ppo"]["tokens"] == 32 * (192 + 16)


def test_the_plan_of_a_batch_that_several_processes_share(tmp_path):
    own = [f"stages.grpo.{key}" for key in ("global_batch_size=16", "args.max_steps=-1", "args.num_generations=8")]
    others = [f"stages.{name}=null" for name in ("gold", "dpo", "ppo")]
    recipe = load_recipe(shipped("recipes", "demo"), [*own, *others], 4)
    alone, four = (plan(recipe, RunDir(tmp_path), None, processes, "1GB")[-1] for processes in (1, 4))
    assert four["bytes"]["activations"] < alone["bytes"]["activations"] and four["steps"] == alone["steps"]


LLAMA_8B, LLAMA_70B = (4096, 14336, 32, 32, 8, 128256, False), (8192, 28672, 80, 64, 8, 128256, False)


@pytest.mark.parametrize(("name", "profile", "processes", "size", "shape"), [
    ("hh_qwen2.5_0.5b", None, 1, "24GB", (896, 4864, 24, 14, 2, 151936, True)),
    ("hh_qwen2.5_1.5b", None, 1, "24GB", (1536, 8960, 28, 12, 2, 151936, True)),
    ("hh_llama3.1_8b_qlora_24gb", None, 1, "24GB", LLAMA_8B),
    ("hh_llama3.1_8b_qlora", None, 1, "80GB", LLAMA_8B),
    ("hh_llama3.1_8b_8gpus", "ddp", 8, "80GB", LLAMA_8B),
    ("hh_llama3.1_8b_8gpus", "zero2", 8, "80GB", LLAMA_8B),
    ("hh_llama3.1_8b_8gpus", "fsdp2", 8, "80GB", LLAMA_8B),
    ("hh_llama3.1_8b_grpo_vllm", "ddp", 8, "56GB", LLAMA_8B),  # vLLM has the rest of 80
    ("hh_llama3.1_70b_2nodes", "multi_node", 16, "80GB", LLAMA_70B),
])  # fmt: skip
def test_a_recipe_fits_the_devices_that_it_is_made_for(
    tmp_path, monkeypatch, installed, name, profile, processes, size, shape
):
    """By the sizes that its base's config has on the Hub, with three tenths to spare for what no estimate knows."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "tie_word_embeddings")  # fmt: skip
    values = dict(zip(keys, shape, strict=True))
    write_json(tmp_path / "config.json", {"model_type": "qwen2" if "qwen" in name else "llama", **values})
    monkeypatch.setattr("rlhf_trl.train.plan._changes", lambda setting, _: [("nothing", setting)])
    base = [f"model.model_name_or_path={tmp_path}", *(NO_PPO if processes == 1 else [])]
    recipe = load_recipe(shipped("recipes", name), base, processes)
    config = profile and shipped("accelerate_configs", profile)
    for row in plan(recipe, RunDir(tmp_path / "run"), config, processes, size):
        assert row["bytes"]["total"] < 0.7 * row["memory"], row["stage"]


@pytest.mark.parametrize(("size", "override", "message"), [
    ("much", "seed=1", "'much' is no size"),
    (None, "model.model_name_or_path=nobody/nothing", "is not at hand"),
])  # fmt: skip
def test_what_cannot_be_planned(tmp_path, size, override, message):
    recipe = load_recipe(shipped("recipes", "demo"), [override])
    with pytest.raises(UserError, match=message):
        plan(recipe, RunDir(tmp_path), None, 1, size)
