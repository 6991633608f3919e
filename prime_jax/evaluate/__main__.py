"""`python -m prime_jax.evaluate`: measure a run beside tuned baselines and write a report."""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prime_jax.errors import PredictorError
from prime_jax.files import user_path
from prime_jax.retrieval import INDEXES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser(
        "python -m prime_jax.evaluate",
        description="Measure a run beside tuned baselines and write a report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=user_path, required=True, metavar="DIR", help="run folder, or one checkpoint"
    )
    parser.add_argument(
        "--data", type=user_path, required=True, metavar="DIR", help="data folder (docs/data.md)"
    )
    parser.add_argument("--split", default="test", help="split to measure on (default: test)")
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="DIR", help="where the report is written"
    )
    parser.add_argument("--store", type=user_path, metavar="DIR", help="embedding store (default: the run's)")
    parser.add_argument(
        "--encoder", metavar="NAME", help="needed where the run's is code (module:attribute); as for training"
    )
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and permutation test (default: 0)")
    parser.add_argument(
        "--index",
        choices=INDEXES,
        default="exact",
        help="what searches (default: exact); $QDRANT_URL for qdrant",
    )
    parser.add_argument("--ablation", action="store_true", help="also without context, query or residual")
    parser.add_argument(
        "--steering",
        metavar="VARIANT",
        help="of a steered model: zero, keyword, residual, predicted, or centroid, which leaks the answer",
    )
    given = parser.parse_args(argv)
    try:
        from prime_jax.evaluate.run import evaluate_run

        values = evaluate_run(
            given.run,
            given.data,
            given.split,
            given.out,
            store=given.store,
            encoder=given.encoder,
            seed=given.seed,
            ablation=given.ablation,
            index=given.index,
            steering=given.steering,
        )
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax evaluate: {mistake}", file=sys.stderr)
        return 2
    _print(values, given.out)
    return 0


def _print(values: Mapping[str, Any], out: Path) -> None:
    """The table of methods, the headline, and where the report is."""
    from prime_jax.evaluate.words import method_table

    head, rows = method_table(values)
    table = Table(*head, title=f"{values['split']}: {values['queries']:,} questions")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "predicted" else None)
    console = Console()
    console.print(table)
    console.print(values["headline"], highlight=False)
    if advice := values.get("advice"):
        console.print(advice, highlight=False)
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
