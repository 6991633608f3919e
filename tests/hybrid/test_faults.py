"""Faults injected into whole runs: each finds the recovery that belongs to it, and the run goes on."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_wrap import CONFIG, GUARDED, OPTIMIZER, watched

from prime_jax.hybrid.divergence import Action
from prime_jax.hybrid.settings import HybridConfig

CALM = 60  # steps before the fault: past that signals are measured against


class Told:
    """A run whose losses and gradient norms are told by the test; each step counts in the weights."""

    def __init__(self, config: HybridConfig) -> None:
        self.at = 0
        params = {"w": jnp.zeros((8, 4))}
        self.state: Any = {
            "params": params,
            "opt_state": OPTIMIZER.init(params),
            "rng": jax.random.key(1),
        }
        self.trainer = watched(self, self._step, config)
        self.trainer.init(self.state)
        self.random = np.random.default_rng(0)

    @staticmethod
    def _step(state: Any, batch: Any) -> Any:
        told, norm = batch
        moved = jax.tree.map(lambda leaf: leaf + 1.0, state["params"])
        rng = jax.random.split(state["rng"])[0]
        return {**state, "params": moved, "rng": rng}, {
            "loss": jnp.float32(told),
            "gradient_norm": jnp.float32(norm),
        }

    def go(self, steps: int, told: Any = None, norm: float = 1.0) -> "Told":
        for _ in range(steps):
            value = 1 + 0.1 * self.random.normal() if told is None else told
            self.at += 1
            self.state, _ = self.trainer.step(self.state, (value, norm))
        return self

    @property
    def actions(self) -> list[str]:
        return [row["actions"] for row in self.trainer.rows if "actions" in row]


@pytest.fixture
def calm() -> Told:
    run = Told(CONFIG).go(CALM)
    assert run.actions == []
    return run


def test_a_loss_far_above_its_past_forbids_jumps_and_halves_their_budget(calm: Told) -> None:
    calm.go(5, told=1.9)
    assert calm.actions == [f"{Action.FORCE_FULL_PHASE}, {Action.REDUCE_PREDICT_RATIO}"]
    assert calm.trainer.phases.diverging
    assert calm.trainer._probe_scale == 0.5
    calm.go(5)
    assert not calm.trainer.phases.diverging  # over with the fault


def test_an_exploding_gradient_forbids_jumps(calm: Told) -> None:
    calm.go(5, norm=25.0)
    assert calm.actions == [f"{Action.FORCE_FULL_PHASE}, {Action.REDUCE_PREDICT_RATIO}"]
    assert calm.trainer.phases.diverging


def test_a_vanishing_gradient_halves_the_budget_only(calm: Told) -> None:
    calm.go(5, norm=0.01)
    assert calm.actions == [str(Action.REDUCE_PREDICT_RATIO)]
    assert not calm.trainer.phases.diverging or calm.trainer.phases.in_phase > 0


def test_oscillation_halves_the_budget() -> None:
    run = Told(CONFIG)
    for turn in range(30):
        run.go(5, told=1.0 + turn % 2)
    assert run.actions[0] == str(Action.REDUCE_PREDICT_RATIO)
    assert run.trainer._probe_scale < 1


def test_losses_far_from_their_prediction_raise_the_confidence_that_is_asked_for(calm: Told) -> None:
    before = calm.trainer.phases.threshold
    calm.trainer._last_error = 7.0  # calibrated deviations; what an observation told
    calm.go(5)
    assert calm.actions == [str(Action.INCREASE_CONFIDENCE_THRESHOLD)]
    assert calm.trainer.phases.threshold == pytest.approx(before + 0.05)


def test_a_predictor_that_is_no_number_is_made_anew(calm: Told) -> None:
    hybrid = calm.trainer.hybrid
    assert hybrid is not None
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, hybrid.dynamics.params)
    calm.trainer.hybrid = replace(hybrid, dynamics=hybrid.dynamics._replace(params=broken))
    calm.go(5)  # sees it
    assert calm.actions == []
    calm.go(5)  # makes it anew
    assert calm.actions == [str(Action.RESET_PREDICTOR)]
    fresh = calm.trainer.hybrid
    assert fresh is not None
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(fresh.dynamics.params))
    calm.go(5)
    assert len(calm.actions) == 1


def test_a_loss_that_ran_away_is_rolled_back_with_rng_and_cursor() -> None:
    run = Told(GUARDED).go(CALM)
    before = jax.tree.map(jnp.copy, run.state)
    run.go(5, told=50.0)
    assert run.actions[0].startswith(str(Action.ROLLBACK_AND_RETRY))
    assert run.at == CALM  # the data too
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), run.state, before)
    assert all(jax.tree.leaves(same))
    assert (run.trainer.totals.steps, run.trainer.totals.rollbacks) == (CALM, 1)
    run.go(5)
    assert run.trainer.totals.steps == CALM + 5
