"""The split into train and test: by conversation, with the lengths and subsets of both alike.

Works on arrays in memory; the same prompts and seed give the same split in any order, process or Python.
"""

import hashlib
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted

import numpy as np

from rlhf_trl.data.pair import Message
from rlhf_trl.recipe.errors import UserError

KEY = "S16"
LENGTH_BINS = 5


@dataclass(frozen=True)
class Split:
    """Arrays of shape (rows,)."""

    held_out: np.ndarray
    first_half: np.ndarray
    """Whether the row is in the first of two halves that share no conversation."""
    prompts: np.ndarray
    """Equal numbers are equal prompts."""


def prompt_keys(prompt: list[Message]) -> list[bytes]:
    """Hash the prompt up to each user turn, letter case and whitespace apart; the last key is of the whole prompt."""
    digest = hashlib.sha256()
    keys = []
    for message in prompt:
        text = " ".join(message["content"].casefold().split())
        digest.update(f"[{quoted(message['role'])}, {quoted(text)}]".encode())
        if message["role"] == "user":
            keys.append(digest.digest()[:16])
    return keys


def split(
    keys: np.ndarray, counts: np.ndarray, subsets: np.ndarray, lengths: np.ndarray, test_fraction: float, seed: int
) -> Split:
    """Choose the rows that are held out, and halve the rows.

    Rows with one prompt stay together. So do two prompts of which one continues the other: in HH-RLHF the longer one
    shows the answer to the shorter one that the user went on with, which is the chosen one in helpful-base and the
    rejected one in harmless-base. Of what stays together, what has the smallest seeded hash is held out, within each
    subset and each fifth of the lengths.

    Args:
        keys: the keys of all rows after one another, (keys,): of the beginnings of a row's prompt, then of the prompt
            as it was in the source, last of the prompt as it is kept.
        counts: how many keys each row has, (rows,).
        subsets: the number of each row's subset in the order of their names, (rows,).
        lengths: tokens of each row, (rows,).
        test_fraction: of the prompts.

    UserError where all rows would have to stay together."""
    prompts, distinct, groups = _group(keys, counts)
    # Of each group: its smallest key, its first subset, its length, and how many prompts it has.
    size = int(groups.max(initial=-1)) + 1
    if size < 2:
        problem = f"{len(counts)} usable rows with {size} separate conversation(s) cannot be split"
        raise UserError("data", problem, "give more data: training and held-out part need a conversation each")
    smallest, subset, length = np.full(size, len(distinct)), np.full(size, len(counts)), np.zeros(size, int)
    np.minimum.at(smallest, groups, prompts)
    np.minimum.at(subset, groups, subsets)
    np.maximum.at(length, groups, lengths)
    weight = np.bincount(groups[np.unique(prompts, return_index=True)[1]])
    names = [key.ljust(16, b"\0") for key in distinct[smallest].tolist()]
    rank = np.array([hashlib.sha256(b"%d " % seed + name).digest() for name in names], "S32")
    fifth = np.zeros(size, int)
    for number in np.unique(subset):
        inside = subset == number
        edges = np.quantile(length[inside], np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
        fifth[inside] = np.searchsorted(edges, length[inside])
    order, stratum, total = np.lexsort((rank, fifth, subset)), subset * LENGTH_BINS + fifth, int(weight.sum())
    target = min(max(1, round(total * test_fraction)), total - 1)
    held_out = np.zeros(size, bool)
    due = taken = 0.0
    for members in np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1):
        # Strata hand on what they could not give, so that small ones do not all round to nothing.
        due += target * int(weight[members].sum()) / total
        for group in members:
            if taken + weight[group] <= round(due):
                held_out[group] = True
                taken += weight[group]
    if not held_out.any():
        held_out[np.lexsort((rank, weight))[0]] = True
    first_half = np.array([hashlib.sha256(b"half %d " % seed + name).digest()[0] < 128 for name in names])
    return Split(held_out[groups], first_half[groups], prompts)


def _group(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the prompts by their keys, and the groups: a prompt joins the rows that have it or begin with it.

    Returns:
        The number of each row's prompt, the keys in the order of these numbers, and the group of each row.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    distinct, codes = np.unique(keys, return_inverse=True)
    last = np.cumsum(counts) - 1
    whole = np.zeros(len(distinct), bool)
    whole[codes[last]] = whole[codes[last - 1]] = True
    joins = whole[codes]
    rows = np.repeat(np.arange(len(counts)), counts)[joins]
    size = len(counts) + len(distinct)
    edges = coo_array((np.ones(len(rows), bool), (rows, len(counts) + codes[joins])), (size, size))
    labels = connected_components(edges, directed=False)[1][: len(counts)]
    return codes[last], distinct, np.unique(labels, return_inverse=True)[1]
