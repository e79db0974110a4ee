"""Step `prepare`: clean the preference pairs, count what is dropped, fit them to the length limit, split by prompt.

Reads `data.source`. Writes `data/`: pairs and prompts for train and test; `quarantine.jsonl` with every dropped row
and its reasons; `summary.json`, which accounts for every row; the tokenizer that all later steps use.

    rlhf-trl prepare RECIPE
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import math
import re
from collections import Counter, defaultdict
from typing import Any

from rapidfuzz.distance import Indel
from tqdm import tqdm

from rlhf_trl.data.hh import normalise, score_not_higher, unread_columns
from rlhf_trl.data.pair import Message, Pair, Reason, RowError
from rlhf_trl.data.sources import read_rows
from rlhf_trl.data.split import halve, prompt_keys, split
from rlhf_trl.data.summary import Kept, Tally, longer, summarise
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Data
from rlhf_trl.run.files import write_json, write_jsonl, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.names import prompt_id

# Marks that may differ between two copies of one text; not those that carry meaning, such as the minus of a number.
ROUGH = re.compile(r"[\s.,;:!?'\"“”‘’…()\[\]{}–—]+")

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, run: RunDir) -> None:
    """Turn the source into train and test pairs and prompts.

    Raises:
        UserError: the source cannot be used; too large a share of it is dropped (`quarantine.jsonl` is there to read);
            or what is left cannot be split.
    """
    from rlhf_trl.models.base import load_tokenizer

    data, tokenizer = recipe.data, load_tokenizer(recipe, run)
    control = _control_pattern(tokenizer)
    seen: set[bytes] = set()
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    kept: list[Kept] = []
    not_read: Counter[str] = Counter()
    quarantine: list[dict[str, Any]] = []
    for number, subset, raw in tqdm(read_rows(data, recipe.seed), desc="prepare", unit=" rows"):
        tally = tallies[subset]
        tally.rows += 1
        not_read.update(unread_columns(raw))
        pair, reasons = _read(raw)
        if pair:
            tally.compared += 1
            tally.chosen_longer += longer(len(pair.chosen), len(pair.rejected))
            tally.notes["multi_turn"] += pair.user_turns > 1
        if pair and not reasons:
            reasons = _find_reasons(pair, data, control, seen)
        if pair and not reasons:
            fitted = fit(tokenizer, pair, data.max_length, f"row {number}")
            if fitted:
                short, tokens = fitted
                tally.notes.update(_find_notes(pair, short, seen))
                tally.notes["score_not_higher"] += score_not_higher(raw)
                (*heads, whole), (*short_heads, short_whole) = prompt_keys(pair.prompt), prompt_keys(short.prompt)
                kept.append(Kept(number, subset, short, (*heads, *short_heads, whole, short_whole), tokens))
                continue
            reasons = [Reason.TOO_LONG]
        names = [reason.value for reason in reasons]
        tally.found.update(names)
        tally.dropped[names[0]] += 1
        entry = {"row": number, "subset": subset, "reason": names[0], "reasons": names, "raw": _printable(raw)}
        quarantine.append(entry)
    # Dropped rows may hold what UTF-8 cannot, so that file is ASCII.
    write_text(run.quarantine, "".join(json.dumps(row, sort_keys=True) + "\n" for row in quarantine))
    _check_dropped(recipe, run, tallies)
    keys = [item.keys for item in kept]
    subsets, lengths = [item.subset for item in kept], [item.length for item in kept]
    held_out = split(keys, subsets, lengths, data.test_fraction, recipe.seed)
    splits = {name: [item for item, test in zip(kept, held_out, strict=True) if test == (name == "test")]
              for name in ("train", "test")}  # fmt: skip
    half_of = {item.row: half for item, half in zip(kept, halve(keys, recipe.seed), strict=True)}
    for name, items in splits.items():
        _write_split(run, name, items, half_of)
    tokenizer.save_pretrained(run.tokenizer)
    if not_read:
        logger.warning("columns of the source that no step reads: %s", ", ".join(sorted(not_read)))
    write_json(run.summary, summarise(recipe, tokenizer, tallies, splits, not_read))


def _write_split(run: RunDir, name: str, items: list[Kept], half_of: dict[int, str]) -> None:
    prompts: dict[str, dict[str, Any]] = {}
    pairs = []
    for item in items:
        key = prompt_id(item.pair.prompt)
        prompts.setdefault(key, {"id": key, "prompt": item.pair.prompt, "subset": item.subset})
        pairs.append({**vars(item.pair), "row": item.row, "subset": item.subset, "id": key, "half": half_of[item.row]})
    write_jsonl(run.pairs(name), pairs)
    write_jsonl(run.prompts(name), prompts.values())


def _check_dropped(recipe: Recipe, run: RunDir, tallies: dict[str, Tally]) -> None:
    rows = sum(tally.rows for tally in tallies.values())
    dropped: Counter[str] = sum((tally.dropped for tally in tallies.values()), Counter())
    limit = recipe.data.max_dropped_fraction
    if dropped.total() > limit * rows:
        top = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common(4))
        share = f"{dropped.total() / rows:.1%}, more than the {limit:.1%} of `data.max_dropped_fraction`"
        remedy = f"read {run.quarantine}; mend the data, or raise the limit"
        raise UserError(recipe.data.source, f"{dropped.total()} of {rows} rows are dropped ({share}): {top}", remedy)


# --- cleaning --------------------------------------------------------------------------------------------------------


def _read(raw: Any) -> tuple[Pair | None, list[Reason]]:
    try:
        return normalise(raw), []
    except RowError as error:
        return error.pair, error.reasons


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Match text that the tokenizer or the template would read as control, not as content."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added}
    if "Human:" in tokenizer.chat_template:
        tokens |= {"\n\nHuman:", "\n\nAssistant:"}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens) if token.strip()))


def _find_reasons(pair: Pair, data: Data, control: re.Pattern[str], seen: set[bytes]) -> list[Reason]:
    """What speaks against a well-formed pair; the pair is then seen."""
    texts = [*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected]
    similarity = Indel.normalized_similarity(pair.chosen, pair.rejected, score_cutoff=data.tie_threshold)
    roles = [message["role"] for message in pair.prompt]
    exact, rough = _digest("pair", roles, texts), _digest("rough", roles, [_rough(text) for text in texts])
    holds = {
        Reason.TOO_SHORT: min(len(pair.chosen), len(pair.rejected)) < data.min_answer_chars,
        Reason.TIE: similarity >= data.tie_threshold,
        Reason.CONTROL_TOKENS: any(control.search(text) for text in texts),
        Reason.DUPLICATE: exact in seen,
        Reason.NEAR_DUPLICATE: exact not in seen and rough in seen,
    }
    seen |= {exact, rough}
    return [reason for reason, held in holds.items() if held]


def _rough(text: str) -> str:
    return ROUGH.sub(" ", text.casefold()).strip() or text


def _find_notes(pair: Pair, fitted: Pair, seen: set[bytes]) -> list[str]:
    """What to know about a pair that is kept; the pair is then seen as kept."""
    prompt = _digest("prompt", pair.prompt)
    holds = {
        "contradictory": _digest("kept", pair.prompt, pair.rejected, pair.chosen) in seen,
        "repeated_prompt": prompt in seen,
        "truncated": fitted.prompt[-1] != pair.prompt[-1],
        "turns_dropped": len(fitted.prompt) < len(pair.prompt),
    }
    seen |= {prompt, _digest("kept", pair.prompt, pair.chosen, pair.rejected)}
    return [note for note, held in holds.items() if held]


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def _printable(value: Any) -> Any:
    """A raw row as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


# --- length ----------------------------------------------------------------------------------------------------------


def fit(tokenizer: Any, pair: Pair, max_length: int, where: str) -> tuple[Pair, tuple[int, int, int]] | None:
    """Shorten the prompt so that it has, with the longer answer, at most `max_length` tokens.

    Whole turns go first, the oldest before the others, so that the prompt still begins with the user (after the system
    message); then the beginning of the last user turn goes, up to a token boundary.

    Returns:
        The pair, and the tokens of its prompt, chosen and rejected answer; None if there is no room for a prompt.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    from jinja2 import TemplateError

    from rlhf_trl.models.base import encode, render

    def tokens(prompt: list[Message]) -> int:
        return len(encode(tokenizer, prompt)[0])

    try:
        start, chosen = render(tokenizer, pair.prompt, pair.chosen)
        rejected = render(tokenizer, pair.prompt, pair.rejected)[1]
        # As in `encode`, but the three texts in one call: this is most of the step's time.
        ids = tokenizer([start, chosen, rejected], add_special_tokens=False, verbose=False).input_ids
        length, *answers = map(len, ids)
        room = max_length - max(answers)
        if length <= room:
            return pair, (length, answers[0], answers[1])
        system = pair.prompt[: pair.prompt[0]["role"] == "system"]
        turns = pair.prompt[len(system) :]
        shorter = [system + turns[start:] for start in range(2, len(turns), 2)]  # roles alternate
        text = turns[-1]["content"]
        cuts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        tails = [text[start:].lstrip() for start, _ in cuts[1:][-max(room, 1) :]]
        shorter += [[*system, {"role": "user", "content": tail}] for tail in tails if tail]
        # Text may break into other tokens where it is cut, so each candidate is measured whole.
        first = bisect.bisect_left(shorter, True, key=lambda prompt: tokens(prompt) <= room)
        if first == len(shorter):
            return None
        return Pair(shorter[first], pair.chosen, pair.rejected), (tokens(shorter[first]), answers[0], answers[1])
    except TemplateError as error:
        remedy = "use a model whose template takes such conversations, or leave these rows out of the data"
        raise UserError("chat template", f"it refuses the conversation of {where}: {error}", remedy) from error
