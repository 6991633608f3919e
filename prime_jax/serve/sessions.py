"""The conversations that a server keeps, where it is told to keep any."""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prime_jax.errors import OverloadedError, PredictorError
from prime_jax.predict.session import Session


class NoSuchSessionError(PredictorError):
    """The id is unknown, or its session was dropped."""


@dataclass
class Kept:
    """A session, who uses it now, and when it was last used."""

    session: Session
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = 0.0


class Sessions:
    """Sessions by id, at most so many, dropped when unused for long. Lives on one event loop.

    Args:
        most: How many are kept; 0 keeps none.
        idle_s: After how many seconds without use a session is dropped.
        clock: Seconds, for tests.
    """

    def __init__(self, most: int, idle_s: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._idle, self._clock = most, idle_s, clock
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        self._drop_idle()
        return len(self._kept)

    def make_room(self) -> None:
        """Drop what is idle.

        Raises:
            OverloadedError: If no more can be kept.
        """
        if len(self) >= self._most:
            raise OverloadedError(f"all {self._most} sessions are in use; try again later")

    def keep(self, session: Session) -> str:
        """Keep a session and return its id, 128 random bits.

        Raises:
            OverloadedError: If no more can be kept.
        """
        self.make_room()
        name = secrets.token_urlsafe(16)
        self._kept[name] = Kept(session, used=self._clock())
        return name

    def find(self, name: str) -> Kept:
        """The session of that id, marked as used now.

        Raises:
            NoSuchSessionError: If there is none.
        """
        self._drop_idle()
        if name not in self._kept:
            raise NoSuchSessionError("there is no such session; it may have been idle for too long")
        kept = self._kept[name]
        kept.used = self._clock()
        return kept

    def drop(self, name: str) -> None:
        """Forget a session.

        Raises:
            NoSuchSessionError: If there is none.
        """
        self.find(name)
        del self._kept[name]

    def _drop_idle(self) -> None:
        oldest = self._clock() - self._idle
        for name in [
            name for name, kept in self._kept.items() if kept.used < oldest and not kept.lock.locked()
        ]:
            del self._kept[name]
