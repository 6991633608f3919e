"""`prime-jax tune`: what can be had without training, compared on dev; the best one as a bundle."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax._version import __version__
from prime_jax.errors import ConfigError, PredictorError
from prime_jax.evaluate import UNTRAINED
from prime_jax.files import user_path, write_json

if TYPE_CHECKING:
    from prime_jax.config import DataConfig
    from prime_jax.evaluate.untrained import Candidate, Comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser(
        "prime-jax tune",
        description="Compare what needs no training on a data folder: tune each candidate on dev, print the "
        "figures, and write the best one as a bundle like any other.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=user_path, required=True, metavar="DIR", help="data folder, docs/data.md"
    )
    add_source_options(parser)
    parser.add_argument("--out", type=user_path, metavar="DIR", help="bundle of the best one")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=UNTRAINED,
        default=UNTRAINED,
        metavar="NAME",
        help=f"of {', '.join(UNTRAINED)}",
    )
    given = parser.parse_args(argv)
    try:
        from prime_jax.evaluate.untrained import compare_untrained

        source, turns = source_of_data(given)
        found = compare_untrained(source, max_turns=turns, only=given.only)
        _print(found)
        if given.json is not None:
            write_json(given.json, as_json(found))
        if given.out is not None:
            from prime_jax.export.bundle import Options

            write_candidate(found.best, found, given.out, Options())
            print(f"bundle: {given.out}")
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax tune: {mistake}", file=sys.stderr)
        return 2
    return 0


def add_source_options(parser: ArgumentParser) -> None:
    """The options that say how a data folder is read where there is no run to say it."""
    parser.add_argument("--encoder", metavar="NAME", help="as for training (default: the run's, or minilm)")
    parser.add_argument("--store", type=user_path, metavar="DIR", help="embedding store")
    parser.add_argument("--query-prefix", metavar="TEXT", help="what the encoder wants before queries")
    parser.add_argument(
        "--passage-prefix", metavar="TEXT", help="and before passages (default: the encoder's own)"
    )
    parser.add_argument("--max-turns", type=int, metavar="N", help="most turns of a query (default: 10)")


def source_of_data(given: Namespace) -> tuple["DataConfig", int]:
    """How a data folder is read, and how many turns are looked at, as these options say.

    Raises:
        ConfigError: If one is out of bounds.
    """
    from pydantic import ValidationError

    from prime_jax.config import DataConfig
    from prime_jax.models.mix import MixConfig

    said = {
        "path": str(given.data),
        "encoder": given.encoder,
        "store": None if given.store is None else str(given.store),
        "query_prefix": given.query_prefix,
        "passage_prefix": given.passage_prefix,
    }
    try:
        source = DataConfig(**{name: value for name, value in said.items() if value is not None})
        turns = 10 if given.max_turns is None else given.max_turns
        return source, MixConfig(max_context_length=turns).max_context_length
    except ValidationError as unfit:
        raise ConfigError(f"--max-turns: {unfit.errors()[0]['msg']}") from None


def write_candidate(
    candidate: "Candidate", compared: "Comparison", out: Path, options: Any
) -> dict[str, Any]:
    """Write a candidate as a bundle; gives what parity.json holds."""
    from prime_jax.evaluate.untrained import model_of
    from prime_jax.export.bundle import INPUT_FACTS, write_bundle

    model, source, own_facts = model_of(candidate, compared)
    data = compared.data
    facts = {
        **data.source.model_dump(include=set(INPUT_FACTS)),
        "encoder": data.encoder.identity,
        "metrics": candidate.figures,
        "data_hash": data.dataset.hash,
        **own_facts,
    }
    return write_bundle(model, out, facts=facts, options=options, source=source)


def as_json(found: "Comparison") -> dict[str, Any]:
    """The figures, and what they were measured on."""
    data = found.data
    return {
        "prime_jax": __version__,
        "data_hash": data.dataset.hash,
        "encoder": data.encoder.identity,
        "max_turns": found.max_turns,
        "questions": len(found.splits["dev"].query),
        "passages": len(data.embedded.corpus_ids),
        "best": found.best.name,
        "candidates": {
            one.name: {"settings": one.settings, **one.figures, "MRR@10 interval": one.interval}
            for one in found.candidates
        },
        "impossible": found.impossible,
    }


def _print(found: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    queries = len(found.splits["dev"].query)
    table = Table("", "settings", "P@5", "MRR@10", "95%", title=f"dev: {queries:,} questions")
    for one in found.candidates:
        settings = ", ".join(f"{name} {value:g}" for name, value in one.settings.items())
        low, high = one.interval
        row = (one.name, settings, *(f"{one.figures[name]:.3f}" for name in ("P@5", "MRR@10")))
        table.add_row(*row, f"{low:.3f} to {high:.3f}", style="bold" if one is found.best else None)
    console = Console()
    console.print(table)
    for name, why in found.impossible.items():
        console.print(f"{name} is not there: {why}", highlight=False)
    console.print(
        f"best on dev: {found.best.name}. Each was tuned on these very questions, which flatters those with "
        "many settings; nothing but the ridge rows was fitted to train.",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
