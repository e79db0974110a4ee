"""PPO: the repairs of TRL's trainer do what the options say."""

import pytest
import torch
from conftest import small_recipe
from transformers import set_seed

from rlhf_trl.models import recorded_tokenizer
from rlhf_trl.rundir import RunDir
from rlhf_trl.train import PPOConfig, _own_settings, build_config, build_trainer


@pytest.fixture
def build(trained, tmp_path):
    """Build the PPO trainer of the small run with other options, after seeding."""
    _, run = trained

    def build(*overrides: str):
        recipe = small_recipe(tmp_path, tuple(f"stages.ppo.args.{item}" for item in overrides))
        values = {**recipe.args_of("ppo"), **_own_settings(RunDir(tmp_path), "ppo", "ppo")}
        set_seed(3)
        return build_trainer(recipe, run, "ppo", build_config(PPOConfig, values, "ppo"))

    return build


def weights(trainer) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters() if param.requires_grad])


@pytest.mark.parametrize(("parts", "expected"), [(1, 8), (2, 16), (4, 32)])
def test_mini_batches_are_optimizer_steps(build, parts, expected):
    # 2 updates of 4 epochs; upstream makes 8 steps whatever num_mini_batches says
    trainer = build("per_device_train_batch_size=2", "gradient_accumulation_steps=4", "total_episodes=16",
                    "num_ppo_epochs=4", f"num_mini_batches={parts}")  # fmt: skip
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == expected


def test_clipping_takes_effect_and_is_logged(build):
    results = {}
    for limit in ("1.0", "1e-9"):
        trainer = build(f"max_grad_norm={limit}", "total_episodes=16")
        trainer.train()
        results[limit] = weights(trainer)
        row = next(row for row in trainer.state.log_history if "grad_norm" in row)
        assert row["grad_norm"] > 1e-3  # before clipping
    assert not torch.equal(results["1.0"], results["1e-9"])


def test_averages_do_not_shrink_with_mini_batches(build):
    """At the first update the policy is the one that sampled, so that the mean ratio is 1; upstream logs 1 / parts."""
    trainer = build("num_mini_batches=2", "learning_rate=1e-12", "total_episodes=16")
    trainer.train()
    row = next(row for row in trainer.state.log_history if "val/ratio" in row)
    assert row["val/ratio"] == pytest.approx(1, abs=1e-2)
    assert abs(row["objective/kl"]) < 1e-4


def test_entropy_bonus_enters_the_gradient(build):
    """The gradient with the bonus differs from that without by the gradient of c times the mean entropy."""
    gradients = {}
    for coefficient in (0.0, 0.5):
        trainer = build(f"entropy_coef={coefficient}", "num_mini_batches=1", "gradient_accumulation_steps=1",
                        "num_ppo_epochs=1", "total_episodes=8", "max_grad_norm=1e9")  # fmt: skip
        seen = {}
        policy = trainer.policy_model

        def keep(*_, seen=seen, policy=policy):
            seen.update({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})

        trainer.optimizer.optimizer.register_step_pre_hook(keep)
        if coefficient:
            forward = trainer._keep_output

            def capture(module, args, kwargs, output, forward=forward, seen=seen):
                forward(module, args, kwargs, output)
                if torch.is_grad_enabled():
                    seen["inputs"] = {key: kwargs[key] for key in ("input_ids", "attention_mask", "position_ids")}

            trainer.model.register_forward_hook(capture, with_kwargs=True)
            before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        trainer.train()
        gradients[coefficient] = seen
        entropy = next(row["entropy"] for row in trainer.state.log_history if "entropy" in row)
    # the expected difference, from the weights of before the update
    policy.load_state_dict(before, strict=False)  # the tied head is not listed
    policy.zero_grad()
    inputs = gradients[0.5].pop("inputs")
    logits = policy(**inputs).logits[:, trainer._context_length - 1 : -1]
    mask = inputs["attention_mask"][:, trainer._context_length :].float()
    distribution = torch.distributions.Categorical(logits=logits)
    mean = (distribution.entropy() * mask).sum() / mask.sum()
    (-0.5 * mean).backward()
    assert entropy == pytest.approx(mean.item(), rel=1e-4)
    for name, param in policy.named_parameters():
        if param.grad is not None:
            assert torch.allclose(gradients[0.5][name] - gradients[0.0][name], param.grad, atol=1e-5), name


def test_bf16_runs_in_bf16(build):
    trainer = build("bf16=true", "total_episodes=16", "gradient_checkpointing=true")
    kinds = set()
    layer = trainer.policy_model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert kinds == {torch.bfloat16}
    row = next(row for row in trainer.state.log_history if "val/ratio" in row)
    assert row["val/ratio"] == pytest.approx(1, abs=0.05)


def test_gradient_checkpointing_is_on_and_changes_nothing(build):
    results = []
    for value in ("false", "true"):
        trainer = build(f"gradient_checkpointing={value}", "total_episodes=16")
        assert trainer.policy_model.is_gradient_checkpointing == (value == "true")
        trainer.train()
        results.append(weights(trainer))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("change", [{"padding_side": "right"}, {"pad_token": "<|endoftext|>"}])
def test_padding_that_ppo_cannot_work_with_is_refused(build, trained, change):
    from rlhf_trl.ppo import PPOTrainer

    tokenizer = recorded_tokenizer(*trained)
    for key, value in change.items():
        setattr(tokenizer, key, value)
    with pytest.raises(ValueError, match="padding"):
        PPOTrainer(args=build().args, processing_class=tokenizer)
