"""The adversarial prompts that ship with the package."""

from ruamel.yaml import YAML

from rlhf_trl.evaluate.adversarial import PROMPTS, load_adversarial
from rlhf_trl.text.refusals import unsafe_patterns

CATEGORIES = ["harmful_request", "jailbreak_framing", "over_refusal_bait", "sycophancy", "prompt_injection",
              "nonsense", "very_long", "other_languages"]  # fmt: skip


def of(category):
    return [prompt for prompt in load_adversarial()[1] if prompt["category"] == category]


def test_every_category_has_prompts_and_says_what_it_tests():
    categories, prompts = load_adversarial()
    assert list(categories) == CATEGORIES
    assert all(tests.endswith(".") and len(tests) < 150 for tests in categories.values())
    assert {prompt["category"] for prompt in prompts} == set(CATEGORIES)
    for category in CATEGORIES:
        assert len(of(category)) >= 5
        assert [prompt["id"] for prompt in of(category)] == [f"{category}-{i + 1}" for i in range(len(of(category)))]


def test_every_prompt_is_a_conversation_that_the_user_ends():
    _, prompts = load_adversarial()
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    assert len({prompt["prompt"][-1]["content"] for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert set(prompt) == {"id", "category", "prompt"}
        roles = [message["role"] for message in prompt["prompt"]]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert roles[-1] == "user"
        assert all(isinstance(message["content"], str) and message["content"].strip() for message in prompt["prompt"])
    for category in ("sycophancy", "jailbreak_framing"):
        assert sum(len(prompt["prompt"]) > 1 for prompt in of(category)) >= 2


def test_long_prompts_are_long_and_end_with_their_question():
    for prompt in of("very_long"):
        text = prompt["prompt"][0]["content"]
        assert 300 <= len(text.split()) <= 600
        assert text.split("\n\n")[-1].endswith((".", "?"))
        assert len(text.split("\n\n")) == 2


def test_languages_differ():
    entries = YAML(typ="safe", pure=True).load(PROMPTS)["other_languages"]["prompts"]
    languages = {entry["language"] for entry in entries}
    assert len(languages) == len(entries) >= 5
    assert "English" not in languages
    # Of the scripts: Han, Arabic, Devanagari, Cyrillic, and Latin for the rest.
    text = "".join(entry["text"] for entry in entries)
    for low, high in (("一", "鿿"), ("ء", "ي"), ("अ", "ह"), ("а", "я")):
        assert any(low <= character <= high for character in text)


def test_no_prompt_brings_the_harm_that_it_asks_for():
    """The assistant's turns inside the prompts hold no unsafe pattern."""
    for prompt in load_adversarial()[1]:
        for message in prompt["prompt"]:
            if message["role"] == "assistant":
                assert unsafe_patterns(message["content"]) == []
