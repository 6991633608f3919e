"""`HybridTrainer`: any jitted optax step, watched, predicted and corrected.

    trainer = HybridTrainer(train_step, get_params, set_params, loss_fn, config, control=batches, fresh=peek)
    trainer.init(state)
    for batch in batches:
        state, metrics = trainer.step(state, batch)
    state, outcome = trainer.finish(state)
    print(trainer.report(folder))

The user's step stays untouched and makes every real step; with `enabled: false`, or `predict` and `correct`
both off, nothing else happens. Jumps cost at most `probe_share` of the real steps. The schedule of the
learning rate follows real steps only: a jump does not advance it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hybrid import bandit, corrector, residuals
from prime_jax.hybrid.divergence import Action, DivergedError, Signals, actions, assess, measure
from prime_jax.hybrid.dynamics import init_dynamics
from prime_jax.hybrid.metrics import Totals, console, write
from prime_jax.hybrid.phases import Phase, PhaseOutcome, PhaseState, advance, force_phase
from prime_jax.hybrid.programs import programs
from prime_jax.hybrid.saving import Resumable
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import HybridState

State = Any
Batch = Any
FORWARD = 1 / 3  # of a full step


@dataclass(frozen=True)
class Snapshot:
    """A state to go back to, with the data cursor and the past that signals are measured against."""

    state: State
    cursor: Any
    hybrid: HybridState
    step: int


class HybridTrainer(Resumable):
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

        Raises:
            ValueError: If jumps are asked for without control batches or fresh ones.
        """
        self.config, self._train_step = config, train_step
        self.active = config.enabled and (config.predict or config.correct)
        if self.active and (len(control) < config.control_batches or fresh is None):
            raise ValueError(
                f"hybrid: {config.control_batches} control batches and `fresh` are needed, there are "
                f"{len(control)} and {'no' if fresh is None else 'a'} `fresh`"
            )
        self._get, self._set = get_params, set_params
        self._control = list(control)[: config.control_batches]
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
        self._run = programs(config, loss_fn, get_params)

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
        else:
            self._retries = 0
            self.phases = replace(self.phases, diverging=False)
        if len(known) < len(losses):  # gradients are hidden: the last moves' lengths stand in
            length = jnp.sqrt(jnp.sum(hybrid.square)) if self.totals.windows else jnp.ones(())
            gradients = jnp.broadcast_to(length, (len(losses),))
        else:
            gradients = jnp.asarray(known)
        direction = self._run.direction(state)
        self.calls["observe"] += 1
        self.hybrid, told = self._run.observe(
            hybrid, self._get(state), direction, jnp.asarray(losses), gradients
        )
        told = jax.device_get(told)
        self._confidence = tuple(float(x) for x in told["confidence"])
        self._last_error, self._predictor_finite = float(told["last_error"]), bool(told["predictor_finite"])
        self.totals = replace(
            self.totals, steps=self.totals.steps + len(losses), windows=self.totals.windows + 1
        )
        row = {
            "step": self.totals.steps,
            "phase": self.phases.phase.name,
            "loss": sum(losses) / len(losses),
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

    def _affordable(self) -> bool:
        """Whether one more jump stays within the budget, which shrinks while jumps are refused."""
        config = self.config
        cost = config.coefficient_gradients + 3 * FORWARD * len(self._control)
        budget = config.probe_share * self._probe_scale * self._backoff * self.totals.steps
        return self.totals.cost + cost <= budget

    # recovery ----------------------------------------------------------------------------------------------

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
                self.hybrid, self._predictor_finite = replace(self.hybrid, dynamics=fresh), True
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

    # jumps -------------------------------------------------------------------------------------------------

    def _judge(self, params: Any) -> float:
        self.calls["control"] += len(self._control)
        return sum(float(self._run.loss(params, batch)) for batch in self._control) / len(self._control)

    def _probe(self, state: State, *, last: bool = False) -> State:
        """PREDICT and CORRECT: jump, correct, and keep what the control set likes best."""
        config, hybrid = self.config, self.hybrid
        assert hybrid is not None
        horizon, params = self.phases.horizon, self._get(state)
        self.calls["predict"] += 1
        expected, start, there = self._run.jump(hybrid, params, jnp.asarray(horizon, jnp.float32))
        self.phases = advance(self.phases, config, 0)  # -> CORRECT
        nothing = jnp.zeros_like(start)
        choices: dict[str, tuple[float, Any]] = {"raw": (self._judge(params), nothing)}
        choices["predicted"] = (self._judge(there), start)
        unit = corrector.units(hybrid.basis)
        if last:
            for at, steps in enumerate(config.ema_steps):
                c = nothing.at[:, at].set(1.0)
                choices[f"ema {steps}"] = (self._judge(self._run.move(params, hybrid.basis, c * unit)), c)
        candidates = len(choices)
        gradients = 0
        if config.correct:
            best = min(choices, key=lambda name: _finite(choices[name][0]))
            work = corrector.begin(choices[best][1], config)
            for batch in self._fresh(config.coefficient_gradients):
                work, _ = self._run.gradient(work, params, hybrid.basis, batch)
                gradients += 1
            c = corrector.coefficients(work, config)
            choices["corrected"] = (self._judge(self._run.move(params, hybrid.basis, c * unit)), c)
            candidates += 1
        self.calls["coefficient gradient"] += gradients
        choice = min(choices, key=lambda name: _finite(choices[name][0]))  # the first one at a tie: raw
        (before, _), (after, c) = choices["raw"], choices[choice]
        cost = gradients + candidates * len(self._control) * FORWARD
        outcome = PhaseOutcome(
            self.totals.steps, 0 if last else horizon, choice != "raw", choice, before, after, cost
        )
        self.outcomes.append(outcome)
        self.rows.append({**asdict(outcome), "phase": "CORRECT", "expected": float(expected)})
        self.totals = replace(
            self.totals,
            jumps=self.totals.jumps + 1,
            kept=self.totals.kept + outcome.kept,
            virtual_steps=self.totals.virtual_steps + outcome.kept * outcome.horizon,
            cost=self.totals.cost + cost,
        )
        self._learn(outcome, c, float(expected))
        if not last and outcome.kept and config.snapshot == "probe":
            self._keep(state)
        if outcome.kept:
            moved = self._run.move(params, hybrid.basis, c * unit)
            state = self._set(state, moved)
            self._settled(state, 0)
        self.phases = advance(self.phases, config, 0)  # -> FULL
        return state

    def _settled(self, state: State, steps: int) -> None:
        """Move the trees on without learning: after a jump, or where a run ends inside a window."""
        hybrid = self.hybrid
        assert hybrid is not None
        key = jax.random.fold_in(jax.random.wrap_key_data(hybrid.key), 2**29 + self.totals.jumps)
        self.hybrid = self._run.settle(
            hybrid, self._get(state), self._run.direction(state), jnp.asarray(steps, jnp.int32), key=key
        )

    def _learn(self, outcome: PhaseOutcome, c: Any, expected: float) -> None:
        """Remember the jump, and tell the bandit what it brought beyond the same cost in real steps."""
        hybrid, config = self.hybrid, self.config
        assert hybrid is not None
        seen = hybrid.features[-1]
        store = residuals.add(hybrid.residuals, seen, c, outcome.after - expected)
        learned = hybrid.bandit
        if outcome.horizon:
            means = hybrid.means[-12:]
            slope = float(jnp.polyfit(jnp.arange(12.0), jnp.log(jnp.maximum(means, 1e-12)), 1)[0])
            plain = max(0.0, -slope) * outcome.cost / config.window
            gain = math.log(max(outcome.before, 1e-12) / max(outcome.after, 1e-12)) - plain
            self._backoff = min(1.0, 2 * self._backoff) if gain > 0 else max(1 / 64, self._backoff / 2)
            arm = config.horizons.index(outcome.horizon)
            learned = bandit.update(learned, arm, seen, gain)
        self.hybrid = replace(hybrid, residuals=store, bandit=learned)

    def finish(self, state: State) -> tuple[State, PhaseOutcome | None]:
        """The end of the run: best of raw, averages, predicted and corrected weights on the control set."""
        if not self.active or not self.config.correct or not self.totals.windows:
            return state, None
        left, self._pending = len(self._pending), []
        if left:
            self._settled(state, left)
            self.totals = replace(self.totals, steps=self.totals.steps + left)
        horizon = self.config.horizons[1]
        self.phases = replace(self.phases, phase=Phase.PREDICT, horizon=horizon)
        state = self._probe(state, last=True)
        return state, self.outcomes[-1]

    def report(self, folder: Path) -> str:
        """Write totals and rows to `hybrid.json` and `hybrid.csv` in a folder; gives one line for people."""
        write(folder, self.rows, self.totals)
        return console(self.totals)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
