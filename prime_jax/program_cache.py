"""The folder that keeps compiled programs for the next start.

JAX trusts what it finds in a compilation cache and runs it, so the folder is the user's alone (mode 700) and
should stay so. It is split by JAX version and processor: code compiled for one processor may not run on
another.
"""

import hashlib
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "PRIME_JAX_CACHE"
"""Environment variable that names the folder; empty means that nothing is kept."""
_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


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
