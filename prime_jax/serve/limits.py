"""What stands before every request: a bound on its body, a count of its answer, an answer to failures."""

import logging
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prime_jax.serve.metrics import Metrics

log = logging.getLogger("prime_jax.serve")

GONE = 499
"""Status under which a request is counted whose client hung up; nobody receives it."""


class BodyLimit:
    """Answers 413 to a body above the limit, and reads no more of it than that."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then hand it on in one piece."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                await self._refuse(scope, receive, send)
                return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            first, whole = whole, None
            return first if first is not None else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = JSONResponse(
            {"error": f"the body is larger than {self._limit} bytes"}, 413, {"Connection": "close"}
        )
        await answer(scope, receive, send)


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
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if status == GONE:  # nothing has been sent yet
                hidden = {"error": "something went wrong in the server; its log says what"}
                await JSONResponse(hidden, 500)(scope, receive, watched)
        finally:
            route: Any = scope.get("route")
            name = getattr(route, "path", "none")  # never what the client wrote: that could be anything
            self._metrics.requests.labels(name, str(status)).inc()
            self._metrics.seconds.labels(name).observe(time.perf_counter() - started)
