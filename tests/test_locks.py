"""Locks: one owner at a time, named in the refusal; a dead owner does not stop the next one."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prime_jax import locks
from prime_jax.errors import ConfigError
from prime_jax.locks import OWNER, Owner, Ownership, exclusive, locked

HOLD = """
import sys, time
from pathlib import Path
from prime_jax.locks import exclusive
with exclusive(Path(sys.argv[1]), "a training run"):
    print("holding", flush=True)
    time.sleep(60)
"""
ELSEWHERE = Owner("elsewhere", "another-boot", 4711, "2026-01-02T03:04:05+00:00")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "SILENT", 0.5)
    monkeypatch.setattr(locks, "SETTLE", 0.1)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)


def write(folder: Path, owner: Owner, *, age: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER
    path.write_text(json.dumps(owner._asdict()))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.fixture
def alive() -> Iterator[Any]:
    """Keeps touching a file, as an owner on another machine does."""
    ended = threading.Event()

    def start(path: Path) -> None:
        def touch() -> None:
            while not ended.wait(0.05):
                os.utime(path)

        threading.Thread(target=touch, daemon=True).start()

    yield start
    ended.set()


def test_a_second_owner_is_refused_at_once_and_told_who_the_first_is(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run", "a training run"):
        started = time.monotonic()
        with pytest.raises(ConfigError) as refused, exclusive(tmp_path / "run", "a training run"):
            pass
        assert time.monotonic() - started < 0.4
        assert (tmp_path / "run" / OWNER).is_file()
    assert f"{tmp_path / 'run'}: process {os.getpid()} on {Owner.here().host} (since 20" in str(refused.value)
    assert "is writing a training run here" in str(refused.value)
    with exclusive(tmp_path / "run", "a training run"):
        pass


def test_another_process_is_refused_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), exclusive(tmp_path, "a run"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == holder.pid  # it could not clean up
    started = time.monotonic()
    with exclusive(tmp_path, "a run"):
        assert time.monotonic() - started < 0.4  # the system says that it is gone: nothing is waited for
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_the_folder_is_left_as_it_was(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a" / "b", "a run"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [OWNER]
    assert not (tmp_path / "a" / "b").exists()
    with exclusive(tmp_path / "c", "a run"):
        (tmp_path / "c" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["result"]
    (tmp_path / "mine").mkdir()
    with exclusive(tmp_path / "mine", "a run"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_the_lock_may_lie_elsewhere(tmp_path: Path) -> None:
    with exclusive(tmp_path / "bundle", "an export", lock=tmp_path / ".bundle.lock"):
        assert [path.name for path in tmp_path.iterdir()] == [".bundle.lock"]
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine_that_lives_is_respected(tmp_path: Path, alive: Any) -> None:
    alive(write(tmp_path, ELSEWHERE))
    since = r"process 4711 on elsewhere \(since 2026-01-02T03:04:05 UTC\)"
    with pytest.raises(ConfigError, match=since), exclusive(tmp_path, "a run"):
        pass
    assert json.loads((tmp_path / OWNER).read_text())["host"] == "elsewhere"


def test_an_owner_on_another_machine_that_is_silent_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, ELSEWHERE, age=0.2)
    started = time.monotonic()
    with exclusive(tmp_path, "a run"):
        assert 0.2 < time.monotonic() - started < 2
    assert "waiting for a sign of life of process 4711 on elsewhere" in capsys.readouterr().err
    write(tmp_path, ELSEWHERE, age=3600)
    started = time.monotonic()
    with exclusive(tmp_path, "a run"):
        assert time.monotonic() - started < 0.2
    assert capsys.readouterr().err == ""


def test_without_flock_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_flock", lambda descriptor, wait: False)
    refused = pytest.raises(ConfigError, match=f"process {os.getpid()} on")
    with exclusive(tmp_path, "a run"), refused, exclusive(tmp_path, "a run"):
        pass
    write(tmp_path, Owner.here(), age=0.3)
    with exclusive(tmp_path, "a run"):
        pass


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_flock", lambda descriptor, wait: False)


def test_of_two_that_take_over_at_the_same_moment_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw the same dead owner, and neither the other one."""
    without_flock(monkeypatch)
    monkeypatch.setattr(locks, "SETTLE", 1.0)
    write(tmp_path, ELSEWHERE, age=3600)
    both, real = threading.Barrier(2), Ownership._write
    outcomes: list[str] = []

    def together(holding: Ownership) -> None:
        both.wait(5)
        real(holding)

    def start() -> None:
        try:
            with exclusive(tmp_path, "a run") as mine:
                both.wait(5)
                mine.check()
                outcomes.append("holds")
        except ConfigError as refused:
            outcomes.append(str(refused))
            both.wait(5)

    monkeypatch.setattr(Ownership, "_write", together)
    starters = [threading.Thread(target=start) for _ in range(2)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    refused, holds = sorted(outcomes, key=len, reverse=True)
    assert holds == "holds"
    assert f"process {os.getpid()} on {Owner.here().host}" in refused
    assert "is writing a run here" in refused  # before it began
    assert not (tmp_path / OWNER).exists()


def test_a_file_that_somebody_has_just_made_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where flock is seen within one machine only, the file of another one is empty for a moment."""
    monkeypatch.setattr(locks, "SETTLE", 9.0)
    (tmp_path / OWNER).touch()
    with monkeypatch.context() as patch:
        patch.setattr(locks.time, "sleep", lambda seconds: write(tmp_path, ELSEWHERE))
        with pytest.raises(ConfigError, match="process 4711 on elsewhere"), exclusive(tmp_path, "a run"):
            pass
    without_flock(monkeypatch)
    (tmp_path / OWNER).unlink()
    sleeps: list[float] = []
    monkeypatch.setattr(locks.time, "sleep", sleeps.append)
    with exclusive(tmp_path, "a run"):  # and who makes it waits for nothing
        assert sleeps == []


def test_a_file_of_nobody_that_goes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SETTLE", 9.0)
    (tmp_path / OWNER).touch()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: (tmp_path / OWNER).unlink())
    with exclusive(tmp_path, "a run") as mine:
        mine.check()


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes
    failures: list[int] = []

    def away(path: Path) -> bytes:
        if failures and threading.current_thread() is threading.main_thread():
            raise OSError(failures.pop(), "away")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", away)
    with exclusive(tmp_path, "a run") as mine:
        failures += [errno.ESTALE, errno.EIO]
        mine.check()
        assert failures == []
        failures += [errno.EIO] * 10_000
        with pytest.raises(ConfigError, match=r"\.owner\.lock cannot be read \(.*away\)"):
            mine.check()
        failures.clear()
    (tmp_path / OWNER).touch()
    failures += [errno.EIO]
    with pytest.raises(OSError, match="away"), exclusive(tmp_path, "a run"):  # it may name somebody
        pass


def test_an_owner_that_ends_while_we_watch_it_is_told_and_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, ELSEWHERE)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: path.unlink())
    with pytest.raises(ConfigError, match="process 4711 on elsewhere"), exclusive(tmp_path, "a run"):
        pass
    assert not path.exists()


def test_a_file_removed_while_it_was_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = locks._flock, []

    def removed_first(descriptor: int, *, wait: bool) -> bool:
        if not calls:
            (tmp_path / OWNER).unlink()
        calls.append(descriptor)
        return real(descriptor, wait=wait)

    monkeypatch.setattr(locks, "_flock", removed_first)
    with exclusive(tmp_path, "a run"):
        assert len(calls) == 2
        with pytest.raises(ConfigError), exclusive(tmp_path, "a run"):
            pass


def test_an_owner_shows_that_it_lives(tmp_path: Path) -> None:
    with exclusive(tmp_path, "a run") as mine:
        os.utime(tmp_path / OWNER, (0, 0))
        time.sleep(0.2)
        assert (tmp_path / OWNER).stat().st_mtime > time.time() - 10
        mine.check()


def test_who_lost_the_folder_writes_no_more_and_leaves_the_new_owner_alone(tmp_path: Path) -> None:
    with exclusive(tmp_path, "a run") as mine:
        path = write(tmp_path, ELSEWHERE, age=100)
        with pytest.raises(ConfigError, match=r"process 4711 on elsewhere .* took over a run"):
            mine.check()
        time.sleep(0.1)
        assert path.stat().st_mtime < time.time() - 50  # it no longer speaks for the other one
    assert json.loads(path.read_text())["host"] == "elsewhere"
    path.unlink()
    with exclusive(tmp_path, "a run") as mine:
        path.unlink()
        with pytest.raises(ConfigError, match="somebody took over"):
            mine.check()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": "a"}', '{"host": 1, "boot": "", "pid": 2, "since": ""}', "\x00\xff"]
)
def test_a_file_that_names_nobody_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / OWNER).write_text(content, encoding="latin-1")
    with exclusive(tmp_path, "a run"):
        pass


def test_who_cannot_be_named_is_refused_all_the_same(tmp_path: Path) -> None:
    with exclusive(tmp_path, "a run"):
        (tmp_path / OWNER).write_text("")
        with pytest.raises(ConfigError, match="another process is writing"), exclusive(tmp_path, "a run"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path, "a run"), locked(tmp_path):
        pass


def test_other_errors_of_the_file_system_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"), exclusive(tmp_path, "a run"):
        pass


def test_a_system_without_fcntl_has_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with exclusive(tmp_path, "a run"), pytest.raises(ConfigError), exclusive(tmp_path, "a run"):
        pass


def test_a_machine_without_a_boot_identity_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    here = Owner.here()
    assert here.boot == ""
    assert here.same_machine(Owner.here())
    assert not here.same_machine(ELSEWHERE)


def test_a_short_lock_waits_its_turn(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
