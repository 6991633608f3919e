"""AdamW with linear warm-up and cosine decay, per optimizer update."""

from functools import partial
from typing import Any

import jax
import optax

from prime_jax.config import TrainingConfig
from prime_jax.losses.objective import TARGET_HEAD
from prime_jax.models.subspace import CENTROIDS
from prime_jax.train.adapters import change_frozen, layers_of, with_layers
from prime_jax.train.encoders import X, Y
from prime_jax.train.state import MODEL


def warmup_steps(config: TrainingConfig, updates: int) -> int:
    """Warm-up length in updates: as configured, but at most a tenth of the run."""
    return min(config.warmup_steps, updates // 10)


def learning_rate(config: TrainingConfig, updates: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to zero at the last of `updates` updates."""
    warmup = warmup_steps(config, updates)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(updates, warmup + 1),
    )


def make_optimizer(config: TrainingConfig, updates: int) -> optax.GradientTransformation:
    """Clipping, AdamW on the schedule, and accumulation over `accumulate_grad_batches` batches.

    Args:
        config: Training settings.
        updates: Optimizer updates of the whole run.
    """

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda at, leaf: leaf.ndim > 1 and not _frozen(at), params)

    adamw = optax.adamw(learning_rate(config, updates), weight_decay=config.weight_decay, mask=matrices)
    if layers_frozen(config) or config.y_encoder == "ema":  # no moments are kept of what gets no gradient
        adamw = optax.masked(adamw, partial(_moved, layers_frozen(config), config.y_encoder == "ema"))
    clip = (
        optax.clip_by_global_norm(config.gradient_clip_val) if config.gradient_clip_val else optax.identity()
    )
    optimizer = optax.chain(clip, adamw, _paced(config))  # three states, as in the files of format 1
    if config.accumulate_grad_batches == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate_grad_batches).gradient_transformation()


def layers_frozen(config: TrainingConfig) -> bool:
    """Whether the transformer layers, and all of an encoder that they belong to, stay as they start."""
    return config.layers_lr_multiplier == 0 or config.lora_rank > 0


def _moved(without_layers: bool, without_y: bool, params: Any) -> Any:
    """True for every parameter that gradients move: not frozen layers, nor a Y-encoder that is an average."""
    kept = jax.tree.map(lambda _: True, params)
    if Y in kept:
        kept[Y] = jax.tree.map(lambda _: not without_y, kept[Y])
    if without_layers and MODEL in kept:
        kept[MODEL] = change_frozen(kept[MODEL], partial(jax.tree.map, lambda _: False))
    return kept


def _paced(config: TrainingConfig) -> optax.GradientTransformation:
    """Heads, encoders and layers move by a share of what they would move otherwise."""
    shares = {
        TARGET_HEAD: config.y_encoder_lr_multiplier,
        X: config.x_encoder_lr_multiplier,
        Y: 0.0 if config.y_encoder == "ema" else config.y_encoder_lr_multiplier,
    }
    of_layers = 0.0 if layers_frozen(config) else config.layers_lr_multiplier

    def scale(updates: Any, params: Any = None) -> Any:
        paced = {name: _scaled(shares.get(name, 1.0), part) for name, part in updates.items()}
        layers = layers_of(updates.get(MODEL))
        if layers is not None and (of_layers, config.layer_decay) != (1.0, 1.0):
            of_layer = {
                name: of_layers * config.layer_decay ** (len(layers) - 1 - int(name)) for name in layers
            }
            slowed = {name: _scaled(of_layer[name], layer) for name, layer in layers.items()}
            paced[MODEL] = with_layers(updates[MODEL], slowed)
        return paced

    return optax.stateless(scale)


def _scaled(share: float, updates: Any) -> Any:
    return updates if share == 1.0 else jax.tree.map(lambda leaf: share * leaf, updates)


def _frozen(path: Any) -> bool:
    """Whether this is never trained: centroids get no gradient, and without decay they stay as they are."""
    return any(getattr(part, "key", None) == CENTROIDS for part in path)
