"""The configuration of a run: what can be set, and how it is read."""

from prime_jax.config.hybrid import HybridSection, control_rows
from prime_jax.config.reading import load_stored_config, nearest, read_config, to_yaml, user_names
from prime_jax.config.sections import (
    Config,
    DataConfig,
    MeshConfig,
    MonitorConfig,
    SteeringConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "HybridSection",
    "MeshConfig",
    "MonitorConfig",
    "SteeringConfig",
    "TrainingConfig",
    "control_rows",
    "load_stored_config",
    "nearest",
    "read_config",
    "to_yaml",
    "user_names",
]
