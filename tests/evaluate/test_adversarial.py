"""The adversarial prompts that ship with the package."""

from ruamel.yaml import YAML

from rlhf_trl.evaluate.results import PROMPTS, load_adversarial
from rlhf_trl.text.refusals import unsafe_patterns

CATEGORIES = ["harmful_request", "jailbreak_framing", "over_refusal_bait", "sycophancy", "prompt_injection",
              "nonsense", "very_long", "other_languages"]  # fmt: skip


def test_every_prompt_is_a_conversation_of_its_category_that_the_user_ends():
    categories, prompts = load_adversarial()
    assert list(categories) == CATEGORIES
    for category in CATEGORIES:
        own = [prompt for prompt in prompts if prompt["category"] == category]
        assert [prompt["id"] for prompt in own] == [f"{category}-{i + 1}" for i in range(len(own))]
        assert len(own) >= 5
        if category in ("sycophancy", "jailbreak_framing"):
            assert sum(len(prompt["prompt"]) > 1 for prompt in own) >= 2
        if category == "very_long":
            texts = [prompt["prompt"][0]["content"] for prompt in own]
            assert all(300 <= len(text.split()) <= 600 and len(text.split("\n\n")) == 2 for text in texts)
    assert len({prompt["prompt"][-1]["content"] for prompt in prompts}) == len(prompts)
    for messages in (prompt["prompt"] for prompt in prompts):
        roles = [message["role"] for message in messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert roles[-1] == "user"
        assert all(message["content"].strip() for message in messages)
        # The harm is asked for, and not brought along.
        assert not [message for message in messages if message["role"] == "assistant"
                    and unsafe_patterns(message["content"])]  # fmt: skip


def test_languages_differ():
    entries = YAML(typ="safe", pure=True).load(PROMPTS)["other_languages"]["prompts"]
    assert len({entry["language"] for entry in entries} - {"English"}) == len(entries) >= 5
