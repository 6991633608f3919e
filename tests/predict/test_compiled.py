"""Compiled programs are kept for the next start, in a folder that is the user's own."""

import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from prime_jax.predict.compiled import FOLDER, cache_folder, compile_ahead

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
