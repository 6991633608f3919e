"""The mixture of loss forecasts: its prior, its bounds, and that it follows what holds."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_jax.hybrid.dynamics import AHEAD
from prime_jax.hybrid.forecast import (
    EXPERTS,
    PRIOR,
    Mixture,
    experts,
    init_mixture,
    learned,
    linear,
    mixed,
    spread,
    weights,
)

H = np.array([1, 3, 5])  # windows ahead
NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=len(EXPERTS), max_size=len(EXPERTS))


@jax.jit
def _told(mixture: Mixture, means: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    said = experts(means, jnp.zeros(AHEAD))[H - 1]
    return said, means[-1] + mixed(weights(mixture), said), spread(means), linear(means)[H - 1]


_learned = jax.jit(learned)


def errors(losses: np.ndarray) -> np.ndarray:
    """Mean squared errors of mixture, persistence and line, `[3, H]`, as they are told beforehand."""
    mixture, told, off = init_mixture(len(H)), {}, []
    for at in range(64, len(losses)):
        due = np.array([at - ahead in told for ahead in H])
        if due.all():
            rows = [[part[h] for part in told[at - ahead]] for h, ahead in enumerate(H)]
            said, mean, last, line, unit = (np.array(part) for part in zip(*rows, strict=True))
            mixture = _learned(mixture, said, losses[at] - last, unit, jnp.asarray(due))
            off.append([(losses[at] - part) ** 2 for part in (mean, last, line)])
        past = jnp.asarray(losses[at - 63 : at + 1], jnp.float32)
        said, mean, unit, line = _told(mixture, past)
        one = np.ones(len(H), np.float32)
        told[at] = (said, mean, one * losses[at], line, one * float(unit))
    return np.mean(off, axis=0)


def test_without_evidence_the_weights_are_the_prior() -> None:
    np.testing.assert_allclose(weights(init_mixture(2)), [PRIOR, PRIOR], rtol=1e-6)


def test_where_only_noise_moves_the_loss_it_beats_persistence_and_the_line() -> None:
    noise = np.random.default_rng(0).normal(2.0, 0.1, 300).astype(np.float32)
    mixture, stays, line = errors(noise)
    assert np.all(mixture < 0.7 * stays)  # 0.5 is possible: the mean is known, the last window is not
    assert np.all(mixture < line)


def test_where_the_loss_falls_on_a_line_it_learns_to_follow() -> None:
    random = np.random.default_rng(1)
    falling = (5 - 0.01 * np.arange(300) + random.normal(0, 0.002, 300)).astype(np.float32)
    mixture, stays, _ = errors(falling)
    assert np.all(mixture < 0.2 * stays)


@settings(max_examples=50, deadline=None)
@given(NUMBERS, NUMBERS)
def test_the_mixture_stays_among_its_experts(weight: list[float], told: list[float]) -> None:
    """INV-5: bounded by what was told, persistence (0) included, whatever the weights."""
    found = float(mixed(jnp.array([weight]), jnp.array([told]))[0])
    assert min(0.0, *told) <= found <= max(0.0, *told)
