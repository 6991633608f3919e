"""Confidence: features by hand, what it trusts, and files that are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prime_jax.errors import CheckpointError
from prime_jax.models.confidence import (
    FEATURES,
    FILE,
    Confidence,
    features,
    mix,
    read_confidence,
    write_confidence,
)
from prime_jax.retrieval.mix import PLAIN_QUERY

CENTRES = np.eye(3, dtype=np.float32)[:2]
COUNT = len(FEATURES)


def made(**fields: np.ndarray) -> Confidence:
    each = np.zeros(COUNT, np.float32)
    some = Confidence(
        weights=each,
        bias=np.float32([0]),
        mean=each,
        scale=each + 1,
        low=each - 9,
        high=each + 9,
        query_centres=CENTRES,
        answer_centres=CENTRES,
        ramp=np.float32([0.5, 0.9]),
        strength=np.float32([1]),
        max_turns=np.float32([4]),
    )
    return replace(some, **fields)


def one(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_features_by_hand() -> None:
    query, predicted = one([2, 0, 0]), one([0, 0.6, 0.8])
    context = one([0, 0, 5], [3, 0, 4], [9, 9, 9])[None]
    mask = np.array([[True, True, False]])
    found = features(context, mask, query, predicted, CENTRES, CENTRES, 4)
    # cosines: with the query; with the turns (0.8 and 0.64); query and newest turn; 2 of 4 turns; centres
    np.testing.assert_allclose(found, [[0.0, 0.8, 0.6, 0.5, 1.0, 0.6]], atol=1e-6)


@pytest.mark.parametrize("turns", [0, 2])
def test_what_does_not_exist_is_zero(turns: int) -> None:
    """No turns, and answers in another space than queries."""
    context, mask = np.full((1, turns, 3), 7, np.float32), np.zeros((1, turns), bool)
    far = np.eye(2, dtype=np.float32)
    found = features(context, mask, one([1, 0, 0]), one([0, 1]), CENTRES, far, 4)
    np.testing.assert_allclose(found, [[0, 0, 0, 0, 1, 1]])


def test_the_probability_is_logistic_and_ends_where_validation_ended() -> None:
    each = np.zeros(COUNT, np.float32)
    weights, high = each.copy(), each + 9
    weights[0], high[0] = 2.0, 0.5  # cosine of prediction and query
    confidence = made(weights=weights, bias=np.float32([-1]), high=high)
    query, nothing = one([1, 0, 0], [1, 0, 0]), np.zeros((2, 0, 3), np.float32)
    predicted = one([0.25, np.sqrt(1 - 0.25**2), 0], [0.9, np.sqrt(1 - 0.9**2), 0])
    found = confidence.probability(nothing, np.zeros((2, 0), bool), query, predicted)
    np.testing.assert_allclose(found, 1 / (1 + np.exp([0.5, 0.0])), rtol=1e-5)


def test_trust_rises_along_the_ramp() -> None:
    cosines = np.array([0.2, 0.5, 0.7, 0.9, 1.0])
    queries = np.stack([cosines, 0 * cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)
    np.testing.assert_allclose(made().trust(3 * queries), [0, 0, 0.5, 1, 1], atol=1e-5)
    assert not made(strength=np.float32([0])).trust(queries).any()


def test_a_trusted_prediction_is_returned_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    predicted, query = rng.normal(size=(2, 3, 8)).astype(np.float32)
    served = mix(predicted, query, np.float32([1, 0, 0.5]))
    np.testing.assert_array_equal(served[0], predicted[0])
    np.testing.assert_allclose(served[1], query[1] / np.linalg.norm(query[1]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(served[2]), 1, rtol=1e-6)
    assert served.dtype == np.float32


def test_where_there_is_no_query_to_go_back_to_the_prediction_stays() -> None:
    predicted = one([0.6, 0.8, 0])
    np.testing.assert_array_equal(mix(predicted, 0 * predicted, np.float32([0])), predicted)


def test_many_rows_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    context, query, predicted = (
        rng.normal(size=size).astype(np.float32) for size in ((9, 2, 3), (9, 3), (9, 3))
    )
    mask = rng.random((9, 2)) < 0.6
    whole = features(context, mask, query, predicted, CENTRES, CENTRES, 4)
    monkeypatch.setattr("prime_jax.models.confidence._ROWS", 4)
    parts = features(context, mask, query, predicted, CENTRES, CENTRES, 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_confidence(tmp_path, 3, 3) is None
    before = made(bias=np.float32([0.25]))
    write_confidence(tmp_path, before)
    after = read_confidence(tmp_path, 3, 3)
    assert after is not None
    for name, array in before.tensors().items():
        np.testing.assert_array_equal(after.tensors()[name], array)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": np.zeros(2, np.float32)}, "weights must hold"),
        ({"ramp": np.float32([0, np.nan])}, "ramp must hold finite"),
        ({"bias": np.zeros(1)}, "found float64"),
        ({"query_centres": np.zeros((2, 5), np.float32)}, r"shape \(2, 5\)"),
        ({"query_centres": np.zeros((0, 3), np.float32)}, r"shape \(0, 3\)"),
        ({"fallback": np.float32([-1, 0.5])}, "fallback holds"),
        ({"fallback": np.float32([1, 2])}, "fallback holds"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_files_that_do_not_fit_are_refused(
    fields: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    write_confidence(tmp_path, made(**fields))
    with pytest.raises(CheckpointError, match=message):
        read_confidence(tmp_path, 3, 3)


def test_a_file_of_an_earlier_release_goes_back_to_the_query(tmp_path: Path) -> None:
    tensors = made(fallback=np.float32([1, 0.5])).tensors()
    del tensors["fallback"]
    save_file(tensors, tmp_path / FILE)
    found = read_confidence(tmp_path, 3, 3)
    assert found is not None
    assert found.fallback_mix == PLAIN_QUERY


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_confidence(tmp_path, 3, 3)
    from safetensors.numpy import save

    (tmp_path / FILE).write_bytes(save({"bias": np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match="holds \\['bias'\\], expected"):
        read_confidence(tmp_path, 3, 3)
