"""A real server on a free port, in a thread of the test's process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from predictors import make

from prime_jax.predict.predictor import Predictor
from prime_jax.serve.app import build_app
from prime_jax.serve.connections import server_config
from prime_jax.serve.settings import ServeSettings


class Served(NamedTuple):
    """A running server: its client, address and what predicts behind it."""

    client: httpx.Client
    port: int
    predictor: Predictor


Serve = Callable[..., Any]


@contextmanager
def serving(predictor: Predictor, **settings: Any) -> Iterator[Served]:
    given = ServeSettings(run=Path("unused"), **settings)
    server = uvicorn.Server(server_config(build_app(predictor, given), given, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Served(client, port, predictor)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def predictor() -> Predictor:
    return Predictor.from_model(make(context_attention="causal", use_torch_compile=False))


@pytest.fixture
def serve(predictor: Predictor) -> Serve:
    """Start a server with the settings given, on a predictor of one's own where given."""
    return lambda predictor=predictor, **settings: serving(predictor, **settings)


@pytest.fixture(scope="module")
def served(predictor: Predictor) -> Iterator[Served]:
    with serving(predictor, max_sessions=2) as started:
        yield started
