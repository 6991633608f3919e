"""Jumps on the way: candidates, what they cost, and whether one of them stays. The end is `ending.py`.

The first `screen_batches` of the control batches choose among the candidates; the others, which had no part
in that, decide by a paired test whether the chosen one stays. A learned correction has to beat the best of
the others by the same test on those that choose.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hybrid import bandit, corrector, residuals
from prime_jax.hybrid.basis import moments
from prime_jax.hybrid.decide import mean, upper_bound
from prime_jax.hybrid.phases import PhaseOutcome, advance
from prime_jax.hybrid.programs import Programs
from prime_jax.hybrid.recovery import Recovering
from prime_jax.hybrid.settings import HybridConfig

State = Any
Batch = Any
FORWARD = 1 / 3  # of a full step


def screen_cost(config: HybridConfig, forward: float = FORWARD) -> float:
    """Full steps that the end takes where no simple candidate looks better than raw weights; the most, else.

    Args:
        config: Settings.
        forward: What one control batch costs, in full steps.
    """
    candidates = 2 + len(config.ema_steps)  # raw, ahead, the averages (or further ahead instead)
    return candidates * config.screen_batches * forward


def end_cost(config: HybridConfig, forward: float = FORWARD) -> float:
    """Most full steps that the end takes: the screen, the proof and the correction."""
    confirming = config.control_batches - config.screen_batches
    # proof: raw and the candidate on those that confirm; then the correction on all
    judged = 2 * confirming + config.control_batches
    return config.coefficient_gradients + judged * forward + screen_cost(config, forward)


class Jumping(Recovering):
    """The part of a trainer that changes weights."""

    calls: Counter[str]
    outcomes: list[PhaseOutcome]
    _run: Programs
    _get: Callable[[State], Any]
    _set: Callable[[State, Any], State]
    _advance: Callable[[State, int], State] | None
    _fresh: Callable[[int], Sequence[Batch]]
    _control: list[Batch]
    _rows: int
    _rows_of: Callable[[Batch], int]

    @property
    def forward_cost(self) -> float:
        """Of one control batch in full steps: a third, less where it is smaller than a training batch."""
        return FORWARD * (self._rows_of(self._control[0]) / self._rows if self._rows else 1.0)

    def _affordable(self) -> bool:
        """Whether one more jump stays within the budget, which shrinks while jumps are refused.

        What the end will take is set aside first, so that a run in which nothing stays costs no more than
        `probe_share` of its steps, or the end alone where it is too short for that.
        """
        config, forward = self.config, self.forward_cost
        judged = 3 * config.screen_batches + 2 * (config.control_batches - config.screen_batches)
        cost = config.coefficient_gradients + judged * forward
        left = config.probe_share * self.totals.steps - end_cost(config, forward) * config.correct
        return self.totals.cost + cost <= self._probe_scale * self._backoff * left

    def _parts(self) -> tuple[list[Batch], list[Batch]]:
        """Control batches that choose, and those that confirm."""
        return self._control[: self.config.screen_batches], self._control[self.config.screen_batches :]

    def _judge(self, params: Any, batches: Sequence[Batch]) -> list[float]:
        self.calls["control"] += len(batches)
        told = jax.device_get([self._run.loss(params, batch) for batch in batches])
        return [float(loss) for loss in told]

    def _probe(self, state: State) -> State:
        """PREDICT and CORRECT: candidates, a correction, a choice and its confirmation."""
        config, hybrid = self.config, self.hybrid
        assert hybrid is not None
        params = self._get(state)
        choosing, confirming = self._parts()
        expected, start, there = self._jumped(params, self.phases.horizon)
        nothing = jnp.zeros_like(start)
        choices: dict[str, tuple[list[float], Any]] = {
            "raw": (self._judge(params, choosing), nothing),
            "predicted": (self._judge(there, choosing), start),
        }
        choice = min(choices, key=lambda name: mean(choices[name][0]))  # the first one at a tie: raw
        gradients = 0
        if config.correct:
            gradients = config.coefficient_gradients
            c = self._corrected(params, choices[choice][1])
            losses = self._judge(self._run.move(params, hybrid.basis, c), choosing)
            if upper_bound(losses, choices[choice][0], config.accept_level) < 0:
                choice = "corrected"
            choices["corrected"] = (losses, c)
        judged = len(choices) * len(choosing)
        before = after = mean(choices["raw"][0])
        bound, moved, c = math.inf, params, choices[choice][1]
        if choice != "raw":
            moved = self._run.move(params, hybrid.basis, c)
            old, new = self._judge(params, confirming), self._judge(moved, confirming)
            judged += 2 * len(confirming)
            before, after, bound = mean(old), mean(new), upper_bound(new, old, config.accept_level)
        outcome = PhaseOutcome(
            step=self.totals.steps,
            horizon=self.phases.horizon,
            kept=bound < 0,
            choice=choice,
            before=before,
            after=after,
            bound=bound,
            cost=gradients + judged * self.forward_cost,
        )
        return self._closed(state, outcome, expected, moved, c)

    def _jumped(self, params: Any, horizon: int) -> tuple[float, Any, Any]:
        """PREDICT in one dispatch: the loss that is expected, coefficients, and the weights there."""
        self.calls["predict"] += 1
        expected, start, there = self._run.jump(self.hybrid, params, jnp.asarray(horizon, jnp.float32))
        self.phases = advance(self.phases, self.config, 0)  # -> CORRECT
        return float(expected), start, there

    def _corrected(self, params: Any, start: Any) -> Any:
        """Coefficients after a few real gradients on them."""
        assert self.hybrid is not None
        work = corrector.begin(start, self.config)
        for batch in self._fresh(self.config.coefficient_gradients):
            work, _ = self._run.gradient(work, params, self.hybrid.basis, batch)
            self.calls["coefficient gradient"] += 1
        return corrector.coefficients(work, self.config)

    def _closed(self, state: State, outcome: PhaseOutcome, expected: float, moved: Any, c: Any) -> State:
        """Write down how it ended, learn from it, and take the weights where they stay."""
        self._note(outcome, expected)
        self._learn(outcome, c if outcome.kept else jnp.zeros_like(c), expected)
        if outcome.kept:
            if outcome.horizon and self.config.snapshot == "probe":
                self._keep(state)
            state = self._set(state, moved)
            if self._advance is not None and outcome.horizon:
                state = self._advance(state, outcome.horizon)
            self._settled(state, 0)
        self.phases = advance(self.phases, self.config, 0)  # -> FULL
        return state

    def _note(self, outcome: PhaseOutcome, expected: float) -> None:
        self.outcomes.append(outcome)
        self.rows.append({**asdict(outcome), "phase": "CORRECT", "expected": expected})
        self.totals = replace(
            self.totals,
            jumps=self.totals.jumps + 1,
            kept=self.totals.kept + outcome.kept,
            virtual_steps=self.totals.virtual_steps + outcome.kept * outcome.horizon,
            cost=self.totals.cost + outcome.cost,
        )

    def _settled(self, state: State, steps: int) -> None:
        """Move the trees on without learning: after a jump, or where a run ends inside a window."""
        hybrid = self.hybrid
        assert hybrid is not None
        key = jax.random.fold_in(jax.random.wrap_key_data(hybrid.key), 2**29 + self.totals.jumps)
        params = self._get(state)
        self.hybrid = self._run.settle(
            hybrid, params, moments(state, params), jnp.asarray(steps, jnp.int32), key=key
        )

    def _learn(self, outcome: PhaseOutcome, c: Any, expected: float) -> None:
        """Remember the jump, and tell the bandit what it brought beyond the same cost in real steps."""
        hybrid, config = self.hybrid, self.config
        assert hybrid is not None
        seen = hybrid.features[-1]
        off = outcome.after - expected
        store = residuals.add(hybrid.residuals, seen, c, off if math.isfinite(off) else 0.0)
        learned = hybrid.bandit
        if outcome.horizon:
            first, second = (float(x) for x in jax.device_get(hybrid.means[jnp.array([-12, -1])]))
            slope = math.log(max(second, 1e-12) / max(first, 1e-12)) / 11  # per window
            plain = max(0.0, -slope) * outcome.cost / config.window
            won = math.log(max(outcome.before, 1e-12) / max(outcome.after, 1e-12)) if outcome.kept else 0.0
            gain = won - plain
            self._backoff = min(1.0, 2 * self._backoff) if gain > 0 else max(1 / 64, self._backoff / 2)
            arm = config.horizons.index(outcome.horizon)
            learned = bandit.update(learned, arm, seen, gain)
        self.hybrid = replace(hybrid, residuals=store, bandit=learned)
