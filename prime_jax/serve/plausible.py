"""Which vectors can be embeddings at all, and which can be predictions.

Bytes in the wrong order or of another type are finite numbers as well, between 1e-38 and 1e38. A model gives
zeros or NaN for them, or a unit vector that means nothing.
"""

import numpy as np

from prime_jax.errors import PredictorError
from prime_jax.predict.inputs import LEAST_NORM

LARGEST, SMALLEST = 1e6, LEAST_NORM  # tighter than `predict` is: what comes as bytes was more often misread
UNIT = 1e-3  # by which the norm of a prediction may be off
_HINT = "base64 must be of little-endian float32"


def check_query(name: str, vector: np.ndarray) -> None:
    """Refuse a query `[D]` that no encoder gives.

    Raises:
        PredictorError: If its norm is below 1e-6 or above 1e6; the message has `name`.
    """
    norm = _norm(vector)
    if not SMALLEST <= norm <= LARGEST:
        raise PredictorError(
            f"{name} has norm {norm:.1e}, expected an embedding with a norm from {SMALLEST:g} to "
            f"{LARGEST:g}; {_HINT}"
        )


def check_turn(name: str, vector: np.ndarray) -> None:
    """Refuse a turn `[D]` that no encoder gives; zeros are allowed, they steer nowhere.

    Raises:
        PredictorError: If its norm is above 1e6, or below 1e-6 and not 0; the message has `name`.
    """
    if np.any(vector):
        check_query(name, vector)


def check_turns(name: str, turns: np.ndarray) -> None:
    """Refuse turns `[N, D]` of which one is none; the message names the first.

    Raises:
        PredictorError: As `check_turn`.
    """
    for place, turn in enumerate(turns):
        check_turn(f"{name}: turn {place}", turn)


def is_prediction(vector: np.ndarray) -> bool:
    """Whether a vector `[E]` is finite and of unit norm, to 1e-3."""
    return bool(abs(_norm(vector) - 1) <= UNIT)  # NaN is not


def _norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))
