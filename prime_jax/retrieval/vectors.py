"""Vectors that are compared by their direction."""

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray


def unit(vectors: Float[ndarray, "*B E"]) -> Float32[ndarray, "*B E"]:
    """Scale to length 1; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)
