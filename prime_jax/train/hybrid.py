"""A watched run: `HybridTrainer` around the compiled step, with control set, place in the data, figures."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax

from prime_jax.config import Config, TrainingConfig, control_rows
from prime_jax.data.control import CONTROL, in_company
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.pipeline import TrainingBatches
from prime_jax.errors import CheckpointError, ConfigError
from prime_jax.hybrid.divergence import DivergedError
from prime_jax.hybrid.metrics import Totals
from prime_jax.hybrid.phases import Phase, PhaseOutcome
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.wrap import HybridTrainer
from prime_jax.train import checkpoints
from prime_jax.train.collective import is_main, say
from prime_jax.train.hybrid_plots import plot_hybrid
from prime_jax.train.judged import Given
from prime_jax.train.memory import GB, bytes_per_device
from prime_jax.train.monitor import History, Row
from prime_jax.train.program import TrainingProgram
from prime_jax.train.state import TrainState
from prime_jax.train.step import Metrics
from prime_jax.types import Batch

WORDS = {
    Phase.WARMUP: "warming up",
    Phase.FULL: "full steps",
    Phase.PREDICT: "jumping",
    Phase.CORRECT: "correcting",
}


class Stepped(NamedTuple):
    """What a step came to.

    Attributes:
        state: After it.
        metrics: Of it.
        step: Steps made; fewer than before where the run went back.
        lost: Why the run cannot go on, or None.
    """

    state: TrainState
    metrics: Metrics
    step: int
    lost: str | None = None


class HybridRun:
    """What a run does beside its steps where `hybrid.enabled` is set.

    Args:
        config: Of the run.
        settings: Its section `hybrid`, checked.
        program: Makes the steps.
        batches: What is trained on; only a rollback moves it.
        data: With the split "control".
        out: Run folder.

    Raises:
        ConfigError: If devices cannot share a control batch.

    Attributes:
        skipped: Batches that were left out for good, after rollbacks.
    """

    def __init__(
        self,
        config: Config,
        settings: HybridConfig,
        program: TrainingProgram,
        batches: TrainingBatches,
        data: EmbeddedDataset,
        out: Path,
    ):
        self.skipped = 0
        self._settings, self._program, self._batches, self._out = settings, program, batches, out
        self._control, self._control_rows = data.splits[CONTROL], control_rows(config)
        train, rows = config.train, self._control_rows
        if rows % program.mesh.size:
            raise ConfigError(
                f"a control batch of {rows} rows does not divide evenly among {program.mesh.size} devices; "
                f"set hybrid.control_rows to a multiple of {program.mesh.size}"
            )
        control = TrainingBatches(
            data,
            CONTROL,
            batch_size=rows,
            seed=settings.seed,
            num_negatives=train.num_negatives if any(map(len, self._control.negatives)) else 0,
            positives=train.positives,
        )
        self._trainer = HybridTrainer(
            self._step,
            _weights,
            _with_weights,
            program.judged_loss,
            settings,
            control=[program.placed(batch) for batch in self._judging(control, train)],
            fresh=self._coming,
            cursor=lambda: batches.place,
            seek=batches.seek,
            rows=_examples,
        )
        self._rows: History
        self._last: tuple[TrainState, Metrics] | None = None
        self._in_window, self._since = 0, 0.0
        self._seconds: list[float] = []

    def begin(self, state: TrainState) -> None:
        """Begin to watch at this state."""
        self._trainer.init(state)
        step = int(state.step)
        self._rows = History(self._out, until_step=step, writing=is_main(), name="hybrid")
        self._trainer.totals = replace(self._trainer.totals, steps=step)
        more = bytes_per_device(self._trainer.hybrid)
        say(
            f"hybrid: {len(self._control)} training examples set aside as control set, in whole "
            f"conversations ({self._settings.control_batches} batches of {self._control_rows} rows); "
            f"watching takes {more / GB:.2f} GB more on each device"
        )

    def restore(self, state: TrainState, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on as when the checkpoint was written; where it tells nothing of that, begin to watch."""
        self.begin(state)
        told = checkpoint.facts.get("hybrid", {})
        self.skipped = int(told.get("skipped", 0))
        try:
            saved = checkpoints.restore_hybrid(checkpoint, self._trainer.saved())
            why = "has no hybrid state"
        except CheckpointError as other:
            saved, why = None, f"has a hybrid state of another structure ({other})"
        if saved is None:
            say(f"{checkpoint.folder} {why}: weights and data go on, watching begins anew")
            return
        trainer = self._trainer
        trainer.restore(saved)
        trainer.totals = Totals(**told["totals"])  # exact, where arrays are float32
        trainer.phases = replace(trainer.phases, threshold=told["threshold"])
        trainer.rows = [_as_it_was(row) for row in self._rows.rows]
        self._in_window = int(saved["numbers"]["pending"])

    def saved(self) -> Any:
        """For a checkpoint: what `restore` needs as arrays."""
        return self._trainer.saved()

    @property
    def facts(self) -> dict[str, Any]:
        """For a checkpoint: what `restore` needs as exact numbers."""
        trainer = self._trainer
        return {
            "totals": asdict(trainer.totals),
            "threshold": trainer.phases.threshold,
            "skipped": self.skipped,
        }

    def step(self, state: TrainState, batch: Batch, step: int) -> Stepped:
        """Make step number `step`, and at the end of a window whatever follows from it."""
        trainer = self._trainer
        known, rollbacks = len(trainer.rows), trainer.totals.rollbacks
        try:
            state, metrics = trainer.step(state, batch)
        except DivergedError as lost:
            assert self._last is not None
            self._note(known, step)
            return Stepped(*self._last, step, str(lost))
        self._last = None
        if self._since:
            self._seconds.append(time.perf_counter() - self._since)
            self._since = 0.0
        if trainer.totals.rollbacks > rollbacks:
            reached, step = step, int(state.step)
            what = trainer.rows[-1]["divergence"]
            say(f"hybrid: {what} up to step {reached}, back to step {step}")
            self.skipped = self._batches.place - step
            self._rows.forget(step)
            kept = [row for row in trainer.rows[:known] if row["step"] <= step]
            trainer.rows[:known], known = kept, len(kept)
        self._note(known, step)
        return Stepped(state, metrics, step)

    def finish(self, state: TrainState, step: int) -> TrainState:
        """Correct the end of the run, and say how that went."""
        known = len(self._trainer.rows)
        state, outcome = self._trainer.finish(state)
        self._note(known, step)
        if outcome is not None:
            say(f"hybrid: at the end {_told(outcome)}")
        return state

    def figures(self) -> dict[str, float]:
        """For the history and the trackers."""
        trainer, totals = self._trainer, self._trainer.totals
        found = {
            "hybrid_phase": float(trainer.phases.phase),
            "hybrid_jumps": float(totals.jumps),
            "hybrid_kept": float(totals.kept),
            "hybrid_saved": float(totals.virtual_steps - totals.cost),
            "hybrid_overhead": float(totals.summary()["overhead"]),
            "hybrid_divergences": float(totals.divergences),
            "hybrid_rollbacks": float(totals.rollbacks),
        }
        for steps, sure in zip(self._settings.horizons[1:], trainer.confidence, strict=False):
            found[f"hybrid_confidence_{steps}"] = sure
        judged = [row for row in trainer.rows if row.get("after") is not None]
        if judged and judged[-1]["before"] is not None:
            found["hybrid_loss_gap"] = judged[-1]["after"] - judged[-1]["before"]
        if self._seconds:
            found["hybrid_ms"] = 1000 * median(self._seconds) / self._settings.window
        return found

    def words(self) -> str:
        """For the progress bar."""
        totals = self._trainer.totals
        jumps = f", {totals.kept} of {totals.jumps} jumps kept" if totals.jumps else ""
        return f"hybrid: {WORDS[self._trainer.phases.phase]}{jumps}"

    def report(self) -> None:
        """Write hybrid.json, hybrid.csv and hybrid.png into the run folder."""
        self._trainer.report(self._out)
        plot_hybrid(self._trainer.rows, self._settings.horizons[1:], self._out / "hybrid.png")

    def summary(self) -> str:
        """One line on the whole run."""
        return self._trainer.report(self._out)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        self._last = self._program(state, batch)
        self._in_window += 1
        if self._in_window == self._settings.window:  # the trainer waits now, so the clock may
            jax.block_until_ready(self._last[1]["loss"])
            self._in_window, self._since = 0, time.perf_counter()
        return self._last

    def _judging(self, control: TrainingBatches, train: TrainingConfig) -> Sequence[Batch]:
        """The control batches; their rows are told from as many passages as those of a training batch."""
        batches = control.coming(self._settings.control_batches)
        if train.negatives == "corpus":
            return batches
        return in_company(batches, train.batch_size)

    def _coming(self, count: int) -> Sequence[Given]:
        return [self._program.placed(batch) for batch in self._batches.coming(count)]

    def _note(self, known: int, step: int) -> None:
        """Keep the trainer's new rows; `at` is where one happened, if the run went back from there."""
        for place, row in enumerate(self._trainer.rows[known:], start=known):
            told = {name: _finite(value) for name, value in row.items()}
            self._trainer.rows[place] = told
            at = {} if told["step"] == step else {"at": told["step"]}
            self._rows.add({**told, "step": step, **at})


def _as_it_was(row: Row) -> dict[str, Any]:
    """A row of the trainer from one of hybrid.jsonl."""
    return {
        name: value for name, value in {**row, "step": row.get("at", row["step"])}.items() if name != "at"
    }


def _finite(value: Any) -> Any:
    """Numbers that files can hold."""
    ended = isinstance(value, float) and value - value != 0.0
    return None if ended else value


def _told(end: PhaseOutcome) -> str:
    """What became of the weights at the end, and why."""
    if end.choice == "raw":
        return "nothing was better than the weights as trained on the control batches that choose"
    what = _plain(end.choice)
    losses = f"loss {end.after:.4f} against {end.before:.4f} of the weights as trained"
    if end.kept:
        return (
            f"{what} took the place of the weights as trained: {losses}, on the control batches that confirm"
        )
    return f"the weights stay as trained: {what} seemed better, but were not confirmed ({losses})"


def _plain(choice: str) -> str:
    average = choice.removeprefix("ema ")
    if average != choice:
        return f"the weights averaged over {average} steps"
    if choice == "corrected":
        return "the corrected weights"
    times = choice.removeprefix("ahead").removesuffix("times").strip()
    return f"the weights {times} stretches ahead" if times else "the weights a stretch ahead"


def _examples(given: Batch | Given) -> int:
    """Examples of a batch; the passages that a judged one brings along are none."""
    batch = given.batch if isinstance(given, Given) else given
    return len(batch.query)


def _weights(state: TrainState) -> Any:
    return state.params


def _with_weights(state: TrainState, params: Any) -> TrainState:
    """Other weights in the places of the old ones: a compiled step takes no others."""
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    return replace(state, params=placed)
