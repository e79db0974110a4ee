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
from rlhf_trl.adapters.files import CONFIG, LINEAGE, PROBE, require_new
from rlhf_trl.adapters.load import load_policy, load_reward_model, locate_base
from rlhf_trl.adapters.verify import require_equal
from rlhf_trl.models.base import positions
from rlhf_trl.models.tokenizer import encode
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, staged, write_json

# What an adapter without a probe of its own is compared on.
TEXTS = (("What is a good way to learn a language?", "Read a little every day, and talk to people."),
         ("Why is the sky blue?", "Because air scatters blue light more than red."))  # fmt: skip


def merge(folder: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    """Merge an adapter into its base in float32, and compare what was saved with the adapter.

    They are compared in float64: in float32, rounding on the way through the layers is larger than what merging does.

    Returns:
        The largest absolute `difference` of an output, and the `largest` absolute output.

    Raises:
        UserError: the adapter or the base is not sound, the base is quantised, or the merged model's outputs differ.
    """
    require_new(out)
    path = locate_base(folder, base)
    classifier = read_json(folder / CONFIG)["task_type"] == "SEQ_CLS"
    if read_json(path / "config.json").get("quantization_config") is not None:
        problem = "the base is quantised: merged weights would be rounded to its few values"
        raise UserError(str(path), problem, "merge into the base in full precision: --base")
    model, tokenizer = _load(folder, path, classifier)
    texts = _texts(folder, model, tokenizer)
    before = _outputs(model.double(), texts)
    del model  # one copy in memory at a time
    with staged(out) as target:
        merged = _load(folder, path, classifier)[0].merge_and_unload()
        merged.config.pad_token_id = tokenizer.pad_token_id  # a classifier finds the end of a text by it
        merged.save_pretrained(target)
        write_tokenizer(tokenizer, "reward" if classifier else "policy", target)
        del merged
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        after = _outputs(auto.from_pretrained(target, dtype="float64", trust_remote_code=False), texts)
        differences = [float((one - other).abs().max()) for one, other in zip(before, after, strict=True)]
        found = {"difference": max(differences), "largest": max(float(one.abs().max()) for one in before)}
        require_equal(str(folder), "the merged model", **found)
        lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else None
        write_json(target / LINEAGE, {"merged": found, "adapter": lineage})
    return found


def _load(folder: Path, base: Path, classifier: bool) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    loaded = load_reward_model(folder, base) if classifier else load_policy(folder, base, dtype="float32")
    return loaded.model, loaded.tokenizer


def _texts(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of the texts that outputs are compared on: the adapter's own probe, or those of `TEXTS`."""
    if not (folder / PROBE).exists():
        pairs = [encode(tokenizer, [{"role": "user", "content": text}], answer) for text, answer in TEXTS]
        return [torch.tensor(prompt + answer) for prompt, answer in pairs]
    try:
        rows = [row["input_ids"] for row in read_json(folder / PROBE)["rows"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(PROBE, "the probe does not hold rows of token ids", "remove the file") from error
    size, limit = model.get_input_embeddings().num_embeddings, positions(model)
    readable = [isinstance(ids, list) and 0 < len(ids) <= (limit or len(ids)) for ids in rows]
    if not rows or not all(readable) or not all(type(id) is int and 0 <= id < size for ids in rows for id in ids):
        raise UserError(PROBE, "the probe holds texts that the model cannot read", "remove the file")
    return [torch.tensor(ids) for ids in rows]


@torch.no_grad()
def _outputs(model: Any, texts: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=row[None].to(model.device)).logits.cpu() for row in texts]
