"""INV-1, 2 and 4 to 7 of the requirement; INV-3 is in test_phases.py. And parts with answers made by hand."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wrap import CONFIG, Run, data, loss

from prime_jax.hybrid import bandit, basis, corrector, residuals
from prime_jax.hybrid.calibration import init_calibration, judge
from prime_jax.hybrid.features import FEATURES
from prime_jax.hybrid.phases import Phase
from prime_jax.hybrid.programs import programs
from prime_jax.hybrid.state import predict

LOSS = jax.jit(loss)
PARAMS = {"w": jnp.zeros((8, 4))}
PREDICT = jax.jit(lambda state, horizon: predict(state, horizon, CONFIG))
SIZES = st.lists(st.floats(2**-20, 2**20, width=32), min_size=5, max_size=5)


@pytest.fixture(scope="module")
def trained() -> Run:
    return Run(CONFIG).go(150)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.floats(-100, 100, width=32))
def test_no_input_makes_the_state_grow_or_stop_being_numbers(
    losses: list[float], gradients: list[float], weight: float
) -> None:
    """INV-2, INV-6 and INV-7: gradients are clipped inside, shapes stay, everything stays finite."""
    state = Run(CONFIG).trainer.hybrid
    before = jax.tree.map(jnp.copy, state.dynamics.params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for turn in range(3):
        params = jax.tree.map(lambda leaf, turn=turn: leaf + weight * turn, PARAMS)
        told = jnp.array(losses), jnp.array(gradients)
        state, _ = programs(CONFIG, loss).observe(state, params, (params, PARAMS), *told)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in floats)
    most = 3 * CONFIG.dynamics_rate * 0.1 / np.sqrt(0.001)  # Adam's longest steps, whatever the gradient
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.dynamics.params, before)
    assert max(jax.tree.leaves(moved)) <= most


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 60, width=32))
def test_predictions_are_finite_and_never_negative(trained: Run, horizon: float) -> None:
    """INV-5 of a single prediction; one program for every horizon."""
    mean, sigma, a = PREDICT(trained.trainer.hybrid, jnp.float32(horizon))
    assert float(mean) >= 0
    assert float(sigma) > 0
    assert bool(jnp.all(jnp.isfinite(a)))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_one_sigma_holds_68_percent_whatever_the_predicted_deviation(seed: int, wrong: float) -> None:
    """INV-5: calibration brings coverage to 0.60-0.76 where the deviation is told up to ten times wrong."""
    noise = jax.random.normal(jax.random.key(seed), (1500, 1))
    one = jnp.ones(1)

    def see(old, x):  # type-free: a scan's body
        return judge(old, 0 * one, wrong * one, one, one, x[0], one > 0), None

    early, _ = jax.lax.scan(see, init_calibration(1), noise[:500])
    late, _ = jax.lax.scan(see, early, noise[500:])
    assert 0.60 <= float(late.inside[0] - early.inside[0]) / 1000 <= 0.76
    assert 0 <= float(late.confidence[0]) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=True, width=32), min_size=12, max_size=12))
def test_corrections_are_bounded_whatever_comes_in(values: list[float]) -> None:
    """INV-4, its bound."""
    found = corrector.bounded(jnp.array(values).reshape(2, 6), CONFIG)
    assert bool(jnp.all(jnp.abs(found) <= CONFIG.max_coefficient))


UNSEEN = [data(seed, rows=500) for seed in range(20_000, 20_004)]


def judged(params: Any) -> float:
    return float(np.mean([float(LOSS(params, batch)) for batch in UNSEEN]))


def arrived(seed: int) -> Run:
    """A run with a jump, until what is left is noise, which averages take away."""
    run = Run(CONFIG, first=seed * 1000).go(45)
    run.trainer.force_phase(Phase.PREDICT)
    return run.go(200)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 50))
def test_the_loss_falls_on_average_and_corrections_that_stay_lower_it_on_unseen_data(seed: int) -> None:
    """INV-1, also through jumps; INV-4: not on the control set alone."""
    run = arrived(seed)
    rolling = [row["loss"] for row in run.trainer.rows if "loss" in row]
    quarters = [float(np.mean(part)) for part in np.array_split(rolling, 4)]
    assert quarters[1] < quarters[0]
    assert max(quarters[2:]) < quarters[0]
    state, outcome = run.trainer.finish(run.state)
    assert outcome is not None
    if outcome.kept:
        assert outcome.after < outcome.before
        assert judged(state["params"]) < judged(run.state["params"])
    else:
        assert state is run.state


@pytest.mark.parametrize("seed", [1, 2, 3, 25])
def test_an_end_that_averages_improve_is_corrected(seed: int) -> None:
    """INV-4 where something does stay."""
    run = arrived(seed)
    state, outcome = run.trainer.finish(run.state)
    assert outcome is not None
    assert outcome.kept
    assert outcome.after < outcome.before
    assert judged(state["params"]) < judged(run.state["params"])


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9))
@settings(max_examples=20, deadline=None)
def test_the_store_is_bounded_and_corrects_no_more_than_it_holds(values: list[float]) -> None:
    """INV-6; an empty store corrects nothing."""
    store, x = residuals.init_residuals(4, 1, 2), jnp.ones(FEATURES)
    empty = residuals.look_up(store, x)
    assert (float(empty.loss), float(empty.agreement)) == (0.0, 0.0)
    for value in values:
        store = residuals.add(store, x, jnp.full((1, 2), value), value)
    found = residuals.look_up(store, x)
    assert len(store.loss) == 4
    assert min(values[-4:]) - 1e-5 <= float(found.loss) <= max(values[-4:]) + 1e-5


def test_the_stack_is_displacements_of_averages_then_direction_then_move() -> None:
    weights = np.random.default_rng(0).normal(size=(30, 5)).cumsum(axis=0).astype(np.float32)
    averages = [weights[0], weights[0]]
    stack = {"w": jnp.zeros((4, 5))}
    for before, after in pairwise(weights):
        averages = [0.9 * averages[0] + 0.1 * after, 0.5 * averages[1] + 0.5 * after]
        move, direction = {"w": jnp.array(after - before)}, {"w": jnp.array(after)}
        stack = basis.moved_on(stack, move, direction, jnp.array([0.9, 0.5]), jax.random.key(0))
    for at in (0, 1):
        np.testing.assert_allclose(weights[-1] + stack["w"][at], averages[at], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stack["w"][2], weights[-1])
    np.testing.assert_array_equal(stack["w"][3], weights[-1] - weights[-2])


def test_stochastic_rounding_is_right_on_average() -> None:
    value = 1 + 1 / 512  # a quarter between two neighbours of bfloat16
    tree, old = {"w": jnp.full((200, 200), value)}, {"w": jnp.zeros((3, 200, 200), jnp.bfloat16)}
    rounded = basis.moved_on(old, tree, tree, jnp.zeros(1), jax.random.key(0))["w"][1:]
    assert set(np.unique(rounded.astype(jnp.float32)).tolist()) == {1.0, 1 + 1 / 128}
    assert abs(float(jnp.mean(rounded.astype(jnp.float32))) - value) < 1e-4
    assert bool(jnp.any(rounded[0] != rounded[1]))  # each tree has noise of its own


def test_the_best_coefficients_give_back_a_move_inside_the_basis() -> None:
    stack = {"w": jax.random.normal(jax.random.key(0), (3, 50)), "big": jnp.ones((3, 256, 64))}
    move = {"w": 2 * stack["w"][0] - stack["w"][2], "big": jnp.ones((256, 64))}
    inner, onto, square = basis.gram(stack, move)
    assert [float(square[0]), float(inner[0, 1, 1])] == [64 * 64.0] * 2  # every fourth row of a big leaf
    a = basis.best_coefficients(inner, onto, ridge=1e-6)
    np.testing.assert_allclose(a[1], [2, 0, -1], atol=1e-3)
    assert float(basis.misfit(a, inner, onto, square)) < 1e-4
    assert float(basis.cosine(a, inner, onto, square)) == pytest.approx(1, abs=1e-4)


def test_the_bandit_learns_which_horizon_pays_and_that_none_is_worth_0() -> None:
    x = jnp.zeros(3).at[0].set(1.0)
    known = bandit.init_bandit(3, 3)
    for _ in range(20):
        known = bandit.update(bandit.update(known, 1, x, 0.5), 2, x, -0.5)
    bound = bandit.scores(known, x, 0.1)
    assert bound[1] > bound[0] == 0 > bound[2]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"ema_steps": (25, 12)}, "ema_steps"), ({"horizons": (5, 10)}, "horizons"), ({"window": 0}, "window")],
)
def test_settings_that_contradict_are_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        type(CONFIG)(**wrong)
