"""The one place that knows which kind of model is called how."""

from prime_jax.export.embedding_interface import EmbeddingInterface
from prime_jax.export.interface import Interface
from prime_jax.export.text_interface import TextInterface
from prime_jax.models import AnyConfig
from prime_jax.models.text import TextConfig


def interface_of(config: AnyConfig) -> Interface:
    """How models of this configuration are called from outside."""
    return TextInterface(config) if isinstance(config, TextConfig) else EmbeddingInterface(config)
