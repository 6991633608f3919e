"""The floor under a prediction's time: reading its weights and doing its products on this device."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prime_jax.models.prime import PredictorConfig

BLOCKS, SIZE = 16, 4096  # a gigabyte of matrices
BYTES = {"float32": 4, "bfloat16": 2}
IN_A_ROW = 10  # on a GPU, where starting a program would else be a good part of its time


def floor(config: PredictorConfig, batch: int, measured: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds a prediction takes at least, for each dtype, at the rates that `rates` measured.

    `overlapped_ms` is the larger of reading and computing, which nothing can beat. `in_turn_ms` is their sum:
    what remains where the cores that multiply are also those that fetch.
    """
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    found = {}
    for dtype, size in BYTES.items():
        read = 1000 * size * model.num_params() / measured["bytes_per_second"]
        compute = 1000 * batch * operations(config) / measured[f"{dtype}_operations_per_second"]
        found[dtype] = {
            "read_ms": read,
            "compute_ms": compute,
            "overlapped_ms": max(read, compute),
            "in_turn_ms": read + compute,
        }
    return found


def operations(config: PredictorConfig) -> float:
    """Operations of the matrix products of one prediction over a full window, attention apart."""
    hidden, tokens = config.hidden_dim, config.max_context_length + 2
    whole = (config.num_layers - 1) * tokens * 12 * hidden**2  # projections in 3, out 1, MLP 8
    last = (2 * tokens + 10) * hidden**2  # keys and values of all tokens, the rest for [PRED] alone
    ends = (tokens - 1) * config.input_dim * hidden + hidden * config.output_dim
    return 2.0 * (whole + last + ends)


def rates(size: int = SIZE) -> dict[str, float]:
    """Bytes this device moves per second, the best of several ways, and operations of large products.

    Args:
        size: Side of the matrices; smaller, to try the script.
    """
    random = jax.random.key(0)  # not constants: products of zeros or ones run faster than real ones
    blocks = [jax.random.normal(jax.random.fold_in(random, index), (size, size)) for index in range(BLOCKS)]
    total = sum(block.nbytes for block in blocks)
    add = jax.jit(lambda blocks: [jnp.sum(block) for block in blocks])
    multiply = jax.jit(lambda blocks, vector: [block @ vector for block in blocks])
    seconds = [_fastest(lambda: add(blocks)), _fastest(lambda: multiply(blocks, blocks[0][0]))]
    if (summed := _torch_sum(total // 4)) is not None:
        seconds.append(summed)
    found = {"bytes_per_second": total / min(seconds)}
    if jax.default_backend() == "gpu":
        copy = jax.jit(lambda blocks: [block + 1 for block in blocks])  # what is read is also written
        found["copy_bytes_per_second"] = 2 * total / _fastest(lambda: copy(blocks))
        found["bytes_per_second"] = max(found["bytes_per_second"], found["copy_bytes_per_second"])
    for dtype in BYTES:
        matrix = blocks[0].astype(dtype)
        taken = min(_fastest(partial(multiply, matrix)) for multiply in (_by_columns, _by_rows))
        found[f"{dtype}_operations_per_second"] = 2 * size**3 / taken
    return found


def _torch_sum(elements: int) -> float | None:
    """Seconds in which PyTorch reads so many float32 on a CPU; None without it, or on a GPU.

    On a GPU PyTorch would take a part of the device's memory for good.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    on = torch.ones(elements)
    return _fastest(lambda: on.sum().item())


@jax.jit
def _by_columns(matrix: jax.Array) -> jax.Array:
    """The matrix squared: the layout in which float32 products on CPUs are fastest."""
    return jnp.matmul(matrix, matrix, precision="highest", preferred_element_type=jnp.float32)


@jax.jit
def _by_rows(matrix: jax.Array) -> jax.Array:
    """The matrix times its transpose: the layout in which bfloat16 ones are."""
    return jnp.einsum("ik,jk->ij", matrix, matrix, precision="highest", preferred_element_type=jnp.float32)


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs; on a GPU several in a row count as one."""
    in_a_row = 1 if jax.default_backend() == "cpu" else IN_A_ROW
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(in_a_row):
            result = run()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - started) / in_a_row)
    return min(taken[2:])
