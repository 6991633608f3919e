"""A sweep tries what it was told, goes on where it stopped, and keeps the best."""

from pathlib import Path
from typing import Any

import pytest

from prime_jax.config import Config, read_config
from prime_jax.errors import ConfigError
from prime_jax.files import read_json
from prime_jax.train import sweep as module
from prime_jax.train.sweep import Range, main, parse_space, sweep


def test_words() -> None:
    words = ["train.temperature=0.02,0.05", "model.dropout=0.1..0.4", "train.learning_rate=1e-4~3e-3"]
    words += ["model.num_layers=1..3", "train.negatives=batch,corpus", "train.context_negatives=true,false"]
    assert parse_space(words) == {
        "train.temperature": (0.02, 0.05),
        "model.dropout": Range(0.1, 0.4, False),
        "train.learning_rate": Range(1e-4, 3e-3, True),
        "model.num_layers": Range(1, 3, False),
        "train.negatives": ("batch", "corpus"),
        "train.context_negatives": (True, False),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.temperature"], "expected NAME=VALUES"),
        (["a=1", "a=2"], "each name once"),
        (["a=2..1"], "a range goes from a number to a larger one"),
        (["a=0~1"], "with ~ above 0"),
        (["a=x..y"], "a range goes from a number"),
    ],
)
def test_malformed_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(words)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Runs that are over at once: best at temperature 0.05, a little luck by seed."""
    seen: list[tuple[float, int]] = []

    def run(config: Config, folder: Path) -> dict[str, Any]:
        seen.append((config.train.temperature, config.train.seed))
        value = 1 - abs(config.train.temperature - 0.05) + 0.001 * config.train.seed
        return {"seed": config.train.seed, "value": value, "metrics": {"MRR@10": value}}

    monkeypatch.setattr(module, "_run", run)
    return seen


def test_a_grid_tries_every_combination_with_every_seed(
    made_up: list[tuple[float, int]], tmp_path: Path
) -> None:
    space = parse_space(["train.temperature=0.02,0.05,0.07", "model.num_layers=1,2"])
    results = sweep(None, [], space, tmp_path, seeds=(0, 1), grid=True)
    assert len(made_up) == 3 * 2 * 2
    assert len({tuple(row["settings"].items()) for row in results}) == 6
    assert results[0]["settings"]["train.temperature"] == 0.05
    assert results[0]["mean"] == pytest.approx(1.0005)
    assert read_json(tmp_path / "results.json") == results
    assert read_config(tmp_path / "best.yaml").train.temperature == 0.05


def test_the_search_finds_the_best_of_a_range(made_up: list[tuple[float, int]], tmp_path: Path) -> None:
    results = sweep(None, [], parse_space(["train.temperature=0.01~0.5"]), tmp_path, trials=25)
    assert len(made_up) == len(results) == 25
    assert abs(results[0]["settings"]["train.temperature"] - 0.05) < 0.02


def test_a_stopped_sweep_goes_on(made_up: list[tuple[float, int]], tmp_path: Path) -> None:
    space = parse_space(["train.temperature=0.01~0.5"])
    sweep(None, [], space, tmp_path, trials=4)
    results = sweep(None, [], space, tmp_path, trials=7)
    assert len(made_up) == len(results) == 7
    with pytest.raises(ConfigError, match="holds a sweep of other settings or seeds"):
        sweep(None, [], space, tmp_path, trials=7, seeds=(1,))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.temprature=0.02,0.05", "did you mean"),
        ("train.temperature=0.02,-1", "greater than 0"),
        ("model.dropout=0.1..0.9", "less than or equal to 0.5"),
    ],
)
def test_mistakes_are_found_before_the_first_run(
    made_up: list[tuple[float, int]], tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(None, [], parse_space([word]), tmp_path / "out")
    assert made_up == []
    assert not (tmp_path / "out").exists()


def test_a_grid_of_a_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a range; name the values to try"):
        sweep(None, [], parse_space(["model.dropout=0.1..0.4"]), tmp_path, grid=True)


def test_the_command_really_trains(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--grid", "--seeds", "0", "1", "--try", "train.temperature=0.05,0.5"]
    assert main([*words, *settings, "--train.num-epochs", "1", "--mesh.data", "1"]) == 0
    results = read_json(tmp_path / "results.json")
    assert len(results) == 2
    for row in results:
        assert len(row["values"]) == 2
        assert row["values"][0] == row["metrics"][0]["MRR@10"]
    assert results[0]["mean"] >= results[1]["mean"]
    assert "best of 2 settings on dev" in capsys.readouterr().out
    assert not (tmp_path / "running").exists()
    assert main([*words[:-1], "nonsense", *settings]) == 2
