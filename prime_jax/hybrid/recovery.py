"""Going back: what a trainer does about the faults that `divergence` finds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hybrid.divergence import Action, DivergedError, Signals, actions, assess
from prime_jax.hybrid.dynamics import init_dynamics
from prime_jax.hybrid.saving import Resumable
from prime_jax.hybrid.state import HybridState

State = Any


@dataclass(frozen=True)
class Snapshot:
    """A state to go back to, with the data cursor and the past that signals are measured against."""

    state: State
    cursor: Any
    hybrid: HybridState
    step: int


class Recovering(Resumable):
    """The part of a trainer that goes back."""

    rows: list[dict[str, Any]]
    _cursor: Callable[[], Any]
    _seek: Callable[[Any], None]
    _snapshot: Snapshot | None

    def _keep(self, state: State) -> None:
        assert self.hybrid is not None
        copied, known = jax.tree.map(jnp.copy, (state, self.hybrid))
        self._snapshot = Snapshot(copied, self._cursor(), known, self.totals.steps)

    def _recover(self, state: State, signals: Signals) -> tuple[State, bool]:
        """Carry out the actions; True where the window is to be made anew."""
        found = assess(signals, self.config)
        todo = actions(found, self.config, snapshot=self._snapshot is not None, rollbacks=self._retries)
        self.totals = replace(self.totals, divergences=self.totals.divergences + 1)
        what = ", ".join(f"{finding.kind} ({finding.level.name.lower()})" for finding in found)
        self.rows.append({"step": self.totals.steps, "divergence": what, "actions": ", ".join(todo)})
        back = False
        for action in todo:
            if action is Action.ABORT:
                raise DivergedError(
                    f"{what} after step {self.totals.steps}, {self._retries} rollbacks so far: training "
                    "cannot go on. A lower learning rate usually helps; hybrid.snapshot: window keeps "
                    "a state to go back to"
                )
            if action is Action.FORCE_FULL_PHASE:
                self.phases = replace(self.phases, diverging=True, in_phase=0)
            elif action is Action.REDUCE_PREDICT_RATIO:
                self._probe_scale *= 0.5
            elif action is Action.INCREASE_CONFIDENCE_THRESHOLD:
                self.phases = replace(self.phases, threshold=min(0.95, self.phases.threshold + 0.05))
            elif action is Action.RESET_PREDICTOR:
                assert self.hybrid is not None
                key = jax.random.fold_in(jax.random.wrap_key_data(self.hybrid.key), self.totals.windows)
                fresh = init_dynamics(key, len(self.hybrid.square), self.config)
                told = jnp.zeros_like(self.hybrid.told)
                self.hybrid = replace(self.hybrid, dynamics=fresh, told=told)
                self._predictor_finite = True
            elif action is Action.ROLLBACK_AND_RETRY:
                assert self._snapshot is not None
                kept = self._snapshot
                state, self.hybrid = jax.tree.map(jnp.copy, (kept.state, kept.hybrid))
                if Action.SKIP_BATCH not in todo:
                    self._seek(kept.cursor)
                self._retries += 1
                lost = (self.totals.steps - kept.step) // self.config.window
                self.totals = replace(
                    self.totals,
                    steps=kept.step,
                    windows=self.totals.windows - lost,
                    rollbacks=self.totals.rollbacks + 1,
                )
                self.phases = replace(self.phases, step=kept.step)
                back = True
        return state, back
