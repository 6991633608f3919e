"""The text predictor: packed or alone, a conversation has the same answer."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from flax import nnx
from pydantic import ValidationError
from tiny_text import SEP, sequences, text_config, text_model

from prime_jax.data.sequences import packed, packed_into, room_for
from prime_jax.errors import ConfigError
from prime_jax.models import model_config
from prime_jax.models.text import TextConfig, TextPredictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.types import Conversations

KINDS: list[dict[str, Any]] = [
    {},
    {"pooling": "cls"},
    {"roles": False, "separate_turns": False},
    {"family": "modernbert"},
    {"query_weight": 0.5},
    {"query_weight": 0.5, "pooling": "cls", "roles": False},
]


def on_device(found: Conversations) -> Conversations:
    return Conversations(*map(jnp.asarray, found))


def alone(model: TextPredictor, width: int = 24) -> np.ndarray:
    """Each sequence in a row of its own, padded."""
    given = sequences()
    rows = np.arange(len(given))
    tokens, mask = given.padded(rows, width), np.arange(width) < given.lengths[:, None]
    return np.asarray(model(jnp.asarray(tokens), jnp.asarray(mask)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packing_changes_nothing(kind: dict[str, Any]) -> None:
    model, given = text_model(text_config(**kind)), sequences()
    expected = alone(model)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(alone(model, 31), expected, atol=2e-6)
    for chosen in (np.arange(9), np.array([7, 2, 5])):
        found = packed(given, chosen, room_for(given.lengths[chosen], most=32))
        np.testing.assert_allclose(model.details(on_device(found)).embedding, expected[chosen], atol=2e-6)
    whole = packed_into(given, np.arange(9), width=32, multiple=1)
    assert len(whole.tokens) < 6  # some do share rows
    assert np.abs(expected - expected[0]).max() > 0.05


def test_gradients_of_packed_rows_are_those_of_padded_ones() -> None:
    model, given = text_model(text_config()), sequences()
    graph, params = nnx.split(model)
    goal = jnp.asarray(np.random.default_rng(2).normal(size=(9, 32)), jnp.float32)
    conversations = on_device(packed_into(given, np.arange(9), width=32, multiple=1))
    tokens = jnp.asarray(given.padded(np.arange(9), 24))
    mask = jnp.arange(24) < jnp.asarray(given.lengths)[:, None]

    def packed_loss(params: Any, remat: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params).details(conversations, remat=remat).embedding * goal)

    def padded_loss(params: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(tokens, mask) * goal)

    expected = jax.grad(padded_loss)(params)
    for remat in ("none", "dots", "blocks"):
        found = jax.grad(packed_loss)(params, remat)
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left, right, atol=2e-5)


def test_a_query_alone_is_what_the_encoder_makes_of_it(tmp_path: Path) -> None:
    encoder = BertTextEncoder(tiny_bert.write_folder(tmp_path / "tiny", tiny_bert.tensors()))
    model = text_config().build(rngs=nnx.Rngs(0))
    nnx.update(model.encoder, nnx.state(nnx.merge(encoder.graph, encoder.params)))
    text = "quiet dogs ran home"
    tokens = jnp.asarray(encoder.tokenize([text])[0])[None]
    found = model(tokens, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(found, encoder.encode([text]), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_query_alone_is_added_with_its_weight(pooling: str) -> None:
    """What the model without a weight says of the query alone, up to the separator that ends it."""
    plain = text_model(text_config(pooling=pooling))
    both = text_model(text_config(pooling=pooling, query_weight=0.7))
    text = jnp.asarray([[2, 5, 6, 3, 7, 8, 3, 9, 3]])
    query, real = text[:, :4], jnp.ones_like(text, bool)
    expected = plain(text, real) + 0.7 * plain(query, real[:, :4])
    found = both(text, real)
    np.testing.assert_allclose(found, expected / jnp.linalg.norm(expected), atol=2e-6)
    np.testing.assert_allclose(both(query, real[:, :4]), plain(query, real[:, :4]), atol=2e-6)


def test_roles_tell_query_answer_and_own_words_apart() -> None:
    model = text_config().build(rngs=nnx.Rngs(0))
    model.roles.set_value(jnp.arange(3.0)[:, None] * jnp.ones((3, 32)))
    tokens = jnp.asarray([[2, 5, 6, SEP, 5, SEP, 6, 7, SEP, 8, SEP, 0]])
    separators = tokens == SEP
    age = jnp.cumsum(separators, axis=1) - separators
    assert age[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert model._said_by(age)[0, :-1, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 1, 1]


def test_neither_neighbours_nor_padding_have_a_say() -> None:
    model, given = text_model(text_config()), sequences()
    found = packed_into(given, np.arange(9), width=32, multiple=1)
    before = model.details(on_device(found)).embedding
    at, number = divmod(int(found.slots[0]), 8)
    others = np.ones(found.tokens.shape, bool)
    others[at] = found.segments[at] != number + 1
    changed = found._replace(tokens=np.where(others, 9, found.tokens))
    np.testing.assert_allclose(model.details(on_device(changed)).embedding[0], before[0], atol=2e-6)


def test_bfloat16_is_near() -> None:
    exact, given = alone(text_model(text_config())), sequences()
    half = text_model(text_config(), dtype=jnp.bfloat16)
    found = half.details(on_device(packed_into(given, np.arange(9), width=32, multiple=1))).embedding
    assert np.min(np.sum(np.asarray(found) * exact, axis=1)) > 0.995


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_dropout_is_for_training_alone(family: str) -> None:
    model = text_model(text_config(family, dropout=0.2))
    conversations = on_device(packed_into(sequences(), np.arange(9), width=32, multiple=1))
    key = jax.random.key(0)
    plain, one, again = (model.details(conversations, dropout_key=k).embedding for k in (None, key, key))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 1e-2
    np.testing.assert_allclose(plain, model.details(conversations).embedding)
    off = text_model(text_config(family))
    np.testing.assert_array_equal(off.details(conversations, dropout_key=key).embedding, plain)


def test_the_config_comes_back_from_json() -> None:
    for kind in KINDS:
        config = text_config(**kind)
        assert model_config(config.model_dump(mode="json")) == config
    assert text_config().forward_flops() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dim": 16}, "must equal output_dim"),
        ({"separate_turns": False}, "roles are told by separators"),
        ({"separate_turns": False, "roles": False, "query_weight": 1}, "a separator ends the query"),
        ({"input_dim": 16, "output_dim": 16}, "the encoder is 32 wide, output_dim is 16"),
        ({"max_tokens": 65}, "more than the 64 that the encoder reads"),
    ],
)
def test_fields_that_contradict(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        text_config(**fields)


def test_without_an_encoder_there_is_no_model() -> None:
    with pytest.raises(ConfigError, match="are not set: training takes them"):
        TextConfig().build(rngs=nnx.Rngs(0))
