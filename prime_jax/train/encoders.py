"""Text encoders that are trained along with the predictor: X for turns and queries, Y for passages.

`slow` trains Y at a share of the learning rate. `ema` makes Y the moving average of X, as joint-embedding
predictive architectures do. With `frozen` Y stays the encoder that the data was encoded with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prime_jax.config import Config, TrainingConfig
from prime_jax.data.encode import Encoder
from prime_jax.errors import ConfigError
from prime_jax.models.base import embeddings_of
from prime_jax.nn.bert import Pooling
from prime_jax.nn.encoders import EncoderModel
from prime_jax.nn.remat import Remat
from prime_jax.nn.target_head import ema, ema_decay
from prime_jax.pretrained.bert import BertTextEncoder, embedded
from prime_jax.pretrained.pair import PairedEncoder
from prime_jax.types import Batch, Texts

X, Y = "x_encoder", "y_encoder"
ENCODERS = (X, Y)


@dataclass(frozen=True)
class EncoderPlan:
    """How a step embeds texts and moves the encoders.

    Attributes:
        graph: Structure of the encoders, in the compute dtype.
        pooling: How both pool.
        x_trained: Whether X is trained.
        y: How Y is.
        remat: What the backward pass of an encoder's layers recomputes.
        unfreeze_epochs: Epochs until the lowest layer moves too.
        ema: First and last decay of Y as the average of X.
    """

    graph: Any
    pooling: Pooling
    x_trained: bool
    y: str
    remat: Remat
    unfreeze_epochs: float
    ema: tuple[float, float]

    def inputs_of(self, batch: Batch) -> tuple[Any, ...]:
        """What `read` takes of a batch: the texts of turns and query where X is trained."""
        if not self.x_trained:
            return embeddings_of(batch)
        assert batch.texts is not None
        return batch.texts.asked, batch.context_mask

    def read(self, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Context, query and mask, as X embeds them now where it is trained."""
        if not self.x_trained:
            return inputs
        texts, mask = inputs
        asked = self._embedded(params[X], texts)
        return asked[:, :-1], asked[:, -1], mask

    def with_targets(self, params: Any, batch: Batch) -> Batch:
        """The batch with its targets as Y embeds them now where it is trained."""
        if self.y == "frozen":
            return batch
        assert batch.texts is not None
        weights = jax.lax.stop_gradient(params[Y]) if self.y == "ema" else params[Y]
        return batch._replace(target=self._embedded(weights, batch.texts.passage))

    def gated(self, updates: Any, epoch: Float[Array, ""]) -> Any:
        """Updates without those of encoder layers whose time has not come: the highest layer is first."""
        if not self.unfreeze_epochs:
            return updates
        return {
            name: self._opened(tree, epoch) if name in ENCODERS else tree for name, tree in updates.items()
        }

    def averaged(self, params: Any, progress: Float[Array, ""]) -> Any:
        """The parameters after a step, Y moved towards X where it is X's average."""
        if self.y != "ema":
            return params
        decay = ema_decay(*self.ema, progress)
        return {**params, Y: jax.tree.map(lambda old, new: ema(old, new, decay), params[Y], params[X])}

    def _embedded(self, weights: Any, texts: Texts) -> Float[Array, "*a D"]:
        shape = texts.lengths.shape
        flat = texts.tokens.reshape(-1, texts.tokens.shape[-1])
        model: EncoderModel = nnx.merge(self.graph, weights)
        vectors = embedded(model, flat, texts.lengths.reshape(-1), self.pooling, self.remat)
        return vectors.reshape(*shape, -1)

    def _opened(self, tree: Any, epoch: Float[Array, ""]) -> Any:
        layers = tree["layers"]
        steps = len(layers)  # the embeddings come after the lowest layer
        opened = {
            number: self._from(layer, epoch, (steps - 1 - int(number)) / steps)
            for number, layer in layers.items()
        }
        rest = {name: self._from(part, epoch, 1.0) for name, part in tree.items() if name != "layers"}
        return {**rest, "layers": opened}

    def _from(self, tree: Any, epoch: Float[Array, ""], share: float) -> Any:
        return jax.tree.map(lambda leaf: jnp.where(epoch >= share * self.unfreeze_epochs, leaf, 0.0), tree)


def encoders_trained(settings: TrainingConfig) -> bool:
    """Whether any encoder is."""
    return settings.x_encoder == "trained" or settings.y_encoder != "frozen"


def trainable(encoder: Encoder, config: Config) -> BertTextEncoder:
    """The encoder that training starts from, where it is one that can be trained.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(encoder, BertTextEncoder):
        raise ConfigError(
            f"data.encoder {config.data.encoder!r} cannot be trained here: give minilm or a model folder"
        )
    return encoder


def encoder_plan(encoder: BertTextEncoder, settings: TrainingConfig) -> EncoderPlan:
    """How a run's steps embed texts."""
    dtype = jnp.bfloat16 if settings.mixed_precision else jnp.float32
    return EncoderPlan(
        graph=encoder.structure(dtype),
        pooling=encoder.pooling,
        x_trained=settings.x_encoder == "trained",
        y=settings.y_encoder,
        remat=settings.remat_policy if settings.gradient_checkpointing else "none",
        unfreeze_epochs=settings.unfreeze_epochs,
        ema=(settings.ema_start, settings.ema_end),
    )


def initial_encoders(encoder: BertTextEncoder, settings: TrainingConfig) -> dict[str, Any]:
    """What is trained of the encoders, float32, a copy for each that is."""
    float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), encoder.params)
    names = ((X, settings.x_encoder != "frozen"), (Y, settings.y_encoder != "frozen"))
    return {name: jax.tree.map(jnp.copy, float32) for name, wanted in names if wanted}


def pair_of(encoder: BertTextEncoder, trained: Mapping[str, Any], step: int) -> PairedEncoder:
    """Both encoders as a state has them; one that is not trained is the one that training started from.

    Args:
        encoder: That training started from.
        trained: `TrainState.encoders`, whole on every device.
        step: Names their embeddings.
    """

    def now(name: str) -> BertTextEncoder:
        if name not in trained:
            return encoder
        return encoder.with_params(jax.device_get(trained[name]), f"{encoder.identity}-{name}-{step}")

    return PairedEncoder(now(X), now(Y))
