"""Which dtype a compiled shape computes in: set by hand, or the fastest of those that agree with float32.

bfloat16 halves the weights that are read and, on most processors, doubles the rate of products; its
predictions differ from float32's in the fourth digit. Whether it pays depends on the machine, so it is
measured, not assumed.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from prime_jax.errors import PredictorError
from prime_jax.predict.forward import Attention
from prime_jax.predict.weights import DType

Precision = Literal["auto", "float32", "bfloat16"]
CHOICES = ("auto", "float32", "bfloat16")

MEASURED_FROM = 10_000_000
"""Parameters below which float32 is taken unmeasured: such models answer within milliseconds in any dtype."""
WORTH_IT = 0.8
"""bfloat16 is taken where it needs at most this share of float32's time."""
AGREES = 0.999
"""Least cosine between a prediction in bfloat16 and the same in float32."""
_RUNS = 3


class Recipe(NamedTuple):
    """How a program computes: the dtype of its matrices, and its attention."""

    dtype: DType
    attention: Attention


class Choice(NamedTuple):
    """The recipe of one compiled shape.

    Attributes:
        recipe: How it computes.
        why: The reason, in a few words, with the measured times.
    """

    recipe: Recipe
    why: str


EXACT = Recipe("float32", "float32")
Run = Callable[[], jax.Array]


def half_recipes() -> tuple[Recipe, ...]:
    """The ways of computing in bfloat16 that may pay on this kind of device.

    On CPUs attention stays float32: its products are small, and XLA's bfloat16 ones of that size are slow
    there.
    """
    if jax.default_backend() == "cpu":
        return (Recipe("bfloat16", "float32"),)
    return (Recipe("bfloat16", "bfloat16"), Recipe("bfloat16", "cudnn"))


def check_known(precision: str) -> None:
    """Refuse a precision that is none of `CHOICES`.

    Raises:
        PredictorError: Naming it.
    """
    if precision not in CHOICES:
        raise PredictorError(f"precision {precision!r} is unknown; choose from {', '.join(CHOICES)}")


def choose(precision: Precision, parameters: int, prepare: Callable[[Recipe], Run]) -> Choice:
    """Choose the recipe of one shape.

    Args:
        precision: What the user asked for.
        parameters: Size of the model.
        prepare: Compiles a recipe and returns a call that runs it once on the same fixed input.

    Raises:
        PredictorError: If `precision` is none of `CHOICES`.
    """
    check_known(precision)
    if precision == "float32":
        return Choice(EXACT, "set by hand")
    if precision == "bfloat16" and len(half_recipes()) == 1:
        return Choice(half_recipes()[0], "set by hand")
    if precision == "auto" and parameters < MEASURED_FROM:
        return Choice(EXACT, f"under {MEASURED_FROM:,} parameters float32 is fast enough")
    exact = prepare(EXACT)
    answer, seconds = np.asarray(exact()), {EXACT: _median_seconds(exact)}
    refused = []
    for recipe in half_recipes():
        try:
            run = prepare(recipe)
            cosine = float((np.asarray(run()) * answer).sum(axis=-1).min())
        except (
            Exception
        ) as unavailable:  # a kernel that this device or shape does not have; XLA raises many kinds
            refused.append(f"{_name(recipe)} is not available ({type(unavailable).__name__})")
            continue
        if not cosine >= AGREES:
            refused.append(f"{_name(recipe)} strays (cosine {cosine:.4f})")
            continue
        seconds[recipe] = _median_seconds(run)
    return _fastest(seconds, refused, by_hand=precision == "bfloat16")


def _fastest(seconds: Mapping[Recipe, float], refused: list[str], *, by_hand: bool) -> Choice:
    """The fastest bfloat16 recipe where it is worth it, or asked for; else float32."""
    times = [f"{_name(recipe)} {1000 * taken:.1f} ms" for recipe, taken in seconds.items()]
    half = [recipe for recipe in seconds if recipe != EXACT]
    why = "measured: " + ", ".join(times + refused)
    if not half:
        return Choice(EXACT, why)
    best = min(half, key=lambda recipe: seconds[recipe])
    if by_hand:
        return Choice(best, f"set by hand; {why}")
    return Choice(best if seconds[best] <= WORTH_IT * seconds[EXACT] else EXACT, why)


def _name(recipe: Recipe) -> str:
    return recipe.dtype + (" with cuDNN attention" if recipe.attention == "cudnn" else "")


def _median_seconds(run: Run) -> float:
    taken = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
