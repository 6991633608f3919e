"""Compiled programs are kept for the next start, in a folder that is the user's own."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from prime_jax.predict.compiled import (
    GPU_OPTIONS,
    LIBRARY_PRODUCTS,
    MANY_ROWS,
    _compile,
    compile_ahead,
    compile_all,
    trace_ahead,
)
from prime_jax.program_cache import FOLDER, cache_folder

HIT = "/jax/compilation_cache/cache_hits"


@pytest.fixture(autouse=True)
def _jax_keeps_nothing() -> Iterator[None]:
    """Without the folder that the tests of a session share: as a user who has given JAX none."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@contextmanager
def counted(event: str) -> Iterator[list[str]]:
    """Every event of that name meanwhile."""
    seen: list[str] = []
    watching = True

    def listen(name: str, **_: object) -> None:
        if watching and name == event:
            seen.append(name)

    monitoring.register_event_listener(listen)
    yield seen
    watching = False


def compiled(scale: float, mode: str = "default") -> float:
    program = compile_ahead(lambda x: scale * x, jax.ShapeDtypeStruct((3,), jnp.float32), mode=mode)
    return float(program(jnp.ones(3))[1])


def test_a_second_start_takes_the_program_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    before = jax.config.jax_compilation_cache_dir
    with counted(HIT) as hits:
        assert compiled(2.5) == 2.5
        assert hits == []
        assert compiled(2.5) == 2.5
        assert hits == [HIT]
        assert compiled(3.5) == 3.5
        assert compiled(2.5, "max-autotune") == 2.5  # other options, another program
        assert hits == [HIT]
    folder = cache_folder()
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.glob("*-cache"))) == 3
    assert jax.config.jax_compilation_cache_dir == before


def test_a_damaged_file_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert compiled(2.25) == 2.25
    (kept,) = tmp_path.rglob("*-cache")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert compiled(2.25) == 2.25


def test_nothing_is_kept_where_the_folder_is_empty_or_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "")
    assert cache_folder() is None
    assert compiled(1.5) == 1.5
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    assert compiled(1.5) == 1.5
    assert (tmp_path / "file").read_text() == "not a folder"


def test_the_users_own_cache_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    try:
        assert cache_folder() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_the_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "prime-jax"
    assert folder.name.startswith("jaxlib-")


def test_threads_may_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    answers: list[float] = []
    threads = [
        threading.Thread(target=lambda scale=scale: answers.append(compiled(scale)))
        for scale in (4.0, 5.0, 6.0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [4.0, 5.0, 6.0]
    assert not jax.config.jax_compilation_cache_dir
    assert sorted(compiled(scale) for scale in (4.0, 5.0, 6.0)) == [4.0, 5.0, 6.0]
    assert len(list(tmp_path.rglob("jit__lambda*-cache"))) == 3


def test_programs_compile_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs that wait for each other: one after the other they would never end."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=30)
    answers: list[float] = []
    steps: list[int] = []

    def job(scale: float) -> None:
        both.wait()
        answers.append(compiled(scale))

    compile_all([lambda: job(7.0), lambda: job(8.0)], lambda: steps.append(1))
    assert sorted(answers) == [7.0, 8.0]
    assert steps == [1, 1]
    assert not jax.config.jax_compilation_cache_dir
    assert len(list(tmp_path.rglob("jit__lambda*-cache"))) == 2


class Lowered:
    """As `jax.stages.Lowered` where XLA knows none of `unknown`."""

    def __init__(self, *unknown: str) -> None:
        self.unknown = unknown
        self.taken: dict[str, Any] | None = None

    def compile(self, compiler_options: dict[str, Any] | None) -> Any:
        for name in compiler_options or {}:
            if name in self.unknown:
                raise RuntimeError(f"INVALID_ARGUMENT: No such compile option: '{name}'")
        self.taken = compiler_options
        return lambda: 1.0


def test_options_for_gpus_that_a_version_does_not_know_are_left_out() -> None:
    first, second = GPU_OPTIONS
    lowered = Lowered(first)
    _compile(lowered, {**GPU_OPTIONS, "exec_time_optimization_effort": 1.0})
    assert lowered.taken == {second: GPU_OPTIONS[second], "exec_time_optimization_effort": 1.0}
    lowered = Lowered(first, second)
    _compile(lowered, dict(GPU_OPTIONS))
    assert lowered.taken is None
    with pytest.raises(RuntimeError, match="No such compile option: 'ours'"):
        _compile(Lowered("ours"), {"ours": 1})


def test_options_go_with_our_programs_on_gpus_and_with_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA takes them here, too, though they change nothing on a CPU; the process's flags stay as they are."""
    seen: list[dict[str, Any]] = []

    def watch(lowered: Any, options: dict[str, Any]) -> Any:
        seen.append(options)
        return _compile(lowered, options)

    monkeypatch.setattr("prime_jax.predict.compiled._compile", watch)
    flags = os.environ.get("XLA_FLAGS")
    assert compiled(1.25, "reduce-overhead") == 1.25
    with monkeypatch.context() as gpu:
        gpu.setattr(jax, "default_backend", lambda: "gpu")
        assert compiled(1.125, "reduce-overhead") == 1.125
        assert compiled(1.375, "default") == 1.375
        many = trace_ahead(lambda x: x, jnp.ones(3), mode="reduce-overhead", rows=MANY_ROWS)()
        assert many(jnp.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert seen == [{}, dict(GPU_OPTIONS), {}, {**GPU_OPTIONS, **LIBRARY_PRODUCTS}]
    assert os.environ.get("XLA_FLAGS") == flags
