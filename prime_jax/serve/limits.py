"""What stands before every request: a bound on its body, a count of its answer, an answer to failures."""

import asyncio
import logging
import time
import traceback
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prime_jax.serve.metrics import Metrics

log = logging.getLogger("prime_jax.serve")

GONE = 499
"""Status under which a request is counted whose client hung up; nobody receives it."""

MESSAGE, FRAMES = 200, 4
"""What a failure may take in the log: characters of its message, places it came from."""


class BodyLimit:
    """Answers 413 to a body above the limit, of which no more is read, and 408 to one that takes too long.

    Compressed bodies, whose size says nothing, get 415.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float):
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then hand it on in one piece."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            why = "compressed bodies are not taken; send it without the header Content-Encoding"
            await _refuse(415, why, scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await self._too_large(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except TimeoutError:
            await _refuse(408, f"the body took longer than {self._seconds:g} s", scope, receive, send)
            return
        if body is None:
            return
        if len(body) > self._limit:
            await self._too_large(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            first, whole = whole, None
            return first if first is not None else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or its beginning where it is too large; None where the client hangs up."""
        body, more = bytearray(), True
        while more and len(body) <= self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _refuse(413, f"the body is larger than {self._limit} bytes", scope, receive, send)


async def _refuse(status: int, why: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body is read to its end, and close the connection."""
    await JSONResponse({"error": why}, status, {"Connection": "close"})(scope, receive, send)


class Observe:
    """Counts every answer by route and status, and its time; a failure is logged and answered with 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and look at the answer's first line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as failed:
            log.error("%s %s failed: %s", scope["method"], _route(scope), in_one_line(failed))
            if status == GONE:  # nothing has been sent yet
                hidden = {"error": "something went wrong in the server; its log says what"}
                await JSONResponse(hidden, 500)(scope, receive, watched)
        finally:
            name = _route(scope)
            self._metrics.requests.labels(name, str(status)).inc()
            self._metrics.seconds.labels(name).observe(time.perf_counter() - started)


def _route(scope: Scope) -> str:
    """The route's own path, never what the client wrote: that could be anything."""
    return str(getattr(scope.get("route"), "path", "none"))


def in_one_line(error: Exception) -> str:
    """An error for the log: its kind, the beginning of its message, and where it came from."""
    told = " ".join(str(error).split())
    told = told if len(told) <= MESSAGE else told[:MESSAGE] + "..."
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {told} (at {places})"
