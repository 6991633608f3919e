"""Connections that say nothing, or too slowly, or never read: closed in time, and never in another's way."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Served
from predictors import D, make
from test_app import TURNS, Gate, body

from prime_jax.export.bundle import write_bundle
from prime_jax.predict.predictor import Predictor
from prime_jax.serve import connections
from prime_jax.serve.connections import BACKLOG, within_descriptors

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def gate(predictor: Predictor) -> Iterator[Gate]:
    made = Gate(predictor)
    yield made
    made.opened.set()


@contextlib.contextmanager
def connected(served: Served, count: int = 1) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
            for _ in range(count)
        ]
        yield opened


def closed(served: Served, reason: str) -> float:
    line = f'prime_jax_connections_closed_total{{reason="{reason}"}} '
    page = served.client.get("/metrics").text
    return next((float(row.removeprefix(line)) for row in page.splitlines() if row.startswith(line)), 0.0)


def wait_for(served: Served, reason: str, count: int) -> None:
    until = time.monotonic() + 20
    while closed(served, reason) < count:
        assert time.monotonic() < until, f"{closed(served, reason)} of {count} were closed as {reason}"
        time.sleep(0.02)


def test_a_connection_that_says_nothing_is_closed(serve: Any) -> None:
    with serve(header_timeout_s=0.2) as served, connected(served) as (silent,):
        assert silent.recv(100) == b""
        assert closed(served, "silent") == 1


def test_a_head_that_comes_byte_by_byte_gets_408(serve: Any) -> None:
    """Bytes do not extend the deadline: a head has so long as a whole."""
    with serve(header_timeout_s=0.3) as served, connected(served) as (slow,):
        slow.settimeout(0.05)
        answer = b""
        for byte in HEAD * 20:
            with contextlib.suppress(OSError):
                slow.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                answer = slow.recv(1000)
                break
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert told == {"error": "the head of the request took longer than 0.3 s"}


def test_the_deadline_holds_for_a_second_head_too(serve: Any) -> None:
    with serve(header_timeout_s=0.3) as served, connected(served) as (kept,):
        kept.sendall(HEAD + b"\r\n")
        assert b"200 OK" in kept.recv(10_000)
        kept.sendall(HEAD[:10])
        assert b"408 Request Timeout" in kept.recv(1000)


def test_a_request_that_takes_longer_than_a_head_may_is_answered(serve: Any, gate: Gate) -> None:
    with serve(gate.predictor, header_timeout_s=0.1) as served, connected(served) as (busy,):
        content = json.dumps(body()).encode()
        busy.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        assert gate.entered.wait(30)
        time.sleep(0.4)
        gate.opened.set()
        assert b"200 OK" in busy.recv(100)


def test_silent_connections_make_room_for_those_that_ask(serve: Any) -> None:
    """Five times as many as there are places, and everybody who asks is answered."""
    with serve(header_timeout_s=60, max_connections=8) as served, connected(served, 40) as silent:
        answer = httpx.get(f"http://127.0.0.1:{served.port}/health", timeout=20)
        assert answer.status_code == 200
        wait_for(served, "evicted", 33)
        for early in silent[:30]:
            assert early.recv(100) == b""
        served.client.get("/health")
        assert closed(served, "silent") == 0


def test_bodies_that_never_come_make_room_but_not_before_silence(serve: Any) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with serve(header_timeout_s=60, timeout_s=60, max_connections=4) as served:
        address = f"http://127.0.0.1:{served.port}/health"
        with connected(served, 3) as slow, connected(served) as (silent,):
            for one in slow:
                one.sendall(head)
            time.sleep(0.2)  # until the server has read these heads
            assert httpx.get(address, timeout=20).status_code == 200
            assert silent.recv(100) == b""
            for one in slow:
                one.sendall(b"123456789")
                assert one.recv(100).startswith(b"HTTP/1.1 415 ")
        with connected(served, 20) as opened:
            for one in opened:
                one.sendall(head)
            for _ in range(5):
                assert httpx.get(address, timeout=20).status_code == 200
            assert closed(served, "refused") == 0


def test_a_client_that_waits_for_its_next_request_goes_before_a_busy_one(serve: Any, gate: Gate) -> None:
    with serve(gate.predictor, max_connections=1) as served, connected(served) as (busy,):
        content = json.dumps(body()).encode()
        busy.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        assert gate.entered.wait(30)
        refused = httpx.get(f"http://127.0.0.1:{served.port}/health", timeout=20)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"error": "too many connections are open; try again later"}
        gate.opened.set()
        assert b"200 OK" in busy.recv(10_000)
        assert served.client.get("/health").status_code == 200  # in the place of who was answered


def test_a_client_that_never_reads_is_cut_off(serve: Any) -> None:
    """Its answers fill its window and the server's buffer; the connection does not stay for ever."""
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve(header_timeout_s=0.4) as served, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.settimeout(20)
        deaf.connect(("127.0.0.1", served.port))
        deaf.setblocking(False)
        until = time.monotonic() + 20
        while not closed(served, "unread"):
            with contextlib.suppress(OSError):
                deaf.send(ask * 50)
            assert time.monotonic() < until
            time.sleep(0.02)


def test_an_upgrade_does_not_leave_the_bound(serve: Any) -> None:
    with serve() as served:
        headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        assert served.client.get("/health", headers=headers).status_code == 200


def test_connections_fit_the_descriptors_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = 256
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("there is nothing to raise"))
    monkeypatch.setattr(connections, "_open_descriptors", lambda: 24)
    assert within_descriptors(1000) == (150, 50)  # 256 - 24 - 32 = 200, a quarter for who is not accepted yet
    assert within_descriptors(50) == (50, 150)
    soft = 60
    assert within_descriptors(1000) == (3, 1)
    soft = 10_000
    assert within_descriptors(1000) == (1000, BACKLOG)


def test_the_limit_is_raised_as_far_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (256, 4096)

    def raised(_: int, new: tuple[int, int]) -> None:
        nonlocal limits
        limits = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", raised)
    monkeypatch.setattr(connections, "_open_descriptors", lambda: 24)
    assert within_descriptors(1000) == (1000, BACKLOG)
    assert limits == (24 + 32 + 1000 + BACKLOG, 4096)


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are limited otherwise")
def test_240_silent_connections_with_256_descriptors(tmp_path: Path) -> None:
    """As an operator runs it: /health answers all the while, and predictions too."""
    write_bundle(make(), tmp_path / "bundle", facts={})
    words = ["--run", str(tmp_path / "bundle"), "--port", "0", "--header-timeout-s", "60"]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
        "from prime_jax.serve.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("Serving on"):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert any("this process may open 256 files" in line for line in lines)
        address = lines[-1].split()[2]
        port = int(address.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            for _ in range(240):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(3):
                assert httpx.get(f"{address}/health", timeout=10).status_code == 200
            request = {"context_embeddings": TURNS.tolist(), "query_embedding": [1.0] * D}
            assert httpx.post(f"{address}/predict", json=request, timeout=10).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
