"""What an exported model takes and gives, by name: shapes, types and meanings for every kind of model.

Every kind takes the same three inputs and gives `embedding`; one with subspaces also gives what explains it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from prime_jax.errors import ExportError
from prime_jax.models import AnyConfig, Model
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.subspace import DecomposedJasperPredictor, SubspaceConfig

INPUTS = ("context", "context_mask", "query")
JOINED = "# Everything above this line is in torch_runtime.py already.\n"
OUTPUTS = ("embedding", "routing", "coarse", "fine")  # of which every model has the first


class Tensor(NamedTuple):
    """One input or output.

    Attributes:
        name: By which runtimes know it.
        dtype: `float32` or `bool`.
        sizes: Its shape without the batch, which comes first and is free.
        meaning: In a sentence, for who uses the file.
    """

    name: str
    dtype: str
    sizes: tuple[int, ...]
    meaning: str


def inputs_of(config: AnyConfig) -> list[Tensor]:
    """The inputs of a model, in the order of its ONNX file."""
    N, D = config.max_context_length, config.input_dim
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
    return [
        Tensor("context", "float32", (N, D), context),
        Tensor("context_mask", "bool", (N,), mask),
        Tensor("query", "float32", (D,), query),
    ]


def outputs_of(config: AnyConfig) -> list[Tensor]:
    """The outputs of a model, in the order of its ONNX file."""
    E = config.output_dim
    embedding = Tensor("embedding", "float32", (E,), "Unit-norm embedding to search with, [B, E].")
    if not isinstance(config, SubspaceConfig):
        return [embedding]
    weights = "Weights of the K subspaces, [B, K]; rows sum to 1."
    return [
        embedding,
        Tensor("routing", "float32", (config.num_subspaces,), weights),
        Tensor("coarse", "float32", (E,), "Mix of the subspaces' centroids by these weights, [B, E]."),
        Tensor("fine", "float32", (E,), "What leads from there: embedding = coarse + fine, [B, E]."),
    ]


def torch_source(config: AnyConfig | None = None) -> str:
    """What a bundle of such a model holds as torch_runtime.py; None means the default model."""
    here = Path(__file__).parent
    if isinstance(config, SteeredConfig):
        return (here / "torch_jasper.py").read_text("utf-8")
    source = (here / "torch_runtime.py").read_text("utf-8")
    if config is None or config.block == "gelu":
        return source
    return source + (here / "torch_llama.py").read_text("utf-8").partition(JOINED)[2]


def check_centroids(model: Model) -> None:
    """Refuse a model with subspaces that never learned where they are.

    Raises:
        ExportError: If all its centroids are zero.
    """
    if isinstance(model, DecomposedJasperPredictor) and not np.any(np.asarray(model.centroids[...])):
        raise ExportError(
            "the model cannot be exported: all its centroids are zero, it was never trained on data with "
            "clusters; training puts them there"
        )
