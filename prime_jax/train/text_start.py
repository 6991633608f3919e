"""How a text predictor starts: as the encoder that its memory was made with, or that with an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import ValidationError

from prime_jax.config import Config
from prime_jax.data.conversations import TOKENIZER, ConversationTokenizer, with_sequences
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.encode import Encoder, load_encoder
from prime_jax.data.records import Dataset
from prime_jax.data.sequences import PackedBatches
from prime_jax.errors import CheckpointError, ConfigError, first_fault
from prime_jax.files import sha256
from prime_jax.models.adapter import GENERAL, adapter_rank, read_facts, with_adapter
from prime_jax.models.text import ROLES, TextConfig, TextPredictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.families import read_encoder_config
from prime_jax.train.collective import say
from prime_jax.train.sharding import make_mesh
from prime_jax.train.state import build_graph


@dataclass(frozen=True)
class TextStart:
    """What a run needs besides the data where the model reads text.

    Attributes:
        params: Parameters of the model to start from, float32, nested dicts.
        tokenizer: The file that goes with every checkpoint.
        facts: What a checkpoint must remember of the adapter that it starts with, if there is one: `start`
            with its `sha256` and `rank`, and its `licence` and `attribution`.
    """

    params: Any
    tokenizer: Path
    facts: Mapping[str, Any]


def completed(config: Config) -> Config:
    """The configuration with what a text predictor takes from `data.encoder`; of other models as it is.

    Raises:
        ConfigError: If there is no such encoder, or it is none that can be trained.
        DataError: If the encoder's folder is incomplete or damaged.
    """
    if not isinstance(config.model, TextConfig):
        return config
    encoder = _trainable(load_encoder(config.data.encoder), config)
    return config.model_copy(update={"model": reading_config(config.model, encoder, config.data.encoder)})


def reading_config(model: TextConfig, encoder: BertTextEncoder, name: str) -> TextConfig:
    """The configuration with what it takes from an encoder; `name` is how that was called, for messages.

    Raises:
        ConfigError: If the encoder does not fit.
        DataError: If its tokenizer is none that makes conversations.
    """
    source = encoder.source
    taken = {
        "encoder": read_encoder_config(source.transformer),
        "pooling": encoder.pooling,
        "lower_case": source.lower_case,
        "separator_id": ConversationTokenizer.of_model(model, source.transformer / TOKENIZER).separator,
    }
    try:
        return TextConfig.model_validate({**model.model_dump(), **taken})
    except ValidationError as unfit:
        raise ConfigError(f"data.encoder {name!r}: {first_fault(unfit)}") from None


def starting_params(model: TextConfig, encoder: BertTextEncoder) -> dict[str, Any]:
    """Parameters of the model before any training, float32, nested dicts."""
    params: dict[str, Any] = {
        "encoder": jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), encoder.params)
    }
    if model.roles:
        params["roles"] = np.zeros((ROLES, model.output_dim), np.float32)
    return params


def adapter_of(start: str) -> Path | None:
    """The adapter that `train.start` names; None for the encoder as it is.

    Raises:
        ConfigError: If it is neither known nor a file.
    """
    if start in ("encoder", "general"):
        return None if start == "encoder" else GENERAL
    if not Path(start).is_file():
        raise ConfigError(f"train.start {start!r}: neither encoder nor general, nor the file of an adapter")
    return Path(start)


def check_encoder(adapter: Path, encoder: BertTextEncoder) -> dict[str, Any]:
    """Refuse an encoder that an adapter does not belong to; gives what its file says (`read_facts`).

    Raises:
        CheckpointError: Naming both; or if the file is missing or no adapter.
    """
    facts = read_facts(adapter)
    if facts.get("encoder") != encoder.identity:
        raise CheckpointError(
            f"{adapter}: belongs to the encoder {facts.get('encoder')}, the one given is {encoder.identity}"
        )
    return facts


def started_model(model: TextConfig, params: Any) -> TextPredictor:
    """The model of a complete configuration with parameters such as those of `starting_params`."""
    made: TextPredictor = nnx.merge(build_graph(model, jnp.float32), params)
    return made


def text_start(
    config: Config, dataset: Dataset, data: EmbeddedDataset, encoder: Encoder
) -> tuple[EmbeddedDataset, TextStart]:
    """The data with its conversations as token ids, and what the model starts from."""
    model, start = config.model, _trainable(encoder, config)
    assert isinstance(model, TextConfig)
    file = start.source.transformer / TOKENIZER
    tokenizer = ConversationTokenizer.of_model(model, file)
    data = with_sequences(dataset, data, tokenizer, config.data.query_prefix)
    if tokenizer.cut:
        everything = sum(len(split) for split in data.splits.values())
        say(
            f"{tokenizer.cut:,} of {everything:,} conversations are longer than {model.max_tokens} tokens; "
            "their oldest words are not read"
        )
    params, adapter = starting_params(model, start), adapter_of(config.train.start)
    if adapter is None:
        return data, TextStart(params, file, {})
    told = check_encoder(adapter, start)
    _compare(told["model"], model, config.train.start)
    facts: dict[str, Any] = {name: told[name] for name in ("licence", "attribution") if name in told}
    facts["start"] = {"sha256": sha256(adapter), "rank": adapter_rank(adapter)}
    return data, TextStart(with_adapter(params, adapter, told.get("share", 1.0)), file, facts)


def _compare(before: Mapping[str, Any], model: TextConfig, start: str) -> None:
    """Say where a model reads otherwise than the adapter it starts with.

    Raises:
        ConfigError: If it does so that what was learned is lost.
    """
    if before.get("separate_turns", True) != model.separate_turns:
        raise ConfigError(
            f"train.start {start!r} was trained with model.separate_turns {not model.separate_turns}; set it "
            "so"
        )
    for name in ("query_weight", "max_tokens"):
        if name in before and before[name] != getattr(model, name):
            say(
                f"train.start {start!r} was trained with model.{name} {before[name]}, here it is "
                f"{getattr(model, name)}: the start is not quite what it was"
            )


def packed_batches(config: Config, data: EmbeddedDataset, split: str) -> PackedBatches | None:
    """What packs the conversations of a split into batches; None for a model that reads embeddings."""
    sequences, settings = data.splits[split].sequences, config.train
    if sequences is None or not isinstance(config.model, TextConfig):
        return None
    micro_batches = settings.batch_size // settings.micro_batch_size if settings.micro_batch_size else 1
    mesh = make_mesh(config.mesh, settings.batch_size, settings.micro_batch_size)
    return PackedBatches(sequences, config.model.max_tokens, micro_batches, mesh.size // jax.process_count())


def _trainable(encoder: Encoder, config: Config) -> BertTextEncoder:
    if not isinstance(encoder, BertTextEncoder):
        raise ConfigError(
            f"data.encoder {config.data.encoder!r} cannot be trained here: give minilm or a model folder"
        )
    return encoder
