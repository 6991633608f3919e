"""Models without layers: they take what PRIME takes, and bring a torch module and a card of their own."""

from collections.abc import Mapping
from typing import Any

from prime_jax.export.card_words import mix_words
from prime_jax.export.embedding_interface import EmbeddingInterface
from prime_jax.export.interface import Words, source_of
from prime_jax.export.joining import READING, joined
from prime_jax.models.mix import MixConfig


class MixInterface(EmbeddingInterface):
    """`context`, `context_mask` and `query`.

    Args:
        config: Of the model.
    """

    config: MixConfig

    def torch_source(self) -> str:
        """torch_mix.py, with what it imports of torch_runtime.py written out."""
        return joined(source_of("torch_mix.py"), source_of("torch_runtime.py"), (*READING, "check_inputs"))

    def metadata(self) -> dict[str, object]:
        """Facts about the model in its ONNX file."""
        config = self.config
        return {
            "kind": config.kind,
            "input_dim": config.input_dim,
            "output_dim": config.output_dim,
            "max_context_length": config.max_context_length,
            "normalised": "true",
            "linear": config.linear,
        }

    def words(self, facts: Mapping[str, Any]) -> Words:
        """What the card says of this kind."""
        return mix_words(self.config, facts)
