"""A preference pair, and the reasons why a row is none."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

Message = dict[str, str]


class Reason(str, Enum):
    """Why a row is dropped. A row with several reasons is dropped for the one that comes first here."""

    MALFORMED = "malformed"
    """Not an object or a transcript, text before the first turn, a system message inside, or the assistant begins."""
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    NOT_TEXT = "not_text"
    INVALID_UNICODE = "invalid_unicode"
    """A lone surrogate, which no UTF-8 file can hold."""
    TOOLS = "tools"
    """Tools, a call of one, or its result: the text alone would be half an answer."""
    MEDIA = "media"
    """Images, audio, video or files."""
    SEVERAL_PROMPTS = "several_prompts"
    """Two columns give a prompt, or a system message, and they differ."""
    UNKNOWN_ROLE = "unknown_role"
    ENDS_ON_HUMAN = "ends_on_human"
    """A transcript goes on after its last answer, or has none."""
    PROMPTS_DIFFER = "prompts_differ"
    """What comes before the last answer is not the same on both sides, or is not the row's `prompt`."""
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    EMPTY_PROMPT = "empty_prompt"
    CONSECUTIVE_ROLES = "consecutive_roles"
    """Two turns of one role in a row in the chosen transcript. (If only in the rejected one, the prompts differ.)"""
    IDENTICAL = "identical"
    """Both answers, or their tokens, are the same. From here on, only rows without a reason above are looked at."""
    TOO_SHORT = "too_short"
    TIE = "tie"
    CONTROL_TOKENS = "control_tokens"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    TOO_LONG = "too_long"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first was preferred."""

    prompt: list[Message]
    chosen: str
    rejected: str

    @property
    def user_turns(self) -> int:
        return sum(message["role"] == "user" for message in self.prompt)


class RowError(Exception):
    """A row that is not a usable pair, with every reason in the order of `Reason`, and the pair as far as it can be
    read: the prompt is the chosen side's; None where a side has no answer."""

    def __init__(self, reasons: Iterable[Reason], pair: Pair | None = None):
        found = set(reasons)
        self.reasons = [reason for reason in Reason if reason in found]
        self.pair = pair
        super().__init__(", ".join(reason.value for reason in self.reasons))
