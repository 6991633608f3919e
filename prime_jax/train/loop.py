"""The training loop: all effects of a run, in one order."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import Config, to_yaml
from prime_jax.data.pipeline import TrainingBatches, steps_per_epoch
from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.files import write_json, write_text
from prime_jax.locks import Ownership
from prime_jax.pretrained.pair import FOLDER as ENCODER
from prime_jax.progress import progress
from prime_jax.train import checkpoints, mining, setup
from prime_jax.train.blending import SHARE, Blending, words_of
from prime_jax.train.collective import any_process, barrier, is_main, say
from prime_jax.train.hybrid import HybridRun
from prime_jax.train.interrupt import interruptible
from prime_jax.train.memory import explain_exhausted
from prime_jax.train.monitor import History, Speed, Trace, last_good, not_finite, note, plot_curves
from prime_jax.train.optim import learning_rate
from prime_jax.train.predicting import SplitPredictor
from prime_jax.train.program import TrainingProgram
from prime_jax.train.state import build_graph
from prime_jax.train.steered_plots import plot_steering
from prime_jax.train.step import Metrics
from prime_jax.train.text_start import completed, packed_batches
from prime_jax.train.trackers import open_trackers
from prime_jax.train.validate import Validated, Validator


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


def train(config: Config, out: Path, *, resume: bool = False, profile: bool = False) -> Outcome:
    """Train a predictor and leave everything about the run in `out`.

    Leaves config.yaml, history.jsonl, history.csv, curves.png and checkpoints/; with `hybrid.enabled` also
    hybrid.json, hybrid.csv and hybrid.png. The first Ctrl-C or SIGTERM finishes the step, saves, and returns.
    With several processes every one of them calls this with the same arguments; the first one writes what is
    not a checkpoint.

    Args:
        config: What to do.
        out: Run folder; with several processes one that all of them see.
        resume: Go on from the newest checkpoint in `out`.
        profile: Write a trace of a few steps to `out`/profile, for TensorBoard or Perfetto.

    Raises:
        ConfigError: If settings contradict each other, the data, the run folder or the memory, or another
            process trains in that folder.
        DataError: If the data is not as it should be.
        CheckpointError: If the run folder cannot be read or written; what was complete before stays so.
        PredictorError: If the loss is no longer a finite number.
    """
    config = completed(config)
    setup.check_folder(config, out, resume)
    with setup.held(out) as holding:
        setup.check_folder(config, out, resume)  # another run may have ended here in between
        prepared = setup.prepared(config)
        try:
            run = _Run(config, out, prepared, holding)
            (run.restore if resume else run.begin)()
            if is_main():
                write_text(out / checkpoints.CONFIG, to_yaml(config))
            return run.run(profile=profile)
        except OSError as failed:
            raise CheckpointError(f"{out}: cannot be written ({failed}); {last_good(out)}") from failed
        except jax.errors.JaxRuntimeError as failed:
            if "RESOURCE_EXHAUSTED" not in str(failed):
                raise
            raise explain_exhausted(failed, config) from failed


class _Run:
    """One run in progress: its program, its data, its files."""

    def __init__(self, config: Config, out: Path, prepared: setup.Prepared, holding: Ownership | None = None):
        self.holding = holding
        settings, (data, facts, steering, texts, watching, start) = config.train, prepared
        self.config, self.out, self.data, self.facts, self.texts = config, out, data, facts, texts
        batch_size, positives = settings.batch_size, settings.positives
        self.epoch_steps = steps_per_epoch(data, "train", batch_size=batch_size, positives=positives)
        self.total_steps = self.epoch_steps * settings.num_epochs
        updates = max(1, self.total_steps // settings.accumulate_grad_batches)
        setup.warn(config, updates)
        self.schedule = learning_rate(settings, updates)
        self.batches = TrainingBatches(
            data,
            "train",
            batch_size=batch_size,
            seed=settings.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_negatives=settings.num_negatives,
            positives=positives,
            steering=None if steering is None else setup.steered_rows(config, data, steering),
            tokens=None if texts is None else texts.tokens,
            conversations=packed_batches(config, data, "train"),
        )
        self.program = TrainingProgram(
            config,
            data,
            self.total_steps,
            epoch_steps=self.epoch_steps,
            steering=steering,
            encoder=None if texts is None else texts.encoder,
        )
        self.copied = () if start is None else (start.tokenizer,)
        self.state = self.program.initial_state(setup.starting_weights(config, start))
        self.blending = Blending(self.state) if settings.blend_with_start else None
        graph, mesh = build_graph(config.model, jnp.float32), self.program.mesh
        self.validate = Validator(
            graph, data, "dev", mesh, steering=steering, judge_with=config.steering.judge_with
        )
        self.predict_train = SplitPredictor(graph, data, "train", mesh)
        self.speed = Speed(config, mesh.size)
        self.history: History
        self.mined: mining.Table | None = None
        self.as_trained: dict[str, float] = {}
        self.hybrid: HybridRun | None = None
        if watching is not None:
            self.hybrid = HybridRun(config, watching, self.program, self.batches, data, out)

    def begin(self) -> None:
        """Start with an empty history."""
        self.history = History(self.out, until_step=0, writing=is_main())
        if self.hybrid is not None:
            self.hybrid.begin(self.state)

    def restore(self) -> None:
        """Continue where the newest checkpoint ended: parameters, optimizer, data order, history."""
        checkpoint = checkpoints.latest(self.out)
        if checkpoint is None:
            raise CheckpointError(
                f"{self.out}: no complete checkpoint to resume from; start without --resume"
            )
        for fact in ("data_hash", "encoder", "steering_hash", "start"):
            before, now = checkpoint.facts.get(fact), self.facts.get(fact)
            if fact == "encoder":  # that of the start, where it was trained
                before = checkpoint.facts.get("encoder_start", before)
            if before != now:
                raise CheckpointError(
                    f"{checkpoint.folder}: was trained with {fact} {before!r}, now it is {now!r}; resuming "
                    "would mix two runs"
                )
        self.state, self.mined = checkpoints.restore(checkpoint, self.state)
        self.history = History(self.out, until_step=checkpoint.step, writing=is_main())
        if self.hybrid is not None:
            self.hybrid.restore(self.state, checkpoint)
        barrier("restored")
        if is_main():
            checkpoints.remove_leftovers(self.out)
        say(f"resuming from step {checkpoint.step} of {self.total_steps}")

    def run(self, *, profile: bool) -> Outcome:
        """Train to the end or until asked to stop."""
        start = step = int(self.state.step)
        examples, log_every = self.config.train.batch_size, self.config.monitor.log_every
        pending: list[Metrics] = []
        broken = False  # a loss is no number; at the end of its window the run goes back or ends
        self._announce()
        with ExitStack() as opened:
            interrupt = opened.enter_context(interruptible())
            trace = opened.enter_context(Trace(self.out / "profile" if profile and is_main() else None))
            self.tracker = opened.enter_context(open_trackers(self.config, self.out))
            self.saver = opened.enter_context(checkpoints.Checkpoints(self.out))
            advance = opened.enter_context(
                progress("training", (self.total_steps - start) * examples, "examples")
            )
            stop = any_process(interrupt.asked)
            self._use_negatives(step)
            self.speed.start()
            while (step < self.total_steps and not stop) or broken:
                # 1. one step, or the way back to an earlier one
                trace.reached(step - start)
                before, step = step, self._step(step, pending)
                if step <= before:
                    advance(examples * self._forget(step, before, pending))
                    broken = False
                    continue
                epoch_ends = step % self.epoch_steps == 0
                # 2. log, and hear whether somebody wants the run to stop
                alone = jax.process_count() == 1
                log_due = epoch_ends or step % log_every == 0 or self._save_due(step)
                if log_due or (alone and interrupt.asked):
                    row = self._log(step, pending)
                    broken = row is None
                    if row is None:
                        continue
                    advance(examples * len(pending), self._note(row))
                    pending = []
                    stop = any_process(interrupt.asked)
                # 3. correct the end, validate and save
                if self.hybrid is not None and step == self.total_steps:
                    self._finish(self.hybrid, step)
                validation_due = epoch_ends and self._validation_due(step)
                found = self._validate(step) if validation_due else Validated({}, None)
                if validation_due or stop or self._save_due(step):
                    self._save(step, found)
                    self.speed.start()
                # 4. new negatives where an epoch begins
                if epoch_ends and step < self.total_steps:
                    self._use_negatives(step)
        if self.hybrid is not None:
            say(self.hybrid.summary())
        barrier("finished")
        newest = checkpoints.latest(self.out)
        assert newest is not None
        return Outcome(step, stop and step < self.total_steps, newest)

    def _step(self, step: int, pending: list[Metrics]) -> int:
        """Make a step; returns how many are made now, fewer where a watched run went back."""
        batch = next(self.batches)
        if self.hybrid is None:
            self.state, metrics = self.program(self.state, batch)
            pending.append(metrics)
            return step + 1
        done = self.hybrid.step(self.state, batch, step + 1)
        self.state = done.state
        pending.append(done.metrics)
        if done.lost is not None:
            self._sound(step + 1, jax.device_get(pending))
            raise PredictorError(f"{done.lost}; {last_good(self.out)}")
        return done.step

    def _forget(self, step: int, before: int, pending: list[Metrics]) -> int:
        """Forget what was made after `step`; returns by how much the progress bar moves (back)."""
        logged = before + 1 - len(pending)
        del pending[max(0, step - logged) :]
        self.history.forget(step)
        return min(0, step - logged)

    def _finish(self, hybrid: HybridRun, step: int) -> None:
        """Correct the end; dev's figures of the weights before it are told beside those after it."""
        if self.config.hybrid.correct:
            scores = self.validate(self.state).scores
            self.as_trained = {f"as trained {name}": scores[name] for name in scores if "MRR@10" in name}
        self.state = hybrid.finish(self.state, step)

    def _note(self, row: Mapping[str, float]) -> str:
        return note(row) if self.hybrid is None else f"{note(row)}, {self.hybrid.words()}"

    def _announce(self) -> None:
        settings = self.config.train
        query = self.validate.plain_query[checkpoints.SELECT_BY]
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(
            f"{self.total_steps} steps of {settings.batch_size} examples on {self.program.mesh.size} "
            f"device(s){processes}; dev {checkpoints.SELECT_BY} of the plain query {query:.3f}"
        )

    def _use_negatives(self, step: int) -> None:
        """Mine hard negatives where it is time to, and add them to the batches from `step` on."""
        settings = self.config.train
        epoch = step // self.epoch_steps
        due = step % self.epoch_steps == 0 and epoch % settings.mine_every_epochs == 0
        if settings.mined_negatives and (due or self.mined is None):
            texts, predict = self.texts, self.predict_train
            predict = predict if texts is None else predict.over(texts.embedded(self.state))
            self.mined = mining.mined_now(settings, self.data, predict, self.state)
            found = np.mean(np.sum(self.mined >= 0, axis=1))
            say(f"mined {found:.1f} hard negatives per example")
        self.batches.seek(step + self._skipped)
        if settings.mined_negatives or settings.context_negatives:
            self.batches.add_negatives(mining.beside_the_given(settings, self.data, self.mined))

    def _validation_due(self, step: int) -> bool:
        epoch = step // self.epoch_steps
        return bool(step == self.total_steps or epoch % self.config.train.eval_every_epochs == 0)

    def _save_due(self, step: int) -> bool:
        every = self.config.train.save_every_steps
        return bool(every and step % every == 0)

    def _sound(self, step: int, fetched: list[dict[str, Any]], *, patience: int = 0) -> bool:
        """Give up at the first loss that is no number, unless `patience` steps were not made since."""
        for index, metrics in enumerate(fetched):
            if not metrics["finite"]:
                if len(fetched) - index > patience:
                    self._give_up(step - len(fetched) + index + 1, metrics)
                return False
        return True

    def _log(self, step: int, pending: list[Metrics]) -> dict[str, float] | None:
        """The means since the last row; None where a watched run has to look at them first."""
        fetched = jax.device_get(pending)  # waits for the device, so the clock is read after it
        window = 0 if self.hybrid is None else self.config.hybrid.window
        if not self._sound(step, fetched, patience=window):
            return None
        names = [name for name in fetched[0] if name != "finite"]
        row = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in names}
        update = (step - 1) // self.config.train.accumulate_grad_batches
        row["learning_rate"] = float(self.schedule(update))
        row |= self.speed.since_start(len(pending))
        if self.hybrid is not None:
            row |= self.hybrid.figures()
        self.history.add({"step": step, "epoch": self._epoch(step), **row})
        self.tracker.log(step, row)
        self.speed.start()
        return row

    def _give_up(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stop for a loss that is no finite number; the state is still the one before that step."""
        ids = self.batches.examples_of(step - 1 + self._skipped)
        file = self.out / f"bad_batch_{step}.json"
        if is_main():
            write_json(file, {"step": step, "examples": ids})
        known = checkpoints.latest(self.out)
        if step > 1 and (known is None or known.step != step - 1):
            self.state = replace(self.state, halted=jnp.zeros_like(self.state.halted))
            self._save(step - 1, Validated({}, None), watched=False)
            self.saver.wait()
        raise PredictorError(
            f"{not_finite(metrics)}gradient norm {metrics['gradient_norm']} in step {step}: training "
            f"stopped before that step could change anything; {last_good(self.out)}. Its batch: "
            f"{', '.join(ids[:3])} and {len(ids) - 3} more, all in {file}. If the examples are sound, a "
            "lower train.learning-rate usually helps."
        )

    def _validate(self, step: int) -> Validated:
        validate = self.validate
        if self.texts is not None:
            validate = validate.over(self.texts.embedded(self.state))
        state, shares, select_by = self.state, dict[str, float](), self.config.train.select_by
        if self.blending is not None:
            state, shares[SHARE] = self.blending.best(state, partial(validate.score, select_by))
        found = validate(state)._replace(facts=shares)
        scores = found.scores
        if not scores:  # another process has them
            return found
        self.history.add({"step": step, "epoch": self._epoch(step), **scores, **self.as_trained, **shares})
        self.tracker.log(step, {**scores, **self.as_trained})
        last = next(row for row in reversed(self.history.rows) if "loss" in row)
        name = checkpoints.SELECT_BY
        say(
            f"epoch {self._epoch(step):g}: loss {last['loss']:.3f} (chance {last['chance']:.2f}), "
            f"dev {name} {scores[name]:.3f}{words_of(shares)} (query {self.validate.plain_query[name]:.3f}), "
            f"{last['samples_per_second']:,.0f} examples/s"
        )
        if self.validate.collapsing(scores):
            say(self.validate.warning(scores))
        return found

    def _save(self, step: int, found: Validated, *, watched: bool = True) -> None:
        if self.holding is not None:
            self.holding.check()
        facts = {"epoch": self._epoch(step), "metrics": found.scores, **self.facts, **found.facts}
        facts["select_by"] = self.config.train.select_by
        with ExitStack() as written:
            copied = self.copied
            if self.texts is not None:
                encoder = Path(written.enter_context(tempfile.TemporaryDirectory(dir=self.out))) / ENCODER
                facts["encoder"] = self.texts.write(self.state, encoder).identity
                copied = (encoder,)
            hybrid = None
            if self.hybrid is not None:
                facts["hybrid"] = self.hybrid.facts
                hybrid = self.hybrid.saved() if watched else None
            extras = (self.mined, found.confidence, copied, hybrid, found.state)
            self.saver.save(self.state, self.config, facts, *extras)
            if self.texts is not None:
                self.saver.wait()
        if is_main():
            self.history.write_csv()
            plot_curves(self.history, self.validate.plain_query, self.out / "curves.png")
            if self.config.steered:
                plain = self.validate.plain_query[checkpoints.SELECT_BY]
                plot_steering(self.history, plain, self.out / "steering.png")
            if self.hybrid is not None:
                self.hybrid.report()

    @property
    def _skipped(self) -> int:
        return 0 if self.hybrid is None else self.hybrid.skipped

    def _epoch(self, step: int) -> float:
        return round(step / float(self.epoch_steps), 4)
