"""A control set: part of the training data, set aside by whole conversations and never trained on."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from prime_jax.data.embedded import EmbeddedDataset, EmbeddedSplit
from prime_jax.errors import DataError
from prime_jax.retrieval.groups import linked

CONTROL = "control"
MOST = 1 / 3  # of the training rows may be set aside


def with_control(data: EmbeddedDataset, rows: int, *, seed: int, all_positives: bool) -> EmbeddedDataset:
    """Move whole conversations (or documents) from "train" to a new split "control".

    Examples belong together when they share a turn or a query, directly or through others. Conversations
    come in a random order; one that is larger than the whole control set stays in training. `windowed` of
    both parts is that of the whole.

    Args:
        data: With the split "train".
        rows: Rows that the control set must have at least.
        seed: Of the choice.
        all_positives: Whether an example is one row, or one for each of its right answers.

    Raises:
        DataError: If too few conversations stand apart, or too little would be left to train on.
    """
    train = data.splits["train"]
    groups = conversations(data)
    count = np.array([1 if all_positives else len(ids) for ids in train.positives])
    sizes = np.bincount(groups, weights=count).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen, found = np.zeros(len(sizes), bool), 0
    for group in order:
        if found >= rows:
            break
        if sizes[group] <= rows:
            chosen[group] = True
            found += int(sizes[group])
    whole = int(count.sum())
    if found < rows or found > MOST * whole:
        raise DataError(
            f"hybrid sets {rows} rows of 'train' aside as its control set, in whole conversations; that "
            f"would be {found} of {whole} rows (the largest of {len(sizes)} conversations has "
            f"{sizes.max()}), and a third is the most; lower hybrid.control_batches or train.batch_size"
        )
    aside = chosen[groups]
    splits = {"train": part_of(train, ~aside), CONTROL: part_of(train, aside)}
    return replace(data, splits={**data.splits, **splits})


def conversations(data: EmbeddedDataset) -> Int64[np.ndarray, " n"]:
    """Which training examples belong together, as labels; turns that a search found join nothing."""
    train = data.splits["train"]
    turns = train.context_rows if data.context_from == "data" else train.context_rows[:, :0]
    asked = np.concatenate([turns, train.query_rows[:, None]], axis=1)
    return linked([row[row >= 0].tolist() for row in asked])


def part_of(split: EmbeddedSplit, which: Bool[np.ndarray, " n"]) -> EmbeddedSplit:
    """The examples of a split where `which` is True."""
    places = np.flatnonzero(which)
    parts: dict[str, Any] = {}
    for field in fields(split):
        value = getattr(split, field.name)
        if isinstance(value, tuple):
            parts[field.name] = tuple(value[place] for place in places)
        elif isinstance(value, np.ndarray):
            parts[field.name] = value[places]
    return replace(split, **parts)
