"""Which dtype a compiled shape computes in: set by hand, or the fastest of those that agree with float32.

bfloat16 halves the weights that are read and, on most processors, doubles the rate of products; its
predictions differ from float32's in the fourth digit. Whether it pays depends on the machine, so it is
measured, not assumed; and so is how float32 matrices should lie in memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
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
TRANSPOSED_FROM = 0.9
"""Float32 matrices are copied to lie `[O, I]` where a product then needs at most this share of its time."""
CLOSE = 0.15
"""How near to `WORTH_IT`, as a share of it, a measurement is repeated."""
_ROUNDS, _ROUNDS_WHERE_CLOSE = 5, 15


class Recipe(NamedTuple):
    """How a program computes.

    Attributes:
        dtype: Of its matrices.
        attention: How attention is computed.
        outputs_first: Whether its matrices lie `[O, I]`.
    """

    dtype: DType
    attention: Attention
    outputs_first: bool = False


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
        return (Recipe("bfloat16", "float32", outputs_first=True),)
    return (Recipe("bfloat16", "bfloat16"), Recipe("bfloat16", "cudnn"))


def check_known(precision: str) -> None:
    """Refuse a precision that is none of `CHOICES`.

    Raises:
        PredictorError: Naming it.
    """
    if precision not in CHOICES:
        raise PredictorError(f"precision {precision!r} is unknown; choose from {', '.join(CHOICES)}")


def unmeasured(precision: Precision, parameters: int, exact: Recipe = EXACT) -> Choice | None:
    """The choice where nothing has to be measured; None where something has to."""
    if precision == "float32":
        return Choice(exact, "set by hand")
    if precision == "bfloat16" and len(half_recipes()) == 1:
        return Choice(half_recipes()[0], "set by hand")
    if precision == "auto" and parameters < MEASURED_FROM:
        return Choice(exact, f"under {MEASURED_FROM:,} parameters float32 is fast enough")
    return None


def choose(
    precision: Precision, parameters: int, prepare: Callable[[Recipe], Run], exact: Recipe = EXACT
) -> Choice:
    """Choose the recipe of one shape.

    Args:
        precision: What the user asked for.
        parameters: Size of the model.
        prepare: Compiles a recipe and returns a call that runs it once on the same fixed input.
        exact: How this model computes in float32 on this machine.

    Raises:
        PredictorError: If `precision` is none of `CHOICES`.
    """
    check_known(precision)
    if known := unmeasured(precision, parameters, exact):
        return known
    runs = {exact: prepare(exact)}
    answer = np.asarray(runs[exact]())
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
        runs[recipe] = run
    return _fastest(timed(runs, exact), exact, refused, by_hand=precision == "bfloat16")


def choose_all(sizes: Sequence[int], choose_one: Callable[[int], Choice]) -> dict[int, Choice]:
    """Choose for every batch size, measuring no more of them than needed.

    The smallest batch waits for its weights, the largest for its products. Where the same recipe wins at both
    ends, it is taken in between too; where not, those in between are measured as well.
    """
    ends = (sizes[0], sizes[-1])
    chosen = {size: choose_one(size) for size in dict.fromkeys(ends)}
    for size in sizes[1:-1]:
        if chosen[ends[0]].recipe == chosen[ends[1]].recipe:
            chosen[size] = Choice(chosen[ends[0]].recipe, f"as for batches of {ends[0]} and {ends[1]}")
        else:
            chosen[size] = choose_one(size)
    return dict(sorted(chosen.items()))


def timed(runs: Mapping[Recipe, Run], exact: Recipe) -> dict[Recipe, float]:
    """Seconds of the fastest of several runs of each, in turns, so that a slow moment hits all alike.

    Whatever else the machine does can only add to a run, so the fastest one says most. Where the best
    bfloat16 is close to the limit, more rounds decide.
    """
    fastest = dict.fromkeys(runs, float("inf"))
    for rounds in range(1, _ROUNDS_WHERE_CLOSE + 1):
        for recipe, run in runs.items():
            fastest[recipe] = min(fastest[recipe], _seconds(run))
        half = [seconds for recipe, seconds in fastest.items() if recipe != exact]
        share = min(half, default=float("inf")) / max(fastest[exact], 1e-9)
        if rounds >= _ROUNDS and abs(share / WORTH_IT - 1) > CLOSE:
            break
    return fastest


def transposed_pays(rows: Sequence[int], inputs: int, outputs: int) -> bool:
    """Whether float32 products on this CPU are faster with matrices that lie `[O, I]`.

    On some processors they take half the time, on others more; it costs a copy of the weights. One product of
    the model's size is timed both ways, for each number of rows.

    Args:
        rows: Numbers of rows that products have, smallest and largest.
        inputs: Inputs I of the model's largest matrix.
        outputs: Its outputs O.
    """
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.standard_normal((inputs, outputs), np.float32))
    kernels = (kernel, jnp.asarray(np.ascontiguousarray(np.asarray(kernel).T)))
    shares = []
    for count in rows:
        x = jnp.asarray(random.standard_normal((count, inputs), np.float32))
        runs = [jax.jit(_product, static_argnums=2) for _ in kernels]
        fastest = [float("inf")] * len(kernels)
        for _ in range(_ROUNDS + 1):  # the first one compiles
            for first, (run, matrix) in enumerate(zip(runs, kernels, strict=True)):
                started = time.perf_counter()
                jax.block_until_ready(run(x, matrix, bool(first)))
                fastest[first] = min(fastest[first], time.perf_counter() - started)
        shares.append(fastest[1] / fastest[0])
    return float(np.mean(shares)) <= TRANSPOSED_FROM and max(shares) <= 1.05


def _product(x: jax.Array, kernel: jax.Array, outputs_first: bool) -> jax.Array:
    contracted = (((1,), (1 if outputs_first else 0,)), ((), ()))
    multiplied: jax.Array = jax.lax.dot_general(
        x, kernel, contracted, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return multiplied


def _fastest(seconds: Mapping[Recipe, float], exact: Recipe, refused: list[str], *, by_hand: bool) -> Choice:
    """The fastest bfloat16 recipe where it is worth it, or asked for; else float32."""
    times = [f"{_name(recipe)} {1000 * taken:.1f} ms" for recipe, taken in seconds.items()]
    half = [recipe for recipe in seconds if recipe != exact]
    why = "measured: " + ", ".join(times + refused)
    if not half:
        return Choice(exact, why)
    best = min(half, key=lambda recipe: seconds[recipe])
    if by_hand:
        return Choice(best, f"set by hand; {why}")
    return Choice(best if seconds[best] <= WORTH_IT * seconds[exact] else exact, why)


def _name(recipe: Recipe) -> str:
    return recipe.dtype + (" with cuDNN attention" if recipe.attention == "cudnn" else "")


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
