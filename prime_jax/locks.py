"""Locks on folders, so that two programs never write one run, report, bundle or store at the same time.

`locked` waits its turn, for changes that take a moment (the embedding store). `owned` refuses at once, for
work that takes hours and whose result would otherwise be lost: a training run, a sweep, an export.

The operating system's lock (flock) decides wherever it can: it goes with the process that holds it, so a
process that was killed leaves nothing behind. But some file systems show it within one machine only, and
some have none. Therefore the owner also writes who it is, and touches the file every BEAT seconds. What
another machine wrote, or what no flock protects, is watched: touched again, its owner lives and we refuse;
not touched for SILENT seconds, its owner is gone and we take over.
"""

import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from prime_jax.errors import ConfigError
from prime_jax.progress import console

OWNER, LOCK = ".owner.lock", ".lock"
BEAT = 5.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one, after which an owner counts as gone
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process holds `folder`, then hold it (nothing on systems without flock)."""
    with (folder / LOCK).open("w") as stream:
        _flock(stream.fileno(), wait=True)
        yield


class Owner(NamedTuple):
    """Who holds a folder.

    Attributes:
        host: Name of the machine.
        boot: Identity of that machine's start, "" where the system has none.
        pid: Number of the process there.
        since: When it began to hold the folder, in UTC, ISO 8601.
    """

    host: str
    boot: str
    pid: int
    since: str

    @classmethod
    def here(cls) -> "Owner":
        """This process, from now on."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        except OSError:
            boot = ""
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        return cls(socket.gethostname(), boot, os.getpid(), now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since[:19]} UTC)"

    def same_machine(self, other: "Owner") -> bool:
        """Whether both are processes of one machine since its start."""
        return (self.host, self.boot) == (other.host, other.boot)


@contextmanager
def owned(folder: Path, work: str, *, lock: Path | None = None) -> Iterator["Ownership"]:
    """Hold a folder while the block runs, or refuse at once where another process does.

    Args:
        folder: What is held; made where it does not exist, and removed again if it is empty in the end.
        work: What is written there, for messages ("a training run").
        lock: The lock file; None means `.owner.lock` in the folder. It is removed in the end.

    Raises:
        ConfigError: If somebody else holds it; the message names machine and process.
        OSError: If the lock file cannot be written.
    """
    path = folder / OWNER if lock is None else lock
    fresh = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    holding = Ownership(path, folder, work)
    try:
        holding._take()
        try:
            yield holding
        finally:
            holding._release()
    finally:
        if fresh:
            with suppress(OSError):  # it holds what was written
                path.parent.rmdir()


class Ownership:
    """A folder that this process holds; `owned` makes one."""

    def __init__(self, path: Path, folder: Path, work: str):
        """Use `owned`."""
        self._path, self._folder, self._work = path, folder, work
        self._descriptor = -1
        self._me = Owner.here()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)

    def check(self) -> None:
        """Refuse to go on where somebody took the folder over, for instance while this machine slept.

        Raises:
            ConfigError: If so; the message says who.
        """
        if not self._still_mine():
            raise ConfigError(
                f"{self._folder}: {_read(self._path) or 'somebody'} took over {self._work} here while this "
                f"process gave no sign of life, or removed {self._path}; nothing more is written"
            )

    def _take(self) -> None:
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if self._is_free():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, json.dumps(self._me._asdict()).encode() + b"\n")
        os.fsync(self._descriptor)
        self._beating.start()

    def _is_free(self) -> bool:
        """Whether the opened file is ours to write; False where it must be opened anew."""
        try:
            protected = _flock(self._descriptor, wait=False)
        except BlockingIOError:
            raise self._refused(_read(self._path)) from None
        if not self._is_same_file():  # its owner ended and removed it while we opened it
            return False
        owner = _read(self._path)
        if owner is not None and not (protected and owner.same_machine(self._me)):
            self._watch(owner)
        return True

    def _watch(self, owner: Owner) -> None:
        """Return once an owner whom flock does not vouch for counts as gone; refuse where it lives.

        Its last sign of life is compared with the file system's own clock, as machines' clocks differ.
        """
        seen = self._path.stat().st_mtime
        with tempfile.TemporaryFile(dir=self._path.parent) as new:
            left = SILENT - max(0.0, os.fstat(new.fileno()).st_mtime - seen)
        end = time.monotonic() + left
        if left > 0:
            console.print(
                f"{self._folder}: waiting for a sign of life of {owner}, at most {left:.0f} s",
                soft_wrap=True,
                markup=False,
            )
        while time.monotonic() < end:
            time.sleep(BEAT / 5)
            if not self._is_same_file() or self._path.stat().st_mtime != seen:
                raise self._refused(_read(self._path) or owner)

    def _refused(self, owner: Owner | None) -> ConfigError:
        return ConfigError(
            f"{self._folder}: {owner or 'another process'} is writing {self._work} here; wait for its end, "
            "stop it, or choose another folder"
        )

    def _still_mine(self) -> bool:
        return self._is_same_file() and _read(self._path) == self._me

    def _is_same_file(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a network file system may be away for a moment
                if self._still_mine():
                    os.utime(self._path)

    def _release(self) -> None:
        self._ended.set()
        self._beating.join()
        with suppress(OSError):
            if self._still_mine():
                os.ftruncate(self._descriptor, 0)  # where an open file cannot be removed, it names nobody
                self._path.unlink()  # while it is locked, so that who has it open notices
        os.close(self._descriptor)


def _read(path: Path) -> Owner | None:
    """Who a lock file names; None where it names nobody."""
    try:
        owner = Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    texts = all(isinstance(part, str) for part in (owner.host, owner.boot, owner.since))
    return owner if texts and isinstance(owner.pid, int) else None


def _flock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file; False where the system or the file system cannot.

    Raises:
        BlockingIOError: If another process has it and we do not wait.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as failed:
        if failed.errno not in _UNSUPPORTED:
            raise
        return False
    return True
