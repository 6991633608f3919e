"""What an evaluation works on: a corpus and a split as plain arrays, and searching one for the other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped
from numpy import ndarray

from prime_jax.retrieval.indexes import Index
from prime_jax.retrieval.mix import real_turns
from prime_jax.retrieval.topk import Rows, search


class Corpus(NamedTuple):
    """The passages.

    Attributes:
        embeddings: `[M, E]`, in memory or read in parts.
        scope: Scope of each, `[M]`, where searches are scoped.
        searcher: What searches them; None reads and compares them anew for each search.
    """

    embeddings: Rows
    scope: Shaped[ndarray, " M"] | None = None
    searcher: Index | None = None


class Split(NamedTuple):
    """The queries of one split as arrays.

    Attributes:
        query: Query embeddings, `[Q, D]`.
        context: Turn embeddings, oldest first, `[Q, N, D]`; slots the mask leaves out hold anything.
        mask: True where a turn is real, `[Q, N]`.
        positives: Right corpus rows of each query, at least one.
        last_turn: Embeddings of the text "last turn + query", `[Q, D]`, the query where there is no turn.
        exclude: Corpus rows never returned for each query, or None.
        scope: Scope of each query, `[Q]`, or None.
        context_texts: The turns themselves, oldest first, of each query, or None.
        query_texts: The queries themselves, or None.
        conversation: Embeddings of query and turns as one text, the newest turn first, `[Q, D]`, or None.
    """

    query: Float32[ndarray, "Q D"]
    context: Float32[ndarray, "Q N D"]
    mask: Bool[ndarray, "Q N"]
    positives: Sequence[ndarray]
    last_turn: Float32[ndarray, "Q D"] | None = None
    exclude: Sequence[ndarray] | None = None
    scope: Shaped[ndarray, " Q"] | None = None
    context_texts: Sequence[Sequence[str]] | None = None
    query_texts: Sequence[str] | None = None
    conversation: Float32[ndarray, "Q D"] | None = None


def retrieve(
    vectors: Float32[ndarray, "Q E"], split: Split, corpus: Corpus, k: int
) -> tuple[Float32[ndarray, "Q k"], Int64[ndarray, "Q k"]]:
    """Search the corpus under the split's exclusions and scopes (`prime_jax.retrieval.topk.search`)."""
    if corpus.searcher is not None:
        return corpus.searcher.search(vectors, k, exclude=split.exclude, query_scope=split.scope)
    return search(
        vectors,
        corpus.embeddings,
        k,
        exclude=split.exclude,
        query_scope=split.scope,
        corpus_scope=corpus.scope,
    )


def mean_turn(split: Split) -> Float32[ndarray, "Q D"]:
    """Mean of the unit-norm turns, zero where there is none."""
    count = np.maximum(split.mask.sum(axis=1), 1)[:, None].astype(np.float32)
    mean: Float32[ndarray, "Q D"] = real_turns(split.context, split.mask).sum(axis=1) / count
    return mean
