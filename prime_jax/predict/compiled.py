"""Programs compiled ahead of time, and the folder that keeps them for the next start.

JAX trusts what it finds in a compilation cache and runs it, so the folder is the user's alone (mode 700) and
should stay so. It is split by JAX version and processor: code compiled for one processor may not run on
another.
"""

import hashlib
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "PRIME_JAX_CACHE"
"""Environment variable that names the folder; empty means that nothing is kept."""

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
_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
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
    function: Callable[..., Any], *arguments: Any, mode: str, donate: tuple[int, ...] = ()
) -> Callable[[], Callable[..., Any]]:
    """The first half of `compile_ahead`, which gives the second, to be called in any thread.

    JAX's settings of the calling thread (`jax.default_device`, for instance) hold for the program; those of
    the thread that compiles do not matter.

    Args:
        function: What to compile.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s in their place.
        mode: How hard XLA works, a key of `COMPILER_OPTIONS`.
        donate: Positions of arguments whose memory the program may take over.
    """
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    options = dict(COMPILER_OPTIONS[mode])
    if mode != "default" and jax.default_backend() == "gpu":
        options |= GPU_OPTIONS

    def finish() -> Callable[..., Any]:
        with caching_in(cache_folder()):
            return _compile(lowered, options)

    return finish


def _compile(lowered: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile with those of `GPU_OPTIONS` that this version of XLA knows: they only make a program faster."""
    while True:
        try:
            program: Callable[..., Any] = lowered.compile(compiler_options=options or None)
        except Exception as refused:  # XLA names the option that it does not know
            unknown = [name for name in options if name in GPU_OPTIONS and name in str(refused)]
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


def home() -> Path | None:
    """The folder for what this library keeps between starts, for this processor; None to keep nothing."""
    chosen = os.environ.get(FOLDER)
    if chosen == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prime-jax"
    return (Path(chosen) if chosen else base) / f"jaxlib-{version('jaxlib')}-{_processor()}"


def cache_folder() -> Path | None:
    """Where programs are kept; None where they are not, or where the user has given JAX a folder already."""
    theirs = getattr(jax.config, _SETTINGS[0])
    if theirs and theirs != _KEEPING.folder:
        return None
    return home()


def usable(folder: Path) -> bool:
    """Make the folder, the user's alone, and say whether it can be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@cache
def _processor() -> str:
    """A short name for what this process compiles for."""
    facts = [platform.machine(), platform.processor(), str(jax.devices()[0].device_kind)]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


class _Keeping:
    """Whose folder JAX keeps programs in at this moment: a setting of the whole process, so it is counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.folder: str | None = None
        self.before: dict[str, Any] = {}

    def enter(self, folder: Path) -> None:
        """Set the folder, if nobody has."""
        with self.lock:
            self.users += 1
            if self.users > 1:
                return
            self.before = {name: getattr(jax.config, name) for name in _SETTINGS}
            self.folder = str(folder)
            for name, value in zip(_SETTINGS, (self.folder, 0.0, -1), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()

    def leave(self) -> None:
        """Put back what was set before, if nobody needs the folder any more."""
        with self.lock:
            self.users -= 1
            if self.users > 0:
                return
            for name, value in self.before.items():
                jax.config.update(name, value)
            self.folder = None
            compilation_cache.reset_cache()


_KEEPING = _Keeping()


@contextmanager
def caching_in(folder: Path | None) -> Iterator[None]:
    """Let JAX keep what it compiles in `folder` meanwhile; an unusable folder costs only time.

    XLA's autotuning results for GPUs go there too (`jax_persistent_cache_enable_xla_caches`, which JAX sets).
    The folder is a setting of the whole process: what others compile at that moment is kept there as well.
    """
    if folder is None or not usable(folder):
        yield
        return
    _KEEPING.enter(folder)
    try:
        yield
    finally:
        _KEEPING.leave()
