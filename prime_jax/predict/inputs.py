"""Checks what callers pass in: shapes and dtypes before anything runs; NaN, Inf and norms that cannot be.

An embedding is a direction, of norm 1 or, as some encoders give it, of some hundreds. A query of norm zero
points nowhere, and one of 1e-30 or 1e30 is something else decoded as float32, mostly bytes in the wrong
order. Both would give a vector that looks like an answer, so both are refused.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from prime_jax.errors import PredictorError
from prime_jax.models import AnyConfig
from prime_jax.models.jasper import SteeredConfig

Vectors = np.ndarray

LEAST_NORM, LARGEST_NORM = 1e-6, 1e6
"""Norms that a query may have, and a turn that is not all zeros; one of zeros says nothing."""


class Request(NamedTuple):
    """Checked input with a batch axis.

    Attributes:
        context: `[B, N, D]`, float32.
        query: `[B, D]`, float32.
        mask: `[B, N]`, bool.
        single: Whether the caller gave no batch axis, and so expects none back.
    """

    context: Vectors
    query: Vectors
    mask: np.ndarray
    single: bool


def checked(
    config: AnyConfig, context: ArrayLike, query: ArrayLike, context_mask: ArrayLike | None = None
) -> Request:
    """The arguments of `Predictor.predict` as float32 and bool arrays with a batch axis.

    Raises:
        PredictorError: For a wrong shape or dtype, too many turns, NaN, Inf, or a norm that cannot be; the
            message says where.
    """
    request = shaped(config, context, query, context_mask)
    check_values(request)
    return request


def check_values(request: Request, *, least: float = LEAST_NORM) -> None:
    """Refuse NaN, Inf and impossible norms; padded turns may hold anything.

    Args:
        request: What to look at.
        least: Smallest norm of a query.

    Raises:
        PredictorError: Naming the first such vector.
    """
    check_norms("query", request.query, least=least)
    check_norms("context", request.context, request.mask, zero=True)


def shaped(
    config: AnyConfig, context: ArrayLike, query: ArrayLike, context_mask: ArrayLike | None = None
) -> Request:
    """As `checked`, before anybody has looked at the numbers.

    Raises:
        PredictorError: For a wrong shape or dtype, or too many turns; the message says where.
    """
    contexts, queries = floats("context", context), floats("query", query)
    single = queries.ndim == 1
    if single:
        contexts, queries = contexts[None], queries[None]
    turns = contexts.shape[1] if contexts.ndim == 3 else -1
    expected = (len(queries), turns, config.input_dim)
    if queries.ndim != 2 or contexts.shape != expected or queries.shape[1] != config.input_dim:
        raise PredictorError(
            f"context {np.shape(context)} and query {np.shape(query)} do not have the shapes "
            f"[B, N, D] and [B, D] (or [N, D] and [D]) with D = {config.input_dim}"
        )
    if turns > config.max_context_length:
        raise PredictorError(
            f"context has {turns} turns, the model takes at most {config.max_context_length}; "
            "pass the newest ones"
        )
    mask = np.ones(contexts.shape[:2], bool)
    if context_mask is not None:
        mask = np.asarray(context_mask)
        mask = mask[None] if single else mask
        if mask.dtype != bool or mask.shape != contexts.shape[:2]:
            raise PredictorError(
                f"context_mask is {mask.dtype} {np.shape(context_mask)}, expected bool "
                f"{np.shape(context)[:-1]}"
            )
    return Request(contexts, queries, mask, single)


def steered_request(
    config: AnyConfig, question: ArrayLike, steering: ArrayLike | None
) -> tuple[Vectors, Vectors, np.ndarray]:
    """Question and steering as the arguments of `Predictor.predict`: the steering is the one turn.

    Raises:
        PredictorError: For a wrong shape or dtype, or a model that takes turns instead.
    """
    if not isinstance(config, SteeredConfig):
        raise PredictorError(f"a {config.kind} model takes turns, no steering: call predict(context, query)")
    questions = floats("question", question)
    vectors = np.zeros_like(questions) if steering is None else floats("steering", steering)
    if vectors.shape != questions.shape:
        raise PredictorError(f"steering has shape {vectors.shape}, the question {questions.shape}")
    return vectors[..., None, :], questions, np.any(vectors != 0, axis=-1, keepdims=True)


def rows(name: str, value: ArrayLike, batch: int, size: int) -> tuple[Vectors, bool]:
    """One embedding per conversation, `[B, D]` float32, and whether it came as `[D]` (allowed for one).

    Raises:
        PredictorError: For a wrong shape or dtype.
    """
    array = floats(name, value)
    single = array.ndim == 1 and batch == 1
    if single:
        array = array[None]
    if array.shape != (batch, size):
        or_one = f" or ({size},)" if batch == 1 else ""
        raise PredictorError(f"{name} has shape {np.shape(value)}, expected ({batch}, {size}){or_one}")
    return array, single


def floats(name: str, value: ArrayLike) -> Vectors:
    """The value as float32.

    Raises:
        PredictorError: If it is ragged or does not hold floating-point numbers.
    """
    try:
        array = np.asarray(value)
    except ValueError as ragged:
        raise PredictorError(f"{name} is not an array: {ragged}") from None
    if array.dtype == np.float32:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise PredictorError(f"{name} has dtype {array.dtype}, expected floating-point embeddings")
    with np.errstate(over="ignore"):  # what becomes Inf is refused later
        return array.astype(np.float32)


def check_norms(
    name: str,
    array: Vectors,
    real: np.ndarray | None = None,
    *,
    least: float = LEAST_NORM,
    zero: bool = False,
) -> None:
    """Refuse vectors with NaN, Inf or a norm that no embedding has.

    Args:
        name: What the array is, for the message.
        array: Vectors on the last axis, float32.
        real: True where a vector counts, others may hold anything; None means that all count.
        least: Smallest norm.
        zero: Whether a vector may also be all zeros.

    Raises:
        PredictorError: Naming the first such vector.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squared = np.einsum("...d,...d->...", array, array)
        bad = np.asarray(~((squared <= LARGEST_NORM**2) & (squared >= least**2)))
    if zero and bad.any():
        bad = np.asarray(bad & array.any(axis=-1))
    if real is not None:
        bad &= real
    if bad.any():
        raise PredictorError(_unusual(name, array, bad))


def _unusual(name: str, array: Vectors, bad: np.ndarray) -> str:
    """What is wrong with the first vector that is not finite or, if all are, with the first bad one."""
    endless = bad & ~np.isfinite(array).all(axis=-1)
    first = tuple(np.argwhere(endless if endless.any() else bad)[0])
    where = f"[{', '.join(str(int(part)) for part in first)}]" if first else ""
    if endless.any():
        return f"{name}{where} holds NaN or Inf (or a number too large for float32)"
    norm = float(np.linalg.norm(array[first].astype(np.float64)))
    return (
        f"{name}{where} has norm {norm:.3g}, which no embedding has (expected {LEAST_NORM:g} to "
        f"{LARGEST_NORM:g}); is it decoded with the right dtype and byte order?"
    )


def sample(config: AnyConfig, batch: int) -> tuple[Vectors, Vectors, np.ndarray]:
    """Fixed random unit vectors to measure with: full windows, `[B, N, D]`, `[B, D]` and `[B, N]`."""
    random = np.random.default_rng(0)
    context = random.normal(size=(batch, config.max_context_length, config.input_dim)).astype(np.float32)
    query = random.normal(size=(batch, config.input_dim)).astype(np.float32)
    context /= np.linalg.norm(context, axis=-1, keepdims=True)
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    return context, query, np.ones(context.shape[:2], bool)
