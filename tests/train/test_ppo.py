"""PPO: the repairs of TRL's trainer do what the options say, on one shared base."""

import math
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from safetensors.torch import load_file
from transformers import set_seed

from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.ppo.loop import AnswerTerms, Batches, generate_in_chunks
from rlhf_trl.train.ppo.trainer import PPOTrainer
from rlhf_trl.train.step import build_stage_config, build_trainer

ONE_BATCH = ("per_device_train_batch_size=8", "gradient_accumulation_steps=1", "num_mini_batches=1")
INPUTS = ("input_ids", "attention_mask", "position_ids")


def make(trained, folder, overrides):
    """Build the PPO trainer of the small run with other options, after seeding."""
    folder.mkdir(exist_ok=True)
    recipe = small_recipe(folder, tuple(f"stages.ppo.args.{item}" for item in overrides))
    config = build_stage_config(recipe, RunDir(folder), "ppo")
    set_seed(3)
    return build_trainer(recipe, trained[1], "ppo", config)


@pytest.fixture
def build(trained, tmp_path):
    return lambda *overrides, folder="": make(trained, tmp_path / folder, overrides)


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """The trainer of the small run after its first update. Read only."""
    trainer = make(trained, tmp_path_factory.mktemp("plain"), ["total_episodes=16"])
    trainer.train()
    return trainer


@pytest.fixture
def finish(build):
    """Build a trainer and train it."""

    def finish(*overrides, **more):
        trainer = build(*overrides, **more)
        trainer.train()
        return trainer

    return finish


def weights(trainer):
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters() if param.requires_grad])


def rows_of(trainer):
    return [row for row in trainer.state.log_history if "objective/kl" in row]


def named(trainer):
    return dict(trainer.shared.named_parameters()) | dict(trainer._value_head.named_parameters())


def snapshot(trainer):
    return {name: param.detach().clone() for name, param in named(trainer).items()}


def load(trainer, state):
    for name, tensor in state.items():
        named(trainer)[name].data.copy_(tensor)


@pytest.mark.parametrize(("parts", "expected"), [(1, 2), (4, 8)])
def test_mini_batches_are_optimizer_steps(build, parts, expected):
    # an update of 2 epochs; upstream makes 2 steps whatever num_mini_batches says
    trainer = build("per_device_train_batch_size=2", "gradient_accumulation_steps=4", "total_episodes=8",
                    "num_ppo_epochs=2", f"num_mini_batches={parts}")  # fmt: skip
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == expected


def test_clipping_takes_effect_and_is_logged(plain, finish):
    narrow = finish("max_grad_norm=1e-9", "total_episodes=16")
    assert not torch.equal(weights(plain), weights(narrow))
    assert rows_of(plain)[0]["grad_norm"] > 1e-3 < rows_of(narrow)[0]["grad_norm"]  # before clipping


def test_a_fresh_adapter_is_its_reference(finish):
    """The policy is the one that sampled, so that the mean ratio is 1; upstream logs 1 / num_mini_batches."""
    for row in rows_of(finish("learning_rate=0", "total_episodes=16", "entropy_coef=0.05", "num_mini_batches=2")):
        assert abs(row["objective/kl"]) < 1e-4
        assert row["val/ratio"] == pytest.approx(1, abs=1e-2)


def test_every_role_learns_what_it_should(build):
    trainer = build("total_episodes=16", "value_init=reward", "learning_rate=1e-2")
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {kind: {name for name in before if f".{kind}." in name} for kind in ("default", "value", "reward")}
    head = {"score.weight", "score.bias"}
    base = before.keys() - head - set().union(*kinds.values())
    assert base and not changed & base
    assert kinds["reward"] and not changed & kinds["reward"]
    assert head <= changed
    for kind in ("default", "value"):
        assert changed >= {name for name in kinds[kind] if "lora_B" in name}, kind
    trained = {name for name, param in trainer.shared.named_parameters() if param.requires_grad}
    assert trained == kinds["default"] | kinds["value"]  # still, after the reference and the rewards


def test_the_update_is_the_one_of_the_paper(build, trained):
    """GAE, clipped surrogate, clipped value loss and entropy bonus of a second epoch, computed by hand."""
    trainer = build(*ONE_BATCH, "total_episodes=8", "num_ppo_epochs=2", "entropy_coef=0.05", "learning_rate=3e-2",
                    "value_init=reward", "kl_coef=0.1", "gamma=0.99", "lam=0.9", "vf_coef=0.3", "temperature=0.8",
                    "cliprange_value=0.05")  # fmt: skip
    args, policy = trainer.args, trainer.shared
    losses, inputs, states, scores = [], [], [snapshot(trainer)], []
    backward, backbone = trainer._backward, trainer.reward_model.backbone
    trainer._backward = lambda loss, **more: (losses.append(loss.item()), backward(loss, **more))
    trainer.model.register_forward_hook(
        lambda _, args, kwargs, out: inputs.append({key: kwargs[key] for key in INPUTS}), with_kwargs=True
    )
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: states.append(snapshot(trainer)))

    def score_and_keep(**more):
        output = backbone(**more)
        scores.append(output.hidden_states[0][:, 0, 0])
        return output

    trainer.reward_model.backbone = score_and_keep
    trainer.train()
    rewards = torch.cat(scores)  # in the rollout's order; each epoch sees its one batch in an order of its own
    start = policy.context_length
    first, second = (batch["input_ids"].tolist() for batch in inputs)
    assert sorted(first) == sorted(second) and first != second
    tokens, mask = inputs[1]["input_ids"], inputs[1]["attention_mask"].bool()
    answers, mask = tokens[:, start:], mask[:, start:]

    def read(state, use_reference=False):
        """Log-probabilities, entropies and values of the answers of the second epoch, under these weights."""
        load(trainer, state)
        with torch.no_grad():
            with policy.reference() if use_reference else torch.no_grad():
                kept = policy(**inputs[1]).logits.kept[:, :-1] / args.temperature
            hidden = trainer._value_head.backbone(**inputs[1]).hidden_states[-1]
            values = trainer._value_head.score(hidden)[:, start - 1 : -1, 0]
        distribution = torch.distributions.Categorical(logits=kept)
        return distribution.log_prob(answers), distribution.entropy(), values

    old, _, old_values = read(states[0])
    reference = read(states[0], use_reference=True)[0]
    tokenizer = trainer.processing_class
    texts = []
    for ids, kept in zip(tokens.tolist(), inputs[1]["attention_mask"].tolist(), strict=True):
        prompt = tuple(t for t, k in zip(ids[:start], kept, strict=False) if k)
        answer = [t for t, k in zip(ids[start:], kept[start:], strict=True) if k]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        texts.append((trainer.reward_model._prompts[prompt], text, answer[-1] == tokenizer.eos_token_id))
    score = load_reward_model(*trained, "rm").score(*zip(*texts, strict=True))
    assert torch.allclose(score.sort().values, rewards.sort().values, atol=1e-4)
    done = [text[2] for text in texts]
    score = score - torch.tensor([0.0 if end else args.missing_eos_penalty for end in done])
    length = mask.sum(1)
    reward = -args.kl_coef * (old - reference).masked_fill(~mask, 0)
    reward[torch.arange(8), torch.where(length < mask.shape[1], length, length - 1)] += score
    seen = torch.arange(mask.shape[1]) <= length[:, None]  # one position past the end
    values = old_values.masked_fill(~seen, 0)
    advantages, running = torch.zeros_like(values), torch.zeros(8)
    for t in reversed(range(mask.shape[1])):
        following = values[:, t + 1] if t + 1 < mask.shape[1] else 0.0
        running = reward[:, t] + args.gamma * following - values[:, t] + args.gamma * args.lam * running
        advantages[:, t] = running
    returns = advantages + values
    raw = advantages[mask]
    whitened = (advantages - raw.mean()) / (raw.var() + 1e-8).sqrt()
    new, entropy, new_values = read(states[1])
    ratio = (new - old).exp()
    surrogate = torch.max(-whitened * ratio, -whitened * ratio.clamp(1 - args.cliprange, 1 + args.cliprange))[mask]
    clipped = torch.clamp(new_values, values - args.cliprange_value, values + args.cliprange_value)
    value_loss = 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)[seen].mean()
    expected = surrogate.mean() + args.vf_coef * value_loss - args.entropy_coef * entropy[mask].mean()
    assert losses[1] == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)
    row = rows_of(trainer)[0]
    assert (ratio[mask] > 1 + args.cliprange).any() and 0 < row["policy/clipfrac_avg"] < 1
    assert row["reward"] == pytest.approx(rewards.mean().item(), abs=1e-4)
    assert (row["answer_tokens"], row["finished"]) == (length.float().mean().item(), sum(done) / 8)


class Vowels:
    """A reward with a known optimum, 1: the share of vowels among an answer's characters, spaces aside."""

    def score(self, prompts, answers, finished):
        texts = ["".join(text.split()) for text in answers]
        return torch.tensor([sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts])


def test_gradients_of_log_probabilities_and_entropies_are_those_of_autograd():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 7, dtype=torch.double, requires_grad=True), torch.randint(6, (2, 3))
    assert torch.autograd.gradcheck(lambda logits: AnswerTerms.apply(logits, tokens), (logits,))
    log_probs, entropies = AnswerTerms.apply(logits, tokens)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_probs, expected.log_prob(tokens))
    torch.testing.assert_close(entropies, expected.entropy())
    barred = logits.detach().clone()
    barred[..., 6] = -math.inf  # as models do with a padded vocabulary
    terms = AnswerTerms.apply(barred.requires_grad_(), tokens)
    terms.sum().backward()
    assert terms.isfinite().all() and barred.grad.isfinite().all()


def test_a_task_with_a_known_optimum_is_learned_and_the_entropy_bonus_keeps_the_entropy_up(build):
    entropies = []
    for bonus in (0, 0.05):
        trainer = build("per_device_train_batch_size=32", "gradient_accumulation_steps=1", "num_mini_batches=1",
                        "total_episodes=384", "learning_rate=2e-3", "kl_coef=0", "response_length=8",
                        "missing_eos_penalty=null", "seed=1", f"entropy_coef={bonus}")  # fmt: skip
        # Short prompts, for the time; and a head that tells tokens apart, which the small model has not learned.
        length = sorted(map(len, trainer.train_dataset["input_ids"]))[63]
        trainer.train_dataset = trainer.train_dataset.filter(lambda row, most=length: len(row["input_ids"]) <= most)
        trainer.dataloader.loader = trainer._prepare_loader()
        trainer.shared.get_base_model().lm_head.weight.data.mul_(5)
        trainer.reward_model._reward = Vowels()
        trainer.train()
        rows = rows_of(trainer)
        assert rows[-1]["reward"] > rows[0]["reward"] + 0.2, [row["reward"] for row in rows]
        entropies.append(sum(row["entropy"] for row in rows[-3:]) / 3)
    assert entropies[1] > entropies[0] + 0.03


def test_interrupted_runs_go_on_exactly(build, finish):
    """N updates straight, and k updates, an end, and the rest: the same weights and trace, bit for bit."""
    options = ("total_episodes=64", "save_steps=1", "save_strategy=steps", "kl_target=0.5", "kl_horizon=100",
               "lr_scheduler_type=linear", "max_kl=1000")  # fmt: skip
    straight = finish(*options, folder="straight")
    expected, rows = snapshot(straight), rows_of(straight)
    assert len(rows) == 4 and len({row["kl_coef"] for row in rows}) > 2
    for step in (1, 3):
        folder = Path(straight.args.output_dir) / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert names >= {"adapter_model.safetensors", "value.safetensors", "ppo_state.json", "manifest.json"}
        held = [*load_file(folder / "adapter_model.safetensors"), *load_file(folder / "value.safetensors")]
        assert all("lora_" in name or "value_model.score." in name for name in held)
        resumed = build(*options, folder=f"resumed{step}")
        set_seed(99)  # what the process drew before must not matter
        resumed.train(resume_from_checkpoint=str(folder))
        again = rows_of(resumed)
        assert [row["step"] for row in again] == list(range(1, 5))
        for key in ("objective/kl", "reward", "kl_coef", "lr", "loss/value_avg", "num_tokens", "episode"):
            assert [row[key] for row in again] == [row[key] for row in rows], key
        after = snapshot(resumed)
        assert all(torch.equal(after[name], expected[name]) for name in expected)
    saved = load_file(Path(straight.args.output_dir) / "checkpoint-4" / "value.safetensors")
    assert torch.equal(saved["value_model.score.bias"], expected["score.bias"])
    assert sum(".value." in name for name in saved) == sum(".value." in name for name in expected)


def test_the_order_of_the_prompts_follows_from_the_update(build):
    trainer = build()
    trainer.train_dataset = trainer.train_dataset.select(range(44))  # two batches of 16 in each pass, and a rest

    def take(start, count):
        batches, taken = Batches(trainer._prepare_loader()), []
        batches.done = start
        while len(taken) < count:
            taken += [batch["input_ids"].tolist() for batch in batches]
        return taken[:count]

    straight = take(0, 7)
    assert straight[0] != straight[2]
    for start in range(1, 7):
        assert take(start, 7 - start) == straight[start:], start


def test_the_coefficient_follows_the_target(finish):
    """Ziegler et al.: times 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon."""
    rows = rows_of(finish("total_episodes=48", "kl_target=6", "kl_horizon=160", "learning_rate=1e-2"))
    for now, following in pairwise(rows):
        error = min(max(now["objective/kl"] / 6 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(now["kl_coef"] * (1 + error * 16 / 160))
    assert rows[-1]["kl_coef"] < rows[0]["kl_coef"]


def test_max_kl_goes_back_to_the_last_good_policy_and_stops(build, finish):
    options = (*ONE_BATCH, "total_episodes=48", "learning_rate=3e-3", "kl_coef=0", "entropy_coef=0")
    free, states = build(*options), []
    free.optimizer.optimizer.register_step_post_hook(lambda *_: states.append(weights(free)))
    free.train()
    trace = [row["objective/kl"] for row in rows_of(free)]
    limit = sorted(trace)[3]
    bad = next(index for index, kl in enumerate(trace) if kl > limit)  # rollout of update bad + 1
    stopped = finish(*options, f"max_kl={limit}")
    assert [row["objective/kl"] for row in rows_of(stopped)] == trace[: bad + 1]
    assert stopped.state.global_step == bad - 1
    assert torch.equal(weights(stopped), states[(bad - 1) * len(states) // len(trace) - 1])
    assert f"after update {bad} is above max_kl: the policy is that of update {bad - 1}" in stopped.stopped


def test_what_cannot_work_is_refused(build, finish, trained, monkeypatch):
    with pytest.raises(UserError, match="max_kl"):  # the first update passes it
        finish("max_kl=1e-6", "learning_rate=1e-2", "total_episodes=64")
    for key, value in {"padding_side": "right", "pad_token": "<|endoftext|>"}.items():
        tokenizer = recorded_tokenizer(*trained)
        setattr(tokenizer, key, value)
        with pytest.raises(ValueError, match="padding"):
            PPOTrainer(args=build().args, processing_class=tokenizer)
    monkeypatch.setattr("rlhf_trl.train.ppo.models.is_deepspeed_zero3_enabled", lambda: True)  # as in its processes
    with pytest.raises(UserError, match="use ddp or zero2"):
        build()


def test_rewards_are_normalised_by_the_stored_scale(plain, finish, trained):
    (first,), (second,) = rows_of(plain), rows_of(finish("total_episodes=16", "normalize_rewards=true"))
    recipe, run = trained
    stored = read_json(run.reward_scale("ppo"))
    pairs = read_jsonl(run.pairs("test"))
    texts = [(pair["prompt"], pair[side], True) for pair in pairs for side in ("chosen", "rejected")]
    scores = load_reward_model(recipe, run, "rm").score(*zip(*texts, strict=True))
    expected = {"mean": scores.mean().item(), "std": scores.std().item(), "answers": len(texts)}
    assert stored == pytest.approx(expected, abs=1e-4)
    assert first["reward"] == pytest.approx(second["reward"], abs=1e-5)  # told as the model gives it
    penalty = first["reward"] - first["objective/scores"]
    normalised = (first["reward"] - stored["mean"]) / stored["std"] - penalty
    assert second["objective/scores"] == pytest.approx(normalised, abs=1e-4)


def test_a_value_model_from_the_reward_model_gives_the_reward_at_the_end(build, trained):
    trainer = build("value_init=reward", "normalize_rewards=true")
    recipe, run = trained
    pair = read_jsonl(run.pairs("test"))[0]
    ids = torch.tensor([list(chain(*encode(trainer.processing_class, pair["prompt"], pair["chosen"])))])
    ones = torch.ones_like(ids)
    hidden = trainer._value_head.backbone(ids, ones, ones.cumsum(1) - 1).hidden_states[-1]
    value = trainer._value_head.score(hidden)[0, -1, 0].item()
    scale = read_json(run.reward_scale("ppo"))
    score = load_reward_model(recipe, run, "rm").score([pair["prompt"]], [pair["chosen"]], [True]).item()
    assert value == pytest.approx((score - scale["mean"]) / scale["std"], abs=1e-4)


def test_logits_are_reduced_chunk_by_chunk(build):
    """The log-probabilities of the sampled tokens, whatever the chunk; no tensor of a whole batch's logits is kept."""
    trainer = build()
    policy, tokenizer = trainer.shared, trainer.processing_class
    rows = [encode(tokenizer, prompt)[0] for prompt in list(trainer.reward_model._prompts.values())[:6]]
    queries = tokenizer.pad({"input_ids": rows}, return_tensors="pt").input_ids
    width = queries.shape[1]
    config = policy.generation_config.__class__(max_new_tokens=12, do_sample=True, top_k=0, top_p=1.0)
    for chunk in (6, 4, 1):
        set_seed(5)
        tokens, sampled = generate_in_chunks(policy, queries, chunk, tokenizer.pad_token_id, config)
        assert sampled.shape == (6, tokens.shape[1] - width)
        mask = tokens != tokenizer.pad_token_id
        with torch.no_grad():
            kept = policy(tokens.masked_fill(~mask, 0), mask, mask.cumsum(1) - mask.long()).logits.kept[:, :-1]
        expected = kept.log_softmax(-1).gather(-1, tokens[:, width:, None])[..., 0]
        inside = mask[:, width:]
        assert torch.allclose(sampled[inside], expected[inside], atol=1e-4)


def test_text_that_is_markup_does_not_end_a_run(build):
    trainer = build("total_episodes=16")
    decode = trainer.processing_class.batch_decode
    trainer.processing_class.batch_decode = lambda *a, **k: ["[/b] <|x|>" for _ in decode(*a, **k)]
    trainer.train()
    assert len(rows_of(trainer)) == 1


def test_bf16_runs_in_bf16(build):
    """In every layer, and in later epochs with the new weights: accelerate's autocast would keep the rounded ones of
    the first forward pass until the end of training."""
    trainer = build("bf16=true", "gradient_checkpointing=true", *ONE_BATCH, "total_episodes=8", "num_ppo_epochs=2",
                    "learning_rate=3e-2")  # fmt: skip
    kinds, seen = set(), []

    def keep_kind(module, args, output):
        if trainer.shared.active_adapter != "reward":  # which scores in its own precision
            kinds.add(output.dtype)

    def keep(_, args, kwargs, output):
        batch = {key: kwargs[key] for key in INPUTS}
        seen.append((output[0].logits.kept.detach().clone(), batch, snapshot(trainer)))

    trainer.policy_model.get_base_model().model.layers[0].mlp.register_forward_hook(keep_kind)
    trainer.model.register_forward_hook(keep, with_kwargs=True)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert kinds == {torch.bfloat16}
    assert len(seen) == 2
    for logits, batch, state in seen:
        load(trainer, state)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(trainer.shared(**batch).logits.kept, logits, atol=1e-6)


def test_an_answer_ends_at_a_sampled_padding_token(build, trained):
    trainer = build()
    tokenizer = trainer.processing_class
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert trainer.shared.generation_config.eos_token_id == [eos, pad]
    prompt, messages = next(iter(trainer.reward_model._prompts.items()))
    answer = tokenizer("yes").input_ids
    trainer.shared.context_length = len(prompt)
    ids = torch.tensor([[*prompt, *answer, pad, eos], [*prompt, *answer, eos, pad]])
    scores = trainer.reward_model.backbone(input_ids=ids, attention_mask=ids != pad).hidden_states[0][:, 0, 0]
    expected = load_reward_model(*trained, "rm").score([messages] * 2, ["yes", "yes"], [False, True])
    assert torch.allclose(scores, expected, atol=1e-4)
    assert scores[0] != scores[1]


def test_gradient_checkpointing_is_on_and_changes_nothing(plain, finish):
    recomputed = finish("gradient_checkpointing=true", "total_episodes=16")
    assert recomputed.policy_model.is_gradient_checkpointing and not plain.policy_model.is_gradient_checkpointing
    assert torch.allclose(weights(plain), weights(recomputed), atol=1e-5)
