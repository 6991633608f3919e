"""Figures of a hybrid run: rows of windows and jumps, totals, and how they are written."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Totals:
    """Sums over the run so far; costs are in full steps (a forward pass is a third).

    Attributes:
        steps: Real steps.
        windows: Observations.
        jumps: Jumps tried.
        kept: Jumps that stayed.
        virtual_steps: Steps that kept jumps stood for.
        cost: Spent on jumps during training and on the correction at the end.
        divergences: Windows in which something was wrong.
        rollbacks: Times the run went back.
    """

    steps: int = 0
    windows: int = 0
    jumps: int = 0
    kept: int = 0
    virtual_steps: int = 0
    cost: float = 0.0
    divergences: int = 0
    rollbacks: int = 0

    def summary(self) -> dict[str, int | float]:
        """Totals and shares: `overhead` is cost per real step."""
        return {**asdict(self), "overhead": self.cost / max(1, self.steps)}


def to_json(rows: Sequence[Row], totals: Totals) -> str:
    """Everything as JSON; a number that is none (a loss that ran away) becomes null."""
    known = [{name: _finite(value) for name, value in row.items()} for row in rows]
    return json.dumps({"totals": totals.summary(), "rows": known}, indent=1, allow_nan=False) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as one table; a row leaves the columns it does not have empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def console(totals: Totals) -> str:
    """One line for people."""
    return (
        f"hybrid: {totals.kept} of {totals.jumps} jumps kept, they cost {totals.cost:.1f} of {totals.steps} "
        f"steps ({totals.summary()['overhead']:.2%}); {totals.divergences} divergences, "
        f"{totals.rollbacks} rollbacks"
    )


def write(folder: Path, rows: Sequence[Row], totals: Totals) -> None:
    """Write `hybrid.json` and `hybrid.csv` into a folder, which is made; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "hybrid.json", to_json(rows, totals))
    _write(folder / "hybrid.csv", to_csv(rows))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """As `prime_jax.files` does, which this part may not import."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
