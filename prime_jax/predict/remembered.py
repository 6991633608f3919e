"""Choices of precision kept for the next start: a small JSON file for each kind of model, device and version.

It is data only. What does not fit what is expected there, in any way, counts as nothing: the choice is
measured again and the file written anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import jax

from prime_jax._version import __version__
from prime_jax.errors import PredictorError
from prime_jax.files import read_json, write_json
from prime_jax.models import AnyConfig
from prime_jax.predict.precision import EXACT, Choice, Precision, Recipe, half_recipe
from prime_jax.program_cache import home, usable

FORMAT = 1
_NOT_ITS_SHAPE = {"checkpoint_path", "init_from", "dropout", "use_torch_compile", "use_static_cache"}


class Remembered:
    """The choices of earlier starts for one model shape on this device.

    Args:
        config: The model's configuration; what does not change its programs is left out.
        precision: What the user asked for.

    Attributes:
        file: Where they are; None where nothing is kept.
    """

    def __init__(self, config: AnyConfig, precision: Precision):
        self._key = {
            "prime_jax": __version__,
            "jax": jax.__version__,
            "device": str(jax.devices()[0].device_kind),
            "platform": str(jax.devices()[0].client.platform_version),  # on GPUs CUDA's version among others
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "model": json.loads(config.model_dump_json(exclude=_NOT_ITS_SHAPE)),
            "precision": precision,
            "half": half_recipe()._asdict(),
        }
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:24]
        folder = home()
        self.file = None if folder is None else folder / f"precision-{digest}.json"

    def read(self) -> dict[int, Choice]:
        """The remembered choice of each batch size; none where the file is missing or not as it should be."""
        if self.file is None:
            return {}
        try:
            content = read_json(self.file)
            if content["format"] != FORMAT or content["key"] != self._key:
                return {}
            return {int(batch): _choice(entry) for batch, entry in content["choices"].items()}
        except (PredictorError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return {}

    def write(self, choices: Mapping[int, Choice]) -> None:
        """Remember these choices beside those of other batch sizes, where that is possible."""
        if self.file is None or not usable(self.file.parent):
            return
        merged = dict(sorted((self.read() | dict(choices)).items()))
        entries = {
            str(batch): {**choice.recipe._asdict(), "why": choice.why} for batch, choice in merged.items()
        }
        try:
            write_json(self.file, {"format": FORMAT, "key": self._key, "choices": entries})
        except OSError:  # a full disk, for instance: the next start measures again
            return

    def forget(self) -> None:
        """Remember none of these choices any more, where that is possible."""
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)


def _choice(entry: dict[str, Any]) -> Choice:
    """A choice from its JSON.

    Raises:
        ValueError: If anything in it is not one of the known values.
    """
    recipe = Recipe(**{name: entry[name] for name in Recipe._fields})
    exact = (EXACT, EXACT._replace(outputs_first=True))
    if recipe not in (*exact, half_recipe()) or not isinstance(entry["why"], str):
        raise ValueError(f"{entry} is no choice")
    return Choice(recipe, entry["why"])
