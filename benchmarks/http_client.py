"""As little of an HTTP client as the benchmark needs: it shares its cores with the server it measures.

Requests are bytes made beforehand, so that malformed ones are as easy to send as valid ones.
"""

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

CHUNK = 65536


class Call(NamedTuple):
    """A request to send.

    Attributes:
        kind: What it is, in words.
        raw: Every byte of it.
        expected: The status it must get; None to hang up without waiting for one.
        row: Which of the known answers it must get; None where only the status matters.
    """

    kind: str
    raw: bytes
    expected: int | None
    row: int | None = None


class Answer(NamedTuple):
    """What came back, and how long it took; status None where the client hung up or the connection broke."""

    status: int | None
    body: bytes
    seconds: float


def post(body: bytes, length: int | None = None) -> bytes:
    """A request to /predict; `length` is what it says of its body, the truth when None."""
    said = len(body) if length is None else length
    return _head("POST", "/predict", f"Content-Length: {said}") + body


def chunked(body: bytes) -> bytes:
    """A request to /predict that does not say how long it will be, and has not come to its end."""
    parts = [body[start : start + CHUNK] for start in range(0, len(body), CHUNK)]
    sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return _head("POST", "/predict", "Transfer-Encoding: chunked") + sent


def _head(method: str, path: str, *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()


class Client:
    """One connection at a time to a server on this machine, kept open as long as the server allows."""

    def __init__(self, port: int):
        self._port = port
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._hang_up()

    async def get(self, path: str) -> Answer:
        """Fetch a page."""
        return await self.send(Call("get", _head("GET", path), 200))

    async def send(self, call: Call) -> Answer:
        """Send a request and receive its answer, or hang up where none is expected.

        A connection that breaks is an answer without a status, whose body says why.
        """
        started = time.perf_counter()
        try:
            status, body = await self._exchange(call)
        except (OSError, EOFError) as broken:
            await self._hang_up()
            status, body = None, repr(broken).encode()
        return Answer(status, body, time.perf_counter() - started)

    async def _exchange(self, call: Call) -> tuple[int | None, bytes]:
        if self._open is None:
            self._open = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._open
        writer.write(call.raw)
        await writer.drain()
        if call.expected is None:
            await self._hang_up()
            return None, b""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(fields["content-length"]))
        if fields.get("connection") == "close":
            await self._hang_up()
        return int(head[0].split()[1]), body

    async def _hang_up(self) -> None:
        if self._open is None:
            return
        _, writer = self._open
        self._open = None
        writer.close()
        with suppress(OSError):  # the server was quicker
            await writer.wait_closed()
