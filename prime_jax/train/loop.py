"""The training loop: all effects of a run, in one order."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import Config, to_yaml
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.pipeline import steps_per_epoch, training_batches
from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.files import write_text
from prime_jax.losses.corpus import Corpus, in_chunks
from prime_jax.progress import console, progress
from prime_jax.train import checkpoints
from prime_jax.train.interrupt import interruptible
from prime_jax.train.monitor import History, plot_curves
from prime_jax.train.optim import learning_rate, make_optimizer
from prime_jax.train.setup import (
    Facts,
    check_folder,
    embedded,
    warn_of_shortened_warmup,
    warn_of_unused,
    with_weights_of,
)
from prime_jax.train.sharding import make_mesh, replicated, split_batch
from prime_jax.train.state import build_graph, init_state
from prime_jax.train.step import Metrics, make_train_step
from prime_jax.train.validate import Validator

LOG_EVERY = 20


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Batches seen in total.
        interrupted: Whether somebody stopped it; a checkpoint was written.
        checkpoint: The newest checkpoint.
    """

    step: int
    interrupted: bool
    checkpoint: checkpoints.Checkpoint


def train(config: Config, out: Path, *, resume: bool = False) -> Outcome:
    """Train a predictor and leave everything about the run in `out`.

    Leaves config.yaml, history.jsonl, history.csv, curves.png and checkpoints/. The first Ctrl-C or SIGTERM
    finishes the step, saves, and returns.

    Args:
        config: What to do.
        out: Run folder.
        resume: Go on from the newest checkpoint in `out`.

    Raises:
        ConfigError: If settings contradict each other, the data or the run folder.
        DataError: If the data is not as it should be.
        CheckpointError: If a checkpoint cannot be read or written.
        PredictorError: If the loss is no longer a finite number.
    """
    check_folder(config, out, resume)
    data, facts = embedded(config)
    run = _Run(config, out, data, facts)
    if resume:
        run.restore()
    write_text(out / checkpoints.CONFIG, to_yaml(config))
    return run.run()


class _Run:
    """One run in progress: its compiled step, its data, its files."""

    def __init__(self, config: Config, out: Path, data: EmbeddedDataset, facts: Facts):
        settings = config.train
        self.config, self.out, self.facts = config, out, facts
        self.mesh = make_mesh(config.mesh, settings.batch_size)
        self.epoch_steps = steps_per_epoch(data, "train", batch_size=settings.batch_size)
        self.total_steps = self.epoch_steps * settings.num_epochs
        updates = max(1, self.total_steps // settings.accumulate_grad_batches)
        self.schedule = learning_rate(settings, updates)
        warn_of_shortened_warmup(config, updates)
        warn_of_unused(config)
        optimizer = make_optimizer(settings, updates)
        self.state = jax.device_put(
            with_weights_of(config, init_state(config.model, optimizer, settings.seed)),
            replicated(self.mesh),
        )
        dtype = jnp.bfloat16 if settings.mixed_precision else jnp.float32
        graph = build_graph(config.model, dtype)
        self.step = make_train_step(
            graph,
            optimizer,
            temperature=settings.temperature,
            remat=settings.gradient_checkpointing,
            corpus=self._corpus(data) if settings.negatives == "corpus" else None,
        )
        self.batches = training_batches(
            data,
            "train",
            batch_size=settings.batch_size,
            seed=settings.seed,
            epochs=None,
            num_negatives=settings.num_negatives,
        )
        self.validate = Validator(build_graph(config.model, jnp.float32), data, "dev")
        self.history = History(out, until_step=0)
        self.scores: dict[str, float] = {}

    def _corpus(self, data: EmbeddedDataset) -> Corpus:
        """All passages on every device."""
        whole = in_chunks(data.corpus(), self.config.train.corpus_chunk)
        placed: Corpus = jax.device_put(whole, replicated(self.mesh))
        return placed

    def restore(self) -> None:
        """Continue where the newest checkpoint ended: parameters, optimizer, data order, history."""
        checkpoint = checkpoints.latest(self.out)
        if checkpoint is None:
            raise CheckpointError(
                f"{self.out}: no complete checkpoint to resume from; start without --resume"
            )
        for fact in ("data_hash", "encoder"):
            if checkpoint.facts[fact] != self.facts[fact]:
                raise CheckpointError(
                    f"{checkpoint.folder}: was trained with {fact} {checkpoint.facts[fact]!r}, "
                    f"now it is {self.facts[fact]!r}; resuming would mix two runs"
                )
        self.state, position = checkpoints.restore(checkpoint, self.state)
        self.batches.set_state(position)
        self.scores = dict(checkpoint.facts["metrics"])
        self.history = History(self.out, until_step=checkpoint.step)
        console.print(f"resuming from step {checkpoint.step} of {self.total_steps}")

    def run(self) -> Outcome:
        """Train to the end or until asked to stop."""
        start = step = int(self.state.step)
        pending: list[Metrics] = []
        query = self.validate.plain_query[checkpoints.SELECT_BY]
        console.print(
            f"{self.total_steps} steps of {self.config.train.batch_size} examples on "
            f"{self.mesh.size} device(s); dev {checkpoints.SELECT_BY} of the plain query {query:.3f}",
            soft_wrap=True,
        )
        clock = time.perf_counter()
        examples = self.config.train.batch_size
        with (
            interruptible() as interrupt,
            progress("training", (self.total_steps - start) * examples, "examples") as advance,
        ):
            while step < self.total_steps and not interrupt.asked:
                # 1. one step
                self.state, metrics = self.step(self.state, split_batch(next(self.batches), self.mesh))
                pending.append(metrics)
                step += 1
                epoch_ends = step % self.epoch_steps == 0
                # 2. log
                if step % LOG_EVERY == 0 or epoch_ends:
                    row = self._log(step, pending, clock)
                    advance(examples * len(pending), f"loss {row['loss']:.3f} (chance {row['chance']:.2f})")
                    pending, clock = [], time.perf_counter()
                # 3. validate and save
                if epoch_ends and self._validation_due(step):
                    self._validate(step)
                    self._save(step)
                    clock = time.perf_counter()
            if interrupt.asked and step > start:  # else the checkpoint on disk is this very state
                if pending:
                    self._log(step, pending, clock)
                if step % self.epoch_steps or not self._validation_due(step):
                    self.scores = {}
                    self._save(step)
        newest = checkpoints.latest(self.out)
        assert newest is not None
        return Outcome(step, interrupt.asked and step < self.total_steps, newest)

    def _validation_due(self, step: int) -> bool:
        epoch = step // self.epoch_steps
        return bool(step == self.total_steps or epoch % self.config.train.eval_every_epochs == 0)

    def _log(self, step: int, pending: list[Metrics], since: float) -> Mapping[str, float]:
        fetched = jax.device_get(pending)  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - since
        row = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
        if not np.isfinite(row["loss"]) or not np.isfinite(row["gradient_norm"]):
            good = checkpoints.latest(self.out)
            kept = (
                f"the last good checkpoint is step {good.step}" if good else "no checkpoint was written yet"
            )
            raise PredictorError(
                f"loss {row['loss']} and gradient norm {row['gradient_norm']} between steps "
                f"{step - len(pending) + 1} and {step}: training stopped; {kept}. "
                "A lower train.learning-rate usually helps."
            )
        update = (step - 1) // self.config.train.accumulate_grad_batches
        row["learning_rate"] = float(self.schedule(update))
        row["samples_per_second"] = self.config.train.batch_size * len(pending) / seconds
        self.history.add({"step": step, "epoch": self._epoch(step), **row})
        return row

    def _validate(self, step: int) -> None:
        self.scores = self.validate(self.state.params)
        self.history.add({"step": step, "epoch": self._epoch(step), **self.scores})
        last = next(row for row in reversed(self.history.rows) if "loss" in row)
        name = checkpoints.SELECT_BY
        console.print(
            f"epoch {self._epoch(step):g}: loss {last['loss']:.3f} (chance {last['chance']:.2f}), "
            f"dev {name} {self.scores[name]:.3f} (query {self.validate.plain_query[name]:.3f}), "
            f"{last['samples_per_second']:,.0f} examples/s",
            soft_wrap=True,
        )

    def _save(self, step: int) -> None:
        facts = {"epoch": self._epoch(step), "metrics": self.scores, **self.facts}
        checkpoints.save(self.out, self.state, self.config, self.batches.get_state(), facts)
        self.history.write_csv()
        plot_curves(self.history, self.validate.plain_query, self.out / "curves.png")

    def _epoch(self, step: int) -> float:
        return round(step / float(self.epoch_steps), 4)
