"""Conversations kept by the server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import Serve, Served
from predictors import D, N, calibrated, conversations, make

from prime_jax.errors import OverloadedError, PredictorError
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.session import Session
from prime_jax.serve.sessions import NoSuchSessionError, Sessions

JSON = {"content-type": "application/json"}
RNG = np.random.default_rng(1)
TURNS = RNG.normal(size=(N + 1, D)).astype(np.float32)
QUERY = RNG.normal(size=D).astype(np.float32)


def start(served: Served) -> str:
    answer = served.client.post("/sessions")
    assert answer.status_code == 201
    assert answer.json()["turns"] == 0
    return f"/sessions/{answer.json()['id']}"


def predicted(served: Served, path: str) -> np.ndarray:
    answer = served.client.post(f"{path}/predict", json={"query_embedding": QUERY.tolist()})
    assert answer.status_code == 200
    return np.array(answer.json()["predicted_embedding"], np.float32)


def test_a_conversation_from_start_to_end(served: Served) -> None:
    path = start(served)
    for count, turn in enumerate(TURNS, start=1):
        answer = served.client.post(f"{path}/turns", json={"turn_embedding": turn.tolist()})
        assert answer.json()["turns"] == min(count, N)
        window = TURNS[:count][-N:]
        np.testing.assert_allclose(
            predicted(served, path), served.predictor.predict(window, QUERY), atol=1e-5
        )
    assert served.client.get(path).json()["turns"] == N
    assert served.client.delete(path).status_code == 204
    gone = served.client.get(path)
    assert gone.status_code == 404
    assert "there is no such session" in gone.json()["error"]


def test_a_session_is_guarded_and_confident_like_a_single_request(serve: Serve) -> None:
    model = make(context_attention="causal", residual="copy", use_torch_compile=False)
    with serve(Predictor(model, confidence=calibrated(model)), max_sessions=1) as served:
        assert served.client.get("/health").json()["guard"] is True
        context, query, mask = conversations(N + 1)
        turns = context[-1][mask[-1]]
        for asked in (query[-1], np.roll(query[-1], D // 2)):  # a typical and a foreign query
            path = start(served)
            for turn in turns:
                served.client.post(f"{path}/turns", json={"turn_embedding": turn.tolist()})
            found = served.client.post(f"{path}/predict", json={"query_embedding": asked.tolist()}).json()
            body = {"context_embeddings": turns.tolist(), "query_embedding": asked.tolist()}
            alone = served.client.post("/predict", json=body).json()
            expected = served.predictor.answer(turns, asked)
            for answer in (found, alone):
                np.testing.assert_allclose(answer["predicted_embedding"], expected.embedding, atol=1e-5)
                assert answer["confidence"] == pytest.approx(float(expected.confidence), abs=1e-4)
                assert answer["trust"] == pytest.approx(float(expected.trust), abs=1e-4)
            served.client.delete(path)


def test_predictions_that_are_never_used_are_told_of(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    model = make(residual="copy", use_torch_compile=False)
    with serve(Predictor(model, confidence=calibrated(model, gain=-1))) as served:
        assert served.client.get("/health").json()["predictions_used"] is False
    assert "beat the query, so the guard always serves that" in caplog.text


def test_the_guard_can_be_turned_off_but_not_on_without_a_calibration(
    serve: Serve, predictor: Predictor
) -> None:
    model = make(residual="copy", use_torch_compile=False)
    with serve(Predictor(model, confidence=calibrated(model)), guard="off") as served:
        assert served.client.get("/health").json()["guard"] is False
        _, (query, *_), _ = conversations(1)
        foreign, turn = np.roll(query, D // 2), TURNS[0]
        body = {"context_embeddings": [turn.tolist()], "query_embedding": foreign.tolist()}
        found = served.client.post("/predict", json=body).json()
        expected = served.predictor.predict(turn[None], foreign)
        np.testing.assert_allclose(found["predicted_embedding"], expected, atol=1e-5)
        assert found["confidence"] is not None
        assert found["trust"] is None
    with pytest.raises(PredictorError, match="carries no calibration"), serve(predictor, guard="on"):
        pass


def test_a_state_moves_to_another_session(served: Served) -> None:
    first, second = start(served), start(served)
    served.client.post(f"{first}/turns", json={"turn_embedding": TURNS[0].tolist()})
    saved = served.client.get(f"{first}/state")
    assert saved.headers["content-type"] == "application/octet-stream"
    headers = {"content-type": "application/octet-stream"}
    assert served.client.put(f"{second}/state", content=saved.content, headers=headers).json()["turns"] == 1
    np.testing.assert_array_equal(predicted(served, second), predicted(served, first))
    damaged = served.client.put(f"{second}/state", content=saved.content[:-3], headers=headers)
    assert damaged.status_code == 422
    assert "this is not a saved session" in damaged.json()["error"]
    full = served.client.post("/sessions")
    assert full.status_code == 503
    assert full.json()["error"] == "all 2 sessions are in use; try again later"
    for path in (first, second):
        served.client.delete(path)


@pytest.mark.parametrize(
    ("turn", "message"),
    [([1.0] * (D - 1), "turn has shape (23,)"), ([float("nan")] * D, "turn_embedding: holds NaN")],
)
def test_a_bad_turn_changes_nothing(served: Served, turn: list[float], message: str) -> None:
    path = start(served)
    content = str(turn).replace("nan", "NaN")
    answer = served.client.post(f"{path}/turns", content=f'{{"turn_embedding": {content}}}', headers=JSON)
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert served.client.get(path).json()["turns"] == 0
    served.client.delete(path)


def test_what_is_no_embedding_changes_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """A turn of bytes in the wrong order stayed in the window, and every later answer was NaN."""
    path = start(served)
    served.client.post(f"{path}/turns", json={"turn_embedding": TURNS[0].tolist()})
    expected = predicted(served, path)
    for turn in ([1e22] * D, [1e-20] * D):
        answer = served.client.post(f"{path}/turns", json={"turn_embedding": turn})
        assert answer.status_code == 422
        assert "turn_embedding has norm 4.9e" in answer.json()["error"]
    answer = served.client.post(f"{path}/predict", json={"query_embedding": [0.0] * D})
    assert answer.status_code == 422
    assert "query_embedding has norm 0, which" in answer.json()["error"]
    headers = {"content-type": "application/octet-stream"}
    elsewhere = served.predictor.session()
    elsewhere.append(np.full(D, 1e5, np.float32))
    saved = elsewhere.save()
    with pytest.MonkeyPatch.context() as patch:  # as a session of another server may hold it
        patch.setattr("prime_jax.predict.inputs.LARGEST_NORM", 1e4)
        answer = served.client.put(f"{path}/state", content=saved, headers=headers)
    assert answer.status_code == 422
    assert "saved turns[0, 0] has norm 4.9e+05" in answer.json()["error"]
    assert served.client.get(path).json()["turns"] == 1
    np.testing.assert_array_equal(predicted(served, path), expected)
    assert caplog.text == ""
    served.client.delete(path)


def test_requests_of_one_session_take_turns(served: Served) -> None:
    path = start(served)
    served.client.post(f"{path}/turns", json={"turn_embedding": TURNS[0].tolist()})
    expected = predicted(served, path)
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: predicted(served, path), range(24)):
            np.testing.assert_array_equal(answer, expected)
    served.client.delete(path)


def test_a_stateless_server_says_how_to_get_sessions(serve: Any) -> None:
    with serve() as started:
        for answer in (started.client.post("/sessions"), started.client.get("/sessions/x")):
            assert answer.status_code == 404
            assert "start it with --max-sessions" in answer.json()["error"]


def test_waiting_requests_to_sessions_are_bounded(
    serve: Any, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened = threading.Event(), threading.Event()
    predict = Session.predict

    def held(session: Session, query: np.ndarray) -> np.ndarray:
        entered.set()
        assert opened.wait(30)
        return predict(session, query)

    monkeypatch.setattr(Session, "predict", held)
    with serve(max_sessions=1, max_queue=1) as started, ThreadPoolExecutor(1) as pool:
        path = start(started)
        first = pool.submit(predicted, started, path)
        assert entered.wait(30)
        refused = started.client.get(path)
        assert refused.status_code == 503
        assert "1 requests to sessions are waiting already" in refused.json()["error"]
        opened.set()
        assert first.result(30).shape == (D,)
        assert started.client.get(path).status_code == 200


def test_idle_sessions_are_dropped_but_not_those_in_use(predictor: Predictor) -> None:
    now = 0.0
    kept = Sessions(most=2, idle_s=10.0, clock=lambda: now)
    session = predictor.session()
    first, second = kept.keep(session), kept.keep(session)
    assert first != second
    with pytest.raises(OverloadedError):
        kept.keep(session)
    now = 8.0
    kept.find(first)
    now = 12.0
    assert len(kept) == 1
    with pytest.raises(NoSuchSessionError):
        kept.find(second)
    kept.keep(session)
    kept.drop(first)
    with pytest.raises(NoSuchSessionError):
        kept.drop(first)
