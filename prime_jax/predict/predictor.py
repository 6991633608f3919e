"""Prediction from Python: `prime_jax.load(run).predict(context, query)`.

Requests are padded to a few fixed shapes, compiled ahead of time; masks hide the padding. Larger batches run
in chunks, and every row comes back (FR-PRED-012 to 014).
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike

from prime_jax._version import __version__
from prime_jax.config import Config
from prime_jax.data.encode import Encoder
from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.models import Model
from prime_jax.models.bundle import is_bundle, load_bundle
from prime_jax.models.confidence import Confidence, read_confidence
from prime_jax.models.text import TextPredictor
from prime_jax.nn.target_head import map_memory
from prime_jax.predict.batcher import Batcher
from prime_jax.predict.inputs import Request, Vectors, checked, shaped, steered_request
from prime_jax.predict.judging import Answer, check_guard, judge
from prime_jax.predict.precision import Precision, Recipe, check_known
from prime_jax.predict.programs import Programs
from prime_jax.predict.schema import PredictorInput, PredictorOutput, predict_one
from prime_jax.predict.session import Session
from prime_jax.predict.session_programs import SessionPrograms, WindowPrograms
from prime_jax.predict.started import Started
from prime_jax.predict.text import Contexts, Queries, TextPaths, named_encoder, prefix_of
from prime_jax.train import checkpoints

BATCH_SIZES = (1, 8, 32)


def load(
    path: str | Path,
    *,
    precision: Precision = "auto",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    encoder: Encoder | str | None = None,
) -> "Predictor":
    """Open a predictor: a run folder (its best checkpoint), one checkpoint folder, or an exported bundle.

    Every file in it is checked against its manifest first (SEC-PRED-001).

    Args:
        path: The folder.
        precision: See `Predictor`.
        batch_sizes: See `Predictor`.
        encoder: Embeds texts, by itself or by the name that `--encoder` takes. Code that only the run's own
            config.yaml names is never run.

    Raises:
        CheckpointError: If nothing usable is there, or a file is missing or damaged; the message names it.
        PredictorError: For an unknown precision or a batch size that is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if is_bundle(folder):
        config, source = None, folder
        model, told, head = load_bundle(folder)
    else:
        model, config, checkpoint, head = checkpoints.load_model(folder)
        source, told = checkpoint.folder, dict(checkpoint.facts)
    predictor = Predictor(
        model,
        config=config,
        facts={"source": str(source), **told},
        precision=precision,
        batch_sizes=batch_sizes,
        target_head=head,
        confidence=read_confidence(source, model.config.input_dim, model.config.output_dim),
    )
    predictor.text_encoder = named_encoder(encoder, {"source": source, **told}, config)
    return predictor


class Predictor:
    """Predicts the embeddings to search with. Safe to share between threads.

    Args:
        model: The model, float32.
        config: Configuration of the run it comes from, or None for a bundle or a model in memory.
        facts: What its checkpoint says of itself, for `info`.
        precision: `float32` is exact: a row's answer is the same in any batch, to 1e-5, and nothing about how
            it is computed depends on a timing. `bfloat16` is faster on most machines and moves predictions in
            the fourth digit. `auto` measures both for each batch size at warm-up, and how float32 matrices
            should lie, and takes the fastest; models under ten million parameters stay float32.
        batch_sizes: Batches to compile for, besides the model's max_batch_size.
        target_head: Kernel `[E, E]` of a run whose targets were mapped by a trained head, or None.
        confidence: How far its predictions can be trusted, or None.

    Attributes:
        model: The model, float32.
        config: Configuration of the run it comes from, or None.
        target_head: As given; where there is one, the memory must be mapped by `map_memory`.
        confidence: As given.
        text_encoder: What `load` was given for texts, or None.

    Raises:
        PredictorError: For an unknown precision or a batch size that is none.
    """

    text_encoder: Encoder | None = None

    def __init__(
        self,
        model: Model,
        *,
        config: Config | None = None,
        facts: Mapping[str, Any] | None = None,
        precision: Precision = "auto",
        batch_sizes: Sequence[int] = BATCH_SIZES,
        target_head: Array | None = None,
        confidence: Confidence | None = None,
    ):
        check_known(precision)
        if any(size < 1 for size in batch_sizes):
            raise PredictorError(f"batch_sizes {list(batch_sizes)} must be 1 or more")
        most = model.config.max_batch_size
        self.model = model
        self.config = config
        self.target_head = target_head
        self.confidence = confidence
        self._facts = dict(facts or {})
        self._buckets = (*sorted({size for size in batch_sizes if size < most}), most)
        self._compiled: Programs | None = None  # a model that reads texts has none
        if not isinstance(model, TextPredictor):
            self._compiled = Programs(model, precision, self._buckets)
        self._session_programs: dict[tuple[int, Recipe], SessionPrograms | WindowPrograms] = {}
        self._warmup_seconds: float | None = None
        self._texts = TextPaths(self)
        self._preparing = threading.RLock()
        if model.config.use_torch_compile and self._compiled is not None:
            self.warmup()

    @classmethod
    def from_model(
        cls, model: Model, *, precision: Precision = "auto", batch_sizes: Sequence[int] = BATCH_SIZES
    ) -> "Predictor":
        """Serve a model that is already in memory."""
        return cls(model, precision=precision, batch_sizes=batch_sizes)

    def predict(
        self,
        context: ArrayLike,
        query: ArrayLike,
        context_mask: ArrayLike | None = None,
        *,
        zero_query: bool = False,
    ) -> Vectors:
        """Predict where in the embedding space the ideal passage lies.

        Args:
            context: Embeddings of the turns so far, oldest first, `[B, N, D]` with N from 0 to
                max_context_length; or `[N, D]` for one request.
            query: Embedding of the query, `[B, D]`, or `[D]` for one request.
            context_mask: True where a turn is real, `[B, N]` or `[N]`; None means all are.
            zero_query: Take queries of any small norm, zero too, and their answers as they come: for
                ablations that ask what a model knows without its query.

        Returns:
            Unit-norm float32 vectors to search with, `[B, E]`, or `[E]` for one request.

        Raises:
            PredictorError: For a wrong shape or dtype, too many turns, NaN, Inf or a norm that no embedding
                has (`inputs`).
            WrongAnswerError: Where the answer is no unit vector.
        """
        request = shaped(self.model.config, context, query, context_mask)
        rows = self._begin(*request[:3]).result(zero_query=zero_query)
        answer: Vectors = rows[0] if request.single else rows
        return answer

    def predict_text(
        self, context: Contexts, query: Queries, *, encoder: Encoder | str | None = None
    ) -> Vectors:
        """Predict from texts, encoder and predictor in one program (`TextPaths` says more)."""
        return self._texts(context, query, encoder)

    def encode_passages(self, texts: Iterable[str]) -> Vectors:
        """Embeddings of texts to search among, `[M, E]`, by the predictor's encoder (`TextPaths`)."""
        return self._texts.encode_passages(texts)

    def steer(self, question: ArrayLike, steering: ArrayLike | None = None) -> Vectors:
        """Predict with a steered model, by the names that its users know.

        Args:
            question: Embedding of the question, `[B, D]`, or `[D]`.
            steering: Steering vectors of the same shape; None, or a zero vector, steers nowhere.

        Raises:
            PredictorError: For a wrong shape or dtype, NaN or Inf, or if the model takes turns instead.
        """
        return self.predict(*steered_request(self.model.config, question, steering))

    def answer(
        self,
        context: ArrayLike,
        query: ArrayLike,
        context_mask: ArrayLike | None = None,
        *,
        guard: bool = True,
    ) -> Answer:
        """Predict, say how likely the prediction is to find the right passage, and do no harm.

        Args:
            context: As for `predict`.
            query: As for `predict`.
            context_mask: As for `predict`.
            guard: Go back to the query, or its mix with the turns, where it is unlike those of training
                (`Confidence`).

        Raises:
            PredictorError: As `predict`; or with a guard, if the model has none.
        """
        request = checked(self.model.config, context, query, context_mask)
        found = self.judge(request, self.predict(*request[:3]), guard=guard)
        return found.first() if request.single else found

    def judge(self, request: Request, predicted: Vectors, *, guard: bool) -> Answer:
        """What `answer` makes of predictions `[B, E]` that are there already, of a session for instance.

        Raises:
            PredictorError: With a guard, if the model has none.
        """
        if guard:
            check_guard(self.model.config, self.confidence)
        return judge(self.confidence, request, predicted, self.map_memory if guard else None)

    def session(self, batch: int = 1, *, precision: Precision | None = None) -> Session:
        """Start a conversation, or `batch` of them side by side, whose turns are not computed anew each time.

        It pays with `context_attention: causal`; docs/predicting.md says when. Everything it needs is
        compiled here, once for each batch size.

        Args:
            batch: How many conversations advance together.
            precision: As for the predictor; None means what was chosen for predicting batches of this size.

        Raises:
            PredictorError: If `batch` is less than 1, `precision` unknown, or the model takes no turns.
        """
        programs = self._programs
        if self.model.config.session == "none":
            raise PredictorError(
                f"a {self.model.config.kind} model takes a steering vector, no turns, so it has no sessions"
            )
        if self.model.config.takes_one_text:
            raise PredictorError(
                "this model takes query and turns as one text in the place of the newest turn, another for "
                "each question; a session keeps turns, so call predict_text or predict"
            )
        if batch < 1:
            raise PredictorError(f"a session of {batch} conversations is none")
        if precision is None:
            nearest = next((size for size in self._buckets if size >= batch), self._buckets[-1])
            recipe = programs.choice(nearest).recipe
        else:
            recipe = programs.choice_for(batch, precision).recipe
        with self._preparing:
            if (batch, recipe) not in self._session_programs:
                self._session_programs[batch, recipe] = self._new_session_programs(batch, recipe)
            return Session(self._session_programs[batch, recipe])

    def _new_session_programs(self, batch: int, recipe: Recipe) -> SessionPrograms | WindowPrograms:
        config: Any = self.model.config
        if config.session == "window":
            window = (batch, config.max_context_length)
            return WindowPrograms(config, self._programs.program(window, recipe), batch)
        return SessionPrograms(config, self._programs.weights(recipe), recipe, batch)

    def batcher(
        self,
        *,
        max_delay_ms: float = 2.0,
        max_batch: int | None = None,
        max_queue: int = 1024,
        on_call: Callable[[int], None] | None = None,
    ) -> Batcher:
        """Start a thread that joins the single requests of many callers into one device call (`Batcher`).

        Args:
            max_delay_ms: How long a request may wait for company.
            max_batch: Most requests of one device call; None means the largest compiled batch.
            max_queue: Most requests that wait; more are refused with an `OverloadedError`.
            on_call: Told the number of requests of every device call.

        Raises:
            PredictorError: If the model reads texts.
        """
        self._refuse_texts()
        return Batcher(
            self.predict,
            partial(checked, self.model.config),
            max_batch=self._buckets[-1] if max_batch is None else max_batch,
            max_delay_ms=max_delay_ms,
            max_queue=max_queue,
            on_call=on_call,
            start=self._begin,
        )

    def predict_one(self, request: PredictorInput) -> PredictorOutput:
        """Answer one request of the wire schema, with its confidence where the model carries a calibration.

        Raises:
            PredictorError: If its dimension or number of turns does not fit the model.
        """
        return predict_one(partial(self.answer, guard=False), request)

    def warmup(self) -> None:
        """Choose precisions and compile every fixed shape now, not at the first request that needs it."""
        if self._compiled is not None and not self.model.config.use_static_cache:
            return
        started = time.perf_counter()
        (self._texts if self._compiled is None else self._compiled).warm_up()
        self._warmup_seconds = time.perf_counter() - started

    @property
    def takes_one_text(self) -> bool:
        """Whether the newest turn given is the embedding of query and turns as one text."""
        return self.model.config.takes_one_text

    @property
    def reads_text(self) -> bool:
        """Whether the model takes texts (`predict_text`) and no embeddings."""
        return self.model.config.reads_text

    @property
    def query_prefix(self) -> str:
        """What stands before queries (and turns, where they are encoded by themselves)."""
        return prefix_of("query_prefix", self._facts, self.config)

    @property
    def passage_prefix(self) -> str:
        """What stands before passages."""
        return prefix_of("passage_prefix", self._facts, self.config)

    @property
    def _programs(self) -> Programs:
        """The programs that take embeddings.

        Raises:
            PredictorError: If the model reads texts.
        """
        self._refuse_texts()
        assert self._compiled is not None
        return self._compiled

    def _refuse_texts(self) -> None:
        if self.reads_text:
            raise PredictorError(
                f"a {self.model.config.kind} model reads texts, no embeddings: call predict_text"
            )

    def map_memory(self, embeddings: Any) -> Any:
        """Passages of a memory as the predictions expect them, `[M, E]`: what to index and search.

        They are the encoder's embeddings unchanged, unless the run trained a target head (`train.target`).

        Args:
            embeddings: Unit-norm embeddings of the passages, float32, `[M, E]`. Rows that are read in parts
                are mapped in parts.
        """
        return embeddings if self.target_head is None else map_memory(self.target_head, embeddings)

    def info(self) -> dict[str, Any]:
        """What this predictor is: version, size, shapes and how each is computed, its checkpoint's facts."""
        config = self.model.config
        choices = {} if self._compiled is None else self._compiled.choices
        return {
            "prime_jax": __version__,
            "parameters": self.model.num_params(),
            "model": config.model_dump(),
            "calibrated": self.confidence is not None,
            "batch_shapes": list(self._buckets) if config.use_static_cache else "as requested",
            "precision": {
                batch: {**choice.recipe._asdict(), "why": choice.why}
                for batch, choice in sorted(choices.items())
            },
            "warmup_seconds": self._warmup_seconds,
            "device": str(jax.local_devices()[0]),
            **{name: fact for name, fact in self._facts.items() if name != "files"},
        }

    def _begin(self, context: Vectors, query: Vectors, mask: np.ndarray) -> "Started":
        """Send a request that was checked for its shape to the device; its numbers are checked there."""
        return Started(self._programs, Request(context, query, mask, False), self._buckets[-1])
