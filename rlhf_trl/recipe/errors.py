"""A mistake of the user: place, problem and remedy, with secrets removed.

Reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Tokens of Hugging Face and OpenAI; `hf_preferences` is a name.
SECRET = re.compile(r"\b(hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|hf_[a-z]{20,}|sk-[A-Za-z0-9_-]{8,})")


class Problem(NamedTuple):
    """Where something is wrong, what is wrong, and what to do about it."""

    place: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}\n    -> {self.remedy}"


class UserError(Exception):
    """Something that the user can mend; shown as place, problem and remedy, without a traceback."""

    def __init__(self, place: str, problem: str, remedy: str):
        self.problems: tuple[Problem, ...] = (_without_secrets(Problem(place, problem, remedy)),)
        super().__init__(str(self.problems[0]))


class NotRun(Exception):
    """A step could not do its work for want of something that lies outside the recipe, such as a server or a key.

    It is said and never becomes a result; the steps after it go on without it.
    """


class RecipeError(UserError):
    """Every mistake of one recipe."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(_without_secrets(problem) for problem in problems)
        Exception.__init__(self, "\n".join(str(problem) for problem in self.problems))


def _without_secrets(problem: Problem) -> Problem:
    return Problem(*(SECRET.sub("<token>", part) for part in problem))
