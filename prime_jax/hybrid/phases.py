"""The phase machine: WARMUP -> FULL -> PREDICT -> CORRECT -> FULL, a pure function of state and settings."""

from dataclasses import dataclass, replace
from enum import IntEnum

from prime_jax.hybrid.settings import HybridConfig


class Phase(IntEnum):
    """What the trainer does now."""

    WARMUP = 0
    FULL = 1
    PREDICT = 2
    CORRECT = 3


@dataclass(frozen=True)
class PhaseState:
    """All that a transition depends on, besides the settings.

    Attributes:
        phase: The phase now.
        step: Real steps made so far.
        in_phase: Real steps made in this phase.
        horizon: Steps that the next jump would stand for; 0 for none.
        confidence: That the predictor has in this horizon, 0 to 1.
        threshold: Confidence that is asked for.
        diverging: Whether a signal forbids to predict.
        forced: Phase that somebody asked for, taken where the machine allows it.
    """

    phase: Phase = Phase.WARMUP
    step: int = 0
    in_phase: int = 0
    horizon: int = 0
    confidence: float = 0.0
    threshold: float = 0.0
    diverging: bool = False
    forced: Phase | None = None


@dataclass(frozen=True)
class PhaseOutcome:
    """How a jump and its correction ended.

    Attributes:
        step: Real steps made before it.
        horizon: Steps that it stands for; 0 for the end of the run.
        kept: Whether the control batches that confirm say that it helps, so that the weights changed.
        choice: What those that choose liked best: `raw`, `predicted` or `corrected`; at the end also
            `ema <n>` and `ahead`, and no `predicted`.
        before: Control loss without it, on those that confirm (on those that choose where raw was best).
        after: That of the choice, on the same batches.
        bound: Upper bound of the mean paired difference; it stays where this is below 0.
        cost: What it took, in full steps (a forward pass is a third).
    """

    step: int
    horizon: int
    kept: bool
    choice: str
    before: float
    after: float
    bound: float
    cost: float


def next_phase(state: PhaseState, config: HybridConfig) -> Phase:
    """The phase that follows. WARMUP comes first and is not left early, not even when forced."""
    if state.phase is Phase.WARMUP:
        return Phase.FULL if state.step >= config.warmup_steps else Phase.WARMUP
    if state.phase is Phase.PREDICT:  # one jump, however far
        return Phase.CORRECT
    if state.phase is Phase.CORRECT:
        return Phase.FULL
    if state.diverging:
        return Phase.FULL
    if state.forced is not None:
        return Phase.PREDICT if state.forced in (Phase.PREDICT, Phase.CORRECT) else Phase.FULL
    ready = state.in_phase >= config.min_full_steps and state.horizon > 0
    return Phase.PREDICT if ready and state.confidence >= state.threshold else Phase.FULL


def advance(state: PhaseState, config: HybridConfig, steps: int) -> PhaseState:
    """The state after `steps` more real steps and the transition that follows.

    FULL is bounded too: after `max_full_steps` it begins anew, and with it the choice of a horizon.
    """
    moved = replace(state, step=state.step + steps, in_phase=state.in_phase + steps)
    following = next_phase(moved, config)
    renewed = following is not moved.phase or (
        following is Phase.FULL and moved.in_phase >= config.max_full_steps
    )
    return replace(moved, phase=following, in_phase=0 if renewed else moved.in_phase, forced=None)


def force_phase(state: PhaseState, phase: Phase) -> PhaseState:
    """Ask for a phase at the next transition; CORRECT is reached through PREDICT.

    Raises:
        ValueError: For WARMUP, which comes once.
    """
    if phase is Phase.WARMUP:
        raise ValueError("WARMUP comes first and only once; force FULL, PREDICT or CORRECT")
    return replace(state, forced=phase)
