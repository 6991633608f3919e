"""Predictors for the first day: nothing is trained, and everything a predictor has is there.

What they are worth beside trained ones is in docs/untrained.md.
"""

from pydantic import ValidationError

from prime_jax.data.encode import Encoder, load_encoder
from prime_jax.errors import ConfigError, first_fault
from prime_jax.models.mix import DECAY, WEIGHT, MixConfig, mix_of
from prime_jax.models.text import TextConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.text_start import reading_config, started_model, starting_params

MAX_TOKENS = 96  # that are read of query and turns; encoders do not gain from more without training
QUERY_WEIGHT = 1.0  # of the query's own embedding beside that of the whole


def untrained(
    dim: int | None = None,
    *,
    encoder: Encoder | str | None = None,
    max_turns: int = 10,
    weight: float | None = None,
    decay: float | None = None,
    query_prefix: str | None = None,
) -> Predictor:
    """A predictor that needs no training.

    With `dim` alone it takes embeddings, of any encoder: `query + weight * sum of decay^age * turn` of
    unit-norm vectors. With an `encoder` whose weights are at hand it takes texts: the embedding of query and
    turns read as one text, newest turn first, plus `weight` times the query's own.

    Args:
        dim: Dimension of the embeddings.
        encoder: The memory's encoder, or the name that `data.encoder` takes: `minilm` or a model folder.
        max_turns: Most turns that are looked at.
        weight: Of the newest turn, 0.3 if not given; of the query's own embedding, 1 if not given.
        decay: From one turn to the one before it, 0.5 if not given; only with `dim`.
        query_prefix: What the encoder wants before queries; only with `encoder`.

    Raises:
        ConfigError: If neither or both are given, something does not go with what is given or is out of
            bounds, or there is no such encoder.
        DataError: If the encoder's folder is incomplete or damaged.
    """
    if (dim is None) == (encoder is None):
        raise ConfigError("untrained: give the dimension of the embeddings, or an encoder that reads texts")
    if dim is not None and query_prefix is not None:
        raise ConfigError("untrained: query_prefix goes with an encoder; embeddings are what they are")
    if encoder is not None and decay is not None:
        raise ConfigError("untrained: decay goes with embeddings; an encoder reads turns as one text")
    try:
        if dim is not None:
            shape = MixConfig(input_dim=dim, output_dim=dim, max_context_length=max_turns)
            weights = (WEIGHT if weight is None else weight, DECAY if decay is None else decay)
            return Predictor.from_model(mix_of(shape, *weights))
        assert encoder is not None
        return _reader(encoder, max_turns, QUERY_WEIGHT if weight is None else weight, query_prefix or "")
    except ValidationError as unfit:
        raise ConfigError(f"untrained: {first_fault(unfit)}") from None


def _reader(encoder: Encoder | str, max_turns: int, query_weight: float, query_prefix: str) -> Predictor:
    """What reads texts with an encoder as it is."""
    found = load_encoder(encoder) if isinstance(encoder, str) else encoder
    if not isinstance(found, BertTextEncoder):
        raise ConfigError(
            f"untrained: the weights of the encoder {encoder!r} are not at hand; give minilm or a model "
            "folder, or the dimension of its embeddings"
        )
    given = TextConfig(
        input_dim=found.dim,
        output_dim=found.dim,
        max_context_length=max_turns,
        max_tokens=min(MAX_TOKENS, found.max_length),
        roles=False,
        query_weight=query_weight,
    )
    config = reading_config(given, found, str(encoder))
    model = started_model(config, starting_params(config, found))
    source = found.source.transformer
    facts = {"source": str(source), "encoder": found.identity, "query_prefix": query_prefix}
    predictor = Predictor(model, facts=facts)
    predictor.text_encoder = found
    return predictor
