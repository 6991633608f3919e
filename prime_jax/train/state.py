"""The one immutable state of a run, and how it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from prime_jax.losses import AnyObjective
from prime_jax.losses.objective import TARGET_HEAD, Objective
from prime_jax.models import ModelConfig
from prime_jax.train.adapters import initial_adapters, with_adapters
from prime_jax.train.encoders import ENCODERS, X

Graph = nnx.GraphDef[Any]

Leaf = Any  # Array, or what JAX puts in its place when it describes a program

MODEL = "model"
ADAPTERS = "adapters"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and returns; nothing else changes during training.

    Attributes:
        step: Batches learned from so far, scalar int32.
        params: What is trained, float32: `model` holds the model's parameters as nested dicts; what the
            objective trains stands beside it under its own names.
        average: Moving average of the part of `params` that the objective names, or None: the kernel of the
            target head, `[E, E]` (`train.target: ema`), or JASPER's online encoder.
        smoothed: Moving average of `averaged_weights`, or None (`train.average_weights` only).
        opt_state: State of the optimizer.
        rng: Raw key data; the dropout key of a step is this folded with the step number.
        halted: Whether a loss or gradient was no finite number. From then on nothing changes, so that the
            state stays the last good one until the loop notices.
    """

    step: Leaf
    params: Any
    average: Any | None
    smoothed: Any | None
    opt_state: Any
    rng: Leaf
    halted: Leaf

    @property
    def target_head(self) -> Array | None:
        """Kernel of the head that targets are compared through at inference, or None for frozen targets."""
        if TARGET_HEAD not in self.params:
            return None
        head: Array = self.params[TARGET_HEAD] if self.average is None else self.average
        return head

    @property
    def predicting(self) -> Any:
        """The model's parameters to predict with: their average where there is one, adapters added."""
        if self.smoothed is None:
            return trained_weights(self.params)
        return {name: part for name, part in self.smoothed.items() if name not in ENCODERS}

    @property
    def encoders(self) -> dict[str, Any]:
        """The parameters of encoders that are trained along, X as it is averaged where it is."""
        now = {name: self.params[name] for name in ENCODERS if name in self.params}
        return now | {name: part for name, part in (self.smoothed or {}).items() if name in now}


def trained_weights(params: Any) -> Any:
    """The model's parameters among those of a state, with the adapters of its layers where it has some."""
    return with_adapters(params[MODEL], params.get(ADAPTERS))


def averaged_weights(params: Any) -> Any:
    """What a moving average is kept of: the model's parameters and, beside them, a trained X-encoder."""
    weights = trained_weights(params)
    return {**weights, X: params[X]} if X in params else weights


def build_graph(config: ModelConfig, dtype: DTypeLike) -> Graph:
    """The model's structure without its parameters; `nnx.merge(graph, params)` gives the model."""
    return nnx.split(nnx.eval_shape(lambda: config.build(dtype=dtype, rngs=nnx.Rngs(0))))[0]


def pure_params(model: nnx.Module) -> Any:
    """A model's parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    objective: AnyObjective | None = None,
    *,
    averaging: bool = False,
    lora_rank: int = 0,
    encoders: Mapping[str, Any] | None = None,
) -> TrainState:
    """Fresh weights and optimizer state, both from `seed`.

    `averaging` starts the average of the weights; a `lora_rank` puts adapters beside the layers;
    `encoders` are trained along from the parameters given.
    """
    objective = objective or Objective()
    key = jax.random.key(seed)
    params = {
        MODEL: pure_params(config.build(rngs=nnx.Rngs(seed))),
        **objective.initial(jax.random.fold_in(key, 1), config.output_dim),
        **(encoders or {}),
    }
    if lora_rank:
        params[ADAPTERS] = initial_adapters(jax.random.fold_in(key, 2), params[MODEL], lora_rank)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=jax.tree.map(jnp.copy, params[objective.averaged]) if objective.averaged else None,
        smoothed=jax.tree.map(jnp.copy, averaged_weights(params)) if averaging else None,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(key),
        halted=jnp.zeros((), bool),
    )
