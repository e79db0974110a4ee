"""The health of a training run: which logged values are watched, their limits, and what is said beyond them.

A stage's `health:` changes the limits, or lets a run stop. To watch something else, add a row to `WATCHED`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.library import suggest
from rlhf_trl.recipe.schema import Rule, Stage


class Watched(NamedTuple):
    """One logged value of some trainers; `says` takes the value."""

    what: str
    trainers: tuple[str, ...]
    rule: Rule
    says: str
    remedy: str


DEFAULT = Rule(logs=3, then="warn")
ONLINE = ("grpo", "ppo")
EVERY = ("sft", "reward", "dpo", *ONLINE)
NO_SIGNAL = "look at the reward model's scores, raise the temperature, or sample more answers"
TOO_FAR = "lower learning_rate, or raise the KL penalty"
NOT_TRUSTED = "train it longer or on more data before a policy learns from it"
WATCHED = (
    Watched("reward_std", ("ppo",), Rule(below=1e-6),
            "all answers of an update have the same reward: there is nothing to learn", NO_SIGNAL),
    Watched("equal_groups", ("grpo",), Rule(above=0.99),
            "in {:.0%} of the groups all answers have the same reward: there is nothing to learn", NO_SIGNAL),
    Watched("kl", ("ppo",), Rule(above=10), "the KL to the reference is {:.3g} nats per answer", TOO_FAR),
    Watched("kl", ("grpo",), Rule(above=1), "the KL to the reference is {:.3g} nats per token", TOO_FAR),
    Watched("reward_margin", ("dpo",), Rule(above=30), "the implicit rewards of a pair differ by {:.3g}", TOO_FAR),
    Watched("answer_tokens", ONLINE, Rule(below=2), "an answer has {:.3g} tokens, its end token included", TOO_FAR),
    Watched("entropy", ONLINE, Rule(below=0.01), "the entropy is {:.2g} nats per token: one answer is left", TOO_FAR),
    Watched("over_chance", ("reward",), Rule(below=0, logs=1),
            "the accuracy on held-out pairs is not clearly above chance (lower end of its interval: {:+.3f} to 0.5)",
            NOT_TRUSTED),
    Watched("over_length", ("reward",), Rule(below=0, logs=1),
            "the accuracy on held-out pairs is not clearly above that of a rule of length alone ({:+.3f})",
            NOT_TRUSTED),
    *(Watched(what, trainers, Rule(), f"{what} is {{:.3g}}", "look at the training curves")
      for what, trainers in (("loss", EVERY), ("grad_norm", EVERY), ("reward", ONLINE))),
)  # fmt: skip


def rules_of(stage: Stage) -> dict[str, tuple[Watched, Rule]]:
    """The rules of a stage: those of the table, with what its `health:` sets."""
    rules = {}
    for watched in WATCHED:
        if stage.trainer in watched.trainers:
            own = stage.health.get(watched.what, Rule())
            given = [rule.model_dump(exclude_none=True) for rule in (watched.rule, own)]
            rules[watched.what] = (watched, DEFAULT.model_copy(update=given[0] | given[1]))
    return rules


def check_health(place: str, stage: Stage) -> Iterator[Problem]:
    """Find the rules on what the stage's trainer does not log."""
    known = rules_of(stage)
    for what in stage.health.keys() - known.keys():
        remedy = suggest(what, known, f"it can watch {', '.join(known)}")
        yield Problem(f"{place}.health.{what}", f"a {stage.trainer} stage logs no {what!r}", remedy)
