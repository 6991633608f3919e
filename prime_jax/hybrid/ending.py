"""The end of a run: raw weights, an average, a short jump, or a correction learned from the best of them.

Every stage is paid for only where the one before it gave reason to:

1. The screen: raw weights and all simple candidates (the averages, and a jump by the shortest horizon) on the
   first few of the choosing batches. Where none of them looks better than raw, that is all it costs.
2. The proof: the best of them against raw on the confirming batches, which had no part in choosing it.
3. The correction: a few gradients on coefficients, from the candidate that was proved. It takes its place
   where it beats it on the choosing batches, and raw by the same test on the confirming ones.

The test of stage 3 is made only where that of stage 2 held, so that no level is spent twice. No weights are
judged twice on a batch.
"""

from typing import Any

import jax.numpy as jnp

from prime_jax.hybrid.decide import mean, upper_bound
from prime_jax.hybrid.jumps import Jumping
from prime_jax.hybrid.phases import PhaseOutcome

State = Any
CHOOSING = 0.95  # level at which a correction has to beat what it began from, on the choosing batches


class Ending(Jumping):
    """The part of a trainer that corrects the end."""

    def _ended(self, state: State) -> State:
        """Screen, proof and correction; the weights of the state are the best that was proved."""
        config, hybrid, half = self.config, self.hybrid, len(self._control) // 2
        assert hybrid is not None
        screen, rest = self._control[: config.screen_batches], self._control[config.screen_batches : half]
        confirming = self._control[half:]
        params, before_all = self._get(state), self.calls["control"]
        expected, start, there = self._jumped(params, self.phases.horizon)
        nothing = jnp.zeros_like(start)

        # 1. the screen
        raw = self._judge(params, screen)
        known: dict[str, tuple[list[float], Any]] = {"predicted": (self._judge(there, screen), start)}
        for at, steps in enumerate(config.ema_steps):
            c = nothing.at[:, at].set(1.0)
            known[f"ema {steps}"] = (self._judge(self._run.move(params, hybrid.basis, c), screen), c)
        choice = min(known, key=lambda name: mean(known[name][0]))
        losses, c = known[choice]
        bound, moved, gradients = upper_bound(losses, raw, config.screen_level), params, 0
        before, after, kept = mean(raw), mean(losses), False
        if bound >= 0:
            choice, after, c = "raw", before, nothing
        else:
            # 2. the proof
            simple = moved = self._run.move(params, hybrid.basis, c)
            old, new = self._judge(params, confirming), self._judge(simple, confirming)
            before, after, bound = mean(old), mean(new), upper_bound(new, old, config.accept_level)
            kept = bound < 0
        if kept:
            # 3. the correction
            learned = self._corrected(params, c)
            gradients = config.coefficient_gradients
            corrected = self._run.move(params, hybrid.basis, learned)
            losses = losses + self._judge(simple, rest)
            if upper_bound(self._judge(corrected, screen + rest), losses, CHOOSING) < 0:
                best = self._judge(corrected, confirming)
                sure = upper_bound(best, old, config.accept_level)
                if sure < 0 and mean(best) < after:
                    choice, after, bound, moved, c = "corrected", mean(best), sure, corrected, learned
        judged = self.calls["control"] - before_all
        outcome = PhaseOutcome(
            step=self.totals.steps,
            horizon=0,
            kept=kept,
            choice=choice,
            before=before,
            after=after,
            bound=bound,
            cost=gradients + judged * self.forward_cost,
        )
        return self._closed(state, outcome, expected, moved, c)
