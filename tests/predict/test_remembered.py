"""Choices of precision outlive the process; what lies in the folder is data and is not trusted."""

import json
import stat
from pathlib import Path
from typing import Any

import jax
import pytest
from jax import monitoring
from predictors import D, make, requests

from prime_jax.predict import precision, programs
from prime_jax.predict.precision import EXACT, Choice, Recipe
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.programs import Programs
from prime_jax.predict.remembered import Remembered
from prime_jax.program_cache import FOLDER

HALF = Recipe("bfloat16", "float32", outputs_first=True)
CHOICES = {1: Choice(HALF, "measured: float32 2.0 ms, bfloat16 1.0 ms"), 4: Choice(EXACT, "measured")}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)


def remembered(**fields: Any) -> Remembered:
    return Remembered(make(**fields).config, "auto")


def test_what_was_written_is_read_by_the_same_kind_of_model_only() -> None:
    remembered().write(CHOICES)
    assert remembered().read() == CHOICES
    assert remembered(dropout=0.3).read() == CHOICES  # not part of how a prediction is computed
    assert remembered(num_layers=3).read() == {}
    assert Remembered(make().config, "bfloat16").read() == {}
    remembered().write({1: Choice(EXACT, "again"), 9: Choice(EXACT, "new")})
    assert remembered().read() == {1: Choice(EXACT, "again"), 4: CHOICES[4], 9: Choice(EXACT, "new")}
    file = remembered().file
    assert file is not None
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["jax", "prime_jax", "device", "cores", "platform", "xla_flags"])
def test_another_version_or_device_measures_again(name: str) -> None:
    remembered().write(CHOICES)
    file = remembered().file
    assert file is not None
    content = json.loads(file.read_text())
    content["key"][name] = "another"
    file.write_text(json.dumps(content))
    assert remembered().read() == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-20],
        lambda content: "[]",
        lambda content: json.dumps(content | {"format": 2}),
        lambda content: json.dumps(content | {"choices": None}),
        lambda content: json.dumps(content | {"choices": {"one": content["choices"]["1"]}}),
        lambda content: json.dumps(content | {"choices": {"1": {"dtype": "float32"}}}),
        lambda content: json.dumps(content | {"choices": {"1": content["choices"]["1"] | {"dtype": "int4"}}}),
        lambda content: json.dumps(
            content | {"choices": {"1": content["choices"]["1"] | {"attention": "os:abort"}}}
        ),
        lambda content: json.dumps(content | {"choices": {"1": content["choices"]["1"] | {"why": 3}}}),
        lambda content: json.dumps(content | {"choices": {"1": content["choices"]["1"] | {"dtype": []}}}),
    ],
)
def test_a_damaged_file_counts_as_nothing_and_is_written_anew(damage: Any) -> None:
    remembered().write(CHOICES)
    file = remembered().file
    assert file is not None
    file.write_text(damage(json.loads(file.read_text())))
    assert remembered().read() == {}
    remembered().write(CHOICES)
    assert remembered().read() == CHOICES


def test_nothing_is_kept_where_nothing_shall_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in ("", str(tmp_path / "file")):
        monkeypatch.setenv(FOLDER, folder)
        remembered().write(CHOICES)
        assert remembered().read() == {}
    assert (tmp_path / "file").read_text() == "not a folder"


class Counted:
    """How often JAX compiled or looked for a program meanwhile, and what was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, Recipe]] = []
        self.measured: list[int] = []
        traced, choose = Programs._traced, programs.choose

        def count_made(kept: Programs, key: Any) -> Any:
            self.made.append((key[0], key[2]))
            return traced(kept, key)

        def count_measured(*arguments: Any) -> Choice:
            self.measured.append(1)
            return choose(*arguments)

        monkeypatch.setattr(Programs, "_traced", count_made)
        monkeypatch.setattr(programs, "choose", count_measured)


def small(**fields: Any) -> Predictor:
    model = make(num_layers=1, use_torch_compile=True, max_batch_size=4, **fields)
    return Predictor.from_model(model, batch_sizes=(1, 2, 3))


def test_a_second_load_measures_nothing_and_compiles_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batch sizes: the first load tries two recipes at both ends; one wins, so two more are needed."""
    monkeypatch.setattr(
        precision, "_seconds", lambda run: (jax.block_until_ready(run()), 1.0)[1]
    )  # float32 wins
    monkeypatch.setattr(programs, "transposed_pays", lambda *_: False)
    first = Counted(monkeypatch)
    loaded = small()
    assert set(first.made) == {(1, EXACT), (1, HALF), (4, EXACT), (4, HALF), (2, EXACT), (3, EXACT)}
    assert len(first.made) == 6  # eight, were all tried
    assert len(first.measured) == 2
    assert loaded._programs.recipes == {EXACT}
    second = Counted(monkeypatch)
    again = small()
    assert sorted(second.made) == [(size, EXACT) for size in (1, 2, 3, 4)]
    assert second.measured == []
    assert again.info()["precision"] == loaded.info()["precision"]
    assert again.info()["precision"][2]["why"] == "as for batches of 1 and 4"


@pytest.mark.parametrize("ahead", [True, False])
def test_a_remembered_recipe_that_does_not_compile_any_more_is_measured_anew(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of driver; at load, and at the first request without a warm-up."""
    monkeypatch.setattr(programs, "transposed_pays", lambda *_: False)
    model = make(num_layers=1, use_torch_compile=False, max_batch_size=2)
    model.config = model.config.model_copy(update={"use_torch_compile": ahead})
    kept = Remembered(model.config, "auto")
    kept.write(dict.fromkeys((1, 2), Choice(HALF, "measured: then")))
    traced = Programs._traced

    def refuse(self: Programs, key: Any) -> Any:
        if key[2] == HALF:
            raise RuntimeError("no such kernel")
        return traced(self, key)

    monkeypatch.setattr(Programs, "_traced", refuse)
    served = Predictor.from_model(model, batch_sizes=(1,))
    assert served.predict(*requests(2)).shape == (2, D)
    choice = served._programs.choices[2]
    assert choice.recipe == EXACT
    assert "bfloat16 is not available (RuntimeError)" in choice.why
    assert kept.read()[2] == choice


def test_a_second_load_takes_every_program_from_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX itself counts them; the folder that tests share is not looked at."""
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.setattr(precision, "MEASURED_FROM", 10**9)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    seen: list[str] = []

    def listen(event: str, **_: object) -> None:
        seen.append(event.rsplit("/", 1)[-1])

    monitoring.register_event_listener(listen)
    try:
        small()
        assert seen.count("cache_misses") == 5  # four batch sizes, and the weights' layout
        seen.clear()
        small()
        assert seen.count("cache_hits") == 5
        assert seen.count("cache_misses") == 0
    finally:
        monitoring.unregister_event_listener(listen)
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
