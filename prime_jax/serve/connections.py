"""What stands before every connection: a deadline for the head of its request, and a bound on their number.

uvicorn closes a connection that falls silent after an answer, but waits without end for a first request, for
the rest of a head, and for a client that does not take its answer.
"""

import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prime_jax.serve.settings import ServeSettings

log = logging.getLogger("prime_jax.serve")

BACKLOG = 2048
SPARE = 32  # descriptors for files, logs and threads that are opened while it serves


class Connection(H11Protocol):
    """One client's connection, HTTP/1.1, that is not waited for without end.

    Where all places are taken, the one that has waited longest for a request makes room, or else the one
    that has waited longest for the rest of one; where every request is complete, the newcomer is refused
    with 503. `bounded` makes the subclasses that are used.
    """

    most: int
    seconds: float
    count_closed: Callable[[str], None]
    places: dict["Connection", None]  # longest without a new request first

    def connection_made(self, transport: Any) -> None:
        """Take a place, or be refused."""
        super().connection_made(transport)
        self._head_since: float | None = self.loop.time()
        self._head_begun = False
        self._unsent, self._unsent_since = 0, 0.0
        self._timer: Any = None
        if len(self.places) >= self.most and not self._make_room():
            self._end("refused", 503, "too many connections are open; try again later")
        else:
            self.places[self] = None
        self._look_later()

    def data_received(self, data: bytes) -> None:
        """Note when the head of a request begins and when it is complete."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and self in self.places:
            self.places[self] = self.places.pop(self)
        if not self.waits:
            self._head_since, self._head_begun = None, False
            return
        self._head_begun = True
        if self._head_since is None:
            self._head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self.places.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_body(self) -> bool:
        """Whether a request is not complete yet; its answer may have begun, such as to a body too large."""
        return not self.waits and self.cycle.more_body and not self.cycle.response_started

    def _make_room(self) -> bool:
        """Close the connection that has waited longest; False where every one is being answered."""
        silent = (one for one in self.places if one.waits)
        unfinished = (one for one in self.places if one.waits_for_body)
        longest = next(silent, None) or next(unfinished, None)
        if longest is not None:
            longest._end("evicted")
        return longest is not None

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(min(1.0, self.seconds / 4), self._look)

    def _look(self) -> None:
        """Close what has kept the server waiting for too long."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent or not self._unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if unsent and now - self._unsent_since >= self.seconds:
            self.count_closed("unread")
            self.transport.abort()
            return
        late = self._head_since is not None and now - self._head_since >= self.seconds
        if late and not self.transport.is_closing():
            why = f"the head of the request took longer than {self.seconds:g} s"
            self._end("silent", 408 if self._head_begun else None, why)
        self._look_later()

    def _end(self, reason: str, status: int | None = None, why: str = "") -> None:
        """Close the connection, with a last answer if `status` is one."""
        self.places.pop(self, None)
        self.count_closed(reason)
        if status is not None:
            body = json.dumps({"error": why}).encode()
            head = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
                *(["Retry-After: 1"] if status == 503 else []),
            ]
            self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.close()


def bounded(most: int, seconds: float, count_closed: Callable[[str], None]) -> type[Connection]:
    """The protocol of one server.

    Args:
        most: Connections that are open at once.
        seconds: How long one may take to send the head of a request, and to take its answer.
        count_closed: Told why a connection was closed: `silent`, `unread`, `evicted` or `refused`.
    """
    members = {
        "most": most,
        "seconds": seconds,
        "count_closed": staticmethod(count_closed),
        "places": {},
    }
    return cast(type[Connection], type("BoundedConnection", (Connection,), members))


def server_config(app: Any, settings: ServeSettings, **more: Any) -> uvicorn.Config:
    """How uvicorn runs an application of `build_app`, within the descriptors that this process may open.

    Args:
        app: The application.
        settings: Its settings.
        more: Further options of `uvicorn.Config`.
    """
    most, backlog = within_descriptors(settings.max_connections)
    metrics = app.state.metrics
    if most < settings.max_connections:
        log.warning(
            "this process may open %d files, so at most %d connections are open at once instead of the %d of "
            "--max-connections; raise the limit (ulimit -n) for more",
            *(descriptor_limit(), most, settings.max_connections),
        )
    return uvicorn.Config(
        app,
        http=bounded(most, settings.header_timeout_s, metrics.count_closed),
        ws="none",  # an upgraded connection would leave the bound
        backlog=backlog,
        log_level="error",  # what a client does wrong is answered and counted, not logged
        access_log=False,
        timeout_graceful_shutdown=settings.grace_s,
        **more,
    )


def within_descriptors(wanted: int) -> tuple[int, int]:
    """How many connections, and how many more that are not accepted yet, this process has descriptors for.

    Its own limit is raised as far as the system allows where that is needed.

    Args:
        wanted: Connections to be open at once.

    Returns:
        Connections, `wanted` at most and 1 at least; and the backlog, as many as may be accepted in one go.
    """
    needed = _open_descriptors() + SPARE + wanted + BACKLOG
    limit = descriptor_limit(needed)
    if limit is None or limit >= needed:
        return wanted, BACKLOG
    room = max(2, limit - (needed - wanted - BACKLOG))
    backlog = max(1, min(BACKLOG, room - wanted if room > 2 * wanted else room // 4))
    return max(1, min(wanted, room - backlog)), backlog


def descriptor_limit(needed: int = 0) -> int | None:
    """How many descriptors this process may open, raised towards `needed`; None where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows counts them otherwise
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    raised = needed if hard == unlimited else min(needed, hard)
    if soft not in (unlimited, raised) and soft < raised:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # the system knows a lower one still
            pass
    return None if soft == unlimited else soft


def _open_descriptors() -> int:
    try:
        return len(list(Path("/dev/fd").iterdir()))
    except OSError:
        return 64
