"""Everything that is checked and gathered before the first step of a run."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from prime_jax._version import __version__
from prime_jax.config import Config, load_stored_config
from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.encode import load_encoder
from prime_jax.data.prepare import prepare
from prime_jax.errors import CheckpointError, ConfigError
from prime_jax.progress import console
from prime_jax.train import checkpoints
from prime_jax.train.optim import warmup_steps
from prime_jax.train.state import TrainState, pure_params

Facts = dict[str, Any]


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Refuse to start over in a folder that holds a run, or to resume one with other settings."""
    if not resume:
        if checkpoints.list_checkpoints(out):
            raise ConfigError(f"{out} already holds a run; add --resume to go on, or choose another --out")
        return
    if not (out / checkpoints.CONFIG).exists():
        raise CheckpointError(f"{out}: no run to resume here")
    stored = load_stored_config(out / checkpoints.CONFIG)
    for section in ("model", "train", "data", "mesh"):
        before, now = getattr(stored, section).model_dump(), getattr(config, section).model_dump()
        changed = [name for name in before if before[name] != now[name]]
        changed = [name for name in changed if (section, name) not in {("data", "path"), ("data", "store")}]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{out} was trained with {section}.{name} {before[name]!r}, not {now[name]!r}; "
                "a resumed run keeps its settings"
            )


def embedded(config: Config) -> tuple[EmbeddedDataset, Facts]:
    """Text to embeddings, and what a checkpoint must remember of them."""
    source = config.data
    if source.path is None:
        raise ConfigError("data.path is not set: name a data folder, for instance with --data.path DIR")
    encoder = load_encoder(source.encoder)
    for name in ("input_dim", "output_dim"):
        if getattr(config.model, name) != encoder.dim:
            raise ConfigError(
                f"model.{name} is {getattr(config.model, name)}, but the encoder {encoder.identity} gives "
                f"{encoder.dim}; set --model.{name.replace('_', '-')} {encoder.dim}"
            )
    dataset, store = prepare(
        Path(source.path),
        ("train", "dev"),
        encoder,
        store_folder=Path(source.store) if source.store else None,
        query_prefix=source.query_prefix,
        passage_prefix=source.passage_prefix,
    )
    data = embed_dataset(
        dataset,
        store,
        max_context_length=config.model.max_context_length,
        query_prefix=source.query_prefix,
        passage_prefix=source.passage_prefix,
        context_from=source.context_from,
        first_pass_k=source.first_pass_k,
    )
    facts = {
        "encoder": encoder.identity,
        "data_hash": data.data_hash,
        "versions": {"prime_jax": __version__, **{name: version(name) for name in ("jax", "flax", "optax")}},
    }
    return data, facts


def with_weights_of(config: Config, state: TrainState) -> TrainState:
    """Start from the weights of `model.checkpoint_path` where one is given."""
    if config.model.checkpoint_path is None:
        return state
    model, _, _ = checkpoints.load_model(Path(config.model.checkpoint_path))
    params = pure_params(model)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, state.params)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"model.checkpoint_path {config.model.checkpoint_path}: its model has other shapes")
    return TrainState(step=state.step, params=params, opt_state=state.opt_state, rng=state.rng)


def warn_of_shortened_warmup(config: Config, updates: int) -> None:
    """Say so when the run is too short for the configured warm-up."""
    used = warmup_steps(config.train, updates)
    if used < config.train.warmup_steps:
        console.print(
            f"warm-up shortened from {config.train.warmup_steps} to {used} updates, "
            f"a tenth of this run's {updates}"
        )


def warn_of_unused(config: Config) -> None:
    """Say so when a field of the requirement was changed that this version does not act on."""
    name = "y_encoder_lr_multiplier"
    if getattr(config.train, name) != type(config.train).model_fields[name].default:
        console.print(f"train.{name} has no effect: targets are frozen embeddings", soft_wrap=True)
    if config.train.negatives == "corpus" and config.train.num_negatives:
        console.print("train.num_negatives has no effect: all passages are negatives already", soft_wrap=True)
