"""`adapter merge`: an adapter folded into its base, as a model of its own that answers, or scores, the same.

Reads an adapter and its base; writes a model's folder, in float32, with the tokenizer and a `lineage.json`.

    rlhf-trl adapter merge shared/demo-grpo merged/demo-grpo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_trl.adapters.export import write_tokenizer
from rlhf_trl.adapters.files import CONFIG, LINEAGE, PROBE
from rlhf_trl.adapters.load import load_policy, load_reward_model, locate_base, positions
from rlhf_trl.adapters.verify import TOLERANCE
from rlhf_trl.models.base import encode, staged
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, write_json

# What an adapter without a probe of its own is compared on.
TEXTS = (("What is a good way to learn a language?", "Read a little every day, and talk to people."),
         ("Why is the sky blue?", "Because air scatters blue light more than red."))  # fmt: skip


def merge(folder: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    """Merge an adapter into its base in float32, and compare what was saved with the adapter.

    They are compared in float64: in float32, rounding on the way through the layers is larger than what merging does.

    Returns:
        `difference`, the largest absolute one of an output, and `largest`, the largest absolute output.

    Raises:
        UserError: the adapter or the base is not sound; the base is quantised, so that the merged weights would be
            rounded to its few values; the adapter's probe cannot be used; or the merged model's outputs differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "this is there already", "name a folder that does not exist")
    path = locate_base(folder, base)
    task = read_json(folder / CONFIG)["task_type"]
    if read_json(path / "config.json").get("quantization_config") is not None:
        problem = "the base is quantised: merged weights would be rounded to its few values"
        raise UserError(str(path), problem, "merge into the base in full precision: --base")
    model, tokenizer = _load(folder, path, task)
    texts = _texts(folder, model, tokenizer)
    before = _outputs(model.double(), texts)
    lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else None
    out.parent.mkdir(parents=True, exist_ok=True)
    del model  # one copy in memory at a time
    with staged(out) as target:
        _save(_load(folder, path, task)[0], tokenizer, task, target)
        auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
        after = _outputs(auto.from_pretrained(target, dtype="float64", trust_remote_code=False), texts)
        pairs = list(zip(before, after, strict=True))
        difference = max(float((one - other).abs().max()) for one, other in pairs)
        largest = max(float(one.abs().max()) for one in before)
        if not difference <= TOLERANCE * max(1.0, largest):
            problem = f"the merged model's outputs differ by up to {difference:.3g}, at outputs up to {largest:.3g}"
            raise UserError(str(folder), problem, "use the adapter as it is, and report this")
        found = {"difference": difference, "largest": largest}
        write_json(target / LINEAGE, {"merged": found, "adapter": lineage})
    return found


def _load(folder: Path, base: Path, task: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    if task == "SEQ_CLS":
        reward = load_reward_model(folder, base)
        return reward.model, reward.tokenizer
    policy = load_policy(folder, base, dtype="float32")
    return policy.model, policy.tokenizer


def _save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: str, folder: Path) -> None:
    merged = model.merge_and_unload()
    merged.config.pad_token_id = tokenizer.pad_token_id  # a classifier finds the end of a text by it
    merged.save_pretrained(folder)
    write_tokenizer(tokenizer, "reward" if task == "SEQ_CLS" else "policy", folder)


def _texts(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    if (folder / PROBE).exists():
        try:
            rows = [row["input_ids"] for row in read_json(folder / PROBE)["rows"]]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(PROBE, "the probe does not hold rows of token ids", "remove the file") from error
        size, limit = model.get_input_embeddings().num_embeddings, positions(model)
        if not rows or not all(_is_text(ids, size, limit) for ids in rows):
            raise UserError(PROBE, "the probe holds texts that the model cannot read", "remove the file")
        return [torch.tensor(ids) for ids in rows]
    pairs = [encode(tokenizer, [{"role": "user", "content": text}], answer) for text, answer in TEXTS]
    return [torch.tensor(prompt + answer) for prompt, answer in pairs]


def _is_text(ids: Any, size: int, limit: int | None) -> bool:
    """Tell whether a probe's row is token ids that a model of so many tokens, and positions, can read."""
    if not isinstance(ids, list) or not ids or (limit is not None and len(ids) > limit):
        return False
    return all(type(token) is int and 0 <= token < size for token in ids)


@torch.no_grad()
def _outputs(model: Any, texts: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=row[None].to(model.device)).logits.cpu() for row in texts]
