"""Predictions of a model that reads text: query and turns in one sequence, one pass of its encoder.

A single request is padded to one of a few lengths; many are packed. For each shape that occurs a program is
compiled. Where the query's own embedding is added (`model.query_weight`) it is read by itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from prime_jax.data.conversations import TOKENIZER, ConversationTokenizer
from prime_jax.data.sequences import Sequences, packed_into
from prime_jax.errors import ConfigError
from prime_jax.models.text import TextPredictor
from prime_jax.pretrained.bert import BUCKETS, TOKENS_PER_BATCH, TOKENS_PER_BATCH_ELSEWHERE
from prime_jax.retrieval.vectors import unit
from prime_jax.train.text_start import started_model
from prime_jax.types import Conversations

if TYPE_CHECKING:
    from prime_jax.predict.predictor import Predictor


class ReadingPath:
    """Predicts from texts with a `TextPredictor`.

    Args:
        predictor: Holds the model; its checkpoint or bundle has the tokenizer.

    Raises:
        ConfigError: If it was not loaded from a folder that has one.
        DataError: If the tokenizer is damaged or another one.
    """

    def __init__(self, predictor: "Predictor"):
        model, source = predictor.model, predictor.info().get("source")
        assert isinstance(model, TextPredictor)
        if source is None:
            raise ConfigError("a text predictor in memory has no tokenizer; load it from a run or a bundle")
        self.tokenizer = ConversationTokenizer.of_model(model.config, Path(source) / TOKENIZER)
        self._config = model.config
        self._prefix = predictor.query_prefix
        most = model.config.max_tokens
        self._widths = (*(size for size in BUCKETS if size < most), most)
        # On the device once: numpy arrays would be copied there for every question.
        self._params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        plain = started_model(model.config.model_copy(update={"query_weight": 0.0}), self._params)
        graph = nnx.graphdef(plain)

        def one(params: Any, tokens: Array, mask: Array) -> Array:
            answer: Array = nnx.merge(graph, params)(tokens, mask)
            return answer

        def many(params: Any, conversations: Conversations) -> Array:
            vectors: Array = nnx.merge(graph, params).packed(conversations)
            return vectors.reshape(-1, vectors.shape[-1])

        self._one, self._many = jax.jit(one), jax.jit(many)

    def warm_up(self) -> None:
        """Compile the program of a single request, for each length."""
        for width in self._widths:
            self._one(self._params, np.zeros((1, width), np.int32), np.ones((1, width), bool))

    def predict(self, contexts: Sequence[Sequence[str]], queries: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Predictions for checked requests: turns, oldest first, and a query each."""
        if not queries:
            return np.zeros((0, self._config.output_dim), np.float32)
        queries, weight = [self._prefix + query for query in queries], self._config.query_weight
        whole = self._read(self.tokenizer(contexts, queries))
        if not weight or not any(contexts):
            return whole
        alone = self._read(self.tokenizer([()] * len(queries), queries))
        found: Float[np.ndarray, "B E"] = unit(whole + np.float32(weight) * alone)
        return found

    def _read(self, sequences: Sequences) -> Float[np.ndarray, "B E"]:
        """The embedding of each sequence, nothing added."""
        count = len(sequences.lengths)
        longest = int(sequences.lengths.max())
        width = next(size for size in self._widths if size >= longest)
        if count == 1:
            tokens = sequences.padded(np.zeros(1, np.int64), width)
            return np.asarray(self._one(self._params, tokens, np.arange(width)[None] < longest))
        budget = TOKENS_PER_BATCH.get(jax.default_backend(), TOKENS_PER_BATCH_ELSEWHERE)
        rows = max(1, budget // width)
        whole = packed_into(sequences, np.arange(count), width=width, multiple=rows)
        nothing = np.zeros(rows, np.int32)
        parts = []
        for start in range(0, len(whole.tokens), rows):
            chunk: Any = (*(field[start : start + rows] for field in whole[:-1]), nothing)
            parts.append(np.asarray(self._many(self._params, Conversations(*chunk))))
        found: Float[np.ndarray, "B E"] = np.concatenate(parts)[whole.slots]
        return found
