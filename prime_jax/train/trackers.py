"""Sending a run's figures to TensorBoard and Weights & Biases (extra `track`)."""

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.markup import escape

from prime_jax.config import Config
from prime_jax.errors import ConfigError
from prime_jax.train.collective import is_main, say

Send = Callable[[int, Mapping[str, float]], None]


class Tracker:
    """Open trackers of a run; use it as a context.

    A tracker that fails on the way (no network, a full disk) is left out from then on, with a warning:
    history.jsonl has everything, and training is worth more than its curves.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[Send, Callable[[], Any]]] = {}

    def add(self, name: str, send: Send, close: Callable[[], Any]) -> None:
        """Also send figures to this one."""
        self._open[name] = (send, close)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures of a step everywhere."""
        for name, (send, _) in list(self._open.items()):
            self._guarded(name, lambda send=send: send(step, figures))  # type: ignore[misc]

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        for name, (_send, close) in list(self._open.items()):
            self._guarded(name, close)

    def _guarded(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as failed:  # whatever their libraries raise
            self._open.pop(name, None)
            say(escape(f"{name} failed and is left out from now on: {failed}"))


def open_trackers(config: Config, run: Path, *, resumed_at: int = 0) -> Tracker:
    """The trackers that `config.monitor` names; none but in the first process.

    Args:
        config: What is run.
        run: Run folder.
        resumed_at: Step that the run goes on from; what TensorBoard has of later ones, which are made again,
            is hidden there. Weights & Biases keeps the first report of a step.

    Raises:
        ConfigError: If the package of one is not installed, or Weights & Biases does not let the run begin.
    """
    tracker = Tracker()
    if not is_main():
        return tracker
    if config.monitor.tensorboard:
        writer = _need("tensorboardX").SummaryWriter(
            logdir=str(run / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
        )

        def write(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        tracker.add("tensorboard", write, writer.close)
    if config.monitor.wandb is not None:
        started = _start_wandb(config, run)
        tracker.add("wandb", lambda step, figures: started.log(dict(figures), step=step), started.finish)
    return tracker


def _start_wandb(config: Config, run: Path) -> Any:
    wandb = _need("wandb")
    try:
        return wandb.init(
            project=config.monitor.wandb,
            name=run.name,
            id=hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16],  # a resumed run goes on there
            resume="allow",
            dir=str(run),
            config=config.model_dump(),
        )
    except Exception as failed:  # no account, no network: its own kinds of errors
        raise ConfigError(
            f"wandb cannot begin ({failed}); set WANDB_MODE=offline, or leave monitor.wandb out"
        ) from failed


def _need(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError(
            f'{package} is not installed; pip install "prime-jax[track]", or leave its monitor setting out'
        ) from None
