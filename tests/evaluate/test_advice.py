"""What `prime-jax evaluate` says one could train instead."""

from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from prime_jax.config import Config, DataConfig
from prime_jax.data.encode import Encoder
from prime_jax.evaluate.advice import advice, better_baseline
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.text import TextConfig
from prime_jax.pretrained.bert import BertTextEncoder


class Called:
    """An encoder behind an API."""

    identity, dim = "called@1", 32

    def encode(self, texts: list[str]) -> np.ndarray:
        raise AssertionError("advice encodes nothing")


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> BertTextEncoder:
    return BertTextEncoder(
        tiny_bert.write_folder(tmp_path_factory.mktemp("bert") / "tiny", tiny_bert.tensors())
    )


FROZEN = Config(model=PredictorConfig(input_dim=32, output_dim=32, hidden_dim=128))


def test_words_are_read_where_the_encoder_can_be_trained(trainable: Encoder) -> None:
    said = advice(FROZEN, trainable, 1309)
    assert "1,309 training examples: configs/recommended.yaml" in said
    assert "recommended" not in advice(FROZEN, trainable, 149)


def test_an_encoder_that_can_only_be_called_leaves_no_choice() -> None:
    assert advice(FROZEN, Called(), 1309) == ""


def test_a_text_predictor_of_few_examples_is_to_be_compared(trainable: Encoder) -> None:
    config = Config(model=TextConfig())
    assert advice(config, trainable, 150) == ""
    assert "40 training examples are fewer than any" in advice(config, trainable, 40)


def test_nothing_is_said_of_models_that_are_steered_or_unknown(trainable: Encoder) -> None:
    assert advice(None, trainable, 1000) == ""
    assert advice(Config(model=JasperConfig()), trainable, 1000) == ""


def test_a_baseline_that_is_better_is_offered() -> None:
    config = Config(data=DataConfig(encoder="my encoder", query_prefix="query: "))

    def offered(**scores: float) -> str:
        return better_baseline(scores, Path("my-data"), config)

    assert offered(query=0.1, recency_mix=0.3, predicted=0.4) == ""
    assert offered(query=0.1, recency_mix=0.5, predicted=0.4).endswith(
        "prime-jax export --baseline recency_mix --data my-data --encoder 'my encoder' "
        "--query-prefix 'query: ' --max-turns 10 --out bundle"
    )
    assert "--baseline text --data" in offered(conversation_text=0.5, predicted=0.4)
    assert offered(rocchio=0.5, predicted=0.4) == ""  # searches twice, so it is no model
