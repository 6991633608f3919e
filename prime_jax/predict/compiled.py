"""Programs compiled ahead of time, and kept for the next start (`prime_jax.program_cache`)."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax

from prime_jax.program_cache import cache_folder, caching_in

COMPILER_OPTIONS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"exec_time_optimization_effort": 1.0},
}
"""What XLA is told for each `compile_mode`."""
GPU_OPTIONS: Mapping[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN",
    "xla_gpu_graph_min_graph_size": 1,
}
"""Added on GPUs, but for the mode `default`: kernels are launched together, as command buffers (CUDA graphs).

At batch 1 a prediction is dozens of kernels of a few microseconds each, and launching one takes as long. They
go with our own programs only; XLA_FLAGS and the programs of others stay as they are.
"""
MANY_ROWS = 1024
LIBRARY_PRODUCTS: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""Added on GPUs for products of at least `MANY_ROWS` rows, which cuBLAS computes.

It is at its best there, and XLA need not compile and time a hundred kernels of its own for each product. An
H200 computes a batch of 256 as fast so, and its program is there in two thirds of the time; a batch of one
would take a third longer.
"""
OPTIONAL = (*GPU_OPTIONS, *LIBRARY_PRODUCTS)
_LOG = logging.getLogger(__name__)


def compile_ahead(
    function: Callable[..., Any], *arguments: Any, mode: str, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compile `function` for the shapes of `arguments`, or take the program from an earlier start.

    Several threads may compile at once. What comes back is called by JAX's C++ dispatch and refuses every
    other shape, so nothing is compiled behind a caller's back. Arguments as `trace_ahead`'s.
    """
    return trace_ahead(function, *arguments, mode=mode, donate=donate)()


def trace_ahead(
    function: Callable[..., Any],
    *arguments: Any,
    mode: str,
    donate: tuple[int, ...] = (),
    answers: Any = None,
    rows: int = 0,
) -> Callable[[], Callable[..., Any]]:
    """The first half of `compile_ahead`, which gives the second, to be called in any thread.

    JAX's settings of the calling thread (`jax.default_device`, for instance) hold for the program; those of
    the thread that compiles do not matter.

    Args:
        function: What to compile.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s in their place.
        mode: How hard XLA works, a key of `COMPILER_OPTIONS`.
        donate: Positions of arguments whose memory the program may take over.
        answers: Shardings of what the function gives, as for `jax.jit`; None leaves them to JAX.
        rows: How many rows its products have, where that is known.
    """
    lowered = jax.jit(function, donate_argnums=donate, out_shardings=answers).lower(*arguments)
    options = dict(COMPILER_OPTIONS[mode])
    if mode != "default" and jax.default_backend() == "gpu":
        options |= {**GPU_OPTIONS, **(LIBRARY_PRODUCTS if rows >= MANY_ROWS else {})}

    def finish() -> Callable[..., Any]:
        with caching_in(cache_folder()):
            return _compile(lowered, options)

    return finish


def _compile(lowered: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile with those options for GPUs that this version of XLA knows: they only make a program faster."""
    while True:
        try:
            program: Callable[..., Any] = lowered.compile(compiler_options=options or None)
        except Exception as refused:  # XLA names the option that it does not know
            unknown = [name for name in options if name in OPTIONAL and name in str(refused)]
            if not unknown:
                raise
            _LOG.debug("this version of XLA does not take %s", ", ".join(unknown))
            options = {name: value for name, value in options.items() if name not in unknown}
        else:
            return program


def compile_all(jobs: Iterable[Callable[[], Any]], done: Callable[[], None]) -> None:
    """Run jobs that compile, side by side: XLA compiles outside Python's lock.

    Args:
        jobs: Each compiles something and keeps it, its error too. An iterator is asked on the calling thread
            while the first jobs run already: the place for `trace_ahead`.
        done: Called after each job.
    """
    with caching_in(cache_folder()), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for finished in as_completed([pool.submit(job) for job in jobs]):
            finished.result()
            done()
