"""JASPER's objective: a weighted sum of named losses, each with a schedule (JASPER plan, tasks 3 and 11).

`contrastive` is PRIME's objective as it stands, in the space that is searched. `jepa` and `vicreg` live in
the auxiliary space of the online encoder, whose slow average encodes the sources. `centroid` and `routing`
say which cluster a source is in; `entropy`, `residual` and `disentanglement` shape the routing.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from prime_jax.frozen import Frozen
from prime_jax.losses import routing
from prime_jax.losses.alignment import centroid_logits, cross_entropy, smooth_l1
from prime_jax.losses.corpus import Corpus
from prime_jax.losses.objective import Metrics, Objective, Trained
from prime_jax.losses.regularize import off_diagonal_covariance, vicreg
from prime_jax.nn.online_encoder import encode, initial_encoder
from prime_jax.nn.router import gumbel_temperature
from prime_jax.types import Batch, Prediction

ONLINE_ENCODER = "online_encoder"
COMPONENTS = ("contrastive", "jepa", "centroid", "vicreg")
ROUTING_COMPONENTS = ("routing", "entropy", "residual", "disentanglement")


class JasperLossConfig(Frozen):
    """Weights and schedules of JASPER's losses (JASPER plan; weights of the public original)."""

    contrastive: float = Field(default=0.5, ge=0, description="weight of InfoNCE, in the searched space")
    jepa: float = Field(default=1.0, ge=0, description="weight of SmoothL1 to the EMA target encoder")
    centroid: float = Field(default=0.1, ge=0, description="weight of telling the source's cluster")
    vicreg: float = Field(default=0.1, ge=0, description="weight of VICReg")
    routing: float = Field(default=1.0, ge=0, description="weight of the router's cross-entropy")
    entropy: float = Field(default=0.1, ge=0, description="weight of the entropy schedule")
    residual: float = Field(default=0.1, ge=0, description="weight of the hinge on the fine part's norm")
    disentanglement: float = Field(default=0.01, ge=0, description="weight of the routing's covariance")
    stage_in: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="loss: [epoch it sets in, epoch of its full weight]"
    )
    ema: bool = Field(default=True, description="sources are encoded by a slow average of the encoder")
    centroid_temperature: float = Field(default=0.1, gt=0, description="divides cosines with centroids")
    vicreg_variance: float = Field(default=25.0, ge=0, description="weight of the variance inside VICReg")
    vicreg_invariance: float = Field(default=25.0, ge=0, description="weight of the invariance inside")
    vicreg_covariance: float = Field(default=1.0, ge=0, description="weight of the covariance inside")
    entropy_epochs: float = Field(default=20.0, gt=0, description="epochs until routing should be sure")
    entropy_end: float = Field(default=0.1, ge=0, description="entropy it should have then, in nats")
    residual_margin: float = Field(default=0.5, ge=0, description="norm of the fine part that is free")

    @model_validator(mode="after")
    def _stages_fit(self) -> "JasperLossConfig":
        known = COMPONENTS + ROUTING_COMPONENTS
        for name, (first, full) in self.stage_in.items():
            if name not in known:
                raise ValueError(f"stage_in names {name!r}; the losses are {', '.join(known)}")
            if not 0 <= first <= full:
                raise ValueError(f"stage_in.{name} [{first}, {full}] must rise from 0 or more")
        if not any(getattr(self, name) for name in COMPONENTS):
            raise ValueError(f"one of the losses {', '.join(COMPONENTS)} needs a weight above 0")
        return self

    def weight(self, name: str, epoch: Float[Array, ""] | float) -> Float[Array, ""]:
        """Weight of a loss at an epoch, with its stage."""
        first, full = self.stage_in.get(name, (0.0, 0.0))
        now = jnp.asarray(epoch, jnp.float32)
        share = jnp.where(now >= full, 1.0, (now - first) / max(full - first, 1e-6))
        return jnp.asarray(getattr(self, name), jnp.float32) * jnp.clip(share, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class JasperObjective:
    """The weighted sum of JASPER's losses.

    Attributes:
        contrastive: InfoNCE as configured; its targets are the raw embeddings.
        config: Weights and schedules.
        centroids: Unit vectors `[C, E]` of the sources' clusters.
        steerings: Names of the steering variants, in the order of `Batch.steering`.
        gumbel: First and last temperature of the router's noise, for the log; None without a router.
    """

    contrastive: Objective
    config: JasperLossConfig
    centroids: Any = field(repr=False)
    steerings: tuple[str, ...] = ()
    gumbel: tuple[float, float] | None = None

    @property
    def averaged(self) -> str | None:
        """Which trained part a moving average is kept of."""
        return ONLINE_ENCODER if self.config.ema else None

    def initial(self, key: Array, dim: int) -> Trained:
        """What the objective trains, before the first step; `dim` is E."""
        own = {ONLINE_ENCODER: initial_encoder(jax.random.fold_in(key, 2), dim)}
        return {**self.contrastive.initial(key, dim), **own}

    def __call__(
        self,
        prediction: Prediction,
        batch: Batch,
        trained: Trained,
        *,
        average: Any = None,
        progress: Float[Array, ""] | float = 0.0,
        epoch: Float[Array, ""] | float = 0.0,
        corpus: Corpus | None = None,
        turns: int = 1,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a batch, with every component by name.

        Args:
            prediction: Of the model, with its routing where it has a router.
            batch: What was to be predicted; needs `cluster`.
            trained: As `initial` gave it, or later.
            average: The online encoder's moving average; None encodes sources with the online encoder.
            progress: Share of the run that is done, 0 to 1.
            epoch: Epochs done, for schedules.
            corpus: All passages as negatives; None means the batch's targets.
            turns: See `info_nce`.

        Returns:
            The scalar loss, and the figures of `Objective` (`loss` is InfoNCE alone, beside its chance),
            `total`, every component unweighted, and gauges of routing and steering.
        """
        if batch.cluster is None:
            raise ValueError("JASPER's losses need the clusters of a batch's targets")
        config, cluster = self.config, batch.cluster
        loss, figures = self.contrastive(
            prediction, batch, trained, progress=progress, epoch=epoch, corpus=corpus, turns=turns
        )
        values = {"contrastive": loss}
        online = trained[ONLINE_ENCODER]
        seen = encode(online, prediction.embedding)
        known = jax.lax.stop_gradient(encode(online if average is None else average, batch.target))
        values["jepa"] = jnp.mean(smooth_l1(seen, known))
        parts = vicreg(seen, known)
        values["vicreg"] = (
            config.vicreg_variance * parts.variance
            + config.vicreg_invariance * parts.invariance
            + config.vicreg_covariance * parts.covariance
        )
        logits = centroid_logits(
            prediction.embedding, jnp.asarray(self.centroids), config.centroid_temperature
        )
        values["centroid"] = jnp.mean(cross_entropy(logits, cluster))
        figures |= {f"vicreg_{name}": value for name, value in parts._asdict().items()}
        figures["centroid_accuracy"] = _share(jnp.argmax(logits, axis=1) == cluster)
        if prediction.logits is not None:
            found, gauges = self._routing(prediction, cluster, progress, epoch)
            values |= found
            figures |= gauges
        figures |= self._steering(batch)
        total = sum((config.weight(name, epoch) * value for name, value in values.items()), jnp.zeros(()))
        del values["contrastive"]  # stands there as `loss`
        return total, {**figures, **values, "total": total}

    def _routing(
        self,
        prediction: Prediction,
        cluster: Int[Array, " B"],
        progress: Float[Array, ""] | float,
        epoch: Float[Array, ""] | float,
    ) -> tuple[Metrics, Metrics]:
        """The losses that a router learns from, and what one would look at."""
        config, logits, weights = self.config, prediction.logits, prediction.routing
        assert logits is not None
        assert weights is not None
        assert prediction.fine is not None
        target = routing.entropy_target(epoch, logits.shape[1], config.entropy_epochs, config.entropy_end)
        sure = jax.nn.softmax(logits, axis=-1)
        values = {
            "routing": jnp.mean(cross_entropy(logits, cluster)),
            "entropy": jnp.mean(routing.entropy_loss(sure, target)),
            "residual": jnp.mean(routing.residual_hinge(prediction.fine, config.residual_margin)),
            "disentanglement": off_diagonal_covariance(weights),
        }
        used = routing.entropy(jnp.mean(sure, axis=0))
        gauges = {
            "routing_entropy": jnp.mean(routing.entropy(sure)),
            "entropy_target": target,
            "router_usage": jnp.exp(used) / logits.shape[1],
            "routing_accuracy": _share(jnp.argmax(logits, axis=1) == cluster),
            "atypicality": jnp.mean(jnp.linalg.norm(prediction.fine, axis=-1)),
        }
        if self.gumbel is not None:
            gauges["gumbel_temperature"] = gumbel_temperature(progress, *self.gumbel)
        return values, gauges

    def _steering(self, batch: Batch) -> Metrics:
        """Which share of the batch has which steering."""
        if batch.steering is None:
            return {}
        return {
            f"steering_{name}": _share(batch.steering == code) for code, name in enumerate(self.steerings)
        }


def _share(true: Array) -> Float[Array, ""]:
    return jnp.mean(true.astype(jnp.float32))
