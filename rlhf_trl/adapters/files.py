"""The files of an exported adapter: their names, and which others may lie in its folder.

Reads directory listings; opens and writes no file.
"""

from __future__ import annotations

import re
from pathlib import Path

ADAPTER, CONFIG, LINEAGE, EVIDENCE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "lineage.json",
    "evidence.json",
)
PROBE, CARD, FIGURE, BASE = "probe.json", "README.md", "pareto.png", "base"
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TOKENIZER = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", TEMPLATE)  # fmt: skip
# Files that an export does not list in its lineage; the Hub adds the second one to every repository.
NOT_LISTED = {LINEAGE, ".gitattributes"}
KNOWN = {ADAPTER, CONFIG, *TOKENIZER, PROBE, EVIDENCE, CARD, FIGURE, *NOT_LISTED}
BASE_CONFIG, BASE_GENERATION = f"{BASE}/config.json", f"{BASE}/generation_config.json"
BASE_SINGLE, BASE_INDEX = f"{BASE}/model.safetensors", f"{BASE}/model.safetensors.index.json"
BASE_FILES = re.compile(
    r"base/(config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
# Written by `hf download --local-dir`; ignored by every loader, and never uploaded.
DOWNLOAD = ".cache/huggingface"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def list_files(folder: Path) -> list[Path]:
    """List the files of an adapter, without those that a download has left beside them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not path.relative_to(folder).as_posix().startswith(f"{DOWNLOAD}/")]
