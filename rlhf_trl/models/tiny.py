"""`builtin:tiny`: a small untrained Llama, with a tokenizer fitted to the demo's text that ships with the package."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

DEMO = Path(__file__).parent.parent / "data" / "demo.jsonl.gz"
SEED = 7


def tiny_config(vocabulary: int = 1024, end: int = 0, pad: int = 1) -> LlamaConfig:
    """The shape of the model; the token ids are those that its tokenizer comes to have."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
                       bos_token_id=end, eos_token_id=end, pad_token_id=pad)  # fmt: skip


def build_tiny(folder: Path) -> None:
    """Build the base of the demo's recipe, about 0.9 M parameters; the same weights come out every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    with gzip.open(DEMO, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row[side] for row in rows for side in ("chosen", "rejected") if isinstance(row.get(side), str)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special,
                                                       initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[0], pad_token=special[1], model_max_length=512
    )
    config = tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
