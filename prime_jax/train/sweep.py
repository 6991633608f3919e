"""`prime-jax sweep`: try settings, several seeds each, and keep what was best on dev.

    prime-jax sweep --config configs/prime_small.yaml --out sweeps/a --trials 40 --seeds 0 1 2 --data.path DIR
    \
        --try train.temperature=0.02,0.05,0.07 --try model.dropout=0.1..0.4 --try
        train.learning_rate=1e-4~3e-3

`a,b,c` is a choice, `a..b` a range, `a~b` a range on a logarithmic scale. The search is Optuna's: all
combinations with --grid, otherwise the tree-structured Parzen estimator (Bergstra et al. 2011), seeded. A
stopped sweep goes on with the same command. What is judged is the mean over the seeds of the figure that
checkpoints are chosen by (`train.select_by`); report the winner on a split that chose nothing.
"""

import itertools
import json
import shutil
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from prime_jax.config import Config, read_config, to_yaml
from prime_jax.errors import ConfigError, PredictorError
from prime_jax.files import user_path, write_json, write_text
from prime_jax.locks import exclusive

RESULTS = "results.json"
BEST = "best.yaml"
SHOWN = 10


class Range(NamedTuple):
    """Numbers from `low` to `high`; whole ones where both ends are."""

    low: float
    high: float
    logarithmic: bool


Choice = tuple[Any, ...]
Space = dict[str, Range | Choice]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake, 130 when interrupted."""
    parser = ArgumentParser(
        "prime-jax sweep",
        description=(__doc__ or "").split("\n\n", 1)[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=user_path, metavar="FILE", help="YAML file with the other settings")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--try", dest="tried", action="append", required=True, metavar="NAME=VALUES")
    parser.add_argument("--trials", type=int, default=20, help="settings to try (default: 20; --grid: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="train.seed of each (default: 0)")
    parser.add_argument("--grid", action="store_true", help="try all combinations of choices")
    given, settings = parser.parse_known_args(argv)
    try:
        space = parse_space(given.tried)
        results = sweep(
            given.config, settings, space, given.out, trials=given.trials, seeds=given.seeds, grid=given.grid
        )
    except PredictorError as mistake:
        print(f"prime-jax sweep: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with the same command", file=sys.stderr)
        return 130
    _print(results, given.out)
    return 0


def parse_space(words: Sequence[str]) -> Space:
    """What to try, from words such as `train.temperature=0.02,0.05` and `model.dropout=0.1..0.4`.

    Raises:
        ConfigError: If a word is malformed, or names a setting twice.
    """
    space: Space = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values or name in space:
            raise ConfigError(f"--try {word}: expected NAME=VALUES, each name once")
        if ".." in values or "~" in values:
            low, _, high = values.partition("~" if "~" in values else "..")
            space[name] = _range(word, low, high, "~" in values)
        else:
            space[name] = tuple(_value(text.strip()) for text in values.split(","))
    return space


def sweep(
    file: Path | None,
    settings: Sequence[str],
    space: Space,
    out: Path,
    *,
    trials: int = 20,
    seeds: Sequence[int] = (0,),
    grid: bool = False,
) -> list[dict[str, Any]]:
    """Try settings and write results.json and best.yaml.

    Args:
        file: YAML file with the settings that are not tried, or None for the defaults.
        settings: More of them, as command-line words.
        space: What to try, by setting.
        out: Folder of the sweep; one that was stopped goes on.
        trials: How many settings to try in all; with `grid` all combinations are.
        seeds: `train.seed` of the runs of each.
        grid: Try every combination of choices.

    Returns:
        What results.json holds, the best first: `settings`, `mean`, `values` of each seed, `metrics` of each.

    Raises:
        ConfigError: If optuna is missing, a setting is unknown or out of bounds, a grid has a range, or
            another sweep writes there.
        PredictorError: As `prime_jax.train.loop.train`; what was tried before stays.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError('a sweep needs optuna; run: pip install "prime-jax[sweep]"') from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=0)
    if grid:
        choices = _all_choices(space)
        trials = len(list(itertools.product(*choices.values())))
        sampler = optuna.samplers.GridSampler(choices, seed=0)
    for edge in _edges(space):  # every mistake before the first run
        configured(file, settings, edge, seeds[0])
    with exclusive(out, "a sweep"):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(out / "journal.log"))),
            sampler=sampler,
            direction="maximize",
            load_if_exists=True,
        )
        described = {"space": {name: list(values) for name, values in space.items()}, "seeds": list(seeds)}
        if study.user_attrs.get("sweep", described) != described:
            raise ConfigError(f"{out}: holds a sweep of other settings or seeds; choose another --out")
        study.set_user_attr("sweep", described)
        console = Console(stderr=True)

        def judge(trial: Any) -> float:
            chosen = {name: _suggested(trial, name, values) for name, values in space.items()}
            found = [_run(configured(file, settings, chosen, seed), out / "running") for seed in seeds]
            trial.set_user_attr("found", found)
            mean = statistics.fmean(one["value"] for one in found)
            console.print(
                f"trial {trial.number + 1}: {mean:.4f}  {_words(chosen)}", highlight=False, markup=False
            )
            return mean

        done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        study.optimize(judge, n_trials=max(0, trials - len(done)))
        results = _results(study, space)
        write_json(out / RESULTS, results)
        write_text(out / BEST, to_yaml(configured(file, settings, results[0]["settings"], seeds[0])))
        return results


def configured(file: Path | None, settings: Sequence[str], chosen: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run."""
    words = [
        f"--{name.replace('_', '-')}={json.dumps(value).strip(chr(34))}" for name, value in chosen.items()
    ]
    return read_config(file, [*settings, *words, f"--train.seed={seed}"])


def _run(config: Config, folder: Path) -> dict[str, Any]:
    """Train once; the figures of the best checkpoint, and the one it was chosen by."""
    from prime_jax.train.checkpoints import best
    from prime_jax.train.loop import train

    shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was stopped
    if train(config, folder).interrupted:
        raise KeyboardInterrupt
    checkpoint = best(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "seed": config.train.seed,
        "value": checkpoint.score,
        "metrics": dict(checkpoint.facts["metrics"]),
    }


def _results(study: Any, space: Space) -> list[dict[str, Any]]:
    """The complete trials; a journal that names what is not tried here would put it into best.yaml."""
    for trial in study.trials:
        for name, value in trial.params.items():
            if not _is_tried(value, space.get(name, ())):
                raise ConfigError(
                    f"the journal of the sweep has {name} {value!r}, which is not tried here; choose "
                    "another --out"
                )
    rows = [
        {
            "settings": dict(trial.params),
            "mean": trial.value,
            "values": [one["value"] for one in trial.user_attrs["found"]],
            "metrics": [one["metrics"] for one in trial.user_attrs["found"]],
        }
        for trial in study.trials
        if trial.state.name == "COMPLETE"
    ]
    return sorted(rows, key=lambda row: -row["mean"])


def _is_tried(value: Any, tried: Range | Choice) -> bool:
    if isinstance(tried, Range):
        return isinstance(value, int | float) and tried.low <= value <= tried.high
    return value in tried


def _suggested(trial: Any, name: str, values: Range | Choice) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, list(values))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.logarithmic)
    return trial.suggest_float(name, values.low, values.high, log=values.logarithmic)


def _all_choices(space: Space) -> dict[str, list[Any]]:
    for name, values in space.items():
        if isinstance(values, Range):
            raise ConfigError(f"--grid: {name} is a range; name the values to try")
    return {name: list(values) for name, values in space.items()}


def _edges(space: Space) -> list[dict[str, Any]]:
    """Settings that hold every choice and both ends of every range at least once."""
    ends = {
        name: [values.low, values.high] if isinstance(values, Range) else list(values)
        for name, values in space.items()
    }
    most = max(map(len, ends.values()))
    return [{name: values[min(row, len(values) - 1)] for name, values in ends.items()} for row in range(most)]


def _range(word: str, low: str, high: str, logarithmic: bool) -> Range:
    ends = _value(low), _value(high)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if not numbers or not ends[0] < ends[1] or (logarithmic and ends[0] <= 0):
        raise ConfigError(f"--try {word}: a range goes from a number to a larger one; with ~ above 0")
    return Range(*ends, logarithmic)


def _value(text: str) -> Any:
    """A number or true, false, null where it reads as one, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _print(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    table = Table("mean", "seeds", *results[0]["settings"], title=f"best of {len(results)} settings on dev")
    for row in results[:SHOWN]:
        values = ", ".join(f"{value:.3f}" for value in row["values"])
        chosen = [f"{one:.4g}" if isinstance(one, float) else str(one) for one in row["settings"].values()]
        table.add_row(f"{row['mean']:.4f}", values, *chosen)
    Console().print(table)
    print(f"all results: {out / RESULTS}; the best as a configuration: {out / BEST}")


if __name__ == "__main__":
    sys.exit(main())
