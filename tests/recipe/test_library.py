"""What `library` reads from the libraries' source is what the libraries have; this test may import them."""

import ast
import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest

from rlhf_trl.recipe.library import (
    CLASSES,
    LATE_CHOICES,
    POSITIVE,
    RANGES,
    UNREAD,
    check_value,
    read_options,
)
from rlhf_trl.recipe.links import OWNED


@pytest.fixture(scope="module")
def classes():
    import trl

    from rlhf_trl.train.step import classes_of

    return {"model": trl.ModelConfig, **{kind: classes_of(kind)[1] for kind in CLASSES if kind != "model"}}


@pytest.mark.parametrize("kind", CLASSES)
def test_names_defaults_and_choices_are_those_of_the_class(kind, classes):
    from transformers import trainer_utils, training_args

    options, unread = read_options(kind), set()
    fields = {item.name: item for item in dataclasses.fields(classes[kind]) if item.init}
    assert set(options) == set(fields)
    for name, item in fields.items():
        truth = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        choices = options[name].choices
        if options[name].default is UNREAD:
            unread.add(name)
        else:
            assert options[name].default == getattr(truth, "value", truth), name
        if "choices" in item.metadata:
            assert set(choices) == set(item.metadata["choices"]), name
        for enum in (*vars(trainer_utils).values(), *vars(training_args).values()):
            is_enum = inspect.isclass(enum) and issubclass(enum, trainer_utils.ExplicitEnum)
            if is_enum and enum.__name__ in str(item.type) and name != "debug":  # several words in one text
                assert set(choices) == {member.value for member in enum}, name
        if "Literal[" in str(item.type):
            assert choices and all(repr(choice) in str(item.type) for choice in choices), name
    assert unread <= {"optim"}


def compared_with(path: str, word: str) -> set[str]:
    """The texts that a library's source compares the value `word`, or an attribute of that name, with."""
    package, _, inside = path.partition("/")
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    texts = set()
    compares = [node for node in ast.walk(ast.parse((root / inside).read_text())) if isinstance(node, ast.Compare)]
    for node in compares:
        name = getattr(node.left, "attr", getattr(node.left, "id", None))
        if isinstance(node.ops[0], ast.Eq | ast.In) and name == word:
            constants = [item for item in ast.walk(node.comparators[0]) if isinstance(item, ast.Constant)]
            texts |= {item.value for item in constants if isinstance(item.value, str)}
    return texts


@pytest.mark.parametrize(("kind", "name"), [key for key in LATE_CHOICES if "log_level" not in key[1]])
def test_late_choices_are_what_the_trainer_handles(kind, name):
    texts = {choice for choice in LATE_CHOICES[kind, name] if isinstance(choice, str)}
    handled = compared_with(f"trl/trainer/{kind}_trainer.py", name)
    assert handled <= texts and texts - handled <= {"chunked_nll"}  # since TRL 1.15 an alias


def test_boolean_choices_and_log_levels_are_those_of_the_libraries():
    from transformers.training_args import trainer_log_levels
    from trl.trainer import grpo_config

    assert {choice for choice in LATE_CHOICES["grpo", "scale_rewards"] if isinstance(choice, bool)} == {True, False}
    assert '{True: "group", False: "none"}.get(self.scale_rewards' in inspect.getsource(grpo_config)
    assert set(read_options("dpo")["log_level"].choices) == set(trainer_log_levels)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_and_every_choice_pass_the_check(kind):
    for name, option in read_options(kind).items():
        if option.default is not UNREAD and name not in OWNED:
            assert check_value(kind, name, option.default) is None, name
        for choice in option.choices:
            assert check_value(kind, name, choice) is None, (name, choice)


@pytest.mark.skipif("ppo" not in CLASSES, reason="this TRL has no PPO")
def test_ranges_and_owned_options_name_options_that_exist():
    assert {name for kind in CLASSES for name in read_options(kind)} >= {*POSITIVE, *RANGES, *OWNED}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(("dpo", "beta", value) for value in (True, "0.1", None, [0.1], {}, float("nan"), float("inf"), -0.1)),
        *(("dpo", "max_steps", value) for value in (True, 1.0, "3", None)),
        *(("grpo", "num_generations", value) for value in (1, 0, -4, 4.0, True, "4")),
        *(("sft", "packing", value) for value in (0, 1, "true", "yes", None)),
        *(("dpo", "loss_type", value) for value in ([], [1], None, "sigmoid,ipo", ["ipo", "x"], True)),
        *(("grpo", "scale_rewards", value) for value in (1, 0, None, "std", 1.0)),
        *(("model", "lora_r", value) for value in (0, -1, 8.0, None, "8")),
    ],
)
def test_what_the_libraries_would_take_in_silence_is_refused(kind, name, value):
    problem, remedy = check_value(kind, name, value)
    assert problem and remedy
