"""Everything a run computes with: mesh, model, objective, optimizer, and the step they compile to."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import Config, TrainingConfig
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.steered import VARIANTS, ZERO, Steering
from prime_jax.losses import AnyObjective
from prime_jax.losses.corpus import Corpus, in_chunks
from prime_jax.losses.jasper import JasperObjective
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.subspace import CENTROIDS, SubspaceConfig
from prime_jax.nn.remat import Remat
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.llama import Place, pretrained_layers
from prime_jax.program_cache import cache_folder, caching_in
from prime_jax.train import memory
from prime_jax.train.collective import say
from prime_jax.train.encoders import encoder_plan, initial_encoders
from prime_jax.train.judged import Given, make_judged_loss
from prime_jax.train.optim import layers_frozen, make_optimizer
from prime_jax.train.sharding import make_mesh, split_batch, spread_out, state_shardings
from prime_jax.train.state import MODEL, TrainState, averaged_weights, build_graph, init_state
from prime_jax.train.step import Metrics, StepPlan, make_train_step
from prime_jax.types import Batch


def objective_of(config: Config, steering: Steering | None = None) -> AnyObjective:
    """The objective that a configuration describes."""
    contrastive = contrastive_of(config.train)
    if steering is None:
        return contrastive
    gumbel = None
    if isinstance(config.model, SubspaceConfig):
        gumbel = (config.model.gumbel_start, config.model.gumbel_end)
    return JasperObjective(
        contrastive, config.jasper, steering.centroids, steerings=(ZERO, *VARIANTS), gumbel=gumbel
    )


def contrastive_of(settings: TrainingConfig) -> Objective:
    """InfoNCE as a configuration describes it."""
    return Objective(
        temperature=settings.temperature,
        schedule=settings.temperature_schedule,
        temperature_end=settings.temperature_end,
        projection_dim=settings.projection_dim,
        projection_weight=settings.projection_weight,
        target=settings.target,
    )


def remat_of(settings: TrainingConfig) -> Remat:
    """What the backward pass recomputes under a configuration."""
    return settings.remat_policy if settings.gradient_checkpointing else "none"


class TrainingProgram:
    """The compiled step of a run, and what it runs on.

    Attributes:
        mesh: The devices of all processes.
    """

    def __init__(
        self,
        config: Config,
        data: EmbeddedDataset,
        total_steps: int,
        *,
        epoch_steps: int = 1,
        steering: Steering | None = None,
        encoder: BertTextEncoder | None = None,
    ):
        settings = config.train
        self._config = config
        self.mesh = make_mesh(config.mesh, settings.batch_size, settings.micro_batch_size)
        self._optimizer = make_optimizer(settings, max(1, total_steps // settings.accumulate_grad_batches))
        self._objective = objective_of(config, steering)
        self._centroids = (
            steering.centroids if isinstance(config.model, SubspaceConfig) and steering else None
        )
        self._encoder = encoder
        dtype = jnp.bfloat16 if settings.mixed_precision else jnp.float32
        plan = StepPlan(
            total_steps=total_steps,
            epoch_steps=epoch_steps,
            remat=remat_of(settings),
            micro_batch=settings.micro_batch_size,
            ema=(settings.ema_start, settings.ema_end),
            rotation=settings.rotation,
            average_weights=settings.average_weights,
            layers_frozen=layers_frozen(settings),
            encoders=None if encoder is None else encoder_plan(encoder, settings),
            inputs_of=config.model.inputs_of,
            compute_dtype=dtype,
        )
        graph = build_graph(config.model, dtype)
        self._step = make_train_step(graph, self._optimizer, self._objective, plan, self.mesh)
        self._graph = graph
        self._corpus: Corpus | None = None
        if settings.negatives == "corpus":
            self._corpus = in_chunks(data.corpus()[:], settings.corpus_chunk, self.mesh, data.corpus_scope)
        self._compiled: dict[tuple[int, ...], Any] = {}  # by the shape of the texts, where there are any

    def initial_state(self, weights: Any | None = None) -> TrainState:
        """A fresh state, made where it will live: no device ever holds what it does not keep.

        Args:
            weights: Parameters of the model to start from; None for fresh ones.
        """
        settings = self._config.train

        encoders = {} if self._encoder is None else initial_encoders(self._encoder, settings)
        encoders = jax.tree.map(np.asarray, encoders)  # of no device: all processes' take part

        def start(encoders: Any) -> TrainState:
            return init_state(
                self._config.model,
                self._optimizer,
                settings.seed,
                self._objective,
                averaging=settings.average_weights > 0,
                lora_rank=settings.lora_rank,
                encoders=encoders,
            )

        shardings = state_shardings(self.mesh, jax.eval_shape(start, encoders))
        state: TrainState = jax.jit(start, out_shardings=shardings)(encoders)
        model = self._config.model
        if isinstance(model, PredictorConfig) and model.init_from is not None:
            for place, tensor in pretrained_layers(model):
                _put(state.params[MODEL], shardings.params[MODEL], place, tensor)
            if state.smoothed is not None:
                state = replace(state, smoothed=jax.tree.map(jnp.copy, averaged_weights(state.params)))
        if weights is not None:
            placed = spread_out(weights, shardings.params[MODEL])
            state = replace(state, params={**state.params, MODEL: placed})
            if state.smoothed is not None:
                state = replace(state, smoothed=jax.tree.map(jnp.copy, averaged_weights(state.params)))
        return state if self._centroids is None else self._with_centroids(state, shardings)

    def _with_centroids(self, state: TrainState, shardings: TrainState) -> TrainState:
        """The state whose model knows the clusters; they are never trained."""
        where = shardings.params[MODEL][CENTROIDS]

        def known(params: Any) -> Any:
            return {**params, CENTROIDS: spread_out(self._centroids, where)}

        smoothed = None if state.smoothed is None else known(state.smoothed)
        return replace(state, params={**state.params, MODEL: known(state.params[MODEL])}, smoothed=smoothed)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step with this process's rows of a batch; `state` is used up.

        Raises:
            ConfigError: At the first call, if the memory of a device will not suffice.
        """
        placed = split_batch(batch, self.mesh)
        shape = _shape_of_texts(batch)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(state, placed)
        answer: tuple[TrainState, Metrics] = self._compiled[shape](state, placed, self._corpus)
        return answer

    @property
    def judged_loss(self) -> Callable[[Any, Given], Any]:
        """`(weights, placed batch) -> loss` as weights are judged, not trained; of prime models."""
        assert isinstance(self._objective, Objective)
        settings = self._config.train
        return make_judged_loss(
            self._graph,
            self._objective,
            self.mesh,
            remat=remat_of(settings),
            micro_batch=settings.micro_batch_size,
            layers_frozen=layers_frozen(settings),
        )

    def placed(self, batch: Batch) -> Given:
        """What `judged_loss` takes: a batch on the devices, and the passages where all are negatives."""
        return Given(split_batch(batch, self.mesh), self._corpus)

    def _compile(self, state: TrainState, batch: Batch) -> Any:
        """Compile, say how much memory a step takes, and refuse what cannot fit."""
        began = time.perf_counter()
        with caching_in(cache_folder()):
            compiled = self._step.lower(state, batch, self._corpus).compile()
        needs = memory.needs_of(compiled, state)
        limit = memory.available(jax.local_devices()[0])
        what = "a step for another length of texts" if self._compiled else memory.describe(needs, limit)
        say(f"{what}; compiled in {time.perf_counter() - began:.1f} s")
        memory.check(needs, limit, self._config)
        return compiled


def _shape_of_texts(batch: Batch) -> tuple[int, ...]:
    """What differs from batch to batch."""
    if batch.conversations is not None:
        return tuple(batch.conversations.tokens.shape)
    return () if batch.texts is None else tuple(batch.texts.asked.tokens.shape)


def _put(params: Any, shardings: Any, place: Place, tensor: Any) -> None:
    """Replace one parameter in place; the old one gives its memory back at once."""
    for part in place[:-1]:
        params, shardings = params[part], shardings[part]
    params[place[-1]].delete()
    params[place[-1]] = spread_out(tensor, shardings[place[-1]])
