"""What a hybrid run needs to go on: arrays of fixed shape, and back."""

import math
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hybrid.metrics import Totals
from prime_jax.hybrid.phases import Phase, PhaseState
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import HybridState


class Resumable:
    """The part of a trainer that is saved."""

    config: HybridConfig
    totals: Totals
    phases: PhaseState
    hybrid: HybridState | None
    _pending: list[tuple[Any, Any]]
    _snapshot: Any
    _confidence: tuple[float, ...]
    _probe_scale: float
    _backoff: float
    _retries: int
    _last_error: float
    _predictor_finite: bool
    _rows: int

    def saved(self) -> dict[str, Any]:
        """Everything that going on needs, as arrays; an open snapshot is given up, here and there."""
        self._snapshot = None
        window, phases = self.config.window, self.phases
        fetched = jax.device_get(self._pending)
        fill = [math.nan] * (window - len(fetched))
        numbers = {
            **asdict(self.totals),
            "phase": int(phases.phase),
            "in_phase": phases.in_phase,
            "phase_step": phases.step,
            "threshold": phases.threshold,
            "diverging": phases.diverging,
            "forced": -1 if phases.forced is None else int(phases.forced),
            "probe_scale": self._probe_scale,
            "backoff": self._backoff,
            "retries": self._retries,
            "last_error": self._last_error,
            "predictor_finite": self._predictor_finite,
            "pending": len(fetched),
            "batch_rows": self._rows,
        }
        return {
            "arrays": _as_dict(self.hybrid),
            "numbers": {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()},
            "losses": jnp.asarray([float(loss) for loss, _ in fetched] + fill),
            "gradients": jnp.asarray([math.nan if g is None else float(g) for _, g in fetched] + fill),
            "confidence": jnp.asarray(self._confidence or [math.nan] * (len(self.config.horizons) - 1)),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `saved` gave; call it after `init`."""
        self._snapshot = None
        self.hybrid = HybridState(**_tupled(saved["arrays"], _as_dict(self.hybrid)))
        n = {name: float(value) for name, value in saved["numbers"].items()}
        self.totals = Totals(**{name: type(old)(n[name]) for name, old in asdict(Totals()).items()})
        self.phases = PhaseState(
            phase=Phase(int(n["phase"])),
            step=int(n["phase_step"]),
            in_phase=int(n["in_phase"]),
            threshold=n["threshold"],
            diverging=bool(n["diverging"]),
            forced=None if n["forced"] < 0 else Phase(int(n["forced"])),
        )
        self._probe_scale, self._backoff, self._retries = n["probe_scale"], n["backoff"], int(n["retries"])
        self._last_error, self._predictor_finite = n["last_error"], bool(n["predictor_finite"])
        self._rows = int(n["batch_rows"])
        pairs = zip(saved["losses"].tolist(), saved["gradients"].tolist(), strict=True)
        self._pending = [(a, None if math.isnan(b) else b) for a, b in list(pairs)[: int(n["pending"])]]
        told = saved["confidence"].tolist()
        self._confidence = () if math.isnan(told[0]) else tuple(told)


def _as_dict(state: HybridState | None) -> dict[str, Any]:
    assert state is not None
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def _tupled(saved: Any, like: Any) -> Any:
    """Saved leaves in the containers they came from (files know no tuples of ours)."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(saved))
