"""The one place that knows which kind of model is called how."""

from typing import Any

from prime_jax.export.embedding_interface import EmbeddingInterface
from prime_jax.export.interface import Interface
from prime_jax.export.mix_interface import MixInterface
from prime_jax.export.text_interface import TextInterface
from prime_jax.models import AnyConfig

_INTERFACES: dict[str, Any] = {"text": TextInterface, "mix": MixInterface}


def interface_of(config: AnyConfig) -> Interface:
    """How models of this configuration are called from outside."""
    interface: Interface = _INTERFACES.get(config.kind, EmbeddingInterface)(config)
    return interface
