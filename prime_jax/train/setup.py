"""Everything that is checked and gathered before the first step of a run."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.markup import escape

from prime_jax._version import __version__
from prime_jax.config import Config, SteeringConfig, control_rows, load_stored_config, user_names
from prime_jax.data.control import with_control
from prime_jax.data.curriculum import Curriculum, SteeredRows
from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.encode import load_encoder, passage_prefix_for
from prime_jax.data.prepare import prepare
from prime_jax.data.steered import STEERING, Steering, open_steering, steered
from prime_jax.data.store import holds_store
from prime_jax.errors import CheckpointError, ConfigError, PredictorError
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.locks import Ownership, exclusive
from prime_jax.losses.jasper import ROUTING_COMPONENTS, JasperLossConfig
from prime_jax.models.bundle import is_bundle, load_bundle
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.train import checkpoints
from prime_jax.train.collective import any_process, in_turn, is_main, say
from prime_jax.train.encoders import encoders_trained, trainable
from prime_jax.train.optim import warmup_steps
from prime_jax.train.plain_paths import plain_path
from prime_jax.train.reencoding import TrainedTexts
from prime_jax.train.state import pure_params
from prime_jax.train.text_start import TextStart, text_start

Facts = dict[str, Any]

_ELSEWHERE = {("data", "path"), ("data", "store"), ("steering", "path")}  # the same data in another place


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Refuse to start over in a folder that holds a run, or to resume one with other settings."""
    if not resume:
        if checkpoints.list_checkpoints(out):
            raise ConfigError(f"{out} already holds a run; add --resume to go on, or choose another --out")
        return
    if not (out / checkpoints.CONFIG).exists():
        raise CheckpointError(f"{out}: no run to resume here")
    stored = load_stored_config(out / checkpoints.CONFIG)
    # another mesh, other trackers change no result
    for section in ("model", "train", "data", "steering", "jasper", "hybrid"):
        before, now = getattr(stored, section).model_dump(), getattr(config, section).model_dump()
        changed = [name for name in before if before[name] != now.get(name)]
        changed = [name for name in changed if (section, name) not in _ELSEWHERE]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{out} was trained with {section}.{name} {before[name]!r}, not {now.get(name)!r}; "
                "a resumed run keeps its settings"
            )


def resumed(config: Config, out: Path, options: Sequence[str]) -> Config:
    """The configuration of a run that goes on by its own config.yaml, which is data and not the user's word.

    Args:
        config: As read from that file, the options and the environment.
        out: Run folder.
        options: The user's options, such as `["--data.store", "DIR"]`.

    Returns:
        The same; without Weights & Biases where only the file names it.

    Raises:
        ConfigError: If only the file names a store, and there is none.
    """
    store, project = config.data.store, config.monitor.wandb
    newest = checkpoints.latest(out)
    if store is not None and newest is not None and not user_names("data", "store", options):
        facts = newest.facts
        identity = facts.get("encoder_start", facts.get("encoder"))
        if not holds_store(Path(store), identity):
            raise ConfigError(
                f"{out / checkpoints.CONFIG}: data.store {store!r} holds no embeddings of {identity}; add "
                f"--data.store {store} to make them there, or name another folder"
            )
    if project is not None and not user_names("monitor", "wandb", options):
        say(escape(f"nothing is sent to wandb; add --monitor.wandb {project} to go on sending"))
        monitor = config.monitor.model_copy(update={"wandb": None})
        config = config.model_copy(update={"monitor": monitor})
    return config


@contextmanager
def held(out: Path) -> Iterator[Ownership | None]:
    """Hold a run folder while the block runs: the first process does, for all of a run.

    Yields:
        What to ask before writing; None in the other processes.

    Raises:
        ConfigError: In every process, if another run holds the folder; the first one says who.
        CheckpointError: Likewise, if the folder cannot be written, or checkpoints in it could not be read.
    """
    with ExitStack() as opened:
        holding: Ownership | None = None
        refused: PredictorError | None = None
        if is_main():
            try:
                holding = opened.enter_context(exclusive(out, "a training run"))
                with plain_path(out):  # what could not be read again is not trained
                    pass
            except PredictorError as taken:
                refused = taken
            except OSError as failed:
                refused = CheckpointError(f"{out}: cannot be written ({failed})")
        if any_process(refused is not None):
            raise refused or ConfigError(f"{out}: the first process may not write here; it says why")
        yield holding


def hybrid_settings(config: Config) -> HybridConfig | None:
    """The section `hybrid` as its part wants it; None where nothing is watched.

    Raises:
        ConfigError: If its numbers contradict each other, or there are several processes.
    """
    if not config.hybrid.watching:
        return None
    if jax.process_count() > 1:
        raise ConfigError(
            "hybrid.enabled needs a run in one process (with as many devices as you like); set it to false"
        )
    try:
        return HybridConfig(**config.hybrid.model_dump(exclude={"control_rows", "control_share"}))
    except ValueError as contradiction:
        raise ConfigError(str(contradiction)) from None


class Prepared(NamedTuple):
    """What a run learns from.

    Attributes:
        data: Texts as embeddings; of a steered model, with the steering that judges it on dev as turns.
        facts: What a checkpoint must remember of them.
        steering: Of a steered model, otherwise None.
        texts: Where encoders are trained, otherwise None.
        watching: How the run is watched, otherwise None; the data has a split "control" then.
        text_start: What a model that reads text starts from, otherwise None.
    """

    data: EmbeddedDataset
    facts: Facts
    steering: Steering | None
    texts: TrainedTexts | None = None
    watching: HybridConfig | None = None
    text_start: TextStart | None = None


def prepared(config: Config) -> Prepared:
    """Text to embeddings and, where the model is steered, their steering.

    Raises:
        ConfigError: If settings do not fit the data, or the steering has another number of clusters.
        DataError: If the data or the steering is not as it should be.
    """
    source, watching = config.data, hybrid_settings(config)
    if source.path is None:
        raise ConfigError("data.path is not set: name a data folder, for instance with --data.path DIR")
    encoder = load_encoder(source.encoder, source.encoder_precision)
    passage_prefix = passage_prefix_for(encoder, source.passage_prefix)
    for name in ("input_dim", "output_dim"):
        if getattr(config.model, name) != encoder.dim:
            raise ConfigError(
                f"model.{name} is {getattr(config.model, name)}, but the encoder {encoder.identity} gives "
                f"{encoder.dim}; set --model.{name.replace('_', '-')} {encoder.dim}"
            )
    with in_turn("prepared"):  # the first process encodes, the others find the work done
        dataset, store = prepare(
            Path(source.path),
            ("train", "dev"),
            encoder,
            store_folder=Path(source.store) if source.store else None,
            query_prefix=source.query_prefix,
            passage_prefix=passage_prefix,
            turns_of_one_text=config.model.max_context_length - 1 if config.model.takes_one_text else None,
        )
    data = embed_dataset(
        dataset,
        store,
        max_context_length=config.model.max_context_length,
        query_prefix=source.query_prefix,
        passage_prefix=passage_prefix,
        context_from=source.context_from,
        first_pass_k=source.first_pass_k,
        conversation=config.model.takes_one_text,
    )
    facts = {
        "encoder": encoder.identity,
        "data_hash": data.data_hash,
        "versions": {"prime_jax": __version__, **{name: version(name) for name in ("jax", "flax", "optax")}},
    }
    if encoders_trained(config.train):
        start = trainable(encoder, config)
        facts["encoder_start"] = encoder.identity
        return Prepared(data, facts, None, TrainedTexts(config, dataset, start, store))
    if config.model.reads_text:
        data, start_text = text_start(config, dataset, data, encoder)
        return Prepared(data, {**facts, **start_text.facts}, None, text_start=start_text)
    if watching is not None:
        data = with_control(
            data,
            watching.control_batches,
            control_rows(config),
            share=config.hybrid.control_share,
            seed=watching.seed,
            all_positives=config.train.positives == "all",
        )
    if not config.steered:
        return Prepared(data, facts, None, watching=watching)
    steering = open_steering(
        steering_folder(config),
        data,
        encoder.identity,
        query_prefix=source.query_prefix,
        passage_prefix=source.passage_prefix,
    )
    if isinstance(config.model, SubspaceConfig) and config.model.num_subspaces != len(steering.centroids):
        raise ConfigError(
            f"model.num_subspaces is {config.model.num_subspaces}, but {steering.folder} has "
            f"{len(steering.centroids)} clusters; set --model.num-subspaces {len(steering.centroids)}"
        )
    facts["steering_hash"] = steering.hash
    if isinstance(config.model, SubspaceConfig):
        facts["subspaces"] = list(steering.names)  # so that a bundle can name them
    return Prepared(steered(data, steering, config.steering.judge_with), facts, steering)


def steering_folder(config: Config) -> Path:
    """Where a run's steering lies."""
    if config.steering.path is not None:
        return Path(config.steering.path)
    return Path(config.data.path or "") / STEERING


def steered_rows(config: Config, data: EmbeddedDataset, steering: Steering) -> SteeredRows:
    """What steering adds to a run's training batches."""
    given = config.steering
    curriculum = Curriculum(given.variants, given.zero_start, given.zero_end, given.zero_epochs)
    told_apart = given.hard_negatives and config.train.negatives == "batch"
    return SteeredRows(data, "train", steering, curriculum, told_apart)


def starting_weights(config: Config, start: TextStart | None = None) -> Any | None:
    """The weights of `model.checkpoint_path`, where one is given, or those that a text predictor starts from.

    Raises:
        ConfigError: If its model has other shapes.
    """
    if config.model.checkpoint_path is None:
        return None if start is None else start.params
    path = Path(config.model.checkpoint_path)
    model = load_bundle(path).model if is_bundle(path) else checkpoints.load_model(path).model
    params = pure_params(model)
    fresh = jax.eval_shape(lambda: pure_params(config.model.build(rngs=nnx.Rngs(0))))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, fresh):
        raise ConfigError(
            f"model.checkpoint_path {config.model.checkpoint_path}: its {model.config.kind} model has other "
            f"shapes than this {config.model.kind} model"
        )
    return params


def warn(config: Config, updates: int) -> None:
    """Say, before the first step, what a user may not expect of these settings."""
    warn_of_shortened_warmup(config, updates)
    warn_of_unused(config)
    say_how_many_negatives(config)


def warn_of_shortened_warmup(config: Config, updates: int) -> None:
    """Say so when the run is too short for the configured warm-up."""
    used = warmup_steps(config.train, updates)
    if used < config.train.warmup_steps:
        say(
            f"warm-up shortened from {config.train.warmup_steps} to {used} updates, "
            f"a tenth of this run's {updates}"
        )


def warn_of_unused(config: Config) -> None:
    """Say so when a setting was changed that the others leave without effect."""
    train = config.train
    averaging = "ema" in (train.target, train.y_encoder) or (config.steered and config.jasper.ema)
    unused = {
        "y_encoder_lr_multiplier": train.target == "frozen" and train.y_encoder != "slow",
        "x_encoder_lr_multiplier": train.x_encoder == "frozen",
        "unfreeze_epochs": not encoders_trained(train),
        "ema_start": not averaging,
        "ema_end": not averaging,
        "temperature_end": train.temperature_schedule != "annealed",
        "projection_weight": not train.projection_dim,
        "remat_policy": not train.gradient_checkpointing or config.steered,
        "mine_every_epochs": not train.mined_negatives,
        "mining_margin": not train.mined_negatives,
        **dict.fromkeys(
            ("num_negatives", "mined_negatives", "context_negatives"), train.negatives == "corpus"
        ),
    }
    if not config.hybrid.watching:
        for name, field in type(config.hybrid).model_fields.items():
            on = name in ("enabled", "predict", "correct")
            if not on and getattr(config.hybrid, name) != field.default:
                say(f"hybrid.{name} has no effect: nothing is watched (hybrid.enabled)")
    reasons = {"num_negatives": ": all passages are negatives already"}
    for name, without_effect in unused.items():
        if without_effect and getattr(train, name) != type(train).model_fields[name].default:
            say(f"train.{name} has no effect here{reasons.get(name, '')}")
    for section, names in _unused_of_sections(config).items():
        part = getattr(config, section)
        for name in names:
            if getattr(part, name) != type(part).model_fields[name].get_default(call_default_factory=True):
                say(f"{section}.{name} has no effect on a {config.model.kind} model")


def _unused_of_sections(config: Config) -> dict[str, Iterable[str]]:
    """Settings of whole sections that this kind of model does not read."""
    if not config.steered:
        return {"steering": SteeringConfig.model_fields, "jasper": JasperLossConfig.model_fields}
    if isinstance(config.model, SubspaceConfig):
        return {}
    return {"jasper": (*ROUTING_COMPONENTS, "entropy_epochs", "entropy_end", "residual_margin")}


def say_how_many_negatives(config: Config) -> None:
    """Accumulation adds gradients, not negatives; say it where somebody could think otherwise."""
    train = config.train
    if train.accumulate_grad_batches > 1 and train.negatives == "batch":
        whole = train.batch_size * train.accumulate_grad_batches
        say(
            f"each row is told from the other {train.batch_size - 1} of its batch, not from the {whole} of "
            f"an update; train.batch-size {whole} with train.micro-batch-size {train.batch_size} would do "
            "that in about the same memory"
        )
