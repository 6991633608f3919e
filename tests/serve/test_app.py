"""Prediction over HTTP: the right answer, and the right status for everything that can be wrong."""

import base64
import contextlib
import gzip
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Served
from predictors import D, N, make

from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import PredictorOutput, to_base64

RNG = np.random.default_rng(0)
TURNS, QUERY = RNG.normal(size=(2, D)).astype(np.float32), RNG.normal(size=D).astype(np.float32)
JSON = {"content-type": "application/json"}


def body(**fields: Any) -> dict[str, Any]:
    return {"context_embeddings": TURNS.tolist(), "query_embedding": QUERY.tolist()} | fields


class Gate:
    """A predictor whose calls wait until they are let through."""

    def __init__(self, like: Predictor) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.predictor = Predictor.from_model(like.model)
        self.predictor.warmup()
        begin = self.predictor._begin

        def held(*arrays: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(30)
            return begin(*arrays)

        self.predictor._begin = held  # type: ignore[method-assign]


@pytest.fixture
def gate(predictor: Predictor) -> Iterator[Gate]:
    made = Gate(predictor)
    yield made
    made.opened.set()


def test_predictions_are_those_of_python(served: Served) -> None:
    expected = served.predictor.predict(TURNS, QUERY)
    for request in (
        body(),
        body(encoding="base64"),
        body(context_embeddings=[to_base64(turn) for turn in TURNS], query_embedding=to_base64(QUERY)),
    ):
        answer = served.client.post("/predict", json=request)
        assert answer.status_code == 200
        output = PredictorOutput.model_validate_json(answer.content)
        np.testing.assert_allclose(output.vector, expected, atol=1e-6)
        assert isinstance(output.predicted_embedding, str) == (request.get("encoding") == "base64")
        assert answer.json()["confidence"] is None


def test_many_at_once(served: Served) -> None:
    queries = RNG.normal(size=(200, D)).astype(np.float32)
    expected = served.predictor.predict(np.tile(TURNS, (200, 1, 1)), queries)

    def ask(row: int) -> np.ndarray:
        answer = served.client.post("/predict", json=body(query_embedding=to_base64(queries[row])))
        return PredictorOutput.model_validate_json(answer.content).vector

    with ThreadPoolExecutor(16) as pool:
        np.testing.assert_allclose(list(pool.map(ask, range(200))), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("request_body", "status", "message"),
    [
        ("{", 400, "the body is not valid JSON"),
        ("", 422, "body: Field required"),
        ("[]", 422, "body: Input should be"),
        ("\x00", 400, "the body is not valid JSON"),
        (
            body(query_embedding=[float("nan")] * D),
            422,
            "query_embedding: holds NaN, Inf or a number too large",
        ),
        (body(context_embeddings=[[float("inf")] * D]), 422, "context_embeddings: turn 0 holds NaN, Inf"),
        (body(context_embeddings=[]), 422, "context_embeddings: cannot be empty"),
        (body(query_embedding=[1.0] * (D + 1)), 422, f"with D = {D}"),
        (body(context_embeddings=[[1.0] * D] * (N + 1)), 422, "5 turns, the model takes at most 4"),
        (body(surprise=1), 422, "surprise: Extra inputs are not permitted"),
        (body(encoding="hex"), 422, "encoding: Input should be 'list' or 'base64'"),
        ({"query_embedding": QUERY.tolist()}, 422, "context_embeddings: Field required"),
    ],
)
def test_bad_bodies(served: Served, request_body: Any, status: int, message: str) -> None:
    content = request_body if isinstance(request_body, str) else json.dumps(request_body)
    answer = served.client.post("/predict", content=content, headers=JSON)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]
    assert len(answer.content) < 500  # what was sent is not sent back
    assert served.client.get("/health").json()["status"] == "ok"


def swapped(vector: np.ndarray) -> str:
    """Base64 of big-endian float32, which is not what is asked for."""
    return base64.b64encode(np.asarray(vector, ">f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"query_embedding": swapped(np.full(D, 0.05))},
            "query_embedding has norm 2.1e+09, which no embedding has",
        ),
        ({"query_embedding": [0.0] * D}, "query_embedding has norm 0, which no embedding has"),
        ({"query_embedding": [1e-42] * D}, "query_embedding has norm 4.9e-42"),
        ({"query_embedding": [1e12] * D}, "query_embedding has norm 4.9e+12"),
        ({"context_embeddings": [[1.0] * D, [1e22] * D]}, "context_embeddings[1] has norm 4.9e+22"),
        ({"context_embeddings": [[1e-20] * D]}, "context_embeddings[0] has norm 4.9e-20"),
        ({"context_embeddings": [swapped(np.full(D, 0.05))]}, "decoded with the right dtype and byte order"),
        ({"query_embedding": base64.b64encode(np.full(D, 0.05).tobytes()).decode()}, f"({2 * D},)"),
    ],
)
def test_finite_numbers_that_are_no_embedding(
    served: Served, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], message: str
) -> None:
    """They gave zeros with status 200, or status 500 with a page of log for each."""
    answer = served.client.post("/predict", json=body(**fields))
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert len(answer.content) < 300
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content", ["[" * 5000, '{"query_embedding": [' + "1" * 5000 + "]}", b'{"a": "\xff"}']
)
def test_json_that_cannot_be_read(served: Served, caplog: pytest.LogCaptureFixture, content: Any) -> None:
    answer = served.client.post("/predict", content=content, headers=JSON)
    assert (answer.status_code, answer.json()) == (400, {"error": "the body is not valid JSON"})
    assert caplog.text == ""


def test_a_compressed_body_is_named(served: Served) -> None:
    content = gzip.compress(json.dumps(body()).encode())
    answer = served.client.post("/predict", content=content, headers={**JSON, "content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["error"]
    plain = served.client.post("/predict", json=body(), headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_a_long_name_is_not_sent_back(served: Served) -> None:
    answer = served.client.post("/predict", json=body(**{"x" * 3000: 1}))
    assert answer.status_code == 422
    assert len(answer.content) < 200


@pytest.mark.parametrize("weight", [0.0, 1e38])
def test_what_is_no_prediction_never_leaves(
    serve: Any, caplog: pytest.LogCaptureFixture, weight: float
) -> None:
    """One line of log, for a request and for a session; the fault is the model's."""
    model = make(residual="none", context_attention="causal", use_torch_compile=False)
    model.output_proj.kernel[...] = jnp.full_like(model.output_proj.kernel[...], weight)
    model.output_proj.bias[...] *= weight
    with (
        serve(Predictor.from_model(model, precision="float32"), max_sessions=1) as started,
        caplog.at_level(logging.WARNING),
    ):
        path = f"/sessions/{started.client.post('/sessions').json()['id']}/predict"
        for route, asked in (("/predict", body()), (path, {"query_embedding": QUERY.tolist()})):
            found = started.client.post(route, json=asked)
            assert found.status_code == 500, found.json()
            assert found.json() == {"error": "something went wrong in the server; its log says what"}
    for route, record in zip(("/predict", "/sessions/{name}/predict"), caplog.records, strict=True):
        line = record.getMessage()
        assert line.startswith(f"POST {route} failed: WrongAnswerError: the answer to request 0 is no unit")
        assert "started.py" in line
        assert "\n" not in line
        assert record.exc_info is None


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    assert served.client.get("/nothing").status_code == 404
    assert served.client.get("/predict").status_code == 405
    assert served.client.get("/nothing").json() == {"error": "Not Found"}


def test_a_body_too_large_is_refused_unread(served: Served) -> None:
    declared = served.client.post("/predict", content=b"x" * 1_000_000)
    assert declared.status_code == 413
    assert re.match(r"the body is larger than \d+ bytes", declared.json()["error"])
    chunks = iter([b"x" * 1000] * 1000)
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # it may hang up before all is sent
        assert served.client.post("/predict", content=chunks).status_code == 413
    assert served.client.get("/health").status_code == 200


def test_a_body_that_comes_too_slowly_is_given_up(serve: Any) -> None:
    with serve(timeout_s=0.2) as started, socket.create_connection(("127.0.0.1", started.port)) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408 Request Timeout" in slow.recv(100)
        assert started.client.get("/health").status_code == 200


def test_a_full_window_as_text_fits(served: Served) -> None:
    turns = (RNG.normal(size=(N, D)) / 3).tolist()
    longest = json.dumps(body(context_embeddings=turns), indent=1)
    assert served.client.post("/predict", content=longest, headers=JSON).status_code == 200


def test_a_body_that_is_not_called_json(served: Served) -> None:
    answer = served.client.post("/predict", content=json.dumps(body()))
    assert answer.status_code == 415
    assert answer.json() == {"error": "send the body with the header 'Content-Type: application/json'"}


def test_too_slow_is_504_and_too_many_503(serve: Any, gate: Gate) -> None:
    with serve(gate.predictor, timeout_s=1.0, max_queue=1) as started, ThreadPoolExecutor(3) as pool:
        first = pool.submit(started.client.post, "/predict", json=body())
        assert gate.entered.wait(30)
        second = pool.submit(started.client.post, "/predict", json=body())
        answers = [started.client.post("/predict", json=body()), first.result(30), second.result(30)]
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses in ([503, 504, 504], [504, 504, 504])  # the second may have given up by then
        late = next(answer for answer in answers if answer.status_code == 504)
        assert late.json() == {"error": "no answer within 1 s"}
        gate.opened.set()
        assert started.client.post("/predict", json=body()).status_code == 200


def test_a_full_queue_says_when_to_come_back(serve: Any, gate: Gate) -> None:
    with serve(gate.predictor, max_queue=1) as started, ThreadPoolExecutor(2) as pool:
        first = pool.submit(started.client.post, "/predict", json=body())
        assert gate.entered.wait(30)
        second = pool.submit(started.client.post, "/predict", json=body())
        while "prime_jax_queue_depth 1.0" not in started.client.get("/metrics").text:
            pass
        refused = started.client.post("/predict", json=body())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "1 requests are waiting already" in refused.json()["error"]
        gate.opened.set()
        assert [first.result(30).status_code, second.result(30).status_code] == [200, 200]


def test_a_client_that_hangs_up_is_forgotten(serve: Any, gate: Gate) -> None:
    content = json.dumps(body()).encode()
    length = f"Content-Length: {len(content)}"
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    with serve(gate.predictor) as started:
        with socket.create_connection(("127.0.0.1", started.port)) as half:
            half.sendall(head.encode() + content[:10])  # gone before its body is there
        with socket.create_connection(("127.0.0.1", started.port)) as busy:
            busy.sendall(head.encode() + content)
            assert gate.entered.wait(30)
            with socket.create_connection(("127.0.0.1", started.port)) as gone:
                gone.sendall(head.encode() + content)
                while "prime_jax_queue_depth 1.0" not in started.client.get("/metrics").text:
                    pass
            # its request leaves the queue, so the device never computes it
            while 'route="/predict",status="499"' not in started.client.get("/metrics").text:
                pass
            gate.opened.set()
            assert b"200 OK" in busy.recv(100)
        assert started.client.post("/predict", json=body()).status_code == 200
        page = started.client.get("/metrics").text
        assert "prime_jax_batch_size_sum 2.0" in page


def test_an_unexpected_error_says_nothing_of_the_inside(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the password is 1234\n" + "x" * 10_000)

    with serve() as started, monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr("prime_jax.predict.batcher.Batcher._call", fails)
        answer = started.client.post("/predict", json=body())
        assert answer.status_code == 500
        assert answer.json() == {"error": "something went wrong in the server; its log says what"}
        patch.undo()
        assert started.client.post("/predict", json=body()).status_code == 200
    (record,) = caplog.records
    line = record.getMessage()
    assert re.fullmatch(
        r"POST /predict failed: RuntimeError: the password is 1234 x+\.\.\. "
        r"\(at \S+\.py:\d+( < \S+\.py:\d+)*\)",
        line,
    )
    assert len(line) < 400
    assert record.exc_info is None


def test_health_says_what_is_served(served: Served) -> None:
    health = served.client.get("/health").json()
    assert health["status"] == "ok"
    assert (health["input_dim"], health["output_dim"], health["max_context_length"]) == (D, D, N)
    assert health["parameters"] == served.predictor.model.num_params()
    assert health["precision"]["1"]["dtype"] == "float32"
    assert "source" not in health


def test_metrics_count_requests_by_route_and_status(serve: Any) -> None:
    with serve() as started:
        for _ in range(3):
            started.client.post("/predict", json=body())
        started.client.post("/predict", json=body(encoding="hex"))
        started.client.get("/whatever/the/client/likes")
        page = started.client.get("/metrics").text
    assert 'prime_jax_requests_total{route="/predict",status="200"} 3.0' in page
    assert 'prime_jax_requests_total{route="/predict",status="422"} 1.0' in page
    assert 'prime_jax_requests_total{route="none",status="404"} 1.0' in page
    assert 'prime_jax_request_seconds_count{route="/predict"} 4.0' in page
    assert "prime_jax_batch_size_count 3.0" in page
    assert "whatever" not in page


def test_openapi_describes_the_routes(served: Served) -> None:
    described = served.client.get("/openapi.json").json()
    assert set(described["paths"]) >= {"/predict", "/health", "/sessions", "/sessions/{name}/predict"}
    answers = described["paths"]["/predict"]["post"]["responses"]
    assert set(answers) >= {"200", "400", "413", "422", "503", "504"}
    example = described["components"]["schemas"]["PredictorInput"]["example"]
    assert served.client.post("/predict", json=example).status_code == 422  # right form, other dimension
    assert served.client.get("/docs").status_code == 200
