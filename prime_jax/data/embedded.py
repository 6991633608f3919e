"""A dataset as rows of an embedding store: what training, validation and evaluation read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from prime_jax.data.first_pass import first_pass
from prime_jax.data.one_text import as_one_text
from prime_jax.data.records import Dataset, Example
from prime_jax.data.sequences import Sequences
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError

EMPTY = -1
IN_MEMORY = 2**30  # bytes of passages that are held rather than read again


@dataclass(frozen=True)
class EmbeddedSplit:
    """The n examples of a split. Store rows find embeddings, corpus indices find passages.

    Attributes:
        ids: Ids of the examples.
        context_rows: Store rows of the turns, oldest first, then -1, `[n, N]`.
        query_rows: Store rows of the queries, `[n]`.
        positives: Per example the corpus indices of its right answers.
        negatives: Per example the corpus indices of passages known to be wrong.
        exclude: Per example the corpus indices that are never returned or counted.
        scope: Scope code of each example, as in `EmbeddedDataset.corpus_scope`, `[n]`.
        windowed: How many examples had more than N turns and keep their newest N.
        sequences: Their conversations as token ids, for a model that reads text, or None.
    """

    ids: tuple[str, ...]
    context_rows: Int64[np.ndarray, "n N"]
    query_rows: Int64[np.ndarray, " n"]
    positives: tuple[Int64[np.ndarray, " _"], ...]
    negatives: tuple[Int64[np.ndarray, " _"], ...]
    exclude: tuple[Int64[np.ndarray, " _"], ...]
    scope: Int32[np.ndarray, " n"]
    windowed: int
    sequences: Sequences | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(
        self, store: EmbeddingStore
    ) -> tuple[Float32[np.ndarray, "n N D"], Bool[np.ndarray, "n N"], Float32[np.ndarray, "n D"]]:
        """The whole split in memory: context (zero where there is no turn), context mask, query."""
        context, mask = gather(store, self.context_rows)
        return context, mask, store[self.query_rows]


@dataclass(frozen=True)
class EmbeddedDataset:
    """Corpus and splits of a dataset as rows of one store.

    Attributes:
        store: The embeddings.
        corpus_ids: Passage ids, M of them.
        corpus_rows: Store row of each passage, `[M]`.
        corpus_scope: Scope code of each passage, -1 for none, `[M]`.
        splits: The splits by name.
        data_hash: `Dataset.hash` of the texts.
        context_from: Where the turns come from.
    """

    store: EmbeddingStore
    corpus_ids: tuple[str, ...]
    corpus_rows: Int64[np.ndarray, " M"]
    corpus_scope: Int32[np.ndarray, " M"]
    splits: dict[str, EmbeddedSplit]
    data_hash: str
    context_from: Literal["data", "search"] = "data"

    def corpus(self) -> Any:
        """Embeddings of all passages, `[M, D]`: an array while that is small, otherwise a `StoredRows`."""
        passages = self.store.part(self.corpus_rows)
        return passages[:] if passages.nbytes <= IN_MEMORY else passages


def gather(
    store: EmbeddingStore, rows: Int64[np.ndarray, "*shape"]
) -> tuple[Float32[np.ndarray, "*shape D"], Bool[np.ndarray, "*shape"]]:
    """Embeddings of store rows, zero where a row is -1, and the mask of rows that are not."""
    mask = rows != EMPTY
    embeddings = np.zeros((*rows.shape, store.dim), np.float32)
    embeddings[mask] = store[rows[mask]]
    return embeddings, mask


def embed_dataset(
    dataset: Dataset,
    store: EmbeddingStore,
    *,
    max_context_length: int,
    query_prefix: str = "",
    passage_prefix: str = "",
    context_from: Literal["data", "search"] = "data",
    first_pass_k: int = 10,
    conversation: bool = False,
) -> EmbeddedDataset:
    """Look every text of a dataset up in the store.

    Args:
        dataset: The texts.
        store: Holds an embedding of every one of them.
        max_context_length: N. A longer conversation keeps its newest N turns; each split counts those.
        query_prefix: What was put before queries and turns when they were encoded.
        passage_prefix: What was put before passages when they were encoded.
        context_from: "data" takes the turns from the examples. "search" replaces them by the passages of a
            first search with the query, the best one last (`first_pass`).
        first_pass_k: How many passages that search finds, at most `max_context_length`.
        conversation: Put query and turns as one text behind the newest turn (`model.conversation_input`); it
            takes the place of the oldest one where there are N.

    Raises:
        DataError: If a text is not in the store; run `python -m prime_jax.data.encode` on the data first.
        ConfigError: If `first_pass_k` is larger than `max_context_length`.
    """
    if context_from == "search" and first_pass_k > max_context_length:
        raise ConfigError(
            f"data.first_pass_k is {first_pass_k}, more than the {max_context_length} turns that "
            "model.max_context_length leaves room for"
        )
    index_of = {passage.id: index for index, passage in enumerate(dataset.corpus)}
    scopes = sorted({passage.scope for passage in dataset.corpus if passage.scope is not None})
    code_of: dict[str | None, int] = {None: EMPTY} | {scope: code for code, scope in enumerate(scopes)}
    corpus_rows = store.rows([passage_prefix + passage.text for passage in dataset.corpus])
    corpus_scope = np.array([code_of[passage.scope] for passage in dataset.corpus], np.int32)

    def indices(ids: Sequence[str]) -> Int64[np.ndarray, " _"]:
        return np.array([index_of[name] for name in ids], np.int64)

    splits = {}
    for name, examples in dataset.splits.items():
        exclude = tuple(indices(example.exclude) for example in examples)
        scope = np.array([code_of[example.scope] for example in examples], np.int32)
        query_rows = store.rows([query_prefix + example.query for example in examples])
        if context_from == "data":
            context_rows = _context_rows(examples, store, max_context_length, query_prefix, conversation)
            most = max_context_length - conversation
            windowed = sum(len(example.context) > most for example in examples)
        else:
            found = first_pass(
                store,
                query_rows,
                corpus_rows,
                first_pass_k,
                exclude=exclude,
                query_scope=scope,
                corpus_scope=corpus_scope,
            )
            context_rows = np.full((len(examples), max_context_length), EMPTY, np.int64)
            context_rows[:, :first_pass_k] = np.where(found == EMPTY, EMPTY, corpus_rows[found])
            windowed = 0
        splits[name] = EmbeddedSplit(
            ids=tuple(example.id for example in examples),
            context_rows=context_rows,
            query_rows=query_rows,
            positives=tuple(indices(example.positives) for example in examples),
            negatives=tuple(indices(example.negatives) for example in examples),
            exclude=exclude,
            scope=scope,
            windowed=windowed,
        )
    return EmbeddedDataset(
        store=store,
        corpus_ids=tuple(index_of),
        corpus_rows=corpus_rows,
        corpus_scope=corpus_scope,
        splits=splits,
        data_hash=dataset.hash,
        context_from=context_from,
    )


def _context_rows(
    examples: Sequence[Example], store: EmbeddingStore, length: int, prefix: str, conversation: bool
) -> Int[np.ndarray, "n N"]:
    """Store rows of the newest `length` turns of each example, oldest first, then -1."""
    most = length - conversation
    windows = [example.context[max(0, len(example.context) - most) :] for example in examples]
    if conversation:
        pairs = zip(examples, windows, strict=True)
        windows = [(*turns, as_one_text(example.query, turns)) for example, turns in pairs]
    turns = list(dict.fromkeys(turn for window in windows for turn in window))
    row_of = dict(zip(turns, store.rows([prefix + turn for turn in turns]).tolist(), strict=True))
    rows = np.full((len(examples), length), EMPTY, np.int64)
    for number, window in enumerate(windows):
        rows[number, : len(window)] = [row_of[turn] for turn in window]
    return rows
