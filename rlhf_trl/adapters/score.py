"""`score`: what a reward adapter makes of pairs, of single answers, or of the rows of a benchmark.

Reads rows in any file format of `data.files`: pairs of any shape that `prepare` takes, rows of `prompt` and
`completion` or `output`, lists of answers, or those of RewardBench 1 and 2, RM-Bench, JudgeBench, PPE and AlpacaEval,
whose official figures it computes. Sources: allenai/reward-bench (rewardbench/utils.py at a009692), THU-KEG/RM-Bench
(README.md at 2119ec5, scripts/utils.py), ScalerLab/JudgeBench (run_judge.py at d8740a8), the data cards of
lmarena-ai/PPE-*.

    rlhf-trl score shared/demo-rm pairs.jsonl > scores.jsonl
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhf_trl.data.files import read_file
from rlhf_trl.data.hh import normalise, read_completion
from rlhf_trl.data.pair import Reason, RowError
from rlhf_trl.models.base import positions
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.tokenizer import Messages, encode, render
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.stats.intervals import wilson
from rlhf_trl.text.display import has_lone_surrogate, visible

# RewardBench's sections: its subsets, with their official weights (rewardbench 0.1.4, constants.py). They are the
# counts of rows, except that math-prm counts as much as all code.
CODE = dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164)
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, **CODE},
}  # fmt: skip
WEIGHTS = {name: weight for weights in SECTIONS.values() for name, weight in weights.items()}
REWARD_BENCH_2 = {"Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"}
RM_BENCH = ("chat", "code", "math", "safety")
JUDGE_BENCH = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
Scored = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """Answers to one prompt, the right ones first: those of two lists, a pair, or one that is only scored."""

    prompt: Messages
    answers: list[str]
    right: int | None = None  # how many of them are, where they are given as lists
    whole: bool = False  # prompt and answer are encoded as one text, as other people's code does
    more: dict[str, Any] = field(default_factory=dict)  # for its result: `benchmark`, `subset`, `id`


def score_file(model: RewardModel, path: Path, batch_size: int = 16) -> list[dict[str, Any]]:
    """Score every row of a file, in its order; a UserError names what cannot be read.

    Returns:
        `line` (of JSON lines; else the number of the row, from 1), and of a completion its `score`; of a pair
        `chosen`, `rejected` and `margin`; of a row with lists of answers `chosen` and `rejected`, lists of scores; of
        a benchmark's row also `benchmark` and `subset`; else `why_not`.
    """
    rows = [(number, *_fit(raw, model)) for number, raw in read_rows(path)]
    left = iter(model.score_ids([answer for _, _, ids, _ in rows for answer in ids], batch_size).tolist())
    results = []
    for number, row, ids, why_not in rows:
        scores = [next(left) for _ in ids]
        if why_not:
            found: dict[str, Any] = {"why_not": why_not}
        elif row.right is not None:
            found = {"chosen": scores[: row.right], "rejected": scores[row.right :]}
        elif len(scores) == 1:
            found = {"score": scores[0]}
        else:
            found = {"chosen": scores[0], "rejected": scores[1], "margin": scores[0] - scores[1]}
        results.append({"line": number, **found, **row.more})
    return results


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """Say what the scores of a file come to: in a line, and in another one for each benchmark."""
    margins = [row["margin"] for row in rows if "margin" in row]
    text = f"{sum('why_not' not in row for row in rows)} of {len(rows)} rows scored"
    if margins:
        share = wilson(sum((margin > 0) + 0.5 * (margin == 0) for margin in margins), len(margins))
        text += f"; the chosen answer has the higher score in {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
    for benchmark, found in figures(rows).items():
        said = ", ".join(f"{visible(name)} {value:.1%}" for name, value in found.items())
        text += f"\n{benchmark}: {said or 'none'}"
    return text


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the rows of a file, each with its number from 1; a UserError names what is none.

    A file of JSON lines may also hold texts; any other format is read as `prepare` does.
    """
    if path.suffix != ".jsonl":
        for number, row in enumerate(read_file(path), start=1):
            if isinstance(row, str):  # a line that is not JSON
                raise UserError(f"{path}, row {number}", "the row is not JSON", "name a file of JSON lines .jsonl")
            yield number, row
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the file cannot be read: {error}"
        raise UserError(str(path), problem, "give a file of JSON lines in UTF-8") from error
    if not "".join(lines).strip():
        raise UserError(str(path), "the file is empty", "write one JSON object a line")
    for number, text in enumerate(lines, start=1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}", "the line is not JSON", "write one JSON object a line") from error


def _fit(raw: Any, model: RewardModel) -> tuple[Row, list[list[int]], str]:
    """Return a row, the token ids of its answers with the prompt, and why they are not scored: it then has none."""
    try:
        row = read_row(raw)
    except RowError as error:
        return Row([], []), [], error.reasons[0].value
    if row.whole:
        texts = ["".join(render(model.tokenizer, [row.prompt], [answer])) for answer in row.answers]
        ids = model.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = [list(chain(*encode(model.tokenizer, row.prompt, answer))) for answer in row.answers]
    limit, longest = positions(model.model), max(map(len, ids))
    if limit is not None and longest > limit:
        return Row([], []), [], f"too_long: {longest} tokens, and the model reads {limit}"
    return row, ids, ""


# --- benchmarks: how their rows are read, and their figures ----------------------------------------------------------


def read_row(raw: Any) -> Row:
    """Read a row of one answer, of a pair as `prepare` takes it, or of a benchmark.

    Raises:
        RowError: with every reason against it.
    """
    if not isinstance(raw, dict):
        raise RowError([Reason.MALFORMED])
    if "completion" in raw:
        prompt, answer = read_completion(raw)
        return Row(prompt, [answer])
    task = raw.get("instruction")
    task = f"{task}\n\n{raw['input']}" if task and raw.get("input") else task
    if {"instruction", "output"} <= set(raw):
        return _read(task, [raw["output"]])
    if {"instruction", "output_1", "output_2", "preference"} <= set(raw):
        side = raw["preference"]  # from 1, the first one, to 2; 1.5 is a tie
        decided = isinstance(side, (int, float)) and 1 <= side <= 2 and side != 1.5
        answers = _in_order(decided and round(side), (1, 2), [raw["output_1"], raw["output_2"]])
        return _read(task, answers, "AlpacaEval", raw.get("dataset"))
    if {"response_A", "response_B", "label"} <= set(raw):
        answers = _in_order(raw["label"], ("A>B", "B>A"), [raw["response_A"], raw["response_B"]])
        source = str(raw.get("source"))
        group = next((name for name in JUDGE_BENCH if source.startswith(name)), source)
        return _read(raw.get("question"), answers, "JudgeBench", group)
    if {"response_1", "response_2", "winner"} <= set(raw):
        answers = _in_order(raw["winner"], ("model_a", "model_b"), [raw["response_1"], raw["response_2"]])
        return _read(raw.get("prompt"), answers, "PPE pairs", raw.get("language"))
    if "response_1" in raw and isinstance(raw.get("scores"), list):
        order = sorted(range(len(raw["scores"])), key=lambda place: not raw["scores"][place])
        answers, right = [raw.get(f"response_{place + 1}") for place in order], sum(map(bool, raw["scores"]))
        return _read(raw.get("prompt"), answers, "PPE best of K", raw.get("category"), right)
    subset = str(raw.get("subset"))
    sides = [raw.get(side) for side in ("chosen", "rejected")]
    if all(isinstance(side, list) and side and isinstance(side[0], str) for side in sides):  # not messages
        answers, right = [*raw["chosen"], *raw["rejected"]], len(raw["chosen"])
        if "domain" in raw and right == len(raw["rejected"]) == 3:
            return _read(raw.get("prompt"), answers, "RM-Bench", str(raw["domain"]).partition("-")[0], right)
        benchmark = "RewardBench 2" if subset in REWARD_BENCH_2 else "best of N"
        return _read(raw.get("prompt"), answers, benchmark, raw.get("subset"), right, id=str(raw.get("id")))
    if subset in WEIGHTS and isinstance(raw.get("prompt"), str):
        return _read(raw["prompt"], [raw.get("chosen"), raw.get("rejected")], "RewardBench", subset)
    pair = normalise(raw)
    more = {"benchmark": "pairs", "subset": subset} if raw.get("subset") else {}
    return Row(pair.prompt, [pair.chosen, pair.rejected], more=more)


def _in_order(verdict: Any, values: tuple[Any, Any], answers: list[Any]) -> list[Any]:
    if verdict not in values:
        raise RowError([Reason.TIE])
    return answers if verdict == values[0] else answers[::-1]


def _read(
    prompt: Any, answers: list[Any], benchmark: str = "", subset: Any = None, right: int | None = None, **more: Any
) -> Row:
    """Take the texts of a benchmark as they stand: space around an answer counts, as it does for its own code."""
    if isinstance(prompt, list):
        talk = read_completion({"prompt": prompt, "completion": "any"})[0]
    else:
        talk = [{"role": "user", "content": prompt}]
    texts = [*answers, talk[-1]["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise RowError([Reason.NOT_TEXT])
    if has_lone_surrogate("".join(texts)):
        raise RowError([Reason.INVALID_UNICODE])
    if not texts[-1].strip():
        raise RowError([Reason.EMPTY_PROMPT])
    more |= {"benchmark": benchmark, "subset": str(subset or "all")} if benchmark else {}
    return Row(talk, answers, right, True, more)


def figures(rows: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Compute the official figures of every benchmark among the results of `score_file`.

    Returns:
        Name of the benchmark -> name of the subset, or of the figure, -> a share from 0 to 1.
    """
    groups: defaultdict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        if "benchmark" in row:
            groups[row["benchmark"]].append(row)
    return {name: COMPUTED[name](group) for name, group in sorted(groups.items())}


def _by_subset(rows: Sequence[Scored], values: Sequence[float]) -> dict[str, float]:
    """The mean of each subset, and of all rows."""
    means = pd.Series(values, dtype=float).groupby([row["subset"] for row in rows]).mean()
    return {str(name): float(mean) for name, mean in means.items()} | {"all": float(np.mean(values))}


def _pairs(rows: Sequence[Scored]) -> dict[str, float]:
    """Share of pairs in which the right answer has the higher score; a tie is none."""
    return _by_subset(rows, [row["margin"] > 0 for row in rows])


def _best_of(rows: Sequence[Scored]) -> dict[str, float]:
    """Share of rows whose highest score has a right answer; where several answers have it, the share of right ones."""
    shares = []
    for row in rows:
        best = [side.count(max([*row["chosen"], *row["rejected"]])) for side in (row["chosen"], row["rejected"])]
        shares.append(best[0] / sum(best))
    return _by_subset(rows, shares)


def _reward_bench(rows: Sequence[Scored]) -> dict[str, float]:
    """By subset, and by section over the subsets that are there; the score is the mean of the four sections."""
    subsets, sections = _pairs(rows), {}
    for section, weights in SECTIONS.items():
        if there := [name for name in weights if name in subsets]:
            shares = [subsets[name] for name in there]
            sections[section] = float(np.average(shares, weights=[weights[name] for name in there]))
    score = {"score": float(np.mean([*sections.values()]))} if len(sections) == len(SECTIONS) else {}
    return subsets | sections | score


def _reward_bench_2(rows: Sequence[Scored]) -> dict[str, float]:
    """By subset; the score is the mean of the six."""
    subsets = {name: share for name, share in _best_of(rows).items() if name not in ("Ties", "all")}
    subsets |= _ties([row for row in rows if row["subset"] == "Ties"])
    score = {"score": float(np.mean([*subsets.values()]))} if subsets.keys() == REWARD_BENCH_2 else {}
    return subsets | score


def _ties(rows: Sequence[Scored]) -> dict[str, float]:
    """Score prompts with many right answers (id `tied:N`) beside those with one (`ref:N`): 60 % whether all right ones
    win, 40 % whether they differ less from each other than from the wrong ones. There is none without both kinds."""
    within: dict[str, float] = {row["id"]: max(row["chosen"]) - min(row["chosen"]) for row in rows}
    gap: dict[str, float] = {row["id"]: min(row["chosen"]) - max(row["rejected"]) for row in rows}
    both = [(id, f"ref:{id[5:]}") for id in gap if id.startswith("tied:") and f"ref:{id[5:]}" in gap]
    if not both:
        return {}
    accuracy = sum(np.mean([gap[id] > 0 for id in gap if id.startswith(kind)]) for kind in ("ref:", "tied:"))
    spread, tied = np.array([within[id] for id, _ in both]), np.array([gap[id] for id, _ in both])
    hard = np.minimum(tied, [gap[reference] for _, reference in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(hard / spread - 1), nan=0.0)
    preferred = np.mean(tied > spread) + np.mean(hard > spread)
    return {"Ties": float(0.3 * accuracy + 0.2 * preferred + 0.01 * margin.mean())}


def _rm_bench(rows: Sequence[Scored]) -> dict[str, float]:
    """Compare right and wrong answers in three styles, from plain to fancy: 3 × 3. Hard is where the wrong one is
    fancier. The two parts of safety are one domain."""
    wins: defaultdict[str, list[Any]] = defaultdict(list)
    for row in rows:
        wins[row["subset"]].append(np.array(row["chosen"])[:, None] > np.array(row["rejected"])[None])
    means = {name: np.mean(matrices, axis=0) for name, matrices in sorted(wins.items())}
    whole = np.mean([*means.values()], axis=0)
    levels = {"hard": whole[np.triu_indices(3, 1)], "normal": np.diag(whole), "easy": whole[np.tril_indices(3, -1)]}
    score = {"score": whole} if means.keys() == {*RM_BENCH} else {}
    return {name: float(np.mean(part)) for name, part in {**means, **levels, **score}.items()}


COMPUTED: dict[str, Callable[[Sequence[Scored]], dict[str, float]]] = {
    "RewardBench": _reward_bench, "RewardBench 2": _reward_bench_2, "RM-Bench": _rm_bench, "JudgeBench": _pairs,
    "PPE pairs": _pairs, "AlpacaEval": _pairs, "pairs": _pairs, "PPE best of K": _best_of, "best of N": _best_of,
}  # fmt: skip
