"""Predictions of a whole split with the parameters of a state."""

import copy

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int64

from prime_jax.data.embedded import EmbeddedDataset, gather
from prime_jax.train.sharding import by_rows, replicated, spread_out
from prime_jax.train.state import Graph, TrainState
from prime_jax.types import Prediction

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
        def forward(params: object, context: Array, query: Array, mask: Array) -> Prediction:
            prediction: Prediction = nnx.merge(graph, params).details(context, query, mask)
            return prediction

        self._mesh, self._store, self._split, self._name = mesh, data.store, data.splits[split], split
        self._examples = np.arange(len(self._split)) if examples is None else examples
        self._predict = jax.jit(forward, out_shardings=replicated(mesh))

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
