"""Which dtype a compiled shape computes in: set by hand, or the fastest of those that agree with float32.

bfloat16 halves the weights that are read and, on most processors, doubles the rate of products; its
predictions differ from float32's in the fourth digit. Whether it pays depends on the machine, so it is
measured, not assumed; and so is how float32 matrices should lie in memory.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.devices import on_gpu
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


def half_recipe() -> Recipe:
    """How to compute in bfloat16 on this kind of device.

    On CPUs attention stays float32: its products are small, and XLA's bfloat16 ones of that size are slow
    there. On GPUs it is bfloat16 and ours: cuDNN's fused kernel takes a quarter longer for a dozen tokens.
    """
    if jax.default_backend() == "cpu":
        return Recipe("bfloat16", "float32", outputs_first=True)
    return Recipe("bfloat16", "bfloat16")


def measured_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes for which the ways of computing are timed before others are.

    The smallest batch waits for its weights, the largest for its products. On a GPU bfloat16 gains more in a
    large batch than in a small one, so that it wins for all where it wins for the smallest; and programs take
    long to compile.
    """
    return (sizes[0],) if on_gpu() else tuple(dict.fromkeys((sizes[0], sizes[-1])))


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
    if precision == "bfloat16":
        return Choice(half_recipe(), "set by hand")
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
    run, half = prepare(exact), half_recipe()
    answer = np.asarray(run())
    try:
        half_run = prepare(half)
        cosine = float((np.asarray(half_run()) * answer).sum(axis=-1).min())
    except Exception as unavailable:  # a kernel that this device or shape does not have; many kinds of error
        return Choice(exact, f"{half.dtype} is not available ({type(unavailable).__name__})")
    if not cosine >= AGREES:
        return Choice(exact, f"{half.dtype} strays (cosine {cosine:.4f})")
    seconds, half_seconds = timed(run, half_run)
    why = f"measured: {exact.dtype} {1000 * seconds:.1f} ms, {half.dtype} {1000 * half_seconds:.1f} ms"
    return Choice(half if half_seconds <= WORTH_IT * seconds else exact, why)


def choose_all(sizes: Sequence[int], choose_one: Callable[[int], Choice]) -> dict[int, Choice]:
    """Choose for every batch size, measuring no more of them than needed.

    Where the same recipe wins for all `measured_sizes`, it is taken for the others too; where not, those are
    measured as well. That float32 wins for the smallest batch alone says nothing of the others.
    """
    measured = measured_sizes(sizes)
    chosen = {size: choose_one(size) for size in measured}
    agreed = len({choice.recipe for choice in chosen.values()}) == 1
    agreed &= len(measured) > 1 or chosen[sizes[0]].recipe.dtype == "bfloat16"
    same = Choice(chosen[sizes[0]].recipe, f"as for batches of {' and '.join(map(str, measured))}")
    for size in sizes:
        if size not in chosen:
            chosen[size] = same if agreed else choose_one(size)
    return dict(sorted(chosen.items()))


def timed(exact: Run, half: Run) -> tuple[float, float]:
    """Seconds of the fastest of several runs of each, in turns, so that a slow moment hits both alike.

    Whatever else the machine does can only add to a run, so the fastest one says most. Where bfloat16 is
    close to the limit, more rounds decide.
    """
    fastest, half_fastest = float("inf"), float("inf")
    for rounds in range(1, _ROUNDS_WHERE_CLOSE + 1):
        fastest, half_fastest = min(fastest, _seconds(exact)), min(half_fastest, _seconds(half))
        share = half_fastest / max(fastest, 1e-9)
        if rounds >= _ROUNDS and abs(share / WORTH_IT - 1) > CLOSE:
            break
    return fastest, half_fastest


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


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
