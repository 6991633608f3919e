"""Predictions of a whole split with the parameters of a state."""

import copy
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int64

from prime_jax.data.embedded import EmbeddedDataset, gather
from prime_jax.data.sequences import Sequences, packed_into
from prime_jax.pretrained.bert import TOKENS_PER_BATCH, TOKENS_PER_BATCH_ELSEWHERE
from prime_jax.train.sharding import by_rows, replicated, spread_out
from prime_jax.train.state import Graph, TrainState
from prime_jax.types import Conversations, Prediction

ROWS = 256

Vectors = Float32[np.ndarray, "n E"]


class SplitPredictor:
    """Predicts a split with given parameters, on all devices, some rows at a time; compiled once.

    Args:
        graph: Structure of the model.
        data: The dataset.
        split: Name of the split.
        mesh: The devices.
        examples: Which examples of it, in order; None for all.
    """

    def __init__(
        self,
        graph: Graph,
        data: EmbeddedDataset,
        split: str,
        mesh: Mesh,
        examples: Int64[np.ndarray, " n"] | None = None,
    ):
        def forward(params: object, *inputs: Any) -> Prediction:
            prediction: Prediction = nnx.merge(graph, params).details(*inputs)
            return prediction

        self._mesh, self._store, self._split, self._name = mesh, data.store, data.splits[split], split
        self._examples = np.arange(len(self._split)) if examples is None else examples

        def forward_packed(params: object, *inputs: Any) -> Array:
            vectors: Array = nnx.merge(graph, params).packed(Conversations(*inputs))
            return vectors.reshape(-1, vectors.shape[-1])

        self._predict = jax.jit(forward, out_shardings=replicated(mesh))
        self._predict_packed = jax.jit(forward_packed, out_shardings=replicated(mesh))

    def over(self, data: EmbeddedDataset) -> "SplitPredictor":
        """The same split of other data of the same size, by the program that is compiled already."""
        other = copy.copy(self)
        other._store, other._split = data.store, data.splits[self._name]
        return other

    def __call__(self, state: TrainState) -> Vectors:
        """Unit-norm predictions `[n, E]`, in every process."""
        return np.asarray(self.details(state).embedding)

    def details(self, state: TrainState) -> Prediction:
        """Predictions with their routing where the model has a router, as numpy arrays, in every process."""
        if self._split.sequences is not None:
            vectors: Any = self._read(self._split.sequences, state)
            return Prediction(vectors)
        split, count, devices = self._split, len(self._examples), self._mesh.size
        rows = -(-min(ROWS, count) // devices) * devices
        parts = []
        for start in range(0, count, rows):
            chunk = self._examples[np.arange(start, start + rows) % count]  # wraps; the surplus is dropped
            context, mask = gather(self._store, split.context_rows[chunk])
            query = self._store[split.query_rows[chunk]]
            inputs = spread_out((context, query, mask), by_rows(self._mesh))
            parts.append(jax.tree.map(np.asarray, self._predict(state.predicting, *inputs)))
        whole: Prediction = jax.tree.map(lambda *pieces: np.concatenate(pieces)[:count], *parts)
        return whole

    def _read(self, sequences: Sequences, state: TrainState) -> Vectors:
        """Predictions of a model that reads text: everything is packed, then read some rows at a time."""
        longest = int(sequences.lengths.max(initial=1))
        tokens = TOKENS_PER_BATCH.get(jax.default_backend(), TOKENS_PER_BATCH_ELSEWHERE)
        rows = self._mesh.size * max(1, tokens // longest)
        whole = packed_into(sequences, self._examples, width=longest, multiple=rows)
        parts = []
        for start in range(0, len(whole.tokens), rows):
            chunk = [field[start : start + rows] for field in whole[:-1]]
            inputs = spread_out((*chunk, np.zeros(rows, np.int32)), by_rows(self._mesh))
            parts.append(np.asarray(self._predict_packed(state.predicting, *inputs)))
        found: Vectors = np.concatenate(parts)[whole.slots]
        return found
