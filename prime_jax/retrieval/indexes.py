"""Other ways to search, for memories too large to compare with one by one: faiss and Qdrant.

Both need the extra `search`. They take what the exact search takes and give it back in the same form, so that
a report can be made with either; `faiss` and `qdrant` in memory are exact too, `hnsw` and a Qdrant server are
approximate.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32, Int64, Shaped
from numpy import ndarray

from prime_jax.errors import DataError
from prime_jax.retrieval.topk import ExactIndex, Rows, search

IndexKind = Literal["exact", "faiss", "hnsw", "qdrant"]
URL, KEY = "QDRANT_URL", "QDRANT_API_KEY"
CHUNK = 8192  # passages handed over at a time
QUERIES = 1024  # queries at a time
BATCH = 64  # queries of one request to Qdrant
SECONDS = 300  # that a server may take for an answer
SMALL_SCOPE = 50_000  # passages
LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 200, 256  # of HNSW (Malkov & Yashunin 2018): M, efConstruction, ef

Exclude = Sequence[Int64[ndarray, " _"]] | None
Found = tuple[Float32[ndarray, "Q k"], Int64[ndarray, "Q k"]]


class Index(Protocol):
    """Passages that can be searched."""

    def search(
        self, queries: ndarray, k: int, *, exclude: Exclude = None, query_scope: ndarray | None = None
    ) -> Found:
        """As `prime_jax.retrieval.topk.search`, with its own passages and their scopes."""


@contextmanager
def open_index(kind: IndexKind, corpus: Rows, corpus_scope: Shaped[ndarray, " M"] | None) -> Iterator[Index]:
    """Put passages into an index, for as long as the context lasts.

    Args:
        kind: Which one. `qdrant` asks the server at $QDRANT_URL (with $QDRANT_API_KEY), or runs in memory.
        corpus: The passages, `[M, E]`; handed over in parts.
        corpus_scope: Their scopes, integers, or None.

    Raises:
        DataError: If the package is not installed, or the server does not answer.
    """
    if kind == "exact":
        yield ExactIndex(corpus, corpus_scope)
    elif kind == "qdrant":
        collection = _Qdrant(corpus, corpus_scope)
        try:
            yield collection
        finally:
            collection.close()
    else:
        yield _Faiss(kind, corpus, corpus_scope)


class _Faiss:
    """An index of faiss, flat (exact) or a navigable small-world graph (HNSW)."""

    def __init__(self, kind: str, corpus: Rows, corpus_scope: ndarray | None):
        self._faiss = faiss = _package("faiss")
        dim, inner = corpus.shape[1], faiss.METRIC_INNER_PRODUCT
        self._kind, self._scope, self._corpus = kind, corpus_scope, corpus
        if kind == "faiss":
            self._index = faiss.IndexFlatIP(dim)
        else:
            self._index = faiss.IndexHNSWFlat(dim, LINKS, inner)
            self._index.hnsw.efConstruction = BUILD_EFFORT
        for start in range(0, len(corpus), CHUNK):
            self._index.add(np.ascontiguousarray(corpus[start : start + CHUNK], np.float32))

    def search(
        self, queries: ndarray, k: int, *, exclude: Exclude = None, query_scope: ndarray | None = None
    ) -> Found:
        """Ask for as many more as are excluded, and leave those out."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = np.full((len(queries), k), -1, np.int64)
        for rows, selected in self._by_scope(len(queries), query_scope):
            more = 0 if exclude is None else max(len(exclude[row]) for row in rows)
            asked = np.ascontiguousarray(queries[rows], np.float32)
            given, names = self._nearest(asked, min(k + more, len(self._corpus)), selected)
            wanted = given.shape[1]
            for row, score, name in zip(rows, given, names, strict=True):
                hidden = np.isin(name, exclude[row]) if exclude is not None else np.zeros(wanted, bool)
                keep = np.flatnonzero((name >= 0) & ~hidden)[:k]
                scores[row, : len(keep)], found[row, : len(keep)] = score[keep], name[keep]
        return scores, found

    def _by_scope(
        self, queries: int, query_scope: ndarray | None
    ) -> Iterator[tuple[ndarray, ndarray | None]]:
        """Some queries at a time, with the passages they may find: all (None), or those of their scope."""
        every = np.arange(queries)
        if query_scope is None or self._scope is None or _all_alike(query_scope, self._scope):
            parts: list[tuple[ndarray, ndarray | None]] = [(every, None)]
        else:
            scopes = np.unique(query_scope)
            parts = [(every[query_scope == one], np.flatnonzero(self._scope == one)) for one in scopes]
        for rows, selected in parts:
            for start in range(0, len(rows), QUERIES):
                yield rows[start : start + QUERIES], selected

    def _nearest(self, asked: ndarray, wanted: int, selected: ndarray | None) -> tuple[ndarray, ndarray]:
        """Scores and rows of the nearest passages; a small scope, which a graph would miss, one by one."""
        if selected is not None and len(selected) <= SMALL_SCOPE:
            if not len(selected):
                return np.full((len(asked), 1), -np.inf, np.float32), np.full((len(asked), 1), -1, np.int64)
            given, places = search(asked, np.asarray(self._corpus[selected], np.float32), wanted)
            return given, np.where(places >= 0, selected[places], -1)
        sel = None if selected is None else self._faiss.IDSelectorBatch(selected)
        if self._kind == "faiss":
            parameters = self._faiss.SearchParameters(sel=sel)
        else:
            parameters = self._faiss.SearchParametersHNSW(sel=sel, efSearch=max(SEARCH_EFFORT, wanted))
        found: tuple[ndarray, ndarray] = self._index.search(asked, wanted, params=parameters)
        return found


class _Qdrant:
    """A collection of its own in Qdrant, dropped when it is closed."""

    def __init__(self, corpus: Rows, corpus_scope: ndarray | None):
        self._client: Any = _package("qdrant_client")
        self._models = self._client.models
        url = os.environ.get(URL)
        self._scoped = corpus_scope is not None
        self._name = f"prime-jax-{uuid.uuid4().hex}"
        client = self._client.QdrantClient
        self._client = (
            client(url, api_key=os.environ.get(KEY), timeout=SECONDS) if url else client(":memory:")
        )
        try:
            self._fill(corpus, corpus_scope, indexed=url is not None)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.close()
            raise

    def _fill(self, corpus: Rows, corpus_scope: ndarray | None, *, indexed: bool) -> None:
        """Make the collection and hand the passages over."""
        vectors = self._models.VectorParams(size=corpus.shape[1], distance=self._models.Distance.DOT)
        self._ask(self._client.create_collection, self._name, vectors_config=vectors)
        if corpus_scope is not None and indexed:
            kind = self._models.PayloadSchemaType.INTEGER
            self._ask(self._client.create_payload_index, self._name, "scope", field_schema=kind)
        for start in range(0, len(corpus), CHUNK):
            part = np.asarray(corpus[start : start + CHUNK], np.float32)
            numbers = range(start, start + len(part))
            payloads = None
            if corpus_scope is not None:
                payloads = [{"scope": int(corpus_scope[number])} for number in numbers]
            self._ask(
                self._client.upload_collection,
                self._name,
                vectors=part,
                payload=payloads,
                ids=list(numbers),
                wait=True,
            )
        while indexed and self._ask(self._client.get_collection, self._name).status != "green":
            time.sleep(0.5)  # until its graph is built

    def search(
        self, queries: ndarray, k: int, *, exclude: Exclude = None, query_scope: ndarray | None = None
    ) -> Found:
        """One filtered request for each query, many in a batch."""
        models = self._models
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = np.full((len(queries), k), -1, np.int64)

        def request(row: int) -> Any:
            hidden = [] if exclude is None else [int(one) for one in exclude[row]]
            scope = []
            if query_scope is not None and self._scoped:
                match = models.MatchValue(value=int(query_scope[row]))
                scope = [models.FieldCondition(key="scope", match=match)]
            chosen = models.Filter(
                must=scope, must_not=[models.HasIdCondition(has_id=hidden)] if hidden else None
            )
            return models.QueryRequest(query=queries[row].tolist(), limit=k, filter=chosen)

        for start in range(0, len(queries), BATCH):
            requests = [request(row) for row in range(start, min(start + BATCH, len(queries)))]
            answers = self._ask(self._client.query_batch_points, self._name, requests=requests)
            for row, answer in enumerate(answers, start):
                for rank, point in enumerate(answer.points):
                    scores[row, rank], found[row, rank] = point.score, point.id
        return scores, found

    def close(self) -> None:
        """Drop the collection."""
        self._ask(self._client.delete_collection, self._name)
        self._client.close()

    def _ask(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        except Exception as failed:  # the client raises its own, httpx's and grpc's kinds
            raise DataError(f"Qdrant did not do what was asked: {failed}") from failed


def _all_alike(*arrays: ndarray) -> bool:
    """Whether all values of all arrays are the same."""
    return len(np.unique(np.concatenate(arrays))) <= 1


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise DataError(f'{name} is not installed: pip install "prime-jax[search]"') from None
