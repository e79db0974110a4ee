"""The split into train and test: by prompt, with the lengths and subsets of both alike.

Works on values in memory; the same prompts and seed give the same split in any order, process or Python.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_trl.data.pair import Message
from rlhf_trl.recipe.errors import UserError

LENGTH_BINS = 5


@dataclass
class Group:
    """Prompts that have to stay together."""

    key: bytes = b"\xff" * 17
    subset: str = ""
    length: int = 0
    prompts: set[bytes] = field(default_factory=set)


def prompt_keys(prompt: list[Message]) -> list[bytes]:
    """Hash the prompt up to each user turn, letter case and whitespace apart; the last key is of the whole prompt."""
    digest = hashlib.sha256()
    keys = []
    for message in prompt:
        digest.update(json.dumps([message["role"], " ".join(message["content"].casefold().split())]).encode())
        if message["role"] == "user":
            keys.append(digest.digest()[:16])
    return keys


def split(
    keys: Sequence[Sequence[bytes]], subsets: Sequence[str], lengths: Sequence[int], test_fraction: float, seed: int
) -> list[bool]:
    """Choose the rows that are held out.

    Rows with one prompt stay together. So do two prompts of which one continues the other: in HH-RLHF the longer one
    shows the answer to the shorter one that the user went on with, which is the chosen one in helpful-base and the
    rejected one in harmless-base. Of what stays together, what has the smallest seeded hash is held out, within each
    subset and each fifth of the lengths.

    Args:
        keys: for each row, the keys of the beginnings of its prompt, then that of the prompt as it was in the source,
            last that of the prompt as it is kept.
        subsets: the subset of each row.
        lengths: tokens of each row.
        test_fraction: the share of the prompts that is held out.
        seed: what the hashes are seeded with.

    Raises:
        UserError: all rows would have to stay together.
    """
    roots = _join(keys)
    groups: defaultdict[bytes, Group] = defaultdict(Group)
    for row, subset, length, root in zip(keys, subsets, lengths, roots, strict=True):
        group = groups[root]
        group.key = min(group.key, row[-1])
        group.subset = min(group.subset or subset, subset)
        group.length = max(group.length, length)
        group.prompts.add(row[-1])
    if len(groups) < 2:
        remedy = "give more data; both the training and the held-out part need a conversation of their own"
        raise UserError(
            "data", f"{len(keys)} usable rows with {len(groups)} separate conversation(s) cannot be split", remedy
        )
    order = {root: hashlib.sha256(b"%d " % seed + group.key).digest() for root, group in groups.items()}
    by_subset: defaultdict[str, list[bytes]] = defaultdict(list)
    for root, group in groups.items():
        by_subset[group.subset].append(root)
    strata: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
    for subset, members in by_subset.items():
        edges = np.quantile([groups[root].length for root in members], np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
        for root in members:
            strata[subset, int(np.searchsorted(edges, groups[root].length))].append(root)
    prompts = sum(len(group.prompts) for group in groups.values())
    target = min(max(1, round(prompts * test_fraction)), prompts - 1)
    held_out: set[bytes] = set()
    due = taken = 0.0
    for stratum in sorted(strata):
        members = sorted(strata[stratum], key=order.__getitem__)
        # Strata hand on what they could not give, so that small ones do not all round to nothing.
        due += target * sum(len(groups[root].prompts) for root in members) / prompts
        for root in members:
            if taken + len(groups[root].prompts) <= round(due):
                held_out.add(root)
                taken += len(groups[root].prompts)
    if not held_out:
        held_out = {min(groups, key=lambda root: (len(groups[root].prompts), order[root]))}
    return [root in held_out for root in roots]


def halve(keys: Sequence[Sequence[bytes]], seed: int) -> list[str]:
    """Assign each row to the `first` or `second` half, so that what `split` keeps together stays together."""
    roots = _join(keys)
    names: dict[bytes, bytes] = {}
    for row, root in zip(keys, roots, strict=True):
        names[root] = min(names.get(root, row[-1]), row[-1])
    return ["first" if hashlib.sha256(b"half %d " % seed + names[root]).digest()[0] < 128 else "second"
            for root in roots]  # fmt: skip


def _join(keys: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Name the group of each row; a prompt joins the rows that have it and those whose prompt begins with it."""
    parents: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    whole = {key for row in keys for key in row[-2:]}
    for row in keys:
        for key in row[:-1]:
            if key in whole:
                parents[root(key)] = root(row[-1])
    return [root(row[-1]) for row in keys]
