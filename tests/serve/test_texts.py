"""Predictions from texts over HTTP: the answers of Python, and what is refused."""

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
from conftest import Served, serving

import prime_jax
from prime_jax.predict.predictor import Predictor
from prime_jax.serve.app import build_app
from prime_jax.serve.settings import ServeSettings

TURNS, QUERY = ["the cat sat", "the dog ran"], "and a bird"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tiny_bert.write_folder(tmp_path_factory.mktemp("encoder") / "tiny", tiny_bert.tensors())
    return prime_jax.untrained(encoder=str(folder), max_turns=3)


@pytest.fixture(scope="module")
def served_texts(reader: Predictor) -> Iterator[Served]:
    with serving(reader) as started:
        yield started


def test_answers_are_those_of_python(served_texts: Served) -> None:
    for turns in (TURNS, TURNS[:1], []):
        sent = {"context": turns, "query": QUERY}
        answer = served_texts.client.post("/predict_text", json=sent).raise_for_status().json()
        expected = served_texts.predictor.predict_text(turns, QUERY)
        np.testing.assert_allclose(answer["predicted_embedding"], expected, atol=1e-6)
        assert answer["confidence"] is None
    coded = served_texts.client.post("/predict_text", json={"query": QUERY, "encoding": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(coded["predicted_embedding"]), "<f4")
    np.testing.assert_allclose(vector, served_texts.predictor.predict_text([], QUERY), atol=1e-6)


def test_what_is_served_is_said(served_texts: Served) -> None:
    health = served_texts.client.get("/health").json()
    assert health["reads_text"] is True
    assert health["max_context_length"] == 3
    assert served_texts.client.post("/predict", json={}).status_code == 404
    assert "/predict_text" in served_texts.client.get("/openapi.json").json()["paths"]
    assert "prime_jax_queue_depth 0.0" in served_texts.client.get("/metrics").text


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"context": ["a"] * 4, "query": "b"}, "context has 4 turns, the model takes at most 3"),
        ({"context": "a", "query": "b"}, "context: Input should be a valid list"),
        ({"context": [1], "query": "b"}, "context.0: Input should be a valid string"),
        ({"context": ["a"]}, "query: Field required"),
        ({"query": "b", "turns": ["a"]}, "turns: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_question_is_refused(served_texts: Served, sent: Any, message: str) -> None:
    answer = served_texts.client.post("/predict_text", json=sent)
    assert answer.status_code == 422
    assert message in answer.json()["error"]


def test_half_a_character_is_refused(served_texts: Served) -> None:
    sent = {"content": b'{"query": "\\ud800"}', "headers": {"content-type": "application/json"}}
    answer = served_texts.client.post("/predict_text", **sent)
    assert answer.status_code == 422
    assert "query holds half a character" in answer.json()["error"]


def test_too_many_and_too_late(reader: Predictor) -> None:
    class Slow(Predictor):
        """Answers when it is told to."""

        opened = threading.Event()
        running = most = calls = 0

        def predict_text(self, *given: Any, **options: Any) -> Any:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.opened.wait(30)
            self.running -= 1
            return reader.predict_text(*given, **options)

    slow = Slow(reader.model, facts={"source": reader.info()["source"]})
    with serving(slow, max_queue=1, timeout_s=0.5) as started, ThreadPoolExecutor(3) as threads:

        def ask(_: int) -> int:
            return int(started.client.post("/predict_text", json={"query": QUERY}).status_code)

        assert sorted(threads.map(ask, range(3))) == [503, 504, 504]
        assert ask(0) == 504  # one of those two has the device still, the other one has left the queue
        slow.opened.set()
        for _ in range(100):
            if (status := ask(0)) == 200:
                break
        assert status == 200
        assert slow.most == 1
        assert slow.calls == 2  # nobody is computed who has left before


@pytest.mark.parametrize("wrong", [{"guard": "on"}, {"max_sessions": 3}])
def test_what_texts_do_not_have_is_refused(reader: Predictor, wrong: dict[str, Any]) -> None:
    with pytest.raises(prime_jax.ConfigError, match="go with models that take embeddings"):
        build_app(reader, ServeSettings(run=Path("unused"), **wrong))


def test_a_run_that_takes_embeddings_has_no_texts(served: Served) -> None:
    assert served.client.post("/predict_text", json={"query": "a"}).status_code == 404


def test_passages_are_encoded_by_the_predictors_encoder(reader: Predictor, tmp_path: Path) -> None:
    passages = ["a cat", "the dog ran home"]
    assert reader.text_encoder is not None
    found = reader.encode_passages(passages)
    np.testing.assert_allclose(found, reader.text_encoder.encode(passages), atol=1e-6)
    np.testing.assert_array_equal(reader.encode_passages(text for text in passages), found)
    with pytest.raises(prime_jax.DataError, match="text 0 holds half a character"):
        reader.encode_passages(["\udfff"])
    with pytest.raises(prime_jax.DataError, match="expected a list of texts"):
        reader.encode_passages("a cat")
    with pytest.raises(prime_jax.ConfigError, match="carries no encoder"):
        prime_jax.untrained(8).encode_passages(passages)
