"""Programs compiled ahead of time, and the folder that keeps them for the next start.

JAX trusts what it finds in a compilation cache and runs it, so the folder is the user's alone (mode 700) and
should stay so. It is split by JAX version and processor: code compiled for one processor may not run on
another.
"""

import hashlib
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
_ONE_AT_A_TIME = threading.Lock()  # the folder is a setting of the whole process


def compile_ahead(
    function: Callable[..., Any], *arguments: Any, mode: str, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compile `function` for the shapes of `arguments`, or take the program from an earlier start.

    Args:
        function: What to compile.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s in their place.
        mode: How hard XLA works, a key of `COMPILER_OPTIONS`.
        donate: Positions of arguments whose memory the program may take over.
    """
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    with _kept(cache_folder()):
        return lowered.compile(compiler_options=COMPILER_OPTIONS[mode] or None)


def cache_folder() -> Path | None:
    """Where programs are kept; None where they are not, or where the user has given JAX a folder already."""
    if getattr(jax.config, _SETTINGS[0]):
        return None
    chosen = os.environ.get(FOLDER)
    if chosen == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prime-jax"
    return (Path(chosen) if chosen else base) / f"jaxlib-{version('jaxlib')}-{_processor()}"


def _processor() -> str:
    """A short name for what this process compiles for."""
    facts = [platform.machine(), platform.processor(), str(jax.devices()[0].device_kind)]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


@contextmanager
def _kept(folder: Path | None) -> Iterator[None]:
    """Let JAX keep what it compiles in `folder` meanwhile; an unusable folder costs only time.

    The folder is a setting of the whole process. Where other threads compile at that moment, JAX may miss one
    program, which is then kept the next time.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        yield
        return
    with _ONE_AT_A_TIME:
        before = {name: getattr(jax.config, name) for name in _SETTINGS}
        try:
            for name, value in zip(_SETTINGS, (str(folder), 0.0, -1), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
