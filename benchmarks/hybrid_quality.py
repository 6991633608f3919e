"""How good predictions are: losses as they were told beforehand, and moves beside what is possible at all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.hybrid import corrector
from prime_jax.hybrid.basis import direction_of, moments
from prime_jax.hybrid.forecast import TREND
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import predict, windows_of

_predict = jax.jit(predict, static_argnames="config")
_units = jax.jit(corrector.units)
AHEAD = (1, 2, 3, 5, 10, 25, 50)


def prequential(
    rows: Sequence[Mapping[str, Any]], losses: Sequence[float], config: HybridConfig
) -> dict[str, dict[str, float]]:
    """Per horizon: R2, skill over persistence, that of a linear trend, and coverage of one sigma.

    A prediction and what it is compared with are means of one window's losses; windows in which the predictor
    has not begun (`TREND` of them) are left out. `R2 possible` is what a predictor that knows the expected
    loss of every step would reach: batches differ, and the mean of a window keeps a part of that noise. `R2
    of a step` scores the same predictions against the loss of the one step that lies so far ahead.

    Args:
        rows: Of a trainer.
        losses: Of every step of its run.
        config: Its settings.
    """
    seen = [row for row in rows if "delta_cosine" in row]
    loss = np.array([row["loss"] for row in seen])
    noise = np.array([row["loss_std"] for row in seen]) ** 2 / (config.window - 1)
    single = np.asarray(losses)
    found = {}
    for steps, ahead in zip(config.horizons[1:], windows_of(config), strict=True):
        at = np.arange(TREND + 1, len(seen) - ahead)
        true = loss[at + ahead]
        told = np.array([seen[i][f"predicted_{steps}"] for i in at])
        sigma = np.array([seen[i][f"sigma_{steps}"] for i in at])
        line = np.array([_line(loss[i - TREND + 1 : i + 1], ahead) for i in at])
        step = single[np.array([seen[i]["step"] + steps - 1 for i in at], int)]

        def error(values: np.ndarray, true: np.ndarray = true) -> float:
            return float(np.mean((true - values) ** 2))

        stays = error(loss[at])
        found[str(steps)] = {
            "R2": 1 - error(told) / float(np.var(true)),
            "R2 possible": 1 - float(np.mean(noise[at + ahead])) / float(np.var(true)),
            "R2 persistence": 1 - stays / float(np.var(true)),
            "R2 of a step": 1 - error(told, step) / float(np.var(step)),
            "skill": 1 - error(told) / stays,
            "skill of a linear trend": 1 - error(line) / stays,
            "coverage": float(np.mean(np.abs(true - told) <= sigma)),
            "predictions": len(at),
        }
    return found


def _line(last: np.ndarray, ahead: int) -> float:
    slope, level = np.polyfit(np.arange(len(last)) - len(last) + 1.0, last, 1)
    return float(level + slope * ahead)


def move_quality(run: Any, seed: int, schedule: str, peak: float, total: int) -> dict[str, Any]:
    """Cosines of predicted with true moves at three states of a run, for each number of steps ahead.

    `ceiling` is the cosine between two continuations of one state with batches in different orders; about its
    square root is what any prediction without the batches can reach.
    """
    config = replace(run.config, predict=False)
    trainer, state = run.trainer(seed, config), run.state(seed, schedule, peak, total)
    trainer.init(state)
    found: dict[str, dict[str, list[float]]] = {
        str(steps): {"head": [], "direction": [], "last move": [], "ceiling": []} for steps in AHEAD
    }
    points = [int(share * total) // config.window * config.window for share in (0.25, 0.5, 0.85)]
    for at in range(points[-1] + 1):
        if at in points:
            _measure(run, trainer, state, seed, at, found)
        state, _ = trainer.step(state, run.task.batches(seed, at))
    return found


def _measure(run: Any, trainer: Any, state: Any, seed: int, at: int, found: Any) -> None:
    hybrid = trainer.hybrid
    start = jax.tree.map(jnp.copy, state["params"])
    true, other = (_continued(run, state, order, at) for order in (seed, seed + 1000))
    last = np.zeros((*hybrid.square.shape, trainer.config.basis), np.float32)
    last[:, -1] = 1.0
    known = moments(state, start)
    assert known is not None
    direction = direction_of(known)
    unit = _units(hybrid.basis)
    for steps in AHEAD:
        move, second = (_minus(one[steps], start) for one in (true, other))
        _, _, a = _predict(hybrid, jnp.asarray(float(steps)), config=trainer.config)
        cell = found[str(steps)]
        cell["head"].append(_cosine(_combined(hybrid.basis, a), move))
        cell["direction"].append(_cosine(direction, move))
        cell["last move"].append(_cosine(_combined(hybrid.basis, jnp.asarray(last) * unit), move))
        cell["ceiling"].append(_cosine(move, second))


def _continued(run: Any, state: Any, seed: int, at: int) -> dict[int, Any]:
    """Weights after each number of steps, from a copy of the state."""
    state, found = jax.tree.map(jnp.copy, state), {}
    for done in range(1, max(AHEAD) + 1):
        state, _ = run.step(state, run.task.batches(seed, at + done - 1))
        if done in AHEAD:
            found[done] = jax.tree.map(jnp.copy, state["params"])
    return found


def _combined(basis: Any, a: Any) -> list[Any]:
    leaves = jax.tree.leaves(basis)
    return [jnp.tensordot(a[g], leaf.astype(jnp.float32), 1) for g, leaf in enumerate(leaves)]


def _minus(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.subtract, one, other)


def _cosine(one: Any, other: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other))
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
