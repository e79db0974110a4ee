"""A mistake of the user: place, problem and remedy, with secrets removed."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from rlhf_trl.text.redact import redact


class Exit(IntEnum):
    """The exit statuses of the program; docs/troubles.md says what they mean. 128 + n says that the signal n came."""

    OK = 0
    DEFECT = 1
    MISTAKE = 2
    NOT_RUN = 3
    RESOURCES = 4
    DIVERGED = 5
    DAMAGED = 7


@dataclass(frozen=True)
class Problem:
    """Where something is wrong, what is wrong, and what to do about it."""

    place: str
    problem: str
    remedy: str
    meant: str | None = field(default=None, compare=False)
    """Of an unknown key: the key that it probably misspells, or ""."""

    @property
    def meant_place(self) -> str:
        """The place of the key that was meant, or ""."""
        return f"{self.place.rpartition('.')[0]}.{self.meant}".lstrip(".") if self.meant else ""

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}\n    -> {self.remedy}"


class UserError(Exception):
    """Something that the user can mend; shown as place, problem and remedy, without a traceback."""

    exit = Exit.MISTAKE

    def __init__(self, place: str, problem: str, remedy: str, exit: Exit = Exit.MISTAKE):
        self.exit = exit
        self._keep([Problem(place, problem, remedy)])

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process hands it over as one with all its problems."""
        return RecipeError, (self.problems,), {"exit": self.exit}

    def _keep(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(
            replace(item, place=redact(item.place), problem=redact(item.problem), remedy=redact(item.remedy))
            for item in problems
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(UserError):
    """Every mistake of one recipe."""

    def __init__(self, problems: Iterable[Problem]):
        self._keep(problems)


class NotRun(Exception):
    """A step lacks something that lies outside the recipe, such as a server or a key.

    Reported as *not run*; later steps continue.
    """

    def __init__(self, reason: str):
        super().__init__(redact(reason))
