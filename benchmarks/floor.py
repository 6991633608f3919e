"""The floor under a prediction's time: reading its weights and doing its products on this device."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from prime_jax.models.prime import PredictorConfig

BLOCKS, SIZE = 16, 4096  # a gigabyte of matrices
BYTES = {"float32": 4, "bfloat16": 2}


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


def rates() -> dict[str, float]:
    """Bytes this device reads per second, the best of three ways, and operations of large products."""
    blocks = [jnp.full((SIZE, SIZE), float(index)) for index in range(BLOCKS)]
    gigabyte = sum(block.nbytes for block in blocks)
    add = jax.jit(lambda blocks: [jnp.sum(block) for block in blocks])
    multiply = jax.jit(lambda blocks, vector: [block @ vector for block in blocks])
    on = torch.ones(BLOCKS * SIZE * SIZE, device="cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "bytes_per_second": gigabyte
        / min(
            _fastest(lambda: add(blocks)),
            _fastest(lambda: multiply(blocks, blocks[0][0])),
            _fastest(lambda: on.sum().item()),
        )
    }
    for dtype in BYTES:
        matrix = blocks[0].astype(dtype)
        taken = min(_fastest(partial(multiply, matrix)) for multiply in (_by_columns, _by_rows))
        found[f"{dtype}_operations_per_second"] = 2 * SIZE**3 / taken
    return found


@jax.jit
def _by_columns(matrix: jax.Array) -> jax.Array:
    """The matrix squared: the layout in which float32 products on CPUs are fastest."""
    return jnp.matmul(matrix, matrix, precision="highest", preferred_element_type=jnp.float32)


@jax.jit
def _by_rows(matrix: jax.Array) -> jax.Array:
    """The matrix times its transpose: the layout in which bfloat16 ones are."""
    return jnp.einsum("ik,jk->ij", matrix, matrix, precision="highest", preferred_element_type=jnp.float32)


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs."""
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - started)
    return min(taken[2:])
