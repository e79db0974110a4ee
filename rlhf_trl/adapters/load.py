"""Adapters for use in Python: a policy that answers, a reward model that scores.

Reads the folder of an adapter, which is checked first, whoever made it, and its base: the one that it ships, the given
one, or that of its public id, from the local cache or the Hub.

    policy = rlhf_trl.load_policy("shared/demo-grpo")
    print(policy.answer([{"role": "user", "content": "Hello."}]))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.adapters.check import require_sound
from rlhf_trl.adapters.files import BASE, CONFIG, LINEAGE
from rlhf_trl.models.base import Messages, fetch, load_causal, load_classifier, set_up_tokenizer
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.sampling import sample
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.run.files import read_json
from rlhf_trl.text.display import first_line


@dataclass
class Policy:
    """A language model with an adapter on it, and the tokenizer that renders text for it."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    lineage: dict[str, Any] | None
    """Content of `lineage.json`; None for an adapter that was not exported here."""

    def answer(self, prompt: Messages, max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> str:
        """Answer a conversation that ends on a user turn; the same seed gives the same answer.

        Args:
            max_new_tokens: the answer is cut there; a prompt that leaves no room for it loses its beginning.
            temperature: 0 takes the most likely token.

        Raises:
            UserError: the model has not more positions than `max_new_tokens`.
        """
        room = limit = positions(self.model)
        if limit is not None:
            room = limit - max_new_tokens
            if room < 1:
                problem = f"{max_new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
                raise UserError("max_new_tokens", problem, f"give less than {limit}")
        decoding = Decoding(temperature=temperature)
        found = sample(self.model, self.tokenizer, [prompt], max_new_tokens, 1, seed, decoding, max_prompt_tokens=room)
        return found[0].text


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Tell how many tokens a model reads at most; None where it sets no limit, as with ALiBi or a state space."""
    config = model.config.get_text_config()
    name = "max_position_embeddings"
    limit: int | None = config.to_dict().get(config.attribute_map.get(name, name))
    return limit


def load_policy(folder: str | Path, base: str | Path | None = None, dtype: str = "auto") -> Policy:
    """Load a policy adapter on its base, ready to answer, on the accelerator if there is one.

    Args:
        base: a folder with the base, instead of the one that the adapter names.
        dtype: `float32`, `bfloat16` or `float16`; `auto` is that of the base's weights.

    Raises:
        AdapterError: with everything that is wrong with the adapter, or with this base for it.
        UserError: it is a reward adapter, or the base cannot be reached.
    """
    folder = Path(folder)
    path = _sound_base(folder, base, "CAUSAL_LM")
    tokenizer = _tokenizer(folder, path)
    model = load_causal(str(path), ModelConfig(dtype=dtype), tokenizer)
    lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else None
    return Policy(_apply(model, folder), tokenizer, lineage)


def load_reward_model(folder: str | Path, base: str | Path | None = None) -> RewardModel:
    """Load a reward adapter on its base in float32, ready to score, on the accelerator if there is one.

    Args:
        base: a folder with the base, instead of the one that the adapter names.

    Raises:
        AdapterError: with everything that is wrong with the adapter, such as a missing head, or with this base for it.
        UserError: it is a policy adapter, or the base cannot be reached.
    """
    folder = Path(folder)
    path = _sound_base(folder, base, "SEQ_CLS")
    tokenizer = _tokenizer(folder, path)
    model = load_classifier(str(path), ModelConfig(dtype="float32"), tokenizer)
    return RewardModel(_apply(model, folder).requires_grad_(False), tokenizer)


def locate_base(folder: Path, base: str | Path | None) -> Path:
    """Find the folder of an adapter's base: the given one, the one that it ships, or that of the id that it names.

    Raises:
        AdapterError: something is wrong with the adapter.
        UserError: the base cannot be reached, or is no model.
    """
    require_sound(folder)
    config = read_json(folder / CONFIG)
    if base is not None:
        if not (Path(base) / "config.json").is_file():
            raise UserError(str(base), "there is no model here", "give a folder with the base")
        return Path(base)
    if config["base_model_name_or_path"] == f"./{BASE}":
        return folder / BASE
    return fetch(config["base_model_name_or_path"], config.get("revision"))


def _sound_base(folder: Path, base: str | Path | None, task: str) -> Path:
    """Locate the base of a policy (CAUSAL_LM) or a reward adapter (SEQ_CLS), and check the two together."""
    path = locate_base(folder, base)
    found = read_json(folder / CONFIG)["task_type"]
    if found != task:
        kinds = {"CAUSAL_LM": "a policy", "SEQ_CLS": "a reward model"}
        problem = f"the adapter is of {kinds[found]}, not of {kinds[task]}"
        raise UserError(str(folder), problem, "use the other command, or load function")
    if path != folder / BASE:  # which was checked with the adapter
        require_sound(folder, path)
    return path


def _apply(model: PreTrainedModel, folder: Path) -> Any:
    """Lay an adapter on its base, on the accelerator if there is one."""
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # what `peft` raises at settings it cannot use
        problem = f"the adapter cannot be laid on its base: {first_line(error)}"
        raise UserError(str(folder), problem, "ask its author for another one") from error
    return adapted.to(PartialState().device).eval()


def _tokenizer(folder: Path, base: Path) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer, or that of its base where others have left it out."""
    return set_up_tokenizer(str(folder if (folder / "tokenizer_config.json").exists() else base), {})
