"""prime-jax predicts the embedding of what should be retrieved, before anything is searched.

Public names load on first use, so that `import prime_jax` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prime_jax._version import __version__

if TYPE_CHECKING:
    from prime_jax.config import Config, TrainingConfig
    from prime_jax.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        OverloadedError,
        PredictorError,
        WrongAnswerError,
    )
    from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
    from prime_jax.predict.adapter import general, load_adapter
    from prime_jax.predict.predictor import Predictor, load
    from prime_jax.predict.schema import PredictorInput, PredictorOutput
    from prime_jax.predict.untrained import untrained

_HOME = {
    "load": "prime_jax.predict.predictor",
    "general": "prime_jax.predict.adapter",
    "load_adapter": "prime_jax.predict.adapter",
    "untrained": "prime_jax.predict.untrained",
    "Predictor": "prime_jax.predict.predictor",
    "EmbeddingPredictor": "prime_jax.models.prime",
    "PredictorConfig": "prime_jax.models.prime",
    "Config": "prime_jax.config",
    "TrainingConfig": "prime_jax.config",
    "PredictorError": "prime_jax.errors",
    "CheckpointError": "prime_jax.errors",
    "ConfigError": "prime_jax.errors",
    "DataError": "prime_jax.errors",
    "ExportError": "prime_jax.errors",
    "OverloadedError": "prime_jax.errors",
    "WrongAnswerError": "prime_jax.errors",
    "PredictorInput": "prime_jax.predict.schema",
    "PredictorOutput": "prime_jax.predict.schema",
}

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "EmbeddingPredictor",
    "ExportError",
    "OverloadedError",
    "Predictor",
    "PredictorConfig",
    "PredictorError",
    "PredictorInput",
    "PredictorOutput",
    "TrainingConfig",
    "WrongAnswerError",
    "__version__",
    "general",
    "load",
    "load_adapter",
    "untrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prime_jax' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
