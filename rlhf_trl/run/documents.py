"""The state documents of a run, each with its type, and the one reader of them. Writes nothing."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rlhf_trl.run.environment import MOMENT

Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _moment(text: str) -> str:
    datetime.strptime(text, MOMENT)
    return text


class Document(BaseModel):
    """What `status` and `run` read of a document; its other keys are for the steps."""

    model_config = ConfigDict(strict=True, frozen=True)


T = TypeVar("T", bound=BaseModel)


class Started(Document):
    """`started.json`: what the checkpoints of a stage belong to."""

    fingerprint: str


class Done(Document):
    """`done.json`: what a step depended on and what it wrote (path below the run's root -> SHA-256)."""

    step: str
    fingerprint: str
    seconds: Seconds
    finished: Annotated[str, AfterValidator(_moment)]
    outputs: dict[str, str]


class Logged(Document):
    """One row of `training_stats.json`."""

    step: Count
    seconds: Seconds
    loss: Finite | None = None
    reward: Finite | None = None
    kl: Finite | None = None


class Summary(Document):
    seconds: Seconds


class Stats(Document):
    """`training_stats.json`."""

    max_steps: Count
    history: list[Logged]
    summary: Summary | None = None


class Env(Document):
    """`env.json`: the order of the steps, and the hashes of the sources."""

    plan: list[str]
    sources: dict[str, str]


class WinRate(Document):
    """`winrate.json`: whether the judge came to its end, and on which answers."""

    status: str
    evaluation: str | None = None
    reason: str | None = None


def read_document(path: Path, kind: type[T]) -> tuple[T | None, str | None]:
    """Read a document; None where there is none that can be read, and what is wrong where it is there."""
    try:
        return kind.model_validate_json(path.read_bytes()), None
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"].split(":")[0].lower()])
    return None, f"{path.parent.name}/{path.name} cannot be read: {reason}"
