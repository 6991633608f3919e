"""Signals, levels and actions: each fault finds its recovery."""

import pytest

from prime_jax.hybrid.divergence import Action, Signals, actions, assess, measure
from prime_jax.hybrid.settings import HybridConfig

CONFIG = HybridConfig()
CALM = [1.0, 1.1] * 30


def todo(signals: Signals, snapshot: bool = True, rollbacks: int = 0) -> set[Action]:
    return set(actions(assess(signals, CONFIG), CONFIG, snapshot=snapshot, rollbacks=rollbacks))


@pytest.mark.parametrize(
    ("losses", "gradients", "expected"),
    [
        ([1.0, 1.1] * 2, [1.0] * 4, {Action.CONTINUE}),
        ([1.5] * 4, [1.0] * 4, {Action.FORCE_FULL_PHASE, Action.REDUCE_PREDICT_RATIO}),
        ([1.0] * 4, [21.0] * 4, {Action.FORCE_FULL_PHASE, Action.REDUCE_PREDICT_RATIO}),
        ([1.0] * 4, [0.01] * 4, {Action.REDUCE_PREDICT_RATIO}),
    ],
)
def test_what_a_window_asks_for(losses: list[float], gradients: list[float], expected: set[Action]) -> None:
    assert todo(measure(CALM, [1.0] * 60, losses, gradients)) == expected


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_no_number_goes_back_then_skips_then_gives_up(wrong: float) -> None:
    signals = measure(CALM, [1.0] * 60, [1.0, wrong, 1.0, 1.0], [1.0] * 4)
    assert Action.ROLLBACK_AND_RETRY in todo(signals)
    assert Action.SKIP_BATCH not in todo(signals)
    assert Action.SKIP_BATCH in todo(signals, rollbacks=1)
    assert todo(signals, rollbacks=3) == {Action.ABORT}
    assert todo(signals, snapshot=False) == {Action.ABORT}


def test_the_predictor_is_reset_and_its_errors_raise_the_threshold() -> None:
    assert todo(Signals(predictor_finite=False)) == {Action.RESET_PREDICTOR}
    assert todo(Signals(error_sigma=9.0)) == {Action.INCREASE_CONFIDENCE_THRESHOLD}


def test_oscillation_is_seen_in_window_means() -> None:
    turning = measure([1.0, 1.0, 2.0, 2.0] * 10, [], [1.0, 1.0], []).turning
    assert turning == 1.0
    assert todo(Signals(turning=turning)) == {Action.REDUCE_PREDICT_RATIO}
