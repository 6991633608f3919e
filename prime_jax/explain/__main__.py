"""`prime-jax explain`: say why a steered model predicts what it predicts, for people and for programs."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prime_jax.errors import PredictorError
from prime_jax.files import user_path

SHOWN = 3  # subspaces in the console's table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser(
        "prime-jax explain",
        description="Explain predictions: subspaces, what steering changed, similar known questions.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=user_path, required=True, metavar="DIR", help="run folder of a steered model"
    )
    parser.add_argument(
        "--data", type=user_path, required=True, metavar="DIR", help="data folder (docs/data.md)"
    )
    parser.add_argument(
        "--encoder", metavar="NAME", help="needed where the run's is code (module:attribute); as for training"
    )
    parser.add_argument("--question", action="append", metavar="TEXT", help="explain this; may be repeated")
    parser.add_argument("--steer", metavar="TEXT", help="steer towards this text instead of a variant")
    parser.add_argument("--split", default="dev", help="without --question: explain its first ones (dev)")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="how many of them (default: 20)")
    parser.add_argument(
        "--steering",
        metavar="VARIANT",
        help="zero, keyword, residual, predicted (default: the run's), or centroid, which leaks the answer",
    )
    parser.add_argument("--out", type=user_path, metavar="DIR", help="write explanations.html and .json here")
    given = parser.parse_args(argv)
    try:
        from prime_jax.explain.run import explain_run

        found = explain_run(
            given.run,
            given.data,
            questions=given.question,
            split=given.split,
            count=given.count,
            steering=given.steering,
            steer_towards=given.steer,
            out=given.out,
            encoder=given.encoder,
        )
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax explain: {mistake}", file=sys.stderr)
        return 2
    console = Console()
    for each in found:
        table = Table(title=escape(each.question[:100]), title_justify="left", show_header=False, box=None)
        for name, weight in list(each.routing_distribution.items())[:SHOWN]:
            table.add_row(escape(name), f"{weight:.1%}", "█" * round(30 * weight))
        table.add_row("similar", "", escape(each.similar_known_pairs[0].question[:90]))
        console.print(table)
        console.print(each.actionable_signal, markup=False, highlight=False)
        console.print()
    if given.out:
        print(f"page: {given.out / 'explanations.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
