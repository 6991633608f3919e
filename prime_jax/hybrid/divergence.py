"""Divergence: signals from what was observed -> levels -> actions, all pure."""

import math
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from statistics import fmean, median, pstdev
from typing import NamedTuple

from prime_jax.hybrid.settings import HybridConfig


class Level(IntEnum):
    """How bad it is."""

    CALM = 0
    CAUTION = 1
    WARNING = 2
    CRITICAL = 3


class Action(StrEnum):
    """What is done about it."""

    CONTINUE = "continue"
    REDUCE_PREDICT_RATIO = "reduce predict ratio"
    FORCE_FULL_PHASE = "force full phase"
    INCREASE_CONFIDENCE_THRESHOLD = "increase confidence threshold"
    ROLLBACK_AND_RETRY = "rollback and retry"
    SKIP_BATCH = "skip batch"
    RESET_PREDICTOR = "reset predictor"
    ABORT = "abort"


class DivergedError(RuntimeError):
    """Training cannot go on; the message says what was seen and what helps."""


class Signals(NamedTuple):
    """What a window shows.

    Attributes:
        finite: Whether all losses and gradient norms are finite numbers.
        loss_sigma: Deviations of the window's loss above its past.
        gradient_ratio: The window's median gradient norm over that of the past.
        error_sigma: Calibrated deviations between the loss and its prediction.
        turning: Share of turning points among the window means of the loss.
        predictor_finite: Whether the dynamics model's own numbers are finite.
    """

    finite: bool = True
    loss_sigma: float = 0.0
    gradient_ratio: float = 1.0
    error_sigma: float = 0.0
    turning: float = 0.0
    predictor_finite: bool = True


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str
    level: Level


def measure(
    past_losses: Sequence[float],
    past_gradients: Sequence[float],
    losses: Sequence[float],
    gradients: Sequence[float],
    *,
    error_sigma: float = 0.0,
    predictor_finite: bool = True,
) -> Signals:
    """Signals of a window against what came before.

    Args:
        past_losses: Losses of single steps, oldest first.
        past_gradients: Gradient norms, oldest first.
        losses: Those of the window.
        gradients: Those of the window.
        error_sigma: How far the window's loss is from its prediction.
        predictor_finite: Whether the dynamics model is in order.
    """
    if not all(map(math.isfinite, [*losses, *gradients])):
        return Signals(finite=False, predictor_finite=predictor_finite)
    enough = len(past_losses) >= 4 * len(losses)
    sigma, ratio = 0.0, 1.0
    if enough:
        spread = max(pstdev(past_losses), 1e-3 * abs(fmean(past_losses)), 1e-12)
        sigma = (fmean(losses) - fmean(past_losses)) / spread
    if enough and past_gradients and gradients:
        usual = median(past_gradients)
        ratio = median(gradients) / usual if usual > 0 else 1.0
    width = len(losses)
    means = [fmean(past_losses[at : at + width]) for at in range(0, len(past_losses) - width + 1, width)]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(means, means[1:], means[2:], strict=False))
    turning = turns / (len(means) - 2) if len(means) >= 12 else 0.0
    return Signals(True, sigma, ratio, error_sigma, turning, predictor_finite)


def assess(signals: Signals, config: HybridConfig) -> tuple[Finding, ...]:
    """What is wrong, the worst first; empty when all is well."""
    found = []
    if not signals.finite:
        found.append(Finding("no finite number", Level.CRITICAL))
    if signals.loss_sigma > config.loss_sigma:
        worse = signals.loss_sigma > 2 * config.loss_sigma
        found.append(Finding("loss", Level.CRITICAL if worse else Level.WARNING))
    if signals.gradient_ratio > config.gradient_factor:
        found.append(Finding("gradient explosion", Level.WARNING))
    if signals.gradient_ratio < 1 / config.gradient_factor:
        found.append(Finding("gradient vanishing", Level.CAUTION))
    if not signals.predictor_finite:
        found.append(Finding("predictor", Level.WARNING))
    elif signals.error_sigma > config.error_sigma:
        found.append(Finding("prediction error", Level.CAUTION))
    if signals.turning > config.oscillation:
        found.append(Finding("oscillation", Level.CAUTION))
    return tuple(sorted(found, key=lambda finding: -finding.level))


def actions(
    found: Sequence[Finding], config: HybridConfig, *, snapshot: bool, rollbacks: int
) -> tuple[Action, ...]:
    """What to do, in order.

    Args:
        found: What `assess` found.
        config: Settings.
        snapshot: Whether there is a state to go back to.
        rollbacks: How often in a row the run went back already: the first retry sees the same batches, later
            ones go on behind them.
    """
    if not found:
        return (Action.CONTINUE,)
    chosen: list[Action] = []
    kinds = {finding.kind for finding in found}
    broken = "no finite number" in kinds
    if any(finding.level is Level.CRITICAL for finding in found):
        if snapshot and rollbacks >= config.max_rollbacks:
            return (Action.ABORT,)
        if snapshot:
            chosen += [Action.ROLLBACK_AND_RETRY] + [Action.SKIP_BATCH] * (rollbacks > 0)
        elif broken:
            return (Action.ABORT,)
        chosen += [Action.FORCE_FULL_PHASE, Action.REDUCE_PREDICT_RATIO]
    if kinds & {"loss", "gradient explosion"} and Action.FORCE_FULL_PHASE not in chosen:
        chosen += [Action.FORCE_FULL_PHASE, Action.REDUCE_PREDICT_RATIO]
    if "prediction error" in kinds:
        chosen.append(Action.INCREASE_CONFIDENCE_THRESHOLD)
    if kinds & {"oscillation", "gradient vanishing"} and Action.REDUCE_PREDICT_RATIO not in chosen:
        chosen.append(Action.REDUCE_PREDICT_RATIO)
    if "predictor" in kinds:
        chosen.append(Action.RESET_PREDICTOR)
    return tuple(chosen)
