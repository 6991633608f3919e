"""The end of a run: raw weights, an average, a step ahead, or a correction learned from the best of them.

Every stage is paid for only where the one before it gave reason to:

1. The screen: raw weights, the longest average, and `ahead`, as far beyond the weights as that average lies
   behind them, on the control batches that choose. Where `ahead` looks better than raw, by a weak test, then
   twice as far, and again, while that looks better (the line search of arXiv 2409.04206); otherwise the
   shorter averages. Where the best of them does not look better than raw, that is all it costs.
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
        seen = self._looked(params, screen)
        raw, _ = seen.pop("raw")
        choice = min(seen, key=lambda name: mean(seen[name][0]))
        (looks, c), moved = seen[choice], params
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

    def _looked(self, params: Any, batches: list[Any]) -> dict[str, tuple[list[float], Any]]:
        """Losses and coefficients of raw weights and of candidates that cost no gradients.

        One look for raw, one for `ahead` and at most as many as there are averages.
        """
        assert self.hybrid is not None
        basis, averages, level = self.hybrid.basis, self.config.ema_steps, self.config.screen_level
        nothing = jnp.zeros((len(self.hybrid.square), self.config.basis))
        seen = {"raw": (self._judge(params, batches), nothing)}

        def look(name: str, tree: int, factor: float) -> list[float]:
            c = nothing.at[:, tree].set(factor)
            seen[name] = self._judge(self._run.move(params, basis, c), batches), c
            return seen[name][0]

        longest = len(averages) - 1
        look(f"ema {averages[longest]}", longest, 1.0)
        nearer = look("ahead", longest, -1.0)
        if upper_bound(nearer, seen["raw"][0], level) >= 0:
            for tree, steps in enumerate(averages[:-1]):
                look(f"ema {steps}", tree, 1.0)
            return seen
        for doubled in range(1, len(averages)):  # in the place of the shorter averages
            times = 2**doubled
            if times > self.config.max_coefficient:
                break
            further = look(f"ahead {times} times", longest, -float(times))
            if mean(further) >= mean(nearer):
                break
            nearer = further
        return seen
