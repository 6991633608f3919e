"""From texts to a prediction: X-encoder, predictor and Y's space in one compiled program.

Requests are padded to a few batch sizes, numbers of turns and text lengths; a program is compiled for each
combination that occurs. Encoders that are not ours run by themselves, before the predictor.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from prime_jax.config import Config
from prime_jax.data.encode import Encoder, load_encoder, names_code, passage_prefix_for
from prime_jax.data.one_text import as_one_text
from prime_jax.data.tokens import BUCKETS
from prime_jax.errors import ConfigError, DataError, PredictorError
from prime_jax.models.jasper import SteeredConfig
from prime_jax.nn.bert import Pooling
from prime_jax.predict.passes import forward_pass
from prime_jax.predict.reading import ReadingPath
from prime_jax.pretrained.bert import BertTextEncoder, check_texts, embedded, is_unicode
from prime_jax.pretrained.pair import FOLDER, PairedEncoder, is_pair, load_pair
from prime_jax.train.checkpoints import CONFIG

if TYPE_CHECKING:
    from prime_jax.predict.predictor import Predictor

TURNS = (0, 1, 2, 4, 8, 16, 32)

Contexts = Sequence[str] | Sequence[Sequence[str]]
Queries = str | Sequence[str]


def encoder_of(predictor: "Predictor") -> Encoder:
    """The encoder of a predictor's texts.

    That is the one it was loaded with, or those trained with it, or the one its configuration names.

    Raises:
        ConfigError: If there is none, or the configuration names code (`load(run, encoder=...)` does).
        DataError: If the encoder's folder is incomplete or damaged.
    """
    if predictor.text_encoder is not None:
        return predictor.text_encoder
    source = predictor.info().get("source")
    if source and is_pair(Path(source) / FOLDER):
        return load_pair(Path(source) / FOLDER)
    if predictor.config is None:
        raise ConfigError(
            "this predictor carries no encoder and does not name one; give one to prime_jax.load (or "
            "predict_text)"
        )
    named = predictor.config.data
    return load_encoder(named.encoder, named.encoder_precision, stored_in=Path(source or "model") / CONFIG)


def prefix_of(name: str, facts: Mapping[str, Any], config: Config | None) -> str:
    """What stands before a predictor's texts: its `query_prefix` or `passage_prefix`."""
    return str(facts.get(name, "")) if config is None else str(getattr(config.data, name))


def load_as_trained(name: str, config: Config | None) -> Encoder:
    """The encoder that a user names, in the precision that the model's data was encoded with."""
    if config is None or names_code(name):
        return load_encoder(name)
    return load_encoder(name, config.data.encoder_precision)


def named_encoder(
    encoder: Encoder | str | None, facts: Mapping[str, Any], config: Config | None = None
) -> Encoder | None:
    """The encoder that a user gives or names for a model whose manifest holds `facts`.

    Raises:
        ConfigError: If there is no such encoder.
        DataError: If the model was trained with another one.
    """
    if encoder is None:
        return None
    found = load_as_trained(encoder, config) if isinstance(encoder, str) else encoder
    trained = facts.get("encoder", found.identity)
    if trained != found.identity:
        raise DataError(
            f"{facts.get('source', 'the model')}: was trained on embeddings of {trained}, but the encoder "
            f"{encoder if isinstance(encoder, str) else 'given'} is {found.identity}; vectors of different "
            "encoders cannot be compared"
        )
    return found


class TextPaths:
    """What `Predictor.predict_text` runs: made at the first call, no encoder is loaded for nothing."""

    def __init__(self, predictor: "Predictor"):
        self._predictor = predictor
        self._encoder: Encoder | None = None
        self._own: TextPath | None = None
        self._read: ReadingPath | None = None
        self._given: tuple[Encoder, TextPath] | None = None
        self._named: dict[str, TextPath] = {}
        self._preparing = threading.Lock()

    def __call__(
        self, context: Contexts, query: Queries, encoder: Encoder | str | None
    ) -> Float[np.ndarray, "*a E"]:
        """Predict from texts.

        Args:
            context: The turns so far, oldest first; or such a list for every request.
            query: The query, or one for every request.
            encoder: Embeds them, by itself or by name (`load_encoder`); None means `encoder_of`.

        Returns:
            Unit-norm float32 vectors to search with, `[E]`, or `[B, E]` for a list of queries.

        Raises:
            PredictorError: For what is no text, too many turns, or a model that takes no turns.
            ConfigError: If there is no encoder, or it does not fit.
        """
        config = self._predictor.model.config
        most = config.max_context_length - config.takes_one_text
        contexts, queries, single = as_requests(context, query, most)
        if config.reads_text:
            if encoder is not None:
                raise ConfigError(f"a {config.kind} model reads texts itself; leave encoder out")
            rows = self._reading().predict(contexts, queries)
        else:
            rows = self._path(encoder).predict(contexts, queries)
        return rows[0] if single else rows

    def encode_passages(self, texts: Iterable[str]) -> Float[np.ndarray, "M E"]:
        """Embeddings of passages, unit norm, in the space of the predictions.

        Raises:
            ConfigError: If the predictor's encoder is not known, or encodes to another width.
            DataError: If an entry is no text.
        """
        texts = [*texts] if not isinstance(texts, str) else texts  # a generator can be read but once
        check_texts(texts)  # which refuses a string
        encoder, config = self._encoder_of_texts(), self._predictor.model.config
        if encoder.dim != config.output_dim:
            raise ConfigError(
                f"the encoder gives {encoder.dim} dimensions, predictions have {config.output_dim}"
            )
        prefix = passage_prefix_for(encoder, self._predictor.passage_prefix)
        return np.asarray(self._predictor.map_memory(encoder.encode([prefix + text for text in texts])))

    def _encoder_of_texts(self) -> Encoder:
        with self._preparing:
            self._encoder = self._encoder or encoder_of(self._predictor)
            return self._encoder

    def warm_up(self) -> None:
        """Compile what single requests to a model that reads texts need."""
        self._reading().warm_up()

    def _reading(self) -> ReadingPath:
        with self._preparing:
            self._read = self._read or ReadingPath(self._predictor)
            return self._read

    def _path(self, encoder: Encoder | str | None) -> "TextPath":
        with self._preparing:
            if isinstance(encoder, str):
                if encoder not in self._named:
                    self._named = {
                        encoder: TextPath(self._predictor, load_as_trained(encoder, self._predictor.config))
                    }
                return self._named[encoder]
            if encoder is None:
                self._encoder = self._encoder or encoder_of(self._predictor)
                self._own = self._own or TextPath(self._predictor, self._encoder)
                return self._own
            if self._given is None or self._given[0] is not encoder:
                self._given = encoder, TextPath(self._predictor, encoder)
            return self._given[1]


def as_requests(context: Contexts, query: Queries, most: int) -> tuple[list[list[str]], list[str], bool]:
    """Turns and query of every request, and whether it was one alone.

    Raises:
        PredictorError: If the numbers do not fit, an entry is no text, or a request has too many turns.
    """
    single = isinstance(query, str)
    for name, value in (("context", context), ("query", query)):
        if not isinstance(value, Iterable):
            raise PredictorError(f"{name} is a {type(value).__name__}, neither a text nor a list")
    queries: list[Any] = [query] if single else list(query)
    contexts: list[Any] = [context] if single else list(context)
    if len(queries) != len(contexts):
        raise PredictorError(f"{len(contexts)} contexts do not go with {len(queries)} queries")
    for number, (turns, asked) in enumerate(zip(contexts, queries, strict=True)):
        where = "" if single else f" of request {number}"
        if isinstance(turns, Iterable) and not isinstance(turns, str):
            turns = contexts[number] = list(turns)  # a generator can be read but once
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise PredictorError(f"context{where} is not a list of texts, oldest first")
        if not isinstance(asked, str):
            raise PredictorError(f"query{where} is a {type(asked).__name__}, not a text")
        if not all(map(is_unicode, (*turns, asked))):
            raise PredictorError(f"context or query{where} holds half a character (a lone surrogate)")
        if len(turns) > most:
            raise PredictorError(
                f"context{where} has {len(turns)} turns, the model takes at most {most}; pass the newest ones"
            )
    return contexts, queries, single


class TextPath:
    """Predicts from texts with one encoder; what it compiles is kept.

    Args:
        predictor: Predicts in the encoder's space.
        encoder: Embeds turns and queries; None means `encoder_of(predictor)`.

    Raises:
        ConfigError: If there is no encoder, or its embeddings have another width than the model takes.
        PredictorError: If the model takes no turns.
    """

    def __init__(self, predictor: "Predictor", encoder: Encoder | None = None):
        config = predictor.model.config
        if isinstance(config, SteeredConfig):
            raise PredictorError(f"a {config.kind} model takes a steering vector, no turns: encode and steer")
        encoder = encoder_of(predictor) if encoder is None else encoder
        if encoder.dim != config.input_dim:
            raise ConfigError(
                f"the encoder gives {encoder.dim} dimensions, the model takes {config.input_dim}"
            )
        model: Any = predictor.model  # it reads embeddings
        self._predictor, self._encoder, self._config = predictor, encoder, config
        self._prefix = predictor.query_prefix
        x = encoder.x if isinstance(encoder, PairedEncoder) else encoder
        self._x = x if isinstance(x, BertTextEncoder) else None
        if self._x is not None:
            forward = forward_pass(model)
            self._weights = (self._x.params, forward.lay_out("float32"))
            graph, pooling = self._x.graph, self._x.pooling  # its own precision: what its identity names
            predict = forward.program("float32", "float32")
            self._run = jax.jit(partial(_from_tokens, graph=graph, pooling=pooling, predict=predict))

    def predict(self, contexts: list[list[str]], queries: list[str]) -> Float[np.ndarray, "B E"]:
        """Predictions for checked requests."""
        if self._config.takes_one_text:
            pairs = zip(contexts, queries, strict=True)
            contexts = [[*turns, as_one_text(query, turns)] for turns, query in pairs]
        contexts = [[self._prefix + turn for turn in turns] for turns in contexts]
        queries = [self._prefix + query for query in queries]
        if not queries:
            return np.zeros((0, self._config.output_dim), np.float32)
        if self._x is None:
            return self._in_two_steps(contexts, queries)
        most = self._config.max_batch_size
        starts = range(0, len(queries), most)
        parts = [self._chunk(contexts[at : at + most], queries[at : at + most]) for at in starts]
        return np.concatenate(parts)

    def _chunk(self, contexts: list[list[str]], queries: list[str]) -> Float[np.ndarray, "B E"]:
        """One call of the compiled program."""
        assert self._x is not None
        ids = self._x.tokenize(
            [text for row in zip(contexts, queries, strict=True) for text in (*row[0], row[1])]
        )
        longest = max(map(len, ids))
        width = next(bucket for bucket in (*BUCKETS, longest) if bucket >= longest)
        most = max(map(len, contexts))
        turns = next(some for some in (*TURNS, most) if some >= most)
        turns = min(turns, self._config.max_context_length)
        sizes = (*(2**power for power in range(12)), self._config.max_batch_size)
        rows = min(next(size for size in sizes if size >= len(queries)), self._config.max_batch_size)
        tokens = np.zeros((rows, turns + 1, width), np.int32)
        lengths = np.zeros((rows, turns + 1), np.int32)
        remaining = iter(ids)
        for row, context in enumerate(contexts):
            for slot in (*range(len(context)), turns):
                text = next(remaining)
                tokens[row, slot, : len(text)], lengths[row, slot] = text, len(text)
        return np.asarray(self._run(self._weights, tokens, lengths))[: len(queries)]

    def _in_two_steps(self, contexts: list[list[str]], queries: list[str]) -> Float[np.ndarray, "B E"]:
        """An encoder that is not ours embeds first."""
        check_texts(queries)
        most = max(map(len, contexts))
        vectors = self._encoder.encode([*(turn for turns in contexts for turn in turns), *queries])
        context = np.zeros((len(queries), most, self._encoder.dim), np.float32)
        mask = np.arange(most) < np.array([len(turns) for turns in contexts])[:, None]
        context[mask] = vectors[: len(vectors) - len(queries)]
        found: Float[np.ndarray, "B E"] = self._predictor.predict(context, vectors[-len(queries) :], mask)
        return found


def _from_tokens(
    weights: Any,
    tokens: Int[Array, "B texts T"],
    lengths: Int[Array, "B texts"],
    *,
    graph: Any,
    pooling: Pooling,
    predict: Callable[..., Array],
) -> Float[Array, "B E"]:
    """Texts (turns, then the query) to predictions; a turn without tokens is none."""
    encoder, predictor = weights
    rows, texts, width = tokens.shape
    model = nnx.merge(graph, encoder)
    vectors = embedded(model, tokens.reshape(rows * texts, width), lengths.reshape(-1), pooling)
    vectors = vectors.reshape(rows, texts, -1)
    return predict(predictor, vectors[:, :-1], vectors[:, -1], lengths[:, :-1] > 0)
