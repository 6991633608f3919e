"""The end of a run: raw weights, an average, a step ahead, or a correction learned from the best of them.

Every stage is paid for only where the one before it gave reason to:

1. The screen: raw weights and the simple candidates (the averages, and `ahead`: as far beyond the weights as
   one of the averages lies behind them) on the control batches that choose. Where the best of them does not
   look better than raw, by a weak test, that is all it costs.
2. The proof: that one against raw on the batches that confirm, which had no part in choosing it.
3. The correction: a few gradients on coefficients, which begin at the candidate that was proved. It takes its
   place where it looks better by the weak test on the batches that choose, is better on those that confirm,
   and beats raw there by the test that the candidate passed.

The test of stage 3 is made only where that of stage 2 held. No weights are judged twice on a batch.
"""

from typing import Any

import jax.numpy as jnp

from prime_jax.hybrid.decide import mean, upper_bound
from prime_jax.hybrid.jumps import Jumping
from prime_jax.hybrid.phases import PhaseOutcome, advance

State = Any


class Ending(Jumping):
    """The part of a trainer that corrects the end."""

    def _ended(self, state: State) -> State:
        """Screen, proof and correction; the best of what was proved becomes the weights of the state."""
        config, hybrid = self.config, self.hybrid
        assert hybrid is not None
        screen, confirming = self._parts()
        params, judged_before = self._get(state), self.calls["control"]
        self.phases = advance(self.phases, config, 0)  # -> CORRECT
        gradients = 0

        # 1. the screen
        raw = self._judge(params, screen)
        starts = self._simple()
        known = {
            name: self._judge(self._run.move(params, hybrid.basis, c), screen) for name, c in starts.items()
        }
        choice = min(known, key=lambda name: mean(known[name]))
        looks, c, moved = known[choice], starts[choice], params
        before, after, bound = mean(raw), mean(looks), upper_bound(looks, raw, config.screen_level)
        kept = False
        if bound >= 0:
            choice, after = "raw", before
        else:
            # 2. the proof
            moved = self._run.move(params, hybrid.basis, c)
            old, new = self._judge(params, confirming), self._judge(moved, confirming)
            before, after, bound = mean(old), mean(new), upper_bound(new, old, config.accept_level)
            kept = bound < 0
        if kept:
            # 3. the correction
            learned = self._corrected(params, c)
            gradients = config.coefficient_gradients
            corrected = self._run.move(params, hybrid.basis, learned)
            if upper_bound(self._judge(corrected, screen), looks, config.screen_level) < 0:
                new = self._judge(corrected, confirming)
                sure = upper_bound(new, old, config.accept_level)
                if sure < 0 and mean(new) < after:
                    choice, after, bound, moved, c = "corrected", mean(new), sure, corrected, learned
        outcome = PhaseOutcome(
            step=self.totals.steps,
            horizon=0,
            kept=kept,
            choice=choice,
            before=before,
            after=after,
            bound=bound,
            cost=gradients + (self.calls["control"] - judged_before) * self.forward_cost,
        )
        return self._closed(state, outcome, before, moved, c)

    def _simple(self) -> dict[str, Any]:
        """Coefficients of the candidates that cost no gradients."""
        assert self.hybrid is not None
        steps = self.config.ema_steps
        nothing = jnp.zeros((len(self.hybrid.square), self.config.basis))
        averages = {f"ema {n}": nothing.at[:, at].set(1.0) for at, n in enumerate(steps)}
        at = len(steps) - min(2, len(steps))  # the longest average lags too far behind
        return averages | {"ahead": nothing.at[:, at].set(-1.0)}
