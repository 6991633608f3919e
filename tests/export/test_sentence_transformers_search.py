"""The adapter for sentence-transformers gives what the library gives for the same texts."""

import sys
from pathlib import Path

import fakes
import jax.numpy as jnp
import numpy as np
import pytest
from consumers import SCRIPTS
from predictors import make

import prime_jax
from prime_jax.export.bundle import write_bundle

sys.path.insert(0, str(SCRIPTS))
from sentence_transformers_search import PredictedQuery

TURNS = ["a b", "b c", "c d", "d e", "e f"]  # one more than the model looks at


def bundle(folder: Path, head: np.ndarray | None = None) -> Path:
    facts = {"encoder": "bag-of-words", "query_prefix": "query: ", "passage_prefix": "passage: "}
    model = make(residual="copy", use_torch_compile=False)
    write_bundle(
        model, folder / "bundle", facts=facts, target_head=None if head is None else jnp.asarray(head)
    )
    return folder / "bundle"


@pytest.mark.parametrize("count", range(len(TURNS) + 1))
def test_a_query_is_encoded_as_predict_does(tmp_path: Path, count: int) -> None:
    folder, encoder = bundle(tmp_path), fakes.encoder()
    ours = PredictedQuery(encoder, folder).encode_query("f g", TURNS[:count])
    turns = encoder.encode([f"query: {turn}" for turn in TURNS[:count][-4:]])
    query = encoder.encode(["query: f g"])[0]
    theirs = prime_jax.load(folder, precision="float32").predict(turns.reshape(-1, fakes.DIM), query)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_documents_have_their_prefix_and_head(tmp_path: Path) -> None:
    head = np.random.default_rng(0).normal(size=(fakes.DIM, fakes.DIM)).astype(np.float32)
    folder, encoder = bundle(tmp_path, head), fakes.encoder()
    ours = PredictedQuery(encoder, folder).encode_documents(["a b", "c"])
    plain = encoder.encode(["passage: a b", "passage: c"])
    theirs = prime_jax.load(folder, precision="float32").map_memory(plain)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_another_encoders_width_is_refused(tmp_path: Path) -> None:
    class Wide:
        def encode(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 25))

    with pytest.raises(ValueError, match=r"gives \(1, 25\), the model takes vectors of 24 dimensions"):
        PredictedQuery(Wide(), bundle(tmp_path)).encode_query("x")
