"""What training minimises, and the only place where per-example values are averaged.

An objective has numbers of its own to train (a temperature, a projection, a target head); they lie beside the
model's parameters and are saved with them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prime_jax.losses import temperature as temperatures
from prime_jax.losses.contrastive import InfoNCE, info_nce
from prime_jax.losses.corpus import Corpus, corpus_info_nce
from prime_jax.losses.projection import initial_projection, project
from prime_jax.nn.target_head import apply_head, initial_head
from prime_jax.types import Batch, Prediction

Metrics = dict[str, Float[Array, ""]]
Trained = dict[str, Any]

TEMPERATURE, PROJECTION, TARGET_HEAD = "temperature", "projection", "target_head"


@dataclass(frozen=True)
class Objective:
    """InfoNCE as configured (FR-PRED-008, FR-PRED-009).

    Attributes:
        temperature: Divides similarities (BR-PRED-003); where it moves, the first one.
        schedule: Whether the temperature stays, is trained, or is annealed to `temperature_end`.
        temperature_end: The last temperature when annealed.
        projection_dim: Dimension of ProjNCE's projection; 0 for none.
        projection_weight: Weight of the loss in the projection.
        target: `frozen` compares with the embeddings as they are. `slow` maps them through a trained head.
            `ema` maps them through the moving average of a head, which in turn is trained to bring the
            targets nearer to the predictions.
    """

    temperature: float = 0.07
    schedule: temperatures.Schedule = "fixed"
    temperature_end: float = 0.02
    projection_dim: int = 0
    projection_weight: float = 1.0
    target: Literal["frozen", "slow", "ema"] = "frozen"

    def initial(self, key: Array, dim: int) -> Trained:
        """What the objective trains, before the first step; `dim` is E."""
        trained: Trained = {}
        if self.schedule == "learned":
            trained[TEMPERATURE] = temperatures.initial(self.temperature)
        if self.projection_dim:
            trained[PROJECTION] = initial_projection(key, dim, self.projection_dim)
        if self.target != "frozen":
            trained[TARGET_HEAD] = initial_head(dim)
        return trained

    @property
    def averaged(self) -> str | None:
        """Which trained part a moving average is kept of."""
        return TARGET_HEAD if self.target == "ema" else None

    def __call__(
        self,
        prediction: Prediction,
        batch: Batch,
        trained: Trained,
        *,
        average: Float[Array, "E E"] | None = None,
        progress: Float[Array, ""] | float = 0.0,
        epoch: Float[Array, ""] | float = 0.0,
        corpus: Corpus | None = None,
        turns: int = 1,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a batch, with the figures that make it readable.

        Args:
            prediction: Of the model; only the embedding counts here.
            batch: What was to be predicted.
            trained: As `initial` gave it, or later.
            average: Kernel of the averaged target head, for `target="ema"`.
            progress: Share of the run that is done, 0 to 1.
            epoch: Epochs done; without effect here.
            corpus: All passages as negatives; None means the batch's targets.
            turns: See `info_nce`.

        Returns:
            The scalar loss, and `loss` (InfoNCE alone), `chance` (the loss of guessing), `negatives`
            (effective, per row), `similarity` (mean cosine of prediction and target), `temperature`, and
            `spread` and `mean_length` of the predictions (see `spread`).
        """
        predicted = prediction.embedding
        tau = self._temperature(trained, jnp.asarray(progress, jnp.float32))
        mapped = batch
        if self.target == "slow":
            mapped = _through(trained[TARGET_HEAD], batch)
        elif average is not None:
            mapped = _through(average, batch)
        values = self._compare(predicted, mapped, tau, corpus, turns)
        info = loss = jnp.mean(values.loss)
        figures: Metrics = {}
        if self.projection_dim:
            projected, there = project(trained[PROJECTION], predicted, mapped)
            figures["projected_loss"] = jnp.mean(
                info_nce(projected, there, temperature=tau, turns=turns).loss
            )
            loss = loss + self.projection_weight * figures["projected_loss"]
        if self.target == "ema":
            online = _through(trained[TARGET_HEAD], batch)
            held = jax.lax.stop_gradient((predicted, tau))
            loss = loss + jnp.mean(info_nce(held[0], online, temperature=held[1], turns=turns).loss)
        return loss, {
            "loss": info,
            "chance": jnp.mean(values.chance),
            "negatives": jnp.mean(values.negatives.astype(jnp.float32)),
            "similarity": jnp.mean(jnp.sum(predicted * mapped.target, axis=-1)),
            "temperature": tau,
            **figures,
            **spread(predicted),
        }

    def _temperature(self, trained: Trained, progress: Float[Array, ""]) -> Float[Array, ""]:
        if self.schedule == "learned":
            return temperatures.learned(trained[TEMPERATURE])
        if self.schedule == "annealed":
            return temperatures.annealed(self.temperature, self.temperature_end, progress)
        return jnp.asarray(self.temperature, jnp.float32)

    def _compare(
        self, predicted: Array, batch: Batch, tau: Float[Array, ""], corpus: Corpus | None, turns: int
    ) -> InfoNCE:
        if corpus is None:
            return info_nce(predicted, batch, temperature=tau, turns=turns)
        return corpus_info_nce(predicted, batch, corpus, temperature=tau)


def spread(predicted: Float[Array, "B E"]) -> Metrics:
    """How far unit-norm predictions lie apart, to see a collapse coming (arXiv 2105.04906).

    Returns:
        `spread`: mean standard deviation of a dimension times sqrt(E), 1 for vectors spread evenly over the
        sphere and 0 when all are the same; `mean_length`: length of their mean, the other way round.
    """
    dim = predicted.shape[-1]
    return {
        "spread": jnp.mean(jnp.std(predicted, axis=0)) * jnp.sqrt(jnp.float32(dim)),
        "mean_length": jnp.linalg.norm(jnp.mean(predicted, axis=0)),
    }


def _through(kernel: Float[Array, "E E"], batch: Batch) -> Batch:
    """The batch with targets and negatives mapped by a target head."""
    return batch.map_targets(lambda vectors: apply_head(kernel, vectors))
