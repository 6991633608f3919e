"""Our predictors beside what one would do instead, on one data folder, in one table.

    python -m benchmarks.rivals --data DIR --out FILE.json [--config FILE ...] [--seeds 0 1 2]
        [--split test|dev] [--epochs 3] [--only NAME ...]

Its rows:

- query, recency_mix, last_turn_concat, ridge, ridge_context: baselines, tuned on dev;
- conversation_text: the memory's encoder, untrained, on the query and then the turns, the newest first, cut
  at 96 tokens; conversation_text_and_query: the mean of that and the query's embedding;
- sentence_transformers_query: that encoder trained by sentence-transformers' trainer on the same text,
  against all passages, which stay as they are; sentence_transformers_both: passages trained too, with
  MultipleNegativesRankingLoss, and the index encoded anew;
- rewrite: the query as people rewrote it, where rows of the data have the key "rewrite";
- and for each --config, under its file's name, our predictor, trained and evaluated as `prime_jax.train`
  and `prime_jax.evaluate` do.

Baselines are tuned and epochs chosen on dev, so figures of --split dev flatter both. Unseen are queries
none of whose right answers is one in train. Milliseconds are those of one question alone, from its texts to
the vector to search with; "turns kept" is without the embeddings of turns, which a memory has from when
they were said. Times hold on an idle machine alone; a cell has its load average. Megabytes are those of the
weights a question needs. Other options are settings on top of every configuration (--data.store=DIR); all
of them must read the data in the same way.

A finished cell (a method with a seed) is in the file at once, and the same command goes on from there. The
rows of sentence-transformers need packages (`rivals_sentence_transformers.py`); --only runs others without
them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts, with_defaults
from benchmarks.rivals_methods import FineTuning, Method, Task, open_task, ours, untrained_methods
from benchmarks.rivals_table import against, as_json, markdown, mean_figures, row_of
from benchmarks.study import Opened
from prime_jax.config import Config, read_config
from prime_jax.errors import DataError, PredictorError
from prime_jax.files import read_json, write_json
from prime_jax.locks import exclusive

CONFIGS = Path(__file__).parents[1] / "configs"
PACKAGES = (
    *("jax", "flax", "optax", "numpy", "torch", "transformers"),
    *("sentence-transformers", "datasets", "accelerate"),
)
SENTENCE_TRANSFORMERS = {
    "sentence_transformers_query": "query_side",
    "sentence_transformers_both": "both_sides",
}
THEIRS = "of sentence-transformers"
_INSTALL = 'pip install "sentence-transformers[train]" torch==2.13.0'
_ELSEWHERE: Any = {"data": {"path", "store"}, "train": {"seed"}}  # what a cell does not depend on


def say(words: str) -> None:
    """A line of progress."""
    print(words, file=sys.stderr, flush=True)


def sentence_transformers_methods(task: Task, options: FineTuning) -> list[Method]:
    """Its two rows; what they need is imported when they run."""
    missing = [name for name in ("sentence_transformers", "datasets", "accelerate") if not find_spec(name)]
    lacking = f"{missing[0]} is not installed; run: {_INSTALL}" if missing else None

    def run(function: str, seed: int) -> Any:
        from benchmarks import rivals_sentence_transformers as theirs

        return getattr(theirs, function)(task, options, seed)

    return [
        Method(name, partial(run, function), options._asdict(), seeded=True, lacking=lacking)
        for name, function in SENTENCE_TRANSFORMERS.items()
    ]


def our_methods(task: Task, configs: dict[str, Config]) -> list[Method]:
    """A row for each configuration."""
    return [
        Method(
            name,
            partial(ours, task, config),
            config.model_dump(mode="json", exclude=_ELSEWHERE),
            seeded=True,
            ours=True,
        )
        for name, config in configs.items()
    ]


def chosen(methods: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """The methods to run.

    Raises:
        DataError: If one is unknown, or cannot run here and was asked for, or lacks a package.
    """
    known = [method.name for method in methods]
    for name in only or ():
        if name not in known:
            raise DataError(f"--only {name}: there is no such row; there are {', '.join(known)}")
    found = []
    for method in methods:
        if only is not None and method.name not in only:
            continue
        if method.lacking is None:
            found.append(method)
        elif only is not None or method.name in SENTENCE_TRANSFORMERS:
            raise DataError(
                f"{method.name}: {method.lacking}" + ("" if only else ", or name rows with --only")
            )
        else:
            say(f"{method.name}: left out, {method.lacking}")
    return found


def run_missing(methods: Sequence[Method], seeds: Sequence[int], result: dict[str, Any], out: Path) -> None:
    """Run every cell that the file does not hold, and write it as soon as it ends.

    Raises:
        DataError: If the file holds a cell with other settings.
    """
    cells = result.setdefault("cells", {})
    todo = []
    for method in methods:
        settings, known = json.loads(json.dumps(method.settings)), cells.get(method.name, {})
        for key, cell in known.items():  # of other seeds, too: a row is the mean of one thing
            made_with = cell["settings"]
            if method.ours:
                made_with = with_defaults(made_with, _ELSEWHERE)
            if made_with != settings:
                raise DataError(
                    f"{out}: {method.name}, seed {key}, was made with other settings "
                    f"({_difference(made_with, settings)}); choose another --out"
                )
        wanted = {str(seed): seed for seed in seeds} if method.seeded else {"any": 0}
        todo += [(method, seed, key, settings) for key, seed in wanted.items() if key not in known]
    for number, (method, seed, key, settings) in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {method.name}, seed {key}")
        started = time.perf_counter()
        about = {"ours": method.ours, "settings": settings, **facts(*PACKAGES)}
        cell = as_json(method.run(seed))
        about["load"] = round(os.getloadavg()[0], 1)  # more than cores: others ran, too, and times are long
        cells.setdefault(method.name, {})[key] = {**about, **cell}
        write_json(out, result)
        say(f"[{number}/{len(todo)}] {method.name}, seed {key}: {time.perf_counter() - started:.0f} s")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return f"{name}.{_difference(old, new)}"
            return f"{name} {old!r}, now {new!r}"
    raise AssertionError("no setting differs")


def options_of(description: str | None) -> argparse.ArgumentParser:
    """What both tables are told: that of one split, and that of folds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--config", type=Path, nargs="+", metavar="FILE", help="default: frozen and recommended"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=FineTuning().epochs, help=THEIRS)
    parser.add_argument("--learning-rate", type=float, default=FineTuning().learning_rate, help=THEIRS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run")
    return parser


def in_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace, Sequence[str]], None],
) -> None:
    """Read the options and work with them; one command at a time writes a table."""
    given, settings = parser.parse_known_args(argv)
    if given.epochs < 1 or given.learning_rate <= 0:
        parser.error("--epochs must be 1 or more, --learning-rate above 0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs a part of a GPU, too
    try:
        with exclusive(given.out, "a table", lock=given.out.with_name(f".{given.out.name}.lock")):
            work(given, settings)
    except PredictorError as mistake:
        say(f"rivals: {mistake}")
        raise SystemExit(2) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and print the table of all that it holds."""
    parser = options_of(__doc__)
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    in_command(parser, argv, _run)


def _run(given: argparse.Namespace, words: Sequence[str]) -> None:
    result, _ = filled(given, words, given.data, given.split, given.out)
    show(result)


def stored_in(place: Path, words: Sequence[str]) -> list[str]:
    """Settings with one store of embeddings for all data folders, unless they name one."""
    named = any("data.store" in word for word in words)
    return [*words, *([] if named else [f"--data.store={place / 'embeddings'}"])]


def filled(
    given: argparse.Namespace, words: Sequence[str], folder: Path, split: str, out: Path
) -> tuple[dict[str, Any], Task]:
    """The table of one split, with every cell that it lacked."""
    files = given.config or [CONFIGS / "frozen.yaml", CONFIGS / "recommended.yaml"]
    options = [f"--data.path={folder}", *words]
    configs = {file.stem: read_config(file, options) for file in files}
    if len(configs) < len(files):
        raise DataError("--config: two files of one name would be one row")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if config.data != first.data:
            raise DataError(f"--config {name}: reads the data in another way than {next(iter(configs))}")
    task = open_task(first, split)
    theirs = sentence_transformers_methods(task, FineTuning(given.epochs, given.learning_rate))
    rivals = [*untrained_methods(task), *theirs]
    if taken := {method.name for method in rivals} & set(configs):
        raise DataError(f"--config {taken.pop()}: a rival has this name; give the file another one")
    methods = [*rivals, *our_methods(task, configs)]
    same = {
        "set": folder.resolve().name,
        "data_hash": task.data.hash,
        "split": split,
        "encoder": task.encoder.identity,
        **{name: getattr(first.data, name) for name in ("query_prefix", "passage_prefix")},
    }
    result: dict[str, Any] = read_json(out, DataError) if out.exists() else {"made_of": same}
    if result.get("made_of") != same:
        difference = _difference(result.get("made_of", {}), same)
        raise DataError(f"{out}: holds a table of something else ({difference}); choose another --out")
    run_missing(chosen(methods, given.only), given.seeds, result, out)
    result |= conclusion(result["cells"], task.data, [method.name for method in methods])
    write_json(out, result)
    return result, task


def show(result: Mapping[str, Any]) -> None:
    """Print the table, and how ours compare."""
    print(markdown(result["table"], result["ours"]))
    for name, by_rival in result["against"].items():
        for rival, row in by_rival.items():
            print(
                f"{name} against {rival:28}",
                *(f"{metric} {row[metric]['difference']:+.3f} p {row[metric]['p']:.4f}" for metric in row),
            )


def conclusion(cells: Mapping[str, Any], data: Opened, order: Sequence[str]) -> dict[str, Any]:
    """Table and significance of all cells that there are, rivals first."""
    names = sorted(cells, key=lambda name: (name not in order, order.index(name) if name in order else 0))
    predicted = [name for name in names if all(cell["ours"] for cell in cells[name].values())]
    names = [*(name for name in names if name not in predicted), *predicted]
    figures = {name: mean_figures(cells[name], data) for name in names}
    return {
        "queries": len(data.fresh),
        "unseen": int(data.fresh.sum()),
        "groups": len(np.unique(data.groups)),
        "passages": len(data.corpus.embeddings),
        "table": {name: row_of(cells[name], data) for name in names},
        "ours": predicted,
        "against": against(
            {name: figures[name] for name in predicted},
            {name: figures[name] for name in names if name not in predicted},
            data,
        ),
    }


if __name__ == "__main__":
    main()
