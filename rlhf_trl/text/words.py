"""The words of a text, and how often they repeat: within a text, and over many; and names of texts by their content.

Reads and writes nothing. A word is a run of letters and digits; in scripts without spaces (Chinese, Japanese, Thai,
Lao, Khmer, Burmese) each character; and any other visible character by itself, so that `!!!!!!!!` is a repetition,
too. Case does not matter.
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import gammaln

NO_SPACES = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U000323af"
)
# Accents and vowel signs that \w leaves out: combining, Hebrew, Arabic, Indic.
SIGNS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
LETTERS = rf"(?:[^\W{NO_SPACES}]|[{SIGNS}])+"
WORD = re.compile(rf"{LETTERS}(?:['’]{LETTERS})*|\S")


def digest(text: str) -> str:
    """Name a text, the same on every machine: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_id(prompt: Sequence[Mapping[str, object]]) -> str:
    """Name a prompt, which is a list of messages: 16 hexadecimal digits."""
    return digest(json.dumps(prompt, sort_keys=True))


def split_words(text: str) -> list[str]:
    """Split a text into words; case and the form of the apostrophe are set aside."""
    return [word.casefold().replace("’", "'") for word in WORD.findall(text)]


def count_ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    """Count the runs of `n` words in a text."""
    words = split_words(text)
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """Measure the share of a text's word n-grams that repeat an earlier one: 1 - unique / total, 0 without any."""
    ngrams = count_ngrams(text, n)
    return 1 - len(ngrams) / ngrams.total() if ngrams else 0.0


def distinct(texts: Sequence[str], n: int, draw: int) -> float | None:
    """Measure the share of different ones among `draw` word n-grams drawn from all texts, its expected value.

    Rarefaction (Hurlbert, 1971, Ecology 52:577). Plain distinct-n (Li et al., 2016, arXiv 1510.03055), unique / total,
    falls with every further word, so that shorter answers look more diverse; at the same `draw` they do not. None
    where the texts hold fewer n-grams than `draw`.
    """
    ngrams = Counter(itertools.chain.from_iterable(count_ngrams(text, n).elements() for text in texts))
    return _rarefy(np.bincount(list(ngrams.values())), draw) if 0 < draw <= ngrams.total() else None


def compare_distinct(ours: Sequence[str], theirs: Sequence[str], n: int = 2) -> tuple[float, float, float] | None:
    """Divide the diversity of our answers by that of theirs to the same prompts: the ratio, and its 99 % interval.

    Both sides draw as many n-grams as the smaller has without its longest answer. The interval is the jackknife's over
    the prompts, on the logarithm: a bootstrap would take answers twice, and two copies are no diversity. None where
    nothing can be drawn.
    """
    sides = [[count_ngrams(text, n) for text in texts] for texts in (ours, theirs)]
    sizes = [[ngrams.total() for ngrams in side] for side in sides]
    draw = min(sum(side) - max(side) for side in sizes)
    if draw < 1:
        return None
    (our_all, our_rest), (their_all, their_rest) = (_leave_one_out(side, draw) for side in sides)
    rest = np.log(our_rest / their_rest)
    half = 2.576 * math.sqrt((len(rest) - 1) * rest.var())
    ratio = our_all / their_all
    return ratio, ratio * math.exp(-half), ratio * math.exp(half)


def opening(text: str, words: int = 5) -> str:
    """Give the text up to the end of its first words; a shorter text as a whole, one without words as ''."""
    ends = [match.end() for match in itertools.islice(WORD.finditer(text), words)]
    return text[: ends[-1]].strip() if ends else ""


def common_opening(texts: Sequence[str], words: int = 5) -> tuple[float, str]:
    """Find the share of the texts that begin with the most common opening, and that opening; ties go by the alphabet.

    Openings are the same when their words are. Texts without words have none, and count in the share's denominator.
    """
    written: dict[tuple[str, ...], list[str]] = {}
    for text in texts:
        if begin := opening(text, words):
            written.setdefault(tuple(split_words(begin)), []).append(begin)
    if not written:
        return 0.0, ""
    most = min(written, key=lambda begin: (-len(written[begin]), begin))
    return len(written[most]) / len(texts), min(written[most])


def _rarefy(spectrum: np.ndarray, draw: int) -> float:
    """Expected share of different n-grams in a draw; `spectrum[c]` of them occur c of T times, and are absent from the
    draw with the chance C(T - c, draw) / C(T, draw)."""
    counts = np.arange(len(spectrum))
    total = spectrum @ counts
    rest = np.maximum(total - counts, draw)
    ways = gammaln(rest + 1) - gammaln(rest - draw + 1) - gammaln(total + 1) + gammaln(total - draw + 1)
    absent = np.where(total - counts < draw, 0.0, np.exp(ways))
    return float(spectrum[1:] @ (1 - absent[1:])) / draw


def _leave_one_out(texts: Sequence[Counter[tuple[str, ...]]], draw: int) -> tuple[float, np.ndarray]:
    """`distinct` of all texts, and of all but each: a float and (texts,)."""
    ngrams = Counter(itertools.chain.from_iterable(text.elements() for text in texts))
    whole = np.bincount(list(ngrams.values()))
    rest = []
    for text in texts:
        spectrum, counts = whole.copy(), np.array([ngrams[ngram] for ngram in text], dtype=int)
        np.subtract.at(spectrum, counts, 1)
        np.add.at(spectrum, counts - np.array(list(text.values()), dtype=int), 1)
        rest.append(_rarefy(spectrum, draw))
    return _rarefy(whole, draw), np.array(rest)
