"""Watched runs through the real command: jumps, resuming, going back, and what is refused."""

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from commands import SETTINGS, history

from prime_jax.config import HybridSection, control_rows, read_config
from prime_jax.data import control as control_sets
from prime_jax.data.control import _chosen, conversations, in_company, with_control
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.pipeline import TrainingBatches
from prime_jax.errors import CheckpointError, ConfigError, DataError, PredictorError
from prime_jax.hybrid.phases import PhaseOutcome
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.losses.contrastive import info_nce
from prime_jax.losses.corpus import in_chunks
from prime_jax.train import checkpoints, loop, program
from prime_jax.train.__main__ import main
from prime_jax.train.checkpoints import load_model
from prime_jax.train.hybrid import _examples, _told
from prime_jax.train.judged import Given
from prime_jax.train.setup import hybrid_settings, prepared
from prime_jax.train.state import pure_params
from prime_jax.types import Batch

STEPS = 15  # 3 per epoch: 50 rows in whole conversations of 5, 20 of them set aside for 8 batches of 2
WATCHED = {
    "enabled": "true",
    "predict": "true",
    "control-batches": "8",
    "screen-batches": "4",
    "control-share": "0.4",
    "accept-level": "0.5",
    "window": "2",
    "warmup-steps": "4",
    "min-full-steps": "4",
    "max-full-steps": "8",
    "ema-steps": "[2, 4]",
    "horizons": "[0, 2, 4]",
    "probe-share": "1",
    "confidence-threshold": "0",
    "coefficient-gradients": "2",
    "snapshot": "window",
    "ensemble": "1",
    "hidden": "8",
    "latent": "2",
    "seed": "3",  # one of those with which a jump stays
}


LIGHT = [
    "--train.num-epochs",
    "5",
    "--train.eval-every-epochs",
    "5",
    "--mesh.data",
    "1",
    "--model.dropout",
    "0.3",
]
TRAINERS_OWN = {"control_rows", "control_share"}


def options(data: Path, **changed: str) -> list[str]:
    """Of a small watched run."""
    given = {**WATCHED, **{name.replace("_", "-"): value for name, value in changed.items()}}
    words = [word for name, value in given.items() for word in (f"--hybrid.{name}", value)]
    return [*SETTINGS, "--data.path", str(data), *LIGHT, *words]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    fakes.write_conversations(folder, chats=14)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched run that nothing happened to."""
    run = tmp_path_factory.mktemp("watched") / "run"
    assert main([*options(data), "--out", str(run)]) == 0
    return run


def weights(run: Path) -> list[np.ndarray]:
    newest = checkpoints.latest(run)
    assert newest is not None
    return jax.tree.leaves(pure_params(load_model(newest.folder).model))


def assert_same(one: Path, other: Path) -> None:
    for left, right in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(left, right)


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "hybrid.json").read_text())
    return found


def test_the_section_has_the_fields_and_defaults_of_its_part() -> None:
    """Every setting of the part can be set, and starts as it does there; only `enabled` is off."""
    section, part = HybridSection().model_dump(exclude=TRAINERS_OWN), asdict(HybridConfig())
    assert section == {**part, "enabled": False}
    assert {name: type(value) for name, value in section.items()} == {
        name: type(value) for name, value in part.items()
    }
    assert HybridSection.model_fields.keys() - part.keys() == TRAINERS_OWN


def test_a_watched_run_jumps_and_leaves_its_report(whole: Path) -> None:
    assert [row["step"] for row in history(whole) if "MRR@10" in row][-1] == STEPS
    report = told(whole)
    jumps = [row for row in report["rows"] if "after" in row]
    assert report["totals"]["steps"] == STEPS
    assert report["totals"]["jumps"] == len(jumps) > 1
    assert jumps[-1]["horizon"] == 0  # the end of the run
    assert all(row["kept"] == (row["bound"] is not None and row["bound"] < 0) for row in jumps)
    assert all(row["after"] < row["before"] for row in jumps if row["kept"])
    assert report["totals"]["kept"] == sum(row["kept"] for row in jumps) > 0
    rows = [json.loads(line) for line in (whole / "hybrid.jsonl").read_text().splitlines()]
    assert rows == report["rows"]
    assert 0 < history(whole)[-1]["as trained MRR@10"] <= 1  # beside the figure after the correction
    last = [row for row in history(whole) if "loss" in row][-1]
    assert last["hybrid_jumps"] == len(jumps) - 1
    assert {"hybrid_phase", "hybrid_saved", "hybrid_overhead", "hybrid_confidence_2"} <= last.keys()
    assert (whole / "hybrid.csv").read_text().startswith("step,phase,loss")
    assert (whole / "hybrid.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_inside_a_window_and_resumed_equals_never_stopped(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "run"
    with monkeypatch.context() as patch:
        asked_after(9, patch)
        assert main([*options(data), "--out", str(broken)]) == 130
    assert main(["--resume", "--encoder", "fakes:encoder", "--out", str(broken)]) == 0
    assert_same(broken, whole)
    assert told(broken) == told(whole)


def test_killed_inside_a_window_and_resumed_equals_never_stopped(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps after a checkpoint that lies inside a window; they are made again."""
    broken, real = tmp_path / "run", loop._Run._step

    def dying(self: Any, step: int, pending: list[Any]) -> int:
        if step == 11:
            raise KeyError("power")
        return real(self, step, pending)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", dying)
        with pytest.raises(KeyError, match="power"):
            main([*options(data), "--train.save-every-steps", "9", "--out", str(broken)])
    assert [kept.step for kept in checkpoints.list_checkpoints(broken)] == [9]
    assert main(["--resume", "--encoder", "fakes:encoder", "--out", str(broken)]) == 0
    assert_same(broken, whole)
    assert told(broken) == told(whole)


def asked_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run asked to stop after so many steps."""
    real = loop._Run._step

    def counting(self: Any, step: int, pending: list[Any]) -> int:
        made = real(self, step, pending)
        if made == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return made

    monkeypatch.setattr(loop._Run, "_step", counting)


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[int]:
    """Make the batches of these calls of the compiled step no numbers; gives the list of calls."""
    real, seen = program.TrainingProgram.__call__, []

    def poisoned(self: Any, state: Any, batch: Any) -> Any:
        seen.append(1)
        bad = np.float32(math.nan if len(seen) in calls else 1)
        return real(self, state, batch._replace(query=batch.query * bad))

    monkeypatch.setattr(program.TrainingProgram, "__call__", poisoned)
    return seen


def test_a_loss_that_is_no_number_goes_back_with_rng_and_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is broken once, dropout is on; the run ends as if nothing had been."""
    words = [*options(data, predict="false"), "--monitor.log-every", "1"]
    clean, hurt = tmp_path / "clean", tmp_path / "hurt"
    assert main([*words, "--out", str(clean)]) == 0
    with monkeypatch.context() as patch:
        calls = poison(patch, 7)
        assert main([*words, "--out", str(hurt)]) == 0
    assert len(calls) == STEPS + 2  # one window again
    assert "no finite number (critical) up to step 8, back to step 6" in capsys.readouterr().err
    assert_same(hurt, clean)
    assert told(hurt)["totals"]["rollbacks"] == 1
    steps = [[row["step"] for row in history(run)] for run in (hurt, clean)]
    assert steps[0] == steps[1]


def test_a_loss_that_stays_no_number_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retried, then left out, then given up; examples are named, the last good state is kept and goes on."""
    config = read_config(None, options(data, predict="false"))
    with monkeypatch.context() as patch:
        poison(patch, *range(7, 99))
        with pytest.raises(PredictorError, match=r"loss nan .* in step 7: .* Its batch: "):
            loop.train(config, tmp_path)
    assert [kept.step for kept in checkpoints.list_checkpoints(tmp_path)] == [6]
    capsys.readouterr()
    assert loop.train(config, tmp_path, resume=True).step == STEPS
    assert "6 has no hybrid state: weights and data go on, watching begins anew" in capsys.readouterr().err
    assert told(tmp_path)["totals"]["steps"] == STEPS


def test_a_hybrid_state_of_another_structure_is_told_from_none(whole: Path, tmp_path: Path) -> None:
    newest = checkpoints.latest(whole)
    assert newest is not None
    with pytest.raises(CheckpointError, match="hybrid: cannot be restored"):
        checkpoints.restore_hybrid(newest, {"arrays": jax.numpy.zeros(3)})
    assert checkpoints.restore_hybrid(replace(newest, folder=tmp_path), {}) is None


@pytest.mark.parametrize(
    "off",
    [
        ["--hybrid.enabled", "true", "--hybrid.predict", "false", "--hybrid.correct", "false"],
        ["--hybrid.predict", "true", "--hybrid.window", "2", "--hybrid.control-rows", "500"],
    ],
)
def test_watching_nothing_changes_nothing(data: Path, tmp_path: Path, off: list[str]) -> None:
    """The weights are those of the bare compiled step over all training batches, to the bit."""
    words = [*SETTINGS, "--data.path", str(data), "--train.num-epochs", "1", "--mesh.data", "1", *off]
    assert main([*words, "--out", str(tmp_path)]) == 0
    config = read_config(None, words)
    chats = prepared(config).data
    assert set(chats.splits) == {"train", "dev"}
    bare = program.TrainingProgram(config, chats, 6, epoch_steps=6)  # 50 rows in batches of 8
    state = bare.initial_state()
    batches = TrainingBatches(chats, "train", batch_size=8, seed=config.train.seed)
    for _ in range(6):
        state, _ = bare(state, next(batches))
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    restored, _ = checkpoints.restore(newest, state)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(left, right)
    assert "hybrid" not in newest.facts
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("hybrid")]
    assert not any("hybrid" in name or "as trained" in name for row in history(tmp_path) for name in row)


def test_the_control_set_is_made_of_whole_conversations(data: Path) -> None:
    before = prepared(read_config(None, [*SETTINGS, "--data.path", str(data)])).data

    def split(seed: int, rows: int = 1, share: float = 0.2) -> EmbeddedDataset:
        return with_control(before, 8, rows, share=share, seed=seed, all_positives=False)

    after = split(3)
    train, control = after.splits["train"], after.splits["control"]
    assert sorted([*train.ids, *control.ids]) == sorted(before.splits["train"].ids)
    assert len(control) == 10  # two conversations of five for 8 rows
    chats = [{name.split("-")[0] for name in part.ids} for part in (train, control)]
    assert not chats[0] & chats[1]
    assert len(np.unique(conversations(before))) == len(chats[0]) + len(chats[1])
    assert split(3).splits["control"].ids == control.ids
    assert split(4).splits["control"].ids != control.ids


def test_the_control_set_is_just_large_enough(data: Path) -> None:
    """Of conversations of 7, 4, 4, 2 and 9 rows, 6 rows take 4 and 2, in any order; 8 take at most 2 more."""
    sizes = np.array([7, 4, 4, 2, 9])
    for seed in range(20):
        random = np.random.default_rng(seed)
        assert sizes[_chosen(sizes, 6, random)].sum() == 6
        assert sizes[_chosen(sizes, 1, random)].sum() == 2  # none fits: the smallest closes it
        assert 8 <= sizes[_chosen(sizes, 8, random)].sum() <= 10


@pytest.mark.parametrize(
    ("rows", "share", "said"),
    [
        (
            4,
            0.3,
            r"8 control batches of 4 rows aside, 32 in all; in whole conversations that takes 35 of the 50 ",
        ),
        (4, 0.4, r"hybrid\.control_share 0\.4 allows 20; lower hybrid\.control_rows to 2"),
        (2, 0.3, r"allows 15; there is too little data, .* leave hybrid\.enabled off"),
    ],
)
def test_a_control_set_that_takes_too_much_is_refused(data: Path, rows: int, share: float, said: str) -> None:
    before = prepared(read_config(None, [*SETTINGS, "--data.path", str(data)])).data
    with pytest.raises(DataError, match=said):
        with_control(before, 8, rows, share=share, seed=0, all_positives=False)


def test_control_rows_are_never_trained_on_and_are_not_of_dev(data: Path, tmp_path: Path) -> None:
    config = read_config(None, options(data))
    ready = prepared(config)
    run = loop._Run(config, tmp_path, ready)
    control, dev = set(ready.data.splits["control"].ids), set(ready.data.splits["dev"].ids)
    trained = {name for place in range(run.total_steps) for name in run.batches.examples_of(place)}
    assert len(control) == 20
    assert not control & dev
    assert len(trained) == 30
    assert not trained & (control | dev)
    given = run.hybrid._trainer._control
    judged = [int(example) for batch in given for example in batch.batch.example]
    assert len(given) == 8
    assert len(set(judged)) == len(judged) == 16  # no row twice, so what confirms was not seen in choosing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.average-weights", "0.9"], r"train\.average_weights is 0\.9"),
        (["--train.target", "ema"], r"train\.target 'ema'"),
        (["--train.x-encoder", "trained"], r"train\.x_encoder is 'trained'"),
        (["--train.accumulate-grad-batches", "3"], r"hybrid\.window 10 is no multiple"),
        (
            ["--hybrid.virtual-steps", "advance_by_Y"],
            r"virtual_steps is 'advance_by_Y', but .* set it to 'real'",
        ),
        (["--hybrid.control-rows", "65"], r"control_rows 65 is more than train\.batch_size 64"),
        (["--hybrid.control-rows", "1"], r"control_rows is 1, but a row is told from the others"),
        (
            ["--hybrid.control-rows", "12", "--train.micro-batch-size", "8"],
            r"micro_batch_size 8, but no multiple",
        ),
        (["--model.kind", "jasper"], r"prime models; a jasper model"),
        (["--hybrid.confidence-threshold", "2"], r"confidence_threshold"),
        (["--hybrid.windows", "2"], r"--hybrid\.windows.*did you mean --hybrid\.window"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(None, ["--hybrid.enabled", "true", *words])


def test_numbers_that_contradict_each_other_are_refused_before_any_data() -> None:
    config = read_config(None, ["--hybrid.enabled", "true", "--hybrid.horizons", "[0, 5, 500]"])
    with pytest.raises(ConfigError, match="horizons reach at most 12 windows"):
        hybrid_settings(config)


def test_devices_must_share_a_control_batch(data: Path, tmp_path: Path) -> None:
    config = read_config(None, [*options(data, control_rows="3", control_share="0.6"), "--mesh.data", "2"])
    with pytest.raises(ConfigError, match=r"3 rows does not divide evenly among 2 devices; .* multiple of 2"):
        loop._Run(config, tmp_path, prepared(config))


def test_a_control_batch_is_an_eighth_of_a_batch_unless_told() -> None:
    rows = {
        batch: control_rows(read_config(None, ["--train.batch-size", str(batch)])) for batch in (2, 4, 128)
    }
    assert rows == {2: 2, 4: 2, 128: 16}
    assert control_rows(read_config(None, ["--hybrid.control-rows", "24"])) == 24


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("ema 25", "the weights averaged over 25 steps took"),
        ("ahead", "the weights a stretch ahead took"),
        ("ahead 4 times", "the weights 4 stretches ahead took"),
        ("corrected", "the corrected weights took"),
    ],
)
def test_the_end_is_told_by_what_was_taken(choice: str, said: str) -> None:
    end = PhaseOutcome(9, 0, kept=True, choice=choice, before=2.0, after=1.0, bound=-0.5, cost=1.0)
    assert _told(end).startswith(said)


def test_rows_in_company_are_told_from_what_those_of_a_whole_batch_are() -> None:
    """Three batches of 2 rows, each told from 6 passages: the loss of a batch of 6, row by row."""
    whole = steps.batch(5, rows=6)
    small = [jax.tree.map(lambda array, at=at: array[at : at + 2], whole) for at in (0, 2, 4)]

    def losses(batches: Sequence[Batch]) -> np.ndarray:
        told = (
            info_nce(jnp.asarray(b.query), jax.tree.map(jnp.asarray, b), temperature=0.1) for b in batches
        )
        return np.concatenate([one.loss for one in told])

    np.testing.assert_allclose(losses(in_company(small, rows=6)), losses([whole]), rtol=1e-5)
    assert np.abs(losses(small) - losses([whole])).max() > 0.1


def test_company_comes_beside_negatives_that_are_there_and_has_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [jax.tree.map(np.asarray, steps.with_everything(seed, rows=2)) for seed in range(4)]
    there = small[0].negatives.shape[1]
    found = in_company(small, rows=6)
    assert [batch.negatives.shape[1] for batch in found] == [there + 4] * 4
    assert [batch.negative_ids.shape[1] for batch in found] == [there + 4] * 4
    np.testing.assert_array_equal(found[3].negatives[0, there : there + 2], small[0].target)  # round and on
    assert in_company(small, rows=2) == small
    assert in_company(small, rows=100)[0].negatives.shape[1] == there + 6  # no more than there are
    monkeypatch.setattr(control_sets, "COMPANY", 3)
    assert in_company(small, rows=100)[0].negatives.shape[1] == there + 3


def test_control_batches_of_a_run_are_in_company_unless_all_passages_are_negatives(
    data: Path, tmp_path: Path
) -> None:
    for more, brought in (([], 6), (["--train.negatives", "corpus"], None)):
        config = read_config(None, [*options(data), *more])
        run = loop._Run(config, tmp_path / str(brought), prepared(config))
        for given in run.hybrid._trainer._control:
            negatives = given.batch.negatives
            assert (None if negatives is None else negatives.shape[:2]) == (brought and (2, brought))


def test_passages_that_a_control_batch_brings_along_are_no_rows_of_it() -> None:
    vectors, ids = jnp.ones((3, 1)), jnp.zeros(3, jnp.int32)
    batch = Batch(
        context=vectors[:, None],
        context_mask=jnp.ones((3, 1), bool),
        query=vectors,
        target=vectors,
        target_id=ids,
        positive_ids=ids[:, None],
        example=ids,
    )
    assert _examples(batch) == 3
    assert _examples(Given(batch, in_chunks(np.ones((40, 1), np.float32), 2))) == 3
