"""The words of an explanation."""

import numpy as np
import pytest

from prime_jax.explain.explanation import Influence
from prime_jax.explain.known import Usual, rank_among
from prime_jax.explain.signal import Reading, signal_of

TEN = np.linspace(0.1, 1.0, 10, dtype=np.float32)
USUAL = Usual(confidence=TEN, atypicality=TEN, influence=TEN)


def reading(confidence: float, atypicality: float = 0.5, l2: float = 0.0, without: str = "cats") -> Reading:
    ranked = [("cats", confidence), ("dogs", 0.1)]
    return Reading(ranked, "cats", confidence, atypicality, Influence(0.0, l2, without))


@pytest.mark.parametrize(
    ("read", "said", "not_said"),
    [
        (reading(0.95), "surer of it than for most", "hesitates"),
        (reading(0.55), "about as sure as usual", "hesitates"),
        (reading(0.15), "hesitates between “cats” (15%) and “dogs” (10%)", "atypical"),
        (reading(0.55, atypicality=2.0), "atypical", "Steering"),
        (reading(0.55, l2=0.9), "Steering moved the answer within the same subspace", "decided"),
        (reading(0.55, l2=0.9, without="dogs"), "without it the answer would lie in “dogs”", "within"),
    ],
)
def test_words_follow_the_figures(read: Reading, said: str, not_said: str) -> None:
    told = signal_of(read, USUAL)
    assert said in told
    assert not_said not in told


def test_a_router_that_always_chooses_one_does_not_hesitate() -> None:
    always = Usual(np.ones(5, np.float32), TEN, TEN)
    assert "about as sure as usual" in signal_of(reading(1.0), always)


def test_equal_values_count_half() -> None:
    assert rank_among(np.ones(4, np.float32), 1.0) == 0.5
    assert rank_among(TEN, 0.05) == 0.0
    assert rank_among(TEN, 5.0) == 1.0
