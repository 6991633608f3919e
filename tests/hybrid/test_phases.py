"""The phase machine: every transition, and INV-3 as a property."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_jax.hybrid.phases import Phase, PhaseState, advance, force_phase, next_phase
from prime_jax.hybrid.settings import HybridConfig

CONFIG = HybridConfig(warmup_steps=10, min_full_steps=20, max_full_steps=100)
READY = PhaseState(Phase.FULL, 100, 20, 5, 0.9, 0.5)
STATES = st.builds(
    PhaseState,
    phase=st.sampled_from(Phase),
    step=st.integers(0, 10_000),
    in_phase=st.integers(0, 99),
    horizon=st.sampled_from([0, 5, 50]),
    confidence=st.floats(0, 1),
    threshold=st.floats(0, 1),
    diverging=st.booleans(),
    forced=st.sampled_from([None, *Phase]),
)


@pytest.mark.parametrize(
    ("state", "following"),
    [
        (PhaseState(step=9), Phase.WARMUP),
        (PhaseState(step=9, forced=Phase.PREDICT), Phase.WARMUP),
        (PhaseState(step=10), Phase.FULL),
        (READY, Phase.PREDICT),
        (replace(READY, in_phase=19), Phase.FULL),
        (replace(READY, horizon=0), Phase.FULL),
        (replace(READY, confidence=0.4), Phase.FULL),
        (replace(READY, diverging=True), Phase.FULL),
        (replace(READY, diverging=True, forced=Phase.PREDICT), Phase.FULL),
        (replace(READY, in_phase=0, forced=Phase.PREDICT), Phase.PREDICT),
        (replace(READY, in_phase=0, forced=Phase.CORRECT), Phase.PREDICT),
        (replace(READY, forced=Phase.FULL), Phase.FULL),
        (replace(READY, phase=Phase.PREDICT), Phase.CORRECT),
        (replace(READY, phase=Phase.CORRECT), Phase.FULL),
    ],
)
def test_every_transition(state: PhaseState, following: Phase) -> None:
    assert next_phase(state, CONFIG) is following


@given(STATES)
def test_transitions_are_deterministic_and_legal(state: PhaseState) -> None:
    """INV-3."""
    following = next_phase(state, CONFIG)
    assert following is next_phase(state, CONFIG)
    assert (
        following
        in {
            Phase.WARMUP: {Phase.WARMUP, Phase.FULL},
            Phase.FULL: {Phase.FULL, Phase.PREDICT},
            Phase.PREDICT: {Phase.CORRECT},
            Phase.CORRECT: {Phase.FULL},
        }[state.phase]
    )


@given(STATES)
def test_no_phase_outlasts_its_bound(state: PhaseState) -> None:
    for _ in range(60):
        state = advance(state, CONFIG, 5)
        assert state.in_phase < CONFIG.max_full_steps


def test_a_forced_phase_is_asked_for_once_and_warm_up_never() -> None:
    state = advance(force_phase(replace(READY, in_phase=0), Phase.PREDICT), CONFIG, 5)
    assert (state.phase, state.forced) == (Phase.PREDICT, None)
    with pytest.raises(ValueError, match="WARMUP comes first"):
        force_phase(READY, Phase.WARMUP)
