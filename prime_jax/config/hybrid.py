"""The section `hybrid`: watching and correcting a run, and what that does not go with."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prime_jax.frozen import Frozen

if TYPE_CHECKING:
    from prime_jax.config.sections import Config


class HybridSection(Frozen):
    """How a run is watched, predicted and corrected (docs/hybrid.md), off by default.

    The fields of `prime_jax.hybrid.settings`, which this part does not know (a test compares them), and two
    of the trainer: `control_rows` and `control_share`. What the numbers of the others must have in common is
    checked where a run begins.
    """

    enabled: bool = Field(default=False, description="watch the run; false changes nothing at all")
    predict: bool = Field(default=False, description="try jumps during training")
    correct: bool = Field(default=True, description="correct the weights at the end, and after a jump")
    warmup_steps: int = Field(default=100, ge=1, description="real steps before anything is predicted")
    min_full_steps: int = Field(default=50, ge=1, description="real steps between two jumps, at least")
    max_full_steps: int = Field(default=500, ge=1, description="real steps until a horizon is chosen anew")
    window: int = Field(default=10, ge=1, description="real steps between two observations")
    ema_steps: tuple[int, ...] = Field(
        default=(12, 25, 50, 100), description="time constants of the averages, shortest first"
    )
    half_precision: bool = Field(default=True, description="keep the averages in bfloat16")
    horizons: tuple[int, ...] = Field(
        default=(0, 5, 10, 25, 50), description="steps that a jump may stand for; 0 (no jump) first"
    )
    confidence_threshold: float = Field(
        default=0.2, ge=0, le=1, description="confidence that a horizon needs"
    )
    probe_share: float = Field(
        default=0.01, ge=0, le=1, description="what jumps may cost, as a share of the real steps"
    )
    coefficient_gradients: int = Field(default=5, ge=1, description="real gradients of a correction")
    coefficient_rate: float = Field(default=0.1, gt=0, description="step length of a coefficient")
    max_coefficient: float = Field(default=4.0, ge=1, description="largest absolute coefficient")
    control_batches: int = Field(
        default=32, ge=8, description="batches set aside from train that decide what stays"
    )
    screen_batches: int = Field(default=8, ge=4, description="those of them that choose; the others confirm")
    screen_level: float = Field(
        default=0.5, ge=0.5, lt=1, description="level of the test before more is spent on a change"
    )
    control_rows: int = Field(
        default=0, ge=0, description="rows of a control batch; 0: an eighth of train.batch_size, at least 2"
    )
    control_share: float = Field(
        default=0.15, gt=0, lt=1, description="most of the training rows that the control set may take"
    )
    accept_level: float = Field(
        default=0.9, ge=0.5, lt=1, description="level of the one-sided test that a change has to pass"
    )
    virtual_steps: Literal["real", "advance_by_Y"] = Field(
        default="real", description="what the schedule follows; the trainer knows 'real' only"
    )
    ensemble: int = Field(default=3, ge=1, description="members of the dynamics model")
    hidden: int = Field(default=32, ge=1, description="width of its deterministic state")
    latent: int = Field(default=8, ge=1, description="width of its stochastic state")
    dynamics_rate: float = Field(default=3e-3, gt=0, description="its learning rate")
    residual_capacity: int = Field(default=256, ge=1, description="jumps that are remembered")
    exploration: float = Field(default=0.5, ge=0, description="how curious the choice of a horizon is")
    loss_sigma: float = Field(default=6.0, gt=0, description="deviations of the loss that are divergence")
    gradient_factor: float = Field(
        default=20.0, gt=0, description="times its median that a gradient norm may be"
    )
    error_sigma: float = Field(
        default=6.0, gt=0, description="deviations from the predicted loss that are an error"
    )
    oscillation: float = Field(
        default=0.95, ge=0, le=1, description="share of turning points that counts as oscillation"
    )
    max_rollbacks: int = Field(default=3, ge=1, description="rollbacks in a row before the run is given up")
    snapshot: Literal["probe", "window"] = Field(
        default="probe", description="keep a state to go back to: after a jump only, or at every observation"
    )
    seed: int = Field(default=0, ge=0, description="seed of the control set, the dynamics model and rounding")

    @property
    def watching(self) -> bool:
        """Whether a run does anything that a plain one does not."""
        return self.enabled and (self.predict or self.correct)


def control_rows(config: "Config") -> int:
    """Rows of one control batch."""
    batch = config.train.batch_size
    return config.hybrid.control_rows or min(batch, max(2, batch // 8))


# What is compared with moves by rules of its own, or weights are averaged twice.
_ONLY: tuple[tuple[str, str, object, str], ...] = (
    ("train", "x_encoder", "frozen", "batches of texts have no fixed shape"),
    ("train", "y_encoder", "frozen", "batches of texts have no fixed shape"),
    ("train", "average_weights", 0.0, "hybrid keeps averages itself and takes the best one at the end"),
)


def check_hybrid(config: "Config") -> None:
    """Refuse what watching does not go with.

    Raises:
        ValueError: Naming the setting and the reason.
    """
    if not config.hybrid.watching:
        return
    if config.steered:
        raise ValueError(
            f"hybrid.enabled is for prime models; a {config.model.kind} model is trained against targets "
            "that move with it"
        )
    for section, name, only, why in _ONLY:
        given = getattr(getattr(config, section), name)
        if given != only:
            raise ValueError(f"{section}.{name} is {given!r}, but hybrid.enabled needs {only!r}: {why}")
    if config.train.target == "ema":
        raise ValueError(
            "train.target 'ema' is an average that a jump would leave behind; with hybrid.enabled use "
            "'slow' or 'frozen'"
        )
    if config.hybrid.virtual_steps != "real":
        raise ValueError(
            f"hybrid.virtual_steps is {config.hybrid.virtual_steps!r}, but the trainer's learning rate falls "
            "over a number of steps that is fixed: moved on, it would be over before the run is; set it to "
            "'real'"
        )
    _check_control(config)
    batches = config.train.accumulate_grad_batches
    if config.hybrid.window % batches:
        raise ValueError(
            f"hybrid.window {config.hybrid.window} is no multiple of train.accumulate_grad_batches "
            f"{batches}: a window must hold whole updates"
        )


def _check_control(config: "Config") -> None:
    """Refuse control batches that no loss can be had of."""
    rows, batch, micro = control_rows(config), config.train.batch_size, config.train.micro_batch_size
    if rows > batch:
        raise ValueError(f"hybrid.control_rows {rows} is more than train.batch_size {batch}")
    if rows < 2 and config.train.negatives == "batch":
        raise ValueError(
            f"hybrid.control_rows is {rows}, but a row is told from the others of its batch: take 2 at least"
        )
    if micro and rows > micro and rows % micro:
        raise ValueError(
            f"hybrid.control_rows {rows} is above train.micro_batch_size {micro}, but no multiple of it"
        )
