"""Sampling, and the drift of a policy from its reference, against closed forms; policies and rewards on one base."""

import math

import pytest
import torch
from conftest import small_recipe
from peft import PeftModel

from rlhf_trl.models.base import encode, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.models.policies import Policies
from rlhf_trl.models.rewards import RewardModel, SharedClassifier, load_reward_model
from rlhf_trl.models.sampling import InverseTransform, answer_logits, measure_drift, sample, sorted_batches, spread
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.run.files import read_jsonl
from rlhf_trl.run.layout import REFERENCE

PROMPT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": " Hi! "},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def base(trained):
    recipe, run = trained
    return Policies(recipe, run, recorded_tokenizer(recipe, run))


# --- drift -----------------------------------------------------------------------------------------------------------


def test_kl_is_exact_over_the_vocabulary():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    logits, ref = p.log().expand(2, 40, 3), (q.log() + 5.0).expand(2, 40, 3)
    mask = torch.tensor([[1] * 33 + [0] * 7, [1] * 40])
    drift = measure_drift(logits, ref, torch.zeros(2, 40, dtype=torch.long), mask)
    assert drift.kl.tolist() == pytest.approx([33 * exact, 40 * exact], rel=1e-5)
    assert drift.entropy.tolist() == pytest.approx([33 * 1.0296530, 40 * 1.0296530], rel=1e-5)
    ratio = 0.2 / 0.5
    assert drift.k1.tolist() == pytest.approx([33 * -math.log(ratio), 40 * -math.log(ratio)], rel=1e-5)
    assert drift.k3.tolist() == pytest.approx([n * (ratio - 1 - math.log(ratio)) for n in (33, 40)], rel=1e-5)


def test_kl_to_itself_is_exactly_zero():
    logits = torch.randn(3, 20, 50)
    drift = measure_drift(logits, logits.clone(), torch.randint(50, (3, 20)), torch.ones(3, 20))
    assert drift.kl.tolist() == drift.k1.tolist() == drift.k3.tolist() == [0.0] * 3


def test_kl_of_almost_equal_policies_is_never_negative():
    torch.manual_seed(0)
    logits = torch.randn(64, 20, 500)
    drift = measure_drift(
        logits, logits + 1e-7 * torch.randn(64, 20, 500), torch.randint(500, (64, 20)), torch.ones(64, 20)
    )
    assert (drift.kl >= 0).all()


def test_what_is_masked_does_not_count_even_if_it_is_not_finite():
    logits = torch.randn(1, 4, 5)
    ref = torch.randn(1, 4, 5)
    ids, mask = torch.tensor([[1, 2, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    expected = measure_drift(logits[:, :2], ref[:, :2], ids[:, :2], mask[:, :2])
    ref[:, 2:] = float("nan")
    for found, value in zip(measure_drift(logits, ref, ids, mask), expected, strict=True):
        assert found.tolist() == value.tolist()


def test_sequence_kl_of_two_enumerated_policies():
    """Averaged over every sequence with its probability, kl, k1 and k3 are the KL of the sequence distributions; the
    means of 40,000 sampled sequences lie within three standard errors of it."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3), torch.randn(2, 3, 3)  # logits of token 1, and of token 2 given token 1
    every = [(a, b) for a in range(3) for b in range(3)]
    logits = torch.stack([torch.stack([first[0], second[0, a]]) for a, _ in every])
    ref = torch.stack([torch.stack([first[1], second[1, a]]) for a, _ in every])
    ids = torch.tensor(every)
    log_p, log_q = (
        scores.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1).sum(-1).double() for scores in (logits, ref)
    )
    p = log_p.exp()
    exact = (p * (log_p - log_q)).sum().item()
    drift = measure_drift(logits, ref, ids, torch.ones(9, 2))
    for estimate in (drift.kl, drift.k1, drift.k3):
        assert (p * estimate).sum().item() == pytest.approx(exact, abs=1e-6)
    picks = torch.multinomial(p, 40_000, replacement=True)
    for estimate in (drift.k1, drift.k3):
        values = estimate[picks]
        assert abs(values.mean().item() - exact) < 3 * values.std().item() / 200


@pytest.mark.parametrize(
    ("mu", "spreads", "bias"), [(0.1, (20, 1.418, 1.417), 0.0025), (1.0, (2.0, 1.732, 1.695), 0.25)]
)
def test_the_estimators_spread_as_schulman_measured(mu, spreads, bias):
    """His table: p = N(mu, 1), q = N(0, 1), x ~ p; standard deviation over the true KL of k1, k2, k3.

    Here on a grid of values in place of the line; k2 is no output of ours and checks the grid itself.
    """
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_p, log_q = -((x - mu) ** 2) / 2, -(x**2) / 2
    ids = torch.arange(4001)[:, None]
    drift = measure_drift(log_p.expand(4001, 1, -1), log_q.expand(4001, 1, -1), ids, torch.ones(4001, 1))
    weight, true = log_p.softmax(-1), mu * mu / 2
    assert drift.kl.tolist() == pytest.approx([true] * 4001, rel=1e-3)
    found = []
    for values in (drift.k1, drift.k1**2 / 2, drift.k3):
        mean = (weight * values).sum()
        found.append(((weight * (values - mean) ** 2).sum().sqrt() / true).item())
    assert found == pytest.approx(spreads, rel=2e-3)
    assert (weight * drift.k1**2 / 2).sum().item() / true - 1 == pytest.approx(bias, rel=0.02)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_answers_are_distributed_as_the_model_says():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]]).repeat(20_000, 1)
    picks = InverseTransform(range(20_000), 1)(torch.empty(0), logits).argmax(-1)
    share = torch.bincount(picks, minlength=5) / 20_000
    expected = logits[0].softmax(-1)
    assert share[4] == 0
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()


def test_sampling_repeats_and_ends(trained, base):
    prompts = [row["prompt"] for row in read_jsonl(trained[1].prompts("test"))[:6]]
    tokenizer = base.tokenizer
    with base.use("dpo") as model:
        first, second = (sample(model, tokenizer, prompts, 12, 4, seed=1) for _ in range(2))
        other = sample(model, tokenizer, prompts, 12, 4, seed=2)
    assert first == second != other
    for answer in first:
        assert answer.finished == (answer.ids[-1] == tokenizer.eos_token_id)
        assert answer.finished or len(answer.ids) == 12
        assert tokenizer.eos_token_id not in answer.ids[:-1]


def test_an_answer_depends_neither_on_its_batch_nor_on_its_place(trained, base):
    prompts = [row["prompt"] for row in read_jsonl(trained[1].prompts("test"))[:5]]
    with base.use("ppo") as model:
        together = sample(model, base.tokenizer, prompts, 12, 8, seed=1)
        reversed_ = sample(model, base.tokenizer, prompts[::-1], 12, 2, seed=1)[::-1]
        more = sample(model, base.tokenizer, [prompts[0]] * 3, 12, 8, seed=1, draws=[0, 1, 2])
    assert together == reversed_
    assert more[0] == together[0]
    assert len({tuple(answer.ids) for answer in more}) == 3


def test_decoding_settings_do_what_they_say(trained, base):
    prompts = [row["prompt"] for row in read_jsonl(trained[1].prompts("test"))[:3]]
    with base.use("dpo") as model, torch.no_grad():
        greedy = sample(model, base.tokenizer, prompts, 4, 8, seed=1, decoding=Decoding(temperature=0))
        for narrow in (Decoding(top_k=1), Decoding(top_p=1e-6), Decoding(temperature=1e-4)):
            assert sample(model, base.tokenizer, prompts, 4, 8, seed=1, decoding=narrow) == greedy
        for prompt, answer in zip(prompts, greedy, strict=True):
            ids = encode(base.tokenizer, prompt)[0]
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == answer.ids[0]


def test_a_prompt_beyond_the_limit_loses_its_beginning(base):
    long = [{"role": "user", "content": "word " * 2000}]
    with base.use("dpo") as model:
        assert len(sample(model, base.tokenizer, [long], 4, 1, seed=1, max_prompt_tokens=100)) == 1


def test_batches_cover_every_row_once_from_long_to_short():
    batches = sorted_batches([3, 9, 1, 9, 5], 2)
    assert batches == [[1, 3], [4, 0], [2]]
    assert spread(batches, lambda rows: [row * 10 for row in rows]) == [0, 10, 20, 30, 40]


# --- one base --------------------------------------------------------------------------------------------------------


def test_answer_logits_do_not_depend_on_padding(base):
    tokenizer = base.tokenizer
    rows = [encode(tokenizer, PROMPT, "Yes."), encode(tokenizer, PROMPT[:1], "No, that is not so.")]
    with torch.no_grad(), base.use("dpo") as model:
        start = tokenizer.pad({"input_ids": [row[0] for row in rows]}, return_tensors="pt")
        width = max(len(row[1]) for row in rows)
        answer = torch.tensor([row[1] + [0] * (width - len(row[1])) for row in rows])
        mask = torch.tensor([[1] * len(row[1]) + [0] * (width - len(row[1])) for row in rows])
        batch = answer_logits(model, start["input_ids"], answer, start["attention_mask"], mask)
        for index, (prompt, ids) in enumerate(rows):
            alone = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(batch[index, : len(ids)], alone, atol=1e-4)


def test_policies_share_one_base(trained):
    recipe, run = trained
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    ids = torch.arange(2, 12)[None]
    outputs = {}
    for name in (REFERENCE, *recipe.policies, "dpo", REFERENCE):
        with torch.no_grad(), policies.use(name) as model:
            outputs.setdefault(name, []).append(model(ids).logits)
    assert torch.equal(*outputs[REFERENCE])
    assert torch.equal(*outputs["dpo"])
    assert all(not torch.equal(outputs[name][0], outputs[REFERENCE][0]) for name in recipe.policies)
    embeddings = [
        param for name, param in policies.model.named_parameters() if "embed_tokens" in name and "lora" not in name
    ]
    assert len(embeddings) == 1


def test_a_reward_adapter_on_the_base_of_the_policies_scores_as_by_itself(trained, base):
    recipe, run = trained
    pairs = read_jsonl(run.pairs("test"))[:16]
    texts = [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs], [True] * 16
    alone = load_reward_model(recipe, run, "rm")
    shared = load_reward_model(recipe, run, "rm", base)
    assert isinstance(alone.model, PeftModel)
    assert isinstance(shared.model, SharedClassifier)
    expected = alone.score(*texts)
    for size in (1, 16):
        assert torch.allclose(shared.score(*texts, batch_size=size), expected, atol=1e-4)
    with base.use("dpo"):  # whatever was in use before
        assert torch.allclose(shared.score(*texts), expected, atol=1e-4)


def test_a_reward_model_of_other_weights_stays_a_model_of_its_own(trained, tmp_path):
    recipe, run = trained
    other = small_recipe(tmp_path, ("stages.rm.model.dtype=bfloat16",))
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    policies.recipe = other
    assert not policies.can_hold("rm")


def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    recipe, run = trained
    folder = tmp_path / "adapter"
    shutil.copytree(run.adapter("dpo"), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    save_file(weights, folder / "adapter_model.safetensors")
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    with pytest.raises(UserError, match="does not fit its base"):
        policies.add("other", folder)


def test_any_sequence_classifier_can_score(trained, tmp_path):
    """A reward model with a tokenizer and template of its own: the text is rendered with those, and a model of two
    outputs is refused."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    recipe, run = trained
    folder = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=1)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    found = load_reward_model(recipe, run, str(folder))
    assert isinstance(found, RewardModel)
    prompts, answers = [PROMPT, PROMPT[:1]], ["Yes.", "No, and that is all there is to say."]
    expected = []
    own = set_up_tokenizer(str(folder), {})
    for prompt, answer in zip(prompts, answers, strict=True):
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in prompt) + f"<assistant>{answer}</s>"
        ids = own(text.replace("</s>", own.eos_token), add_special_tokens=False).input_ids
        expected.append(model(torch.tensor([ids])).logits.item())
    for size in (1, 2):
        assert found.score(prompts, answers, [True, True], size).tolist() == pytest.approx(expected, abs=1e-4)
    AutoModelForSequenceClassification.from_config(
        LlamaConfig(**{**config.to_diff_dict(), "num_labels": 2})
    ).save_pretrained(folder)
    with pytest.raises(UserError, match="2 outputs"):
        load_reward_model(recipe, run, str(folder))
