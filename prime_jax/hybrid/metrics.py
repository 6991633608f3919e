"""Figures of a hybrid run: rows of windows and jumps, totals, and how they are written."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

    def summary(self) -> dict[str, float]:
        """Totals and shares: `overhead` is cost per real step."""
        return {**asdict(self), "overhead": self.cost / max(1, self.steps)}


def to_json(rows: Sequence[Row], totals: Totals) -> str:
    """Everything as JSON."""
    return json.dumps({"totals": totals.summary(), "rows": list(rows)}, indent=1) + "\n"


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
