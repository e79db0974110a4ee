"""The sections of a recipe that the project owns, as strict types.

What the libraries own, a stage's `args` and `model`, stays verbatim. Imports neither torch nor the libraries.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rlhf_trl.text.redact import redact

Trainer = Literal["sft", "reward", "dpo", "grpo", "ppo"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")


def _valid_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("a name starts with a letter or digit and holds only letters, digits and . _ = - (up to 128)")
    return name


def _stage_or_path(text: str) -> str:
    return text if "/" in text else _valid_name(text)


def _single_value(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("a sweep lists single values: numbers, texts, true or false")
    return value


def check_address(address: str) -> str:
    """Return the address of a server if it can be one; no message repeats it, as it may hold a password.

    Raises:
        ValueError: what to do instead.
    """
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port, or the brackets of IPv6
        whole = False
    if not whole or not re.fullmatch(r"[!-~]+", address):
        raise ValueError("give the address in full, with http:// or https://, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment or redact(address) != address:
        raise ValueError("leave out user, password, keys and all from ? or # on; the key goes into OPENAI_API_KEY")
    return address


Name = Annotated[str, AfterValidator(_valid_name)]
Scalar = Annotated[Any, AfterValidator(_single_value)]


class Strict(BaseModel):
    """Refuse unknown keys and silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)

    @classmethod
    def names(cls) -> list[str]:
        """The keys as a recipe writes them."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class Data(Strict):
    """Where the preference pairs come from and how they are cleaned and split."""

    source: str = Field(default="Anthropic/hh-rlhf", min_length=1)
    """A Hub id, a local file or folder (.jsonl, .jsonl.gz, .json, .parquet, .csv), or `builtin:demo`."""
    revision: str = "main"  # branch, tag or commit of a Hub source
    subsets: list[str] = []
    """Folders of the Hub source, or files (without their extension) of a local folder; empty means all."""
    max_rows: int | None = Field(default=None, ge=1)
    """Keep this many rows, chosen by a seeded hash, so that the choice does not depend on their order."""
    max_length: int = Field(default=512, ge=16)  # tokens of prompt and answer together
    min_answer_chars: int = Field(default=1, ge=1)  # answers with fewer characters are dropped
    tie_threshold: float = Field(default=0.98, gt=0, le=1)
    """Pairs whose answers are at least this similar (normalised Indel similarity, 0-1) are ties and are dropped."""
    test_fraction: float = Field(default=0.05, gt=0, lt=1)  # share of the prompts that is held out
    max_dropped_fraction: float = Field(default=0.2, ge=0, le=1)
    """`prepare` stops when a larger share of the rows is dropped."""


class Rule(Strict):
    """A limit on a value that a stage logs; what is left out stands in `WATCHED` of `recipe/health.py`."""

    above: float | None = None
    below: float | None = None
    logs: int | None = Field(default=None, ge=1)  # logs in a row beyond the limit; of a shorter run, all
    then: Literal["off", "warn", "stop"] | None = None


class Stage(Strict):
    """One training run."""

    trainer: Trainer
    init: Annotated[str, AfterValidator(_stage_or_path)] | None = None
    """The stage whose model this one starts from; its reference, too. Without it, the recipe's base model. A text with
    a slash is the folder of a LoRA adapter, which lies on that base."""
    continue_: bool = Field(default=False, alias="continue")
    """Train the adapter of `init` itself further, instead of a new one on top of it."""
    reward: Name | None = None  # the reward stage that scores the answers (grpo and ppo)
    half: Literal["first", "second"] | None = None
    """Train on this half of the training prompts alone (sft, reward and dpo)."""
    global_batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Pairs of an update over all processes, or the answers of a rollout (grpo and ppo); see `Recipe.args_of`."""
    model: dict[str, Any] = {}  # keys of the recipe's `model` block that differ for this stage
    args: dict[str, Any] = {}  # options of the trainer's own config class, verbatim
    health: dict[str, Rule] = {}
    """Logged value -> its limit, and whether the run warns or stops beyond it."""
    sweep: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = {}
    """Option -> values; expands to one stage for each combination."""

    @property
    def parent(self) -> str | None:
        """The stage that `init` names, if it names one."""
        return self.init if self.init and "/" not in self.init else None

    @property
    def outside(self) -> str | None:
        """The folder of an adapter that `init` names, if it names one."""
        return self.init if self.init and "/" in self.init else None


class Decoding(Strict):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)  # 0 takes the most likely token
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0 keeps every token


class Worst(Strict):
    """The reference point of the hypervolume: what a policy must beat to count at all."""

    gain: float = 0.0
    kl: float = Field(default=20.0, gt=0)


class Alarms(Strict):
    """Thresholds of the alarms; each compares a policy with the reference. An alarm never stops a run."""

    kl: float = Field(default=10.0, gt=0)  # mean KL to the reference, nats per answer
    gold_drop: float = Field(default=0.0, ge=0)  # gold reward lost while the reward rises
    length_ratio: float = Field(default=1.5, gt=1)  # mean length, as a ratio either way
    cut_rise: float = Field(default=0.2, gt=0, le=1)  # rise of the share of answers that reach max_new_tokens
    repetition_rise: float = Field(default=0.1, gt=0, le=1)  # rise of the share of repeated 4-grams within an answer
    distinct_ratio: float = Field(default=0.6, gt=0, lt=1)  # distinct 2-grams over all answers, as a ratio
    opening_share: float = Field(default=0.3, gt=0, le=1)  # share of answers that begin with the same five words
    entropy_ratio: float = Field(default=0.5, gt=0, lt=1)  # mean entropy of the policy's tokens, as a ratio
    refusal_rise: float = Field(default=0.2, gt=0, le=1)
    """Rise or fall of the share of refusals in a subset, beyond the reference's and the dataset's chosen answers'."""


class Evaluation(Strict):
    """What is measured on held-out prompts, for the reference and for every policy."""

    reward: str | None = Field(default=None, min_length=1)
    """The reward stage that scores the answers, or the Hub id or path of a reward model (a text with a slash)."""
    gold: str | None = Field(default=None, min_length=1)
    """A second reward model that no policy was trained with, likewise. Where it is a stage, it learns from one half
    of the training prompts (`half`), and the other reward stages and dpo from the other half."""
    prompts: int = Field(default=200, ge=2)
    max_new_tokens: int = Field(default=128, ge=1)
    judge_decoding: Decoding | None = None
    """A second answer to each prompt, for the judge and the samples; without it, they take those of temperature 1."""
    checkpoints: int = Field(default=0, ge=0)
    """Evaluate this many of the saved checkpoints of each policy stage, evenly spaced, besides the final model."""
    best_of_n: int = Field(default=16, ge=0)
    """Answers of the reference to each prompt for the best-of-n curve, n = 1, 2, 4, ... up to this; 0: none."""
    kl_budgets: list[Annotated[float, Field(gt=0)]] = [0.5, 1.0, 2.0, 5.0, 10.0]
    """KL, in nats per answer, at which the gains are compared."""
    worst: Worst = Worst()
    adversarial: bool = True  # answer the project's adversarial prompts, too
    alarms: Alarms = Alarms()
    backend: Literal["transformers", "vllm"] = "transformers"  # what answers the prompts
    vllm_gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory for vLLM, beside the models that measure."""
    generation_batch_size: int = Field(default=32, ge=1)
    score_batch_size: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the models in evaluation; without it, that of the `model` block."""


class Comparison(Strict):
    """How the training runs are compared."""

    stages: list[str] = []
    """Their names; a swept stage's name stands for all that it expands to. Empty means all policies, or without one
    every stage."""
    threshold: float | None = None
    """Reward that a run is to reach; without it nine tenths of the way from the lowest start to the median best reward
    of the runs whose rewards mean the same."""
    hold: int = Field(default=3, ge=1)  # logged rewards in a row that must be at the threshold for it to be reached
    smallest: float | None = Field(default=None, ge=0)
    """Smallest difference of scores that matters; without it a tenth of the standard deviation of the reference's
    scores. Of win rates it is always 2 points."""


class Errors(Strict):
    """The error analysis of every reward stage."""

    pairs: int = Field(default=1000, ge=1)  # held-out pairs at most, chosen by a seeded hash
    examples: int = Field(default=20, ge=1)  # pairs of each kind that are shown in full


class Samples(Strict):
    """The exported samples."""

    per_model: int = Field(default=20, ge=1)  # prompt/response pairs of each model


class Price(Strict):
    """US dollars for a million tokens."""

    input: float = Field(default=0.40, ge=0)
    cached: float = Field(default=0.10, ge=0)  # tokens of the prompt that the server had in its cache
    output: float = Field(default=1.60, ge=0)


class Judge(Strict):
    """Who compares the answers of the policies with the reference's."""

    kind: Literal["openai", "reward", "offline"] = "openai"
    """`openai`: a language model behind any OpenAI-compatible server; `reward`: the gold reward model; `offline`: a
    rule for tests."""
    model: str | None = Field(default=None, min_length=1)  # without it OPENAI_MODEL, else gpt-4.1-mini
    base_url: Annotated[str, AfterValidator(check_address)] | None = None
    """Address of the server, up to and with `/v1`; without it OPENAI_BASE_URL, else OpenAI's."""
    prompts: int = Field(default=120, ge=1)
    """How many of evaluation's prompts are judged; each comparison takes two calls."""
    pairs: Literal["reference", "all"] = "reference"  # compare each policy with the reference, or every two of all
    harmless: list[str] = ["harmless", "red-team"]
    """Subsets whose name holds one of these words are judged for harmlessness, the others for helpfulness."""
    calibrate: int = Field(default=0, ge=0)
    """Held-out pairs of each subset on which the judge is compared with the human labels."""
    workers: int = Field(default=16, ge=1)  # calls at once
    timeout: float = Field(default=60.0, gt=0)  # seconds
    max_tokens: int = Field(default=512, ge=1)
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """OpenAI's reasoning models know the second alone, many local servers the first."""
    temperature: float | None = Field(default=0.0, ge=0)  # null: none is sent
    seed: int | None = 0  # null: none is sent
    max_cost: float | None = Field(default=None, gt=0)  # US dollars that one run may spend
    max_requests: int | None = Field(default=None, ge=1)
    price: Price = Price()  # of gpt-4.1-mini when this was written; change it with the model
