"""Predictions on their way out: checked, and as JSON."""

import numpy as np
from fastapi import Response

from prime_jax.errors import WrongAnswerError
from prime_jax.predict.schema import Encoding, PredictorOutput

UNIT = 1e-3  # by which the norm of a prediction that leaves the server may be off


def output(
    vector: np.ndarray, encoding: Encoding, sure: float | None = None, trust: float | None = None
) -> PredictorOutput:
    """A prediction `[E]` with its confidence.

    Raises:
        WrongAnswerError: If it is no unit vector, or the confidence no probability.
    """
    norm = np.linalg.norm(vector)
    if not abs(norm - 1) <= UNIT or not (sure is None or 0 <= sure <= 1):  # NaN is neither
        raise WrongAnswerError(f"norm {norm:.3g}, confidence {sure}")
    return PredictorOutput.of(vector, encoding, sure, trust)


def as_json(answer: PredictorOutput) -> Response:
    """The answer's body."""
    return Response(answer.model_dump_json(), media_type="application/json")
