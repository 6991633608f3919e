"""`HybridTrainer` on a small regression: off it is the bare step; on it keeps what helps, and resumes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prime_jax.hybrid.divergence import DivergedError
from prime_jax.hybrid.jumps import end_cost
from prime_jax.hybrid.phases import Phase
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.wrap import HybridTrainer

TRUE = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
OPTIMIZER = optax.adam(0.03)
CONTROL_SEEDS = range(10_000, 10_008)
SETTINGS: dict[str, Any] = {
    "predict": True,
    "window": 5,
    "control_batches": 8,
    "accept_level": 0.95,  # four batches confirm
    "screen_batches": 4,
    "warmup_steps": 20,
    "min_full_steps": 20,
    "ensemble": 2,
    "hidden": 8,
    "latent": 2,
}
CONFIG = HybridConfig(**SETTINGS)
GUARDED = HybridConfig(**{**SETTINGS, "predict": False, "snapshot": "window"})


def data(seed: int, rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 8)).astype(np.float32)
    return x, x @ TRUE + rng.normal(size=(rows, 4)).astype(np.float32)


CONTROL = [data(seed, rows=128) for seed in CONTROL_SEEDS]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


@jax.jit
def step(state: Any, batch: Any) -> Any:
    value, gradient = jax.value_and_grad(loss)(state["params"], batch)
    updates, opt_state = OPTIMIZER.update(gradient, state["opt_state"])
    rng = jax.random.split(state["rng"])[0]
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "rng": rng}, {
        "loss": value,
        "gradient_norm": optax.tree.norm(gradient),
    }


def params_of(state: Any) -> Any:
    return state["params"]


def watched(run: Any, train_step: Any, config: HybridConfig, **more: Any) -> HybridTrainer:
    """A trainer around a step; its cursor is `run.at`."""
    return HybridTrainer(
        train_step,
        params_of,
        lambda state, params: {**state, "params": params},
        loss,
        config,
        control=CONTROL,
        fresh=lambda count: [data(run.at + ahead) for ahead in range(count)],
        cursor=lambda: run.at,
        seek=lambda place: setattr(run, "at", place),
        **more,
    )


class Run:
    def __init__(
        self,
        config: HybridConfig,
        broken: frozenset[int] = frozenset(),
        first: int = 0,
        advance: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.at, self.broken, self.seen = first, broken, []
        params = {"w": jnp.zeros((8, 4))}
        self.state: Any = {
            "params": params,
            "opt_state": OPTIMIZER.init(params),
            "rng": jax.random.key(1),
        }
        self.trainer = watched(self, step, config, advance=advance)
        self.trainer.init(self.state)

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            batch = data(self.at)
            if self.at in self.broken:
                batch = (batch[0] * np.nan, batch[1])
            self.seen.append(self.at)
            self.at += 1
            self.state, _ = self.trainer.step(self.state, batch)
        return self


def equal(one: Any, other: Any) -> bool:
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, other)
    return all(jax.tree.leaves(same))


def bare(steps: int) -> Any:
    return Run(HybridConfig(enabled=False)).go(steps).state


def test_off_and_watching_are_the_bare_step_to_the_bit() -> None:
    plain = Run(HybridConfig(enabled=False)).state
    for at in range(60):
        plain, _ = step(plain, data(at))
    assert equal(bare(60), plain)
    assert equal(Run(HybridConfig(predict=False, correct=False)).go(60).state, plain)
    assert equal(Run(GUARDED).go(60).state, plain)  # watched


def test_a_jump_is_one_dispatch_and_stays_only_where_control_improves() -> None:
    run = Run(CONFIG).go(60)
    before = run.trainer.calls.copy()
    run.trainer.force_phase(Phase.PREDICT)
    run.go(5)
    spent = run.trainer.calls - before
    assert (spent["observe"], spent["predict"], spent["coefficient gradient"]) == (1, 1, 5)
    outcome = run.trainer.outcomes[-1]
    # raw, predicted and corrected weights on 4 choosing batches; raw and the choice on 4 confirming ones
    assert spent["control"] == 3 * 4 + 2 * 4 * (outcome.choice != "raw")
    assert outcome.kept == (outcome.bound < 0)
    half = CONTROL[:4] if outcome.choice == "raw" else CONTROL[4:]
    control = np.mean([float(loss(run.state["params"], batch)) for batch in half])
    np.testing.assert_allclose(control, outcome.after if outcome.kept else outcome.before, rtol=1e-5)
    counted = run.trainer.calls.copy()
    assert all(0 <= value <= 1 for value in run.trainer.confidence)
    assert run.trainer.calls == counted  # reading runs nothing


def test_the_end_is_the_best_of_all_candidates() -> None:
    run = Run(GUARDED).go(303)
    state, outcome = run.trainer.finish(run.state)
    assert outcome is not None
    assert outcome.kept
    assert outcome.after < outcome.before
    control = np.mean([float(loss(state["params"], batch)) for batch in CONTROL[4:]])
    np.testing.assert_allclose(control, outcome.after, rtol=1e-4)


def test_resuming_inside_a_window_is_the_same_to_the_bit() -> None:
    whole = Run(CONFIG).go(93)
    first = Run(CONFIG).go(48)
    second = Run(CONFIG)
    second.trainer.restore(jax.device_get(first.trainer.saved()))
    second.state, second.at = first.state, first.at
    second.go(45)
    assert equal(second.state, whole.state)
    assert equal(second.trainer.hybrid, whole.trainer.hybrid)
    assert second.trainer.totals == whole.trainer.totals


def test_a_broken_batch_is_rolled_back_tried_again_and_skipped() -> None:
    run = Run(GUARDED, broken=frozenset({42})).go(60)
    assert run.seen[45:50] == [40, 41, 42, 43, 44]  # the same batches once more
    assert run.seen[50:] == [*range(45, 55)]  # then those behind them
    assert run.trainer.totals.rollbacks == 2
    expected = Run(HybridConfig(enabled=False)).go(40)
    expected.at = 45
    assert equal(run.state, expected.go(10).state)  # bitwise: weights, moments and rng


def test_without_a_state_to_go_back_to_it_gives_up() -> None:
    with pytest.raises(DivergedError, match="no finite number"):
        Run(CONFIG, broken=frozenset({12})).go(20)


def test_a_jump_that_stays_moves_the_schedule_on_where_that_is_asked_for() -> None:
    def advance(state: Any, steps: int) -> Any:
        (adam, *rest) = state["opt_state"]
        return {**state, "opt_state": (adam._replace(count=adam.count + steps), *rest)}

    virtual = HybridConfig(**SETTINGS, virtual_steps="advance_by_Y")
    counts = {}
    for name, config, given in (("advance_by_Y", virtual, advance), ("real", CONFIG, None)):
        run = Run(config, advance=given).go(35)  # far from arrived: a step in the known direction helps
        run.trainer.force_phase(Phase.PREDICT)
        run.go(5)
        (outcome,) = run.trainer.outcomes
        assert outcome.kept
        counts[name] = int(run.state["opt_state"][0].count) - run.trainer.totals.steps
    assert counts == {"advance_by_Y": outcome.horizon, "real": 0}


def test_a_schedule_that_nobody_can_move_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no `advance` was given"):
        Run(HybridConfig(**SETTINGS, virtual_steps="advance_by_Y"))
    with pytest.raises(ValueError, match="virtual_steps is neither"):
        HybridConfig(virtual_steps="both")


@pytest.mark.parametrize("first", [0, 4])
def test_where_nothing_stays_the_cost_is_bounded_by_the_share_or_the_end(first: int) -> None:
    """INV-1, where all control losses are no numbers, and where those that confirm are."""
    share = 0.2
    run = Run(HybridConfig(**SETTINGS, probe_share=share, confidence_threshold=0.0))
    run.trainer._control = CONTROL[:first] + [(x, y * np.nan) for x, y in CONTROL[first:]]
    run.go(600)
    state, _ = run.trainer.finish(run.state)
    assert not any(outcome.kept for outcome in run.trainer.outcomes)
    assert equal(state, run.state)
    end = end_cost(run.trainer.config, run.trainer.forward_cost)
    assert 0 < run.trainer.totals.cost <= max(share * run.trainer.totals.steps, end)
