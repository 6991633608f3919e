"""Models that take embeddings: turns, or a steering vector in the place of the one turn, and a query."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prime_jax.errors import ExportError
from prime_jax.evaluate.arrays import Split
from prime_jax.export.card_words import prime_words, steered_words
from prime_jax.export.interface import (
    JOINED,
    OUTPUTS,
    Arrays,
    Company,
    Interface,
    Tensor,
    Words,
    source_of,
)
from prime_jax.models import EmbeddingConfig, Model
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.subspace import DecomposedJasperPredictor, SubspaceConfig
from prime_jax.models.text import TextPredictor

SEED = 0
STEERED_ROWS = 16
NORM = 100.0  # of the vectors of a row that does not belong


class EmbeddingInterface(Interface):
    """`context`, `context_mask` and `query`; one with subspaces also gives what explains its prediction.

    Args:
        config: Of the model.
    """

    stranger = (f"a row of norm {NORM:g}", {"norm": NORM})

    def __init__(self, config: EmbeddingConfig):
        self.config: EmbeddingConfig = config
        N, D, E = config.max_context_length, config.input_dim, config.output_dim
        if isinstance(config, SteeredConfig):
            meanings = (
                "Steering vector in the place of the one turn, [B, 1, D]; says where to look.",
                "True where there is steering, [B, 1]; False is the same as a vector of zeros.",
                "Embedding of the question, [B, D].",
            )
        else:
            meanings = (
                "Embeddings of the past turns, oldest first, [B, N, D]; padded slots are ignored.",
                "True where a turn is real, [B, N]; all False for the first turn of a conversation.",
                "Embedding of the current query, [B, D].",
            )
        context, mask, query = meanings
        self.inputs = [
            Tensor("context", "float32", (N, D), context),
            Tensor("context_mask", "bool", (N,), mask),
            Tensor("query", "float32", (D,), query),
        ]
        self.outputs = [Tensor("embedding", "float32", (E,), "Unit-norm embedding to search with, [B, E].")]
        if isinstance(config, SubspaceConfig):
            weights = "Weights of the K subspaces, [B, K]; rows sum to 1."
            self.outputs += [
                Tensor("routing", "float32", (config.num_subspaces,), weights),
                Tensor(
                    "coarse", "float32", (E,), "Mix of the subspaces' centroids by these weights, [B, E]."
                ),
                Tensor("fine", "float32", (E,), "What leads from there: embedding = coarse + fine, [B, E]."),
            ]

    def predict(self, model: Model, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What JAX answers, by name."""
        assert not isinstance(model, TextPredictor)
        inputs = given["context"], given["query"], given["context_mask"]
        return _named(model.details(*inputs)._asdict())

    def predict_in_torch(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the torch module answers."""
        inputs = given["context"], given["query"], given["context_mask"]
        if not hasattr(model, "details"):
            return {"embedding": model(*inputs)}
        return _named(model.details(*inputs)._asdict())

    def torch_source(self) -> str:
        """torch_runtime.py, with Llama layers where the model has such; or torch_jasper.py."""
        if isinstance(self.config, SteeredConfig):
            return source_of("torch_jasper.py")
        assert isinstance(self.config, PredictorConfig)
        source = source_of("torch_runtime.py")
        if self.config.block == "gelu":
            return source
        return source + source_of("torch_llama.py").partition(JOINED)[2]

    def golden_inputs(self) -> Arrays:
        """Requests for every number of real turns from 0 to N: unit vectors around a common topic.

        Every second row has its padding in front instead of behind, and padded slots hold vectors like the
        others, so that a consumer who forgets the mask gets wrong numbers. A steered model gets 16 questions,
        the even ones without steering.
        """
        rng = np.random.default_rng(SEED)
        N, D = self.config.max_context_length, self.config.input_dim
        rows = STEERED_ROWS if isinstance(self.config, SteeredConfig) else N + 1
        topic = rng.normal(size=(rows, 1, D))
        vectors = topic + rng.normal(size=(rows, N + 1, D))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        mask = np.arange(N) < np.arange(rows)[:, None] % (N + 1)
        mask[1::2] = mask[1::2, ::-1]
        vectors = vectors.astype(np.float32)
        return {"context": vectors[:, :N].copy(), "context_mask": mask, "query": vectors[:, N].copy()}

    def requests(self, split: Split, source: Path, query_prefix: str) -> Arrays:
        """The embeddings of a split's queries."""
        return {"context": split.context, "context_mask": split.mask, "query": split.query}

    def alone(self, golden: Arrays) -> Iterator[Arrays]:
        """Each golden request by itself."""
        for row in range(len(golden["query"])):
            yield {name: golden[name][row : row + 1] for name in self.names}

    def beside_a_stranger(self, golden: Arrays) -> Company:
        """The golden requests, and the last of them with vectors a hundred times as long."""
        inputs = {name: golden[name] for name in self.names}
        strange = {
            name: np.concatenate(
                [array, array[-1:] if array.dtype == bool else np.float32(NORM) * array[-1:]]
            )
            for name, array in inputs.items()
        }
        return Company(strange, np.arange(len(golden["query"])))

    def metadata(self) -> dict[str, object]:
        """Facts about the model in its ONNX file."""
        config: Any = self.config
        facts: dict[str, object] = {
            "input_dim": config.input_dim,
            "output_dim": config.output_dim,
            "max_context_length": config.max_context_length,
            "normalised": "true",
            "residual": config.residual,
        }
        if isinstance(config, PredictorConfig):
            facts["context_attention"] = config.context_attention
        else:
            facts["kind"] = config.kind
        if isinstance(config, SubspaceConfig):
            facts |= {"num_subspaces": config.num_subspaces, "routing": config.routing}
        return facts

    def words(self, facts: Mapping[str, Any]) -> Words:
        """What the card says of this kind."""
        config: Any = self.config
        return (
            prime_words(config, facts)
            if isinstance(config, PredictorConfig)
            else steered_words(config, facts)
        )

    def check(self, model: Model) -> None:
        """Refuse a model with subspaces that never learned where they are.

        Raises:
            ExportError: If all its centroids are zero.
        """
        if isinstance(model, DecomposedJasperPredictor) and not np.any(np.asarray(model.centroids[...])):
            raise ExportError(
                "the model cannot be exported: all its centroids are zero, it was never trained on data with "
                "clusters; training puts them there"
            )


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs among what a model says of a prediction."""
    return {name: found[name] for name in OUTPUTS if found.get(name) is not None}
