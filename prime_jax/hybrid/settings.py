"""What a hybrid run can be told: a plain frozen dataclass, so that the part stands on jax and optax alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HybridConfig:
    """Settings of `HybridTrainer`.

    Attributes:
        enabled: False makes the wrapper the bare step.
        predict: Whether jumps are tried during training; off, for they made decayed schedules worse.
        correct: Whether the end of the run is corrected.
        warmup_steps: Real steps before anything is predicted.
        min_full_steps: Real steps between two jumps, at least.
        max_full_steps: Real steps after which a horizon is chosen anew although none was taken.
        window: Real steps between two observations; scalars reach the host once per window.
        ema_steps: Time constants of the averages, shortest first.
        half_precision: Keep the trees in bfloat16, rounded stochastically (the anchor stays float32).
        horizons: Steps that a jump may stand for; 0, "do not predict", comes first.
        confidence_threshold: Confidence that a horizon needs.
        probe_share: Most full steps that jumps during training may cost, as a share of the real ones.
        coefficient_gradients: Real gradients that a correction takes.
        coefficient_rate: Step length of a coefficient; 1 is the whole way to an average.
        max_coefficient: Largest absolute coefficient, at least 1; the end looks no further ahead.
        control_batches: Batches that decide what stays; many small ones (an eighth of a training batch) tell
            more than few large ones.
        screen_batches: Those of them that choose; the others confirm.
        screen_level: Of the one-sided test by which the end looks better where it is chosen, before anything
            more is spent; 0.5 is a lower mean.
        accept_level: Of the one-sided test that a change has to pass to stay.
        virtual_steps: "real": the schedule follows real steps; "advance_by_Y": a jump that stays moves it on.
        ensemble: Members of the dynamics model.
        hidden: Width of its deterministic state.
        latent: Width of its stochastic state.
        dynamics_rate: Its learning rate.
        residual_capacity: Jumps that are remembered.
        exploration: Width of the bandit's bonus, in standard deviations.
        loss_sigma: Deviations of the loss from its past that count as divergence.
        gradient_factor: Times that a gradient norm may exceed, or fall below, its median.
        error_sigma: Calibrated deviations of the loss from its prediction that are an error.
        oscillation: Share of turning points in the loss that counts as oscillation (random: 2/3).
        max_rollbacks: Rollbacks in a row before the run is given up.
        snapshot: "probe" keeps the state only after a jump, "window" at every observation as well.
        seed: Of the dynamics model and of rounding.
    """

    enabled: bool = True
    predict: bool = False
    correct: bool = True
    warmup_steps: int = 100
    min_full_steps: int = 50
    max_full_steps: int = 500
    window: int = 10
    ema_steps: tuple[int, ...] = (12, 25, 50, 100)
    half_precision: bool = True
    horizons: tuple[int, ...] = (0, 5, 10, 25, 50)
    confidence_threshold: float = 0.2
    probe_share: float = 0.01
    coefficient_gradients: int = 5
    coefficient_rate: float = 0.1
    max_coefficient: float = 4.0
    control_batches: int = 32
    screen_batches: int = 8
    screen_level: float = 0.5
    accept_level: float = 0.9
    virtual_steps: str = "real"
    ensemble: int = 3
    hidden: int = 32
    latent: int = 8
    dynamics_rate: float = 3e-3
    residual_capacity: int = 256
    exploration: float = 0.5
    loss_sigma: float = 6.0
    gradient_factor: float = 20.0
    error_sigma: float = 6.0
    oscillation: float = 0.95
    max_rollbacks: int = 3
    snapshot: str = "probe"
    seed: int = 0

    def __post_init__(self) -> None:
        steps, horizons = self.ema_steps, self.horizons
        problems = {
            "ema_steps needs 2 to 4 rising numbers above 1": not 2 <= len(steps) <= 4
            or list(steps) != sorted(set(steps))
            or steps[0] <= 1,
            "horizons needs 0 first, then rising numbers, at least two in all": len(horizons) < 2
            or horizons[0] != 0
            or list(horizons) != sorted(set(horizons)),
            "horizons reach at most 12 windows": bool(horizons) and horizons[-1] > 12 * self.window,
            "warmup_steps is below one window": self.warmup_steps < self.window,
            "min_full_steps is below one window": self.min_full_steps < self.window,
            "max_full_steps is below min_full_steps": self.max_full_steps < self.min_full_steps,
            "probe_share is no share between 0 and 1": not 0 <= self.probe_share <= 1,
            "max_coefficient is below 1, the whole way to an average": not self.max_coefficient >= 1,
            "screen_batches is below 4": self.screen_batches < 4,
            "control_batches leaves less than 4 to confirm beside screen_batches": self.control_batches
            < self.screen_batches + 4,
            "screen_level is not between 0.5 and 1": not 0.5 <= self.screen_level < 1,
            "accept_level is not between 0.5 and 1": not 0.5 <= self.accept_level < 1,
            "virtual_steps is neither 'real' nor 'advance_by_Y'": self.virtual_steps
            not in ("real", "advance_by_Y"),
            "snapshot is neither 'probe' nor 'window'": self.snapshot not in ("probe", "window"),
        }
        for name in (
            "window",
            "coefficient_gradients",
            "ensemble",
            "hidden",
            "latent",
            "residual_capacity",
            "max_rollbacks",
            "coefficient_rate",
            "dynamics_rate",
            "loss_sigma",
            "gradient_factor",
            "error_sigma",
        ):
            problems[f"{name} is not above 0"] = not getattr(self, name) > 0
        for problem, found in problems.items():
            if found:
                raise ValueError(f"hybrid: {problem} ({self.__class__.__name__})")

    @property
    def basis(self) -> int:
        """P, the trees that a jump is made of: the averages, the optimizer's direction, the last move."""
        return len(self.ema_steps) + 2
