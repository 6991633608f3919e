"""Locks on folders, so that two programs never write one run, report, bundle or store at the same time.

`locked` waits its turn, for changes that take a moment (the embedding store). `exclusive` refuses at once,
for work that takes hours and whose result would otherwise be lost: a training run, a sweep, an export.

The operating system's lock (flock) decides wherever it can: it goes with the process that holds it, so a
process that was killed leaves nothing behind. But some file systems show it within one machine only, and
some have none. Therefore the owner also writes who it is, and touches the file every BEAT seconds. What
another machine wrote, or what no flock protects, is watched: touched again, its owner lives and we refuse;
not touched for SILENT seconds, its owner is gone and we take over.

Two programs may come to that at the same moment. The one that makes the file (O_EXCL) has it, and a file that
names nobody yet is left to its maker for SETTLE seconds. Who takes over writes its name, waits SETTLE seconds
and reads again: of two, the one that wrote last is named there, and the other one refuses.
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
SETTLE = 3.0  # seconds in which of several that take over at once all have written; NFS shows it within them
PATIENCE = 10.0  # seconds for which a lock file that cannot be read is tried again
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
def exclusive(folder: Path, work: str, *, lock: Path | None = None) -> Iterator["Ownership"]:
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
    """A folder that this process holds; `exclusive` makes one."""

    def __init__(self, path: Path, folder: Path, work: str):
        """Use `exclusive`."""
        self._path, self._folder, self._work = path, folder, work
        self._descriptor = -1
        self._me = Owner.here()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)

    def check(self) -> None:
        """Refuse to go on where somebody took the folder over, for instance while this machine slept.

        A network file system may be away for a moment: what cannot be read is tried again for PATIENCE.

        Raises:
            ConfigError: If so, and the message says who; or if the lock file cannot be read.
        """
        end = time.monotonic() + PATIENCE
        while True:
            try:
                mine = self._still_mine()
                break
            except OSError as failed:
                if time.monotonic() >= end:
                    raise ConfigError(
                        f"{self._folder}: {self._path} cannot be read ({failed}), so somebody may have taken "
                        f"over {self._work} here; nothing more is written"
                    ) from failed
                time.sleep(BEAT / 5)
        if not mine:
            raise ConfigError(
                f"{self._folder}: {_named(self._path) or 'somebody'} took over {self._work} here while this "
                f"process gave no sign of life, or removed {self._path}; nothing more is written"
            )

    def _take(self) -> None:
        """Open the file, be sure that it is ours, write our name and begin to show that we live."""
        while True:
            made = self._open()
            try:
                decided = self._decided(made)
                if decided is not None:
                    self._write()
                    if not decided:
                        self._settle()
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        self._beating.start()

    def _open(self) -> bool:
        """Open the file; whether we made it."""
        while True:
            with suppress(FileExistsError):
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                return True
            with suppress(FileNotFoundError):  # removed in between
                self._descriptor = os.open(self._path, os.O_RDWR)
                return False

    def _decided(self, made: bool) -> bool | None:
        """Whether nobody else can believe that the opened file is theirs; None where it must be opened anew.

        False where it is ours to write, but somebody else may come to the same.
        """
        try:
            protected = _flock(self._descriptor, wait=False)
        except BlockingIOError:
            raise self._refused(_named(self._path)) from None
        if not self._is_same_file():  # its owner ended and removed it while we opened it
            return None
        owner = _read(self._path)
        if made and owner is None:
            return True
        if owner is not None and protected and owner.same_machine(self._me):
            return True
        try:
            return False if self._watch(owner) else None
        except FileNotFoundError:  # as above
            return None

    def _write(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, json.dumps(self._me._asdict()).encode() + b"\n")
        os.fsync(self._descriptor)

    def _settle(self) -> None:
        """Refuse where somebody else wrote their name after us."""
        time.sleep(SETTLE)
        if not self._still_mine():
            raise self._refused(_named(self._path))

    def _watch(self, owner: Owner | None) -> bool:
        """Wait until an owner whom flock does not vouch for counts as gone; refuse where it lives.

        Its last sign of life is compared with the file system's own clock, as machines' clocks differ.

        Args:
            owner: Whom the file names; None where that is nobody yet.

        Returns:
            False where the file of nobody was removed meanwhile.
        """
        seen, patience = self._path.stat().st_mtime, SETTLE if owner is None else SILENT
        with tempfile.TemporaryFile(dir=self._path.parent) as new:
            left = patience - max(0.0, os.fstat(new.fileno()).st_mtime - seen)
        end = time.monotonic() + left
        if left > 0 and owner is not None:
            console.print(
                f"{self._folder}: waiting for a sign of life of {owner}, at most {left:.0f} s",
                soft_wrap=True,
                markup=False,
            )
        while time.monotonic() < end:
            time.sleep(min(BEAT / 5, max(0.0, end - time.monotonic())))
            there = self._is_same_file()
            if owner is None and not there:
                return False
            if not there or self._path.stat().st_mtime != seen:
                raise self._refused(_named(self._path) or owner)
        if _read(self._path) != owner:  # opened anew: more recent than what `stat` may remember
            raise self._refused(_named(self._path) or owner)
        return True

    def _refused(self, owner: Owner | None) -> ConfigError:
        return ConfigError(
            f"{self._folder}: {owner or 'another process'} is writing {self._work} here; wait for its end, "
            "stop it, or choose another folder"
        )

    def _still_mine(self) -> bool:
        """Whether the file names us.

        Raises:
            OSError: If it cannot be read.
        """
        return _read(self._path) == self._me and self._is_same_file()

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
    """Who a lock file names; None where it names nobody, or is gone.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        owner = Owner(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    texts = all(isinstance(part, str) for part in (owner.host, owner.boot, owner.since))
    return owner if texts and isinstance(owner.pid, int) else None


def _named(path: Path) -> Owner | None:
    """As `_read`, for messages: None also where the file cannot be read."""
    with suppress(OSError):
        return _read(path)
    return None


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
