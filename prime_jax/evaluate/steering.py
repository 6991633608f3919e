"""Which steering a steered model is measured with, and whether it is the one that it was trained with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.data.embedded import EMPTY, EmbeddedDataset
from prime_jax.data.steered import LEAKY, STEERING, ZERO, Steering, open_steering, steered, variant_code
from prime_jax.errors import ConfigError, DataError
from prime_jax.predict.predictor import Predictor


def steer(
    predictor: Predictor, run: Path, data: Path, embedded: EmbeddedDataset, encoder: str, variant: str | None
) -> EmbeddedDataset:
    """The data with steering vectors in place of turns; "zero" needs no steering folder.

    Args:
        predictor: A steered one.
        run: For messages.
        data: Data folder.
        embedded: Its splits.
        encoder: Identity of the encoder.
        variant: Of the steering; None means the one that the run was judged with.

    Raises:
        ConfigError: For an unknown variant.
        DataError: As `open_steering_of`.
    """
    assert predictor.config is not None
    variant = variant or predictor.config.steering.judge_with
    variant_code(variant)  # refuses what there is not
    if variant == ZERO:
        splits = {
            name: replace(split, context_rows=np.full((len(split), 1), EMPTY, np.int64), windowed=0)
            for name, split in embedded.splits.items()
        }
        return replace(embedded, splits=splits)
    return steered(embedded, open_steering_of(predictor, run, data, embedded, encoder), variant)


def open_steering_of(
    predictor: Predictor, run: Path, data: Path, embedded: EmbeddedDataset, encoder: str
) -> Steering:
    """The steering of a data folder: for the run's own data the one that it was trained with.

    Raises:
        DataError: If there is none, or it does not belong to the data, or it was built anew since training.
    """
    config = predictor.config
    assert config is not None
    folder = steering_folder(predictor, data)
    prefixes = {"query_prefix": config.data.query_prefix, "passage_prefix": config.data.passage_prefix}
    steering = open_steering(folder, embedded, encoder, **prefixes)
    info = predictor.info()
    trained_here = info.get("data_hash") in steering.facts["data_hashes"].values()
    if trained_here and steering.hash != info.get("steering_hash"):
        raise DataError(
            f"{folder}: was built anew since {run} was trained on these data, so its clusters differ; "
            "bring the old folder back, or train again"
        )
    return steering


def steering_folder(predictor: Predictor, data: Path) -> Path:
    """Where the steering of a data folder lies: beside the texts, or where the run had it for these data."""
    config = predictor.config
    if config is None or config.steering.path is None or config.data.path is None:
        return data / STEERING
    same = Path(config.data.path).resolve() == data.resolve()
    return Path(config.steering.path) if same else data / STEERING


def steering_facts(predictor: Predictor, variant: str | None) -> dict[str, Any]:
    """What a report says of the steering; nothing for a model that takes turns."""
    if predictor.config is None or not predictor.config.steered:
        return {}
    chosen = variant or predictor.config.steering.judge_with
    return {"steering": {"variant": chosen, "leaks": chosen in LEAKY}}


def steering_words(facts: Mapping[str, Any]) -> str:
    """A sentence for the headline, "" where nobody was steered by anything."""
    if "steering" not in facts:
        return ""
    variant = facts["steering"]["variant"]
    if facts["steering"]["leaks"]:
        return (
            f" Steered by “{variant}”, which is made from the right answer: this shows what knowing its "
            "cluster would be worth, not what a user gets."
        )
    if variant == ZERO:
        return " Nothing was steered."
    return f" Steered by “{variant}”, made from the question alone."


def check_not_steered(steering: str | None, run: Path) -> None:
    """Refuse a steering variant for a model that takes turns.

    Raises:
        ConfigError: If one is given.
    """
    if steering is not None:
        raise ConfigError(f"{run}: its model takes turns, no steering; leave --steering out")
