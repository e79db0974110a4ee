"""Sampling, and the KL of a policy to its reference, against closed forms; policies and rewards on one base."""

import math
import shutil

import pytest
import torch
from conftest import PROMPT, small_recipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from rlhf_trl.models.base import Policies, shares_base
from rlhf_trl.models.rewards import RewardModel, SharedClassifier, load_reward_model
from rlhf_trl.models.sampling import InverseTransform, answer_logits, measure_kl, sample, sorted_batches, spread
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.run.files import read_jsonl
from rlhf_trl.run.layout import REFERENCE


@pytest.fixture(scope="module")
def base(trained):
    return Policies(*trained, recorded_tokenizer(*trained))


@pytest.fixture(scope="module")
def draw(trained, base):
    """Sample answers of a policy to the first held-out prompts, or to others."""
    held_out = [row["prompt"] for row in read_jsonl(trained[1].prompts("test"))]

    def draw(policy, prompts=6, length=12, size=8, seed=1, **more):
        rows = held_out[:prompts] if isinstance(prompts, int) else prompts
        with base.use(policy) as model:
            return sample(model, base.tokenizer, rows, length, size, seed, **more)

    draw.prompts = held_out
    return draw


# --- KL


def test_kl_is_exact_over_the_vocabulary():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    logits, ref = p.log().expand(2, 40, 3), (q.log() + 5.0).expand(2, 40, 3)
    mask = torch.tensor([[1] * 33 + [0] * 7, [1] * 40])
    kl = measure_kl(logits, ref, torch.zeros(2, 40, dtype=torch.long), mask)
    ratio = 0.2 / 0.5
    per_token = {"kl": exact, "entropy": 1.0296530, "k1": -math.log(ratio), "k3": ratio - 1 - math.log(ratio)}
    for name, value in per_token.items():
        assert getattr(kl, name).tolist() == pytest.approx([33 * value, 40 * value], rel=1e-5), name


def test_kl_to_itself_is_zero_and_what_is_masked_does_not_count_even_if_it_is_not_finite():
    logits, ids, mask = torch.randn(8, 20, 500), torch.randint(500, (8, 20)), torch.ones(8, 20)
    assert all(part.tolist() == [0.0] * 8 for part in measure_kl(logits, logits.clone(), ids, mask)[:3])
    assert (measure_kl(logits, logits + 1e-7 * torch.randn(8, 20, 500), ids, mask).kl >= 0).all()
    logits, ref = torch.randn(2, 1, 4, 5)
    ids, mask = torch.tensor([[1, 2, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    expected = measure_kl(logits[:, :2], ref[:, :2], ids[:, :2], mask[:, :2])
    ref[:, 2:] = float("nan")
    assert torch.equal(torch.stack(measure_kl(logits, ref, ids, mask)), torch.stack(expected))


def test_sequence_kl_of_two_enumerated_policies():
    """Averaged over every sequence with its probability, kl, k1 and k3 are the KL of the sequence distributions; the
    means of 40,000 sampled sequences lie within three standard errors of it."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3), torch.randn(2, 3, 3)  # logits of token 1, and of token 2 given token 1
    every = [(a, b) for a in range(3) for b in range(3)]
    ids = torch.tensor(every)
    logits, ref = (torch.stack([torch.stack([first[i], second[i, a]]) for a, _ in every]) for i in range(2))
    log_p, log_q = (
        scores.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1).sum(-1).double() for scores in (logits, ref)
    )
    p = log_p.exp()
    exact = (p * (log_p - log_q)).sum().item()
    kl = measure_kl(logits, ref, ids, torch.ones(9, 2))
    picks = torch.multinomial(p, 40_000, replacement=True)
    for estimate in (kl.kl, kl.k1, kl.k3):
        assert (p * estimate).sum().item() == pytest.approx(exact, abs=1e-6)
        values = estimate[picks]
        assert estimate is kl.kl or abs(values.mean().item() - exact) < 3 * values.std().item() / 200


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
    kl = measure_kl(log_p.expand(4001, 1, -1), log_q.expand(4001, 1, -1), ids, torch.ones(4001, 1))
    weight, true, k2 = log_p.softmax(-1), mu * mu / 2, kl.k1**2 / 2
    assert kl.kl.tolist() == pytest.approx([true] * 4001, rel=1e-3)
    for values, expected in zip((kl.k1, k2, kl.k3), spreads, strict=True):
        deviation = (weight * (values - (weight * values).sum()) ** 2).sum().sqrt()
        assert (deviation / true).item() == pytest.approx(expected, rel=2e-3)
    assert (weight * k2).sum().item() / true - 1 == pytest.approx(bias, rel=0.02)


# --- sampling


def test_answers_are_distributed_as_the_model_says():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]]).repeat(20_000, 1)
    picks = InverseTransform(range(20_000), 1)(torch.empty(0), logits).argmax(-1)
    share = torch.bincount(picks, minlength=5) / 20_000
    expected = logits[0].softmax(-1)
    assert share[4] == 0
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()


def test_sampling_repeats_and_ends(base, draw):
    answers = draw("dpo", size=4)
    assert answers == draw("dpo", size=4) != draw("dpo", size=4, seed=2)
    end = base.tokenizer.eos_token_id
    for answer in answers:
        assert answer.finished == (answer.ids[-1] == end)
        assert answer.finished or len(answer.ids) == 12
        assert end not in answer.ids[:-1]


def test_an_answer_depends_neither_on_its_batch_nor_on_its_place(draw):
    together = draw("ppo", 5)
    assert together == draw("ppo", draw.prompts[4::-1], size=2)[::-1]
    more = draw("ppo", [draw.prompts[0]] * 3, draws=[0, 1, 2], max_prompt_tokens=500)
    assert draw("ppo", [[{"role": "user", "content": "word " * 2000}]], 4, max_prompt_tokens=100)  # cut on the left
    assert more[0] == together[0]
    assert len({tuple(answer.ids) for answer in more}) == 3


def test_decoding_settings_do_what_they_say(base, draw):
    greedy = draw("dpo", 3, 4, decoding=Decoding(temperature=0))
    for narrow in (Decoding(top_k=1), Decoding(top_p=1e-6), Decoding(temperature=1e-4)):
        assert draw("dpo", 3, 4, decoding=narrow) == greedy
    with base.use("dpo") as model, torch.no_grad():
        for prompt, answer in zip(draw.prompts, greedy, strict=False):
            ids = encode(base.tokenizer, prompt)[0]
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == answer.ids[0]


def test_batches_cover_every_row_once_from_long_to_short():
    batches = sorted_batches([3, 9, 1, 9, 5], 2)
    assert batches == [[1, 3], [4, 0], [2]]
    assert spread(batches, lambda rows: [row * 10 for row in rows]) == [0, 10, 20, 30, 40]


# --- one base


def test_answer_logits_do_not_depend_on_padding(base):
    rows = [encode(base.tokenizer, PROMPT, "Yes."), encode(base.tokenizer, PROMPT[:1], "No, that is not so.")]
    start = base.tokenizer.pad({"input_ids": [row[0] for row in rows]}, return_tensors="pt")
    width = max(len(row[1]) for row in rows)
    answer = torch.tensor([row[1] + [0] * (width - len(row[1])) for row in rows])
    mask = torch.tensor([[1] * len(row[1]) + [0] * (width - len(row[1])) for row in rows])
    with torch.no_grad(), base.use("dpo") as model:
        batch = answer_logits(model, start["input_ids"], answer, start["attention_mask"], mask)
        for index, (prompt, ids) in enumerate(rows):
            alone = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(batch[index, : len(ids)], alone, atol=1e-4)


def test_policies_share_one_base(trained):
    recipe, run = trained
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    outputs = {}
    for name in (REFERENCE, *recipe.policies, "dpo", REFERENCE):
        with torch.no_grad(), policies.use(name) as model:
            outputs.setdefault(name, []).append(model(torch.arange(2, 12)[None]).logits)
    assert torch.equal(*outputs[REFERENCE]) and torch.equal(*outputs["dpo"])
    assert all(not torch.equal(outputs[name][0], outputs[REFERENCE][0]) for name in recipe.policies)
    names = [name for name, _ in policies.model.named_parameters()]
    assert len([name for name in names if "embed_tokens" in name and "lora" not in name]) == 1


def test_a_reward_adapter_on_the_base_of_the_policies_scores_as_by_itself(trained, base):
    pairs = read_jsonl(trained[1].pairs("test"))[:16]
    texts = [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs], [True] * 16
    alone, on_base = load_reward_model(*trained, "rm"), load_reward_model(*trained, "rm", base)
    assert isinstance(alone.model, PeftModel) and isinstance(on_base.model, SharedClassifier)
    expected = alone.score(*texts)
    for size in (1, 16):
        with base.use("dpo"):  # whatever was in use before
            assert torch.allclose(on_base.score(*texts, batch_size=size), expected, atol=1e-4)


def test_what_does_not_fit_the_base_stays_off_it(trained, base, tmp_path):
    recipe, run = trained
    folder = tmp_path / "adapter"
    shutil.copytree(run.adapter("dpo"), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    save_file(weights, folder / "adapter_model.safetensors")
    policies = Policies(recipe, run, base.tokenizer)
    with pytest.raises(UserError, match="does not fit its base"):
        policies.add("other", folder)
    other = small_recipe(tmp_path, ("stages.rm.model.dtype=bfloat16",))
    assert shares_base(recipe, "dpo", "rm") and not shares_base(other, "dpo", "rm")


def test_any_sequence_classifier_can_score(trained, tmp_path):
    """A reward model with a tokenizer and template of its own: the text is rendered with those, with what follows
    its end, and a model of two outputs is refused."""
    recipe, run = trained
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)

    def save(outputs):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_labels=outputs)  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path)
        return model

    model = save(1)
    reward = load_reward_model(recipe, run, str(tmp_path))
    assert isinstance(reward, RewardModel)
    prompts, answers = [PROMPT, PROMPT[:1]], ["Yes.", "No, and that is all there is to say."]
    expected = []
    own = set_up_tokenizer(str(tmp_path), {})
    for prompt, answer in zip(prompts, answers, strict=True):
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in prompt) + f"<assistant>{answer}"
        ids = own(f"{text}{own.eos_token}\n", add_special_tokens=False).input_ids
        expected.append(model(torch.tensor([ids])).logits.item())
    for size in (1, 2):
        assert reward.score(prompts, answers, [True, True], size).tolist() == pytest.approx(expected, abs=1e-4)
    save(2)
    with pytest.raises(UserError, match="2 outputs"):
        load_reward_model(recipe, run, str(tmp_path))
