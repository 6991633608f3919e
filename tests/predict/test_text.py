"""From texts to a prediction: what encoding first and predicting then gives, in one program or in two."""

from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import tiny_bert
from predictors import make

from prime_jax.errors import ConfigError, PredictorError
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder

REQUESTS = [
    (["the cat sat on a mat", "rain"], "dogs ran home"),
    ([], "quiet hills"),
    (["over the hills"] * 4, " ".join(["while rain fell"] * 9)),  # another length, a full window
    (["a mat"], "and the cat"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> BertTextEncoder:
    return BertTextEncoder(
        tiny_bert.write_folder(tmp_path_factory.mktemp("bert") / "tiny", tiny_bert.tensors())
    )


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    fields = {"residual": "copy", "use_torch_compile": False, "max_batch_size": 3}
    return Predictor.from_model(make(input_dim=32, output_dim=32, **fields), precision="float32")


def expected(predictor: Predictor, encoder: Any, turns: list[str], query: str) -> np.ndarray:
    vectors = encoder.encode([*turns, query])
    return predictor.predict(vectors[:-1], vectors[-1])


def test_every_request_alone_and_all_together(predictor: Predictor, encoder: BertTextEncoder) -> None:
    """Four requests are more than one batch of three."""
    alone = predictor.predict_text(*REQUESTS[1], encoder=encoder)
    together = predictor.predict_text(*map(list, zip(*REQUESTS, strict=True)), encoder=encoder)
    wanted = np.stack([expected(predictor, encoder, *request) for request in REQUESTS])
    np.testing.assert_allclose(together, wanted, atol=1e-5)
    np.testing.assert_allclose(alone, wanted[1], atol=1e-5)


def test_the_encoders_precision_is_kept(predictor: Predictor, encoder: BertTextEncoder) -> None:
    """An encoder in bfloat16 has an identity of its own, so its products must be in bfloat16 here, too.

    XLA may round in other places in another program, so digits are not compared.
    """
    halves = BertTextEncoder(encoder.source.transformer, "mean", precision="bfloat16")
    turns, query = REQUESTS[0]
    found = predictor.predict_text(turns, query, encoder=halves)
    assert (found * expected(predictor, halves, turns, query)).sum() > 0.999
    path = predictor._texts._path(halves)
    program = path._run.lower(path._weights, np.zeros((1, 3, 16), np.int32), np.ones((1, 3), np.int32))
    products = [line for line in program.as_text().splitlines() if "dot_general" in line]
    assert any("xbf16>, tensor<" in line for line in products)


def test_an_encoder_that_is_not_ours(encoder: BertTextEncoder) -> None:
    bag = fakes.encoder()
    model = Predictor.from_model(make(use_torch_compile=False), precision="float32")
    found = model.predict_text(*map(list, zip(*REQUESTS, strict=True)), encoder=bag)
    for row, (turns, query) in enumerate(REQUESTS[:1]):
        np.testing.assert_allclose(found[row], expected(model, bag, turns, query), atol=1e-5)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("context", "query", "message"),
    [
        ("a turn", "a query", "context is not a list of texts"),
        (None, "a query", "context is a NoneType, neither a text nor a list"),
        ([], None, "query is a NoneType, neither a text nor a list"),
        ([None], ["q"], "context of request 0 is not a list of texts"),
        (["a", 3], "a query", "context is not a list of texts"),
        ([["a"], "b"], ["q", "q"], "context of request 1 is not a list of texts"),
        ([["a"]], ["q", "q"], "1 contexts do not go with 2 queries"),
        ([["a"]], [7], "query of request 0 is a int, not a text"),
        (["a"] * 5, "q", "5 turns, the model takes at most 4"),
    ],
)
def test_what_is_no_text_is_said(
    predictor: Predictor, encoder: BertTextEncoder, context: Any, query: Any, message: str
) -> None:
    with pytest.raises(PredictorError, match=message):
        predictor.predict_text(context, query, encoder=encoder)


def test_without_an_encoder_or_with_one_that_does_not_fit(
    predictor: Predictor, encoder: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="carries no encoder"):
        predictor.predict_text(["a"], "b")
    with pytest.raises(ConfigError, match="gives 24 dimensions, the model takes 32"):
        predictor.predict_text(["a"], "b", encoder=fakes.encoder())
