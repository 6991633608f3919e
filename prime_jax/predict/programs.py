"""A predictor's compiled programs: one for each batch size, how it computes, the weights it reads."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from prime_jax.devices import on_gpu
from prime_jax.errors import PredictorError
from prime_jax.models import EmbeddingModel
from prime_jax.models.prime import PredictorConfig
from prime_jax.predict.compiled import compile_ahead, compile_all, trace_ahead
from prime_jax.predict.inputs import Vectors, sample
from prime_jax.predict.packing import Flat, Packing, flat, valid_input, with_state
from prime_jax.predict.passes import forward_pass
from prime_jax.predict.precision import (
    EXACT,
    MEASURED_FROM,
    Choice,
    Precision,
    Recipe,
    choose,
    choose_all,
    half_recipe,
    measured_sizes,
    transposed_pays,
    unmeasured,
)
from prime_jax.predict.remembered import Remembered
from prime_jax.predict.staging import Buffer, Buffers, Staging
from prime_jax.progress import progress

Shape = tuple[int, int]
Key = tuple[int, int, Recipe]
K = TypeVar("K")
T = TypeVar("T")


class Program:
    """One compiled shape. Safe to share between threads.

    Args:
        packing: How its requests are packed.
        staging: How they get to the device.
        run: The compiled function of the packed request and the arguments that hold the weights.
        weights: Those arguments.
    """

    def __init__(
        self, packing: Packing, staging: Staging, run: Callable[..., Any], weights: tuple[jax.Array, ...]
    ):
        self.packing = packing
        self._staging = staging
        self._run = run
        self._weights = weights
        self._buffers = Buffers(staging, packing.shape)

    def start(self, context: Vectors, query: Vectors, mask: np.ndarray) -> "Running":
        """Send a request of up to the program's rows and turns to the device, without waiting for it."""
        buffer = self._buffers.take()
        self.packing.pack(buffer.view, context, query, mask)
        answer = self._run(buffer.argument, *self._weights)
        self._staging.send_for(answer)
        return Running(answer, len(mask), buffer, self._buffers)

    def measured(self, inputs: tuple[Vectors, Vectors, np.ndarray]) -> Callable[[], jax.Array]:
        """A call that runs the program once on the same input."""
        buffer = self._staging.buffer(self.packing.shape)
        self.packing.pack(buffer.view, *inputs)
        return lambda: self._run(buffer.argument, *self._weights)


class Running:
    """A call under way on the device.

    The device reads the buffer in place, so that is free for other requests once the answer is there.
    """

    def __init__(self, answer: jax.Array, rows: int, buffer: Buffer, buffers: Buffers):
        self._answer = answer
        self._rows = rows
        self._buffer: Buffer | None = buffer
        self._buffers = buffers

    def ready(self) -> bool:
        """Whether the answer is there already."""
        ready: Any = self._answer
        return bool(ready.is_ready())

    def result(self) -> np.ndarray:
        """Wait for predictions and their state, `[rows, E + 1]`, not to be written to."""
        answer = np.asarray(self._answer)
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._buffers.give_back(buffer)
        return answer[: self._rows]


class Programs:
    """What a predictor compiles, and keeps.

    Args:
        model: The model, float32.
        precision: What the user asked for.
        sizes: The batch sizes to compile for, ascending.
    """

    def __init__(self, model: EmbeddingModel, precision: Precision, sizes: Sequence[int]):
        self._model = model
        self._config = model.config
        self._precision: Precision = precision
        self._sizes = tuple(sizes)
        self._parameters = model.num_params()
        self._forward = forward_pass(model)
        self._remembered = Remembered(model.config, precision)
        self._lock = threading.Lock()  # of the two dictionaries below; nobody waits for anything under it
        self._choosing = threading.RLock()
        self._compiled: dict[Key, Future[Program]] = {}
        self._weights: dict[tuple[str, bool], Future[Flat]] = {}
        self._exact: Recipe | None = None
        self._ready: dict[int, Program] = {}  # what a request of a fixed shape needs, without a lock
        self._asked: dict[tuple[int, Precision], Choice] = {}  # for sessions
        self.choices: dict[int, Choice] = {}

    @property
    def recipes(self) -> set[Recipe]:
        """The recipes of all programs that are kept."""
        return {recipe for _, _, recipe in self._compiled}

    @property
    def shapes(self) -> set[Shape]:
        """Batch size and turns of all programs that are kept."""
        return {(batch, turns) for batch, turns, _ in self._compiled}

    @property
    def width(self) -> int:
        """Dimension E of a prediction."""
        return self._config.output_dim

    def serving(self, rows: int, turns: int) -> Program:
        """The program for a request of up to the largest batch size."""
        return self.fixed(rows) if self._config.use_static_cache else self.as_requested((rows, turns))

    def fixed(self, rows: int) -> Program:
        """The program of the next fixed batch size; compiled now if it has not been."""
        size = next(size for size in self._sizes if size >= rows)
        program = self._ready.get(size)
        if program is None:
            recipe = self.choice(size).recipe
            program = self._ready[size] = self.program((size, self._config.max_context_length), recipe)
        return program

    def as_requested(self, shape: Shape) -> Program:
        """The program of exactly this shape; nothing is measured: it is what was asked for, or exact."""
        half = self._precision == "bfloat16"
        recipe = self.choice(self._sizes[-1]).recipe if half else self.exact(self._precision)
        return self.program(shape, recipe)

    def choice(self, size: int) -> Choice:
        """How batches of this size are computed, chosen once."""
        with self._choosing:
            if size not in self.choices:
                known = unmeasured(self._precision, self._parameters, self.exact(self._precision))
                known = known or self._remembered_choices((size,)).get(size)
                if known is None:
                    before = self._kept()
                    known = self.choose(size, self._precision)
                    self._keep(before | {(size, self._config.max_context_length, known.recipe)})
                    self._remembered.write({size: known})
                self.choices[size] = known
            return self.choices[size]

    def choice_for(self, batch: int, precision: Precision) -> Choice:
        """How a session of this batch computes with this `precision`; measured once where it must be."""
        with self._choosing:
            if (batch, precision) not in self._asked:
                before = self._kept()
                self._asked[batch, precision] = self.choose(batch, precision)
                self._keep(before)
            return self._asked[batch, precision]

    def choose(self, size: int, precision: Precision) -> Choice:
        """Choose a recipe for batches of this size, measuring where it must."""
        inputs = sample(self._config, size)
        shape = (size, self._config.max_context_length)

        def prepare(recipe: Recipe) -> Callable[[], jax.Array]:
            return self.program(shape, recipe).measured(inputs)

        return choose(precision, self._parameters, prepare, self.exact(precision))

    def warm_up(self) -> None:
        """Choose for every size, compile side by side what was chosen, and drop the rest."""
        with self._choosing:
            self._choose_all()
        wanted = [(size, self._config.max_context_length, self.choices[size].recipe) for size in self._sizes]
        self._compile_all("Compiling the predictor", wanted)
        for size in self._sizes:
            self.fixed(size)
        self._keep(wanted)

    def _kept(self) -> set[Key]:
        """Which programs are kept now."""
        with self._lock:
            return set(self._compiled)

    def _keep(self, programs: Iterable[Key]) -> None:
        """Drop all other programs, and the weights that nothing needs any more."""
        with self._lock:
            for key in set(self._compiled) - set(programs):
                del self._compiled[key]
            choices = (*self.choices.values(), *self._asked.values())
            recipes = self.recipes | {choice.recipe for choice in choices}
            for layout in set(self._weights) - {(recipe.dtype, recipe.outputs_first) for recipe in recipes}:
                del self._weights[layout]

    def weights(self, recipe: Recipe) -> Flat:
        """The weights for a recipe, as arguments of a program."""
        key = recipe.dtype, recipe.outputs_first
        return _once(self._lock, self._weights, key, partial(self._lay_out, recipe)).result()

    def _lay_out(self, recipe: Recipe) -> Flat:
        compile_with = partial(compile_ahead, mode="default")
        return flat(
            self._forward.lay_out(recipe.dtype, outputs_first=recipe.outputs_first, compile_with=compile_with)
        )

    def exact(self, precision: Precision) -> Recipe:
        """How this model computes in float32 where `precision` is asked for.

        With `auto`, on CPUs, with matrices as they are read fastest. Set by hand it depends on no timing.
        """
        if precision != "auto":
            return EXACT
        with self._choosing:
            if self._exact is None:
                self._exact = EXACT._replace(outputs_first=self._transposed())
            return self._exact

    def _transposed(self) -> bool:
        """Whether float32 matrices are laid out `[O, I]`: remembered, or measured."""
        config = self._config
        if not isinstance(config, PredictorConfig) or jax.default_backend() != "cpu":
            return False
        if self._parameters < MEASURED_FROM:
            return False
        layouts = Remembered(config, "float32")
        if known := layouts.read().get(0):
            return known.recipe.outputs_first
        width = config.mlp_dim or 4 * config.hidden_dim
        tokens = config.max_context_length + 2
        pays = transposed_pays((tokens, tokens * self._sizes[-1]), config.hidden_dim, width)
        layouts.write({0: Choice(EXACT._replace(outputs_first=pays), "layout of float32 matrices")})
        return pays

    def _choose_all(self) -> None:
        """Choose for all sizes: remembered, or measured, after the candidates have compiled together.

        What an earlier request chose for its size stays: its program is in use.
        """
        exact = self.exact(self._precision)
        if known := unmeasured(self._precision, self._parameters, exact):
            self.choices = dict.fromkeys(self._sizes, known) | self.choices
            return
        if remembered := self._remembered_choices([size for size in self._sizes if size not in self.choices]):
            self.choices |= remembered
            return
        turns = self._config.max_context_length
        open_sizes = [size for size in measured_sizes(self._sizes) if size not in self.choices]
        candidates = [(size, turns, recipe) for size in open_sizes for recipe in (exact, half_recipe())]
        if on_gpu() and open_sizes:  # what will most likely be chosen for the others compiles beside them
            others = [size for size in self._sizes if size not in (*open_sizes, *self.choices)]
            candidates += [(size, turns, half_recipe()) for size in others]
        self._compile_all("Choosing the precision", candidates)

        def choose_one(size: int) -> Choice:
            return self.choices.get(size) or self.choose(size, self._precision)

        self.choices = choose_all(self._sizes, choose_one) | self.choices
        self._remembered.write(self.choices)

    def _remembered_choices(self, sizes: Sequence[int]) -> dict[int, Choice]:
        """The choices of an earlier start for these sizes, their programs compiled; none where one lacks.

        What does not compile any more (another driver, less memory) is forgotten.
        """
        remembered = self._remembered.read()
        if any(size not in remembered for size in sizes):
            return {}
        turns = self._config.max_context_length
        keys = [(size, turns, remembered[size].recipe) for size in sizes]
        self._compile_all("Compiling the predictor", keys)
        if any(key not in self._compiled for key in keys):
            self._remembered.forget()
            return {}
        return {size: remembered[size] for size in sizes}

    def _compile_all(self, title: str, keys: Iterable[Key]) -> None:
        """Compile side by side, traced on this thread, whose settings of JAX count.

        What cannot be traced or compiled says so to whoever asks for it.
        """
        missing = [key for key in keys if key not in self._compiled]
        if not missing:
            return
        with progress(title, len(missing), "programs") as step:
            compile_all(self._jobs(missing), lambda: step(1))

    def _jobs(self, keys: Iterable[Key]) -> Iterator[Callable[[], Any]]:
        """What compiles these programs, each traced when it is asked for."""
        for key in keys:
            with suppress(Exception):  # weights that do not fit, or no such kernel
                yield partial(_once, self._lock, self._compiled, key, self._traced(key))

    def program(self, shape: Shape, recipe: Recipe) -> Program:
        """The compiled forward pass for one shape. After an error the next call tries again."""
        key = (*shape, recipe)
        return _once(self._lock, self._compiled, key, lambda: self._traced(key)()).result()

    def _traced(self, key: Key, page_locked: bool | None = None) -> Callable[[], Program]:
        """A program ready to be compiled, in any thread; `page_locked` as for `Staging`."""
        shape, recipe = key[:2], key[2]
        weights = self.weights(recipe)
        packing = Packing(*shape, self._config.input_dim)
        staging = Staging(weights.device, page_locked)
        forward = self._forward.program(recipe.attention, recipe.dtype)

        def predict(packed: jax.Array, *arguments: jax.Array) -> jax.Array:
            context, query, mask = packing.unpack(staging.fetched(packed))
            answer = forward(weights.restore(*arguments), context, query, mask)
            return with_state(answer, valid_input(context, query, mask))

        run = trace_ahead(
            predict,
            staging.shape(packing.shape),
            *weights.arguments,
            mode=self._config.compile_mode,
            answers=staging.answers,
            rows=shape[0] * (shape[1] + 2),  # turns, [PRED] and the query
        )
        return lambda: Program(packing, staging, run(), weights.arguments)


def _once(lock: threading.Lock, kept: dict[K, "Future[T]"], key: K, make: Callable[[], T]) -> "Future[T]":
    """What `make` gives, made by the first who asks; the others wait.

    An error is for those who wait at that moment and is not kept: who asks later tries again. What ends more
    than this call, Ctrl-C for instance, is raised here only; who waits gets a PredictorError.
    """
    mine: Future[T] = Future()
    with lock:
        future = kept.setdefault(key, mine)
    if future is not mine:
        return future
    try:
        made = make()
    except BaseException as failed:
        with lock:
            if kept.get(key) is mine:
                del kept[key]
        if isinstance(failed, Exception):
            mine.set_exception(failed)
            return mine
        mine.set_exception(PredictorError("another thread was interrupted while it compiled this; try again"))
        raise
    mine.set_result(made)
    return mine
