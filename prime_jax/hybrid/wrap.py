"""`HybridTrainer`: any jitted optax step, watched, predicted and corrected.

    trainer = HybridTrainer(train_step, get_params, set_params, loss_fn, config, control=batches, fresh=peek)
    trainer.init(state)
    for batch in batches:
        state, metrics = trainer.step(state, batch)
    state, outcome = trainer.finish(state)
    print(trainer.report(folder))

The user's step stays untouched and makes every real step; with `enabled: false`, or `predict` and `correct`
both off, nothing else happens. Jumps cost at most `probe_share` of the real steps. The schedule of the
learning rate follows real steps only, unless `virtual_steps: advance_by_Y` says that a jump that stays moves
it on, by a function that the user gives.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hybrid.basis import moments
from prime_jax.hybrid.decide import rows_of
from prime_jax.hybrid.divergence import assess, measure
from prime_jax.hybrid.ending import Ending
from prime_jax.hybrid.metrics import Totals, console, write
from prime_jax.hybrid.phases import Phase, PhaseOutcome, PhaseState, advance, force_phase
from prime_jax.hybrid.programs import programs
from prime_jax.hybrid.recovery import Snapshot
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import HybridState

State = Any
Batch = Any


class HybridTrainer(Ending):
    """Wraps a step.

    Attributes:
        totals: Figures of the run.
        rows: One per observation and per jump since somebody emptied the list.
        calls: How often each compiled part ran.
        outcomes: Of all jumps since the start of this process.
        phases: Where the phase machine is.
    """

    def __init__(
        self,
        train_step: Callable[[State, Batch], tuple[State, dict[str, Any]]],
        get_params: Callable[[State], Any],
        set_params: Callable[[State, Any], State],
        loss_fn: Callable[[Any, Batch], Any],
        config: HybridConfig,
        *,
        control: Sequence[Batch] = (),
        fresh: Callable[[int], Sequence[Batch]] | None = None,
        cursor: Callable[[], Any] | None = None,
        seek: Callable[[Any], None] | None = None,
        advance: Callable[[State, int], State] | None = None,
        rows: Callable[[Batch], int] = rows_of,
    ):
        """Wrap `train_step`.

        Args:
            train_step: `(state, batch) -> (state, metrics)`; metrics hold `loss`, and `gradient_norm` where
                it is known.
            get_params: The weights in a state.
            set_params: A state with other weights.
            loss_fn: `(weights, batch) -> loss`, as it is judged (no dropout).
            config: Settings.
            control: Batches that decide what stays; neither trained on nor the validation set.
            fresh: Gives the next n training batches without moving on; needed for corrections.
            cursor: Where the data stands.
            seek: Puts the data there.
            advance: A state whose step count, and so its schedule, is some steps further; needed for
                `virtual_steps: advance_by_Y`.
            rows: Examples in a training or control batch, where another array of it is longer than they are.

        Raises:
            ValueError: If jumps are asked for without control batches or fresh ones, or `advance_by_Y`
                without a way to advance.
        """
        self.config, self._train_step = config, train_step
        self.active = config.enabled and (config.predict or config.correct)
        if self.active and (len(control) < config.control_batches or fresh is None):
            raise ValueError(
                f"hybrid: {config.control_batches} control batches and `fresh` are needed, there are "
                f"{len(control)} and {'no' if fresh is None else 'a'} `fresh`"
            )
        if self.active and config.virtual_steps == "advance_by_Y" and advance is None:
            raise ValueError(
                "hybrid: virtual_steps is 'advance_by_Y', but no `advance` was given: pass a function "
                "(state, steps) -> state that moves the step count of the schedule on, or choose 'real'"
            )
        self._advance = advance if config.virtual_steps == "advance_by_Y" else None
        self._get, self._set = get_params, set_params
        self._control = list(control)[: config.control_batches]
        self._rows_of = rows
        self._fresh = fresh or (lambda count: [])
        self._cursor, self._seek = cursor or (lambda: None), seek or (lambda place: None)
        self.totals, self.phases = Totals(), PhaseState(threshold=config.confidence_threshold)
        self.rows: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.outcomes: list[PhaseOutcome] = []
        self._pending: list[tuple[Any, Any]] = []
        self._probe_scale, self._backoff, self._retries = 1.0, 1.0, 0
        self._snapshot: Snapshot | None = None
        self.hybrid: HybridState | None = None
        self._rows = 0
        self._run = programs(config, loss_fn)

    def init(self, state: State) -> None:
        """Begin a run at this state."""
        if self.active:
            self.hybrid = self._run.init(self._get(state))
            if self.config.snapshot == "window":
                self._keep(state)

    @property
    def confidence(self) -> tuple[float, ...]:
        """Per horizon above 0, as the last observation wrote it; reading it runs nothing."""
        return self._confidence

    _confidence: tuple[float, ...] = ()

    def force_phase(self, phase: Phase) -> None:
        """Ask for a phase at the next observation."""
        self.phases = force_phase(self.phases, phase)

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        """One real step; every `window` steps also an observation, and what follows from it.

        Raises:
            DivergedError: If the run cannot go on.
        """
        state, metrics = self._train_step(state, batch)
        if not self.active:
            return state, metrics
        self._rows = self._rows or self._rows_of(batch)
        self._pending.append((metrics["loss"], metrics.get("gradient_norm")))
        if len(self._pending) == self.config.window:
            state = self._window(state)
        return state, metrics

    # observation -------------------------------------------------------------------------------------------

    def _window(self, state: State) -> State:
        assert self.hybrid is not None
        config, hybrid = self.config, self.hybrid
        fetched = jax.device_get(self._pending)  # the one wait per window
        self._pending = []
        losses = [float(loss) for loss, _ in fetched]
        known = [float(norm) for _, norm in fetched if norm is not None]
        past = max(0, int(self.totals.windows)) * config.window
        ring, norms = jax.device_get((hybrid.losses, hybrid.gradients))
        signals = measure(
            [float(x) for x in ring[-min(past, 128) :]] if past else [],
            [float(x) for x in norms[-min(past, 64) :]] if past and known else [],
            losses,
            known,
            error_sigma=self._last_error,
            predictor_finite=self._predictor_finite,
        )
        if not signals.finite or assess(signals, config):
            state, back = self._recover(state, signals)
            if back:
                return state
            hybrid = self.hybrid  # its predictor may be a new one
        else:
            self._retries = 0
            self.phases = replace(self.phases, diverging=False)
        if len(known) < len(losses):  # gradients are hidden: the last moves' lengths stand in
            length = float(jnp.sqrt(jnp.sum(hybrid.square))) if self.totals.windows else 1.0
            known = [length] * len(losses)
        self.calls["observe"] += 1
        params = self._get(state)
        self.hybrid, told = self._run.observe(
            hybrid,
            params,
            moments(state, params),
            jnp.asarray(losses, jnp.float32),
            jnp.asarray(known, jnp.float32),
        )
        told = jax.device_get(told)
        self._confidence = tuple(float(x) for x in told["confidence"])
        self._last_error, self._predictor_finite = float(told["last_error"]), bool(told["predictor_finite"])
        self.totals = replace(
            self.totals, steps=self.totals.steps + len(losses), windows=self.totals.windows + 1
        )
        mean = sum(losses) / len(losses)
        row = {
            "step": self.totals.steps,
            "phase": self.phases.phase.name,
            "loss": mean,
            "loss_std": (sum((loss - mean) ** 2 for loss in losses) / len(losses)) ** 0.5,
            "delta_cosine": float(told["cosine"]),
        }
        for at, steps in enumerate(config.horizons[1:]):
            row[f"predicted_{steps}"] = float(told["predicted"][at])
            row[f"sigma_{steps}"] = float(told["sigma"][at])
            row[f"skill_{steps}"] = float(told["skill"][at])
            row[f"confidence_{steps}"] = self._confidence[at]
        self.rows.append(row)
        self._transition(told["features"])
        if self.phases.phase is Phase.PREDICT:
            state = self._probe(state)
        elif config.snapshot == "probe" and self.phases.in_phase >= config.min_full_steps:
            self._snapshot = None  # the jump proved sound
        if config.snapshot == "window":
            self._keep(state)
        return state

    _last_error = 0.0
    _predictor_finite = True

    def _transition(self, features: Any) -> None:
        """Choose a horizon where it is time to, and let the machine decide."""
        config, phases = self.config, self.phases
        due = phases.phase is Phase.FULL and phases.in_phase + config.window >= config.min_full_steps
        horizon, confidence = 0, 0.0
        if due and config.predict and (self._affordable() or phases.forced is not None):
            self.calls["choose"] += 1
            assert self.hybrid is not None
            bound = self._run.choose(self.hybrid.bandit, jnp.asarray(features)).tolist()
            sure = [1.0, *self._confidence]
            allowed = [at for at in range(len(bound)) if at == 0 or sure[at] >= phases.threshold]
            best = max(allowed, key=lambda at: bound[at])
            if best == 0 and phases.forced in (Phase.PREDICT, Phase.CORRECT):
                best = 1
            horizon, confidence = config.horizons[best], sure[best] if best else 0.0
            if self.rows:
                self.rows[-1]["horizon"] = horizon
        self.phases = advance(replace(phases, horizon=horizon, confidence=confidence), config, config.window)
        if self.phases.phase is Phase.PREDICT:
            self.phases = replace(self.phases, horizon=horizon or config.horizons[1])

    def finish(self, state: State) -> tuple[State, PhaseOutcome | None]:
        """The end of the run: best of raw, averages, predicted and corrected weights on the control set.

        Where nothing stays the state is the one that was given, and what is left of the budget can go on as
        steps: the outcome's `cost` says what was spent.
        """
        if not self.active or not self.config.correct or not self.totals.windows:
            return state, None
        left, self._pending = len(self._pending), []
        if left:
            self._settled(state, left)
            self.totals = replace(self.totals, steps=self.totals.steps + left)
        horizon = self.config.horizons[1]
        self.phases = replace(self.phases, phase=Phase.PREDICT, horizon=horizon)
        state = self._ended(state)
        return state, self.outcomes[-1]

    def report(self, folder: Path) -> str:
        """Write totals and rows to `hybrid.json` and `hybrid.csv` in a folder; gives one line for people."""
        write(folder, self.rows, self.totals)
        return console(self.totals)
