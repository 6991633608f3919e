"""What a run leaves to be read: history as JSON lines and CSV, and curves as a picture."""

import csv
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prime_jax.config import Config
from prime_jax.errors import CheckpointError
from prime_jax.files import atomic_path, write_text
from prime_jax.losses.jasper import COMPONENTS, ROUTING_COMPONENTS
from prime_jax.train import checkpoints
from prime_jax.train.flops import DType, flops_per_example, mfu

Row = Mapping[str, Any]


class History:
    """The run's rows, one per logged interval or validation, on disk as they come.

    A row of training has `loss`, one of validation has `MRR@10`; both have `step` and `epoch`.
    """

    def __init__(self, run: Path, *, until_step: int, writing: bool = True, name: str = "history"):
        """Take up the history of `run`, dropping rows after `until_step` (they will be written again).

        Args:
            run: Run folder.
            until_step: Last step whose rows stay.
            writing: Whether rows go to disk; one process of a run does that.
            name: Of the files.
        """
        self._writing = writing
        self._jsonl = run / f"{name}.jsonl"
        self._csv = run / f"{name}.csv"
        self.rows: list[Row] = self._read()
        self.forget(until_step)

    def forget(self, until_step: int) -> None:
        """Drop the rows after a step: what they tell of will be done again."""
        self.rows = [row for row in self.rows if row["step"] <= until_step]
        if self._writing:
            write_text(self._jsonl, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        """Append a row."""
        self.rows.append(row)
        if not self._writing:
            return
        with self._jsonl.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")

    def write_csv(self) -> None:
        """Write all rows as one table; a row leaves the columns it does not have empty."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self._csv, table.getvalue())

    def _read(self) -> list[Row]:
        if not self._jsonl.exists():
            return []
        lines = self._jsonl.read_text(encoding="utf-8").splitlines()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if number == len(lines):  # cut off while it was being written
                    break
                raise CheckpointError(f"{self._jsonl}, line {number}: not valid JSON") from None
        return rows


class Speed:
    """Samples per second, and how much of the devices' arithmetic they use."""

    def __init__(self, config: Config, devices: int):
        self._config, self._devices = config, devices
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin to count, after whatever was not training."""
        self._since = time.perf_counter()

    def since_start(self, steps: int) -> dict[str, float]:
        """`samples_per_second`, and `mfu` (0 to 1) where the peak of the device is known."""
        rate = self._config.train.batch_size * steps / (time.perf_counter() - self._since)
        per_example = flops_per_example(self._config.model, recomputed=False)
        dtype: DType = "bfloat16" if self._config.train.mixed_precision else "float32"
        used = mfu(rate, per_example, self._devices, jax.local_devices()[0].device_kind, dtype)
        return {"samples_per_second": rate, **({} if used is None else {"mfu": used})}


def note(row: Row) -> str:
    """The end of the progress line: what tells whether training goes well."""
    parts = [
        f"loss {row['loss']:.3f} (chance {row['chance']:.2f})",
        f"gradient {row['gradient_norm']:.2g}",
        f"{row['negatives']:,.0f} negatives",
    ]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    return ", ".join(parts)


class Trace:
    """A profile of a few steps, written for TensorBoard or Perfetto; nothing where there is no folder."""

    FIRST, LAST = 3, 8  # steps since the start; the first ones compile

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def reached(self, step: int) -> None:
        """Say how many steps were made since the start."""
        if self._folder is not None and step == self.FIRST:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self.LAST:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def plot_curves(history: History, plain_query: Mapping[str, float], file: Path) -> bool:
    """Draw loss against chance and validation MRR@10 against the plain query.

    Returns:
        Whether it was drawn; without matplotlib (extra `plots`) it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    training = [row for row in history.rows if "loss" in row]
    validation = [row for row in history.rows if "MRR@10" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in training]
    left.plot(steps, [row["loss"] for row in training], label="InfoNCE")
    left.plot(steps, [row["chance"] for row in training], "--", color="grey", label="chance")
    left.set(xlabel="step", ylabel="nats", title="Training loss", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(
        [row["step"] for row in validation], [row["MRR@10"] for row in validation], "o-", label="predicted"
    )
    right.axhline(plain_query["MRR@10"], ls="--", color="grey", label="plain query")
    right.set(xlabel="step", ylabel="MRR@10", title="Retrieval on the dev split", ylim=(0, None))
    right.legend(frameon=False)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def last_good(run: Path) -> str:
    """What a message says of where a run that ends here can go on."""
    newest = checkpoints.latest(run)
    return f"the last good checkpoint is step {newest.step}" if newest else "no checkpoint was written yet"


def not_finite(metrics: Mapping[str, Any]) -> str:
    """The loss, and whichever of its parts are no finite numbers."""
    parts = (*COMPONENTS, *ROUTING_COMPONENTS)
    wrong = [name for name in parts if name in metrics and not np.isfinite(metrics[name])]
    return ", ".join(f"{name} {metrics[name]}" for name in ("loss", *wrong)) + " and "
