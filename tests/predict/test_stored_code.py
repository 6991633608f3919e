"""config.yaml inside a run is data: code that it names runs only where the user names the same."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest

import prime_jax
from prime_jax.config import load_stored_config, read_config, to_yaml
from prime_jax.errors import ConfigError, DataError
from prime_jax.evaluate.__main__ import main as evaluate
from prime_jax.explain.__main__ import main as explain
from prime_jax.export.__main__ import _data_of
from prime_jax.export.__main__ import main as export
from prime_jax.files import read_json
from prime_jax.manifest import MANIFEST, write_manifest
from prime_jax.predict import text
from prime_jax.serve.settings import read_settings
from prime_jax.train.__main__ import main as train
from prime_jax.train.checkpoints import latest
from prime_jax.train.setup import resumed

SETTINGS = [
    *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}", "--model.hidden-dim", "128"),
    *("--model.num-layers", "1", "--model.num-heads", "4", "--model.max-context-length", "4"),
    *("--model.use-torch-compile", "false", "--mesh.data", "1"),
    *("--train.batch-size", "8", "--train.num-epochs", "1", "--train.warmup-steps", "2"),
]
PAYLOAD = """
from pathlib import Path
Path("ran").write_text("code of a loaded file ran")
from fakes import encoder as run
"""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user with an encoder of their own."""
    folder = tmp_path_factory.mktemp("honest")
    fakes.write_conversations(folder / "data")
    options = [*SETTINGS, "--encoder", "fakes:encoder", "--data.path", str(folder / "data")]
    assert train([*options, "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def hostile(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same run as somebody hands it over who can change files and write manifests, in a folder with code.

    It is the working directory, as in `evaluate --run .`; the data folder is named by its config.yaml too.
    """
    shutil.copytree(honest / "run", tmp_path / "run")
    change(tmp_path / "run", encoder="payload:run")
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("payload", None)


def change(run: Path, **data: str) -> None:
    """Change the section `data` of a run's configurations, with manifests that vouch for it."""
    newest = latest(run)
    assert newest is not None
    for folder in (run, newest.folder):
        config = load_stored_config(folder / "config.yaml")
        changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
        (folder / "config.yaml").write_text(to_yaml(changed))
    manifest = read_json(newest.folder / MANIFEST)
    facts = {key: fact for key, fact in manifest.items() if key not in ("files", "sha256", "format_version")}
    write_manifest(newest.folder, **facts)


def refused(said: str) -> bool:
    return "config.yaml: data.encoder 'payload:run' is code" in said and "--encoder payload:run" in said


def test_evaluating_runs_no_code_of_the_run(
    hostile: Path, honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", "run", "--data", str(honest / "data"), "--out", "report"]
    assert evaluate(words) == 2
    assert refused(capsys.readouterr().err)
    assert not (hostile / "ran").exists()
    assert not (hostile / "report").exists()
    assert evaluate([*words, "--encoder", "fakes:encoder"]) == 0  # the user's word, whatever the file says
    assert not (hostile / "ran").exists()
    assert evaluate([*words, "--encoder", "payload:run"]) == 0  # and this is it as well
    assert (hostile / "ran").exists()


def test_exporting_runs_no_code_of_the_run(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data are found by the run's configuration; the encoder is not."""
    assert export(["--run", "run", "--out", "bundle"]) == 2
    assert refused(capsys.readouterr().err)
    assert not (hostile / "ran").exists()


def test_predicting_from_texts_runs_no_code_of_the_run(hostile: Path) -> None:
    predictor = prime_jax.load("run", precision="float32", batch_sizes=(1,))
    with pytest.raises(ConfigError, match="'payload:run' is code"):
        predictor.predict_text(["topic1 turn1"], "topic1 turn2")
    with pytest.raises(ConfigError, match="'payload:run' is code"):
        text.TextPath(predictor)
    assert not (hostile / "ran").exists()
    wanted = predictor.predict_text(["topic1 turn1"], "topic1 turn2", encoder=fakes.encoder())
    for encoder in ("fakes:encoder", fakes.encoder()):
        named = prime_jax.load("run", precision="float32", batch_sizes=(1,), encoder=encoder)
        found = named.predict_text(["topic1 turn1"], "topic1 turn2")
        np.testing.assert_array_equal(found, wanted)
        found = predictor.predict_text(["topic1 turn1"], "topic1 turn2", encoder=encoder)
        np.testing.assert_array_equal(found, wanted)
    assert not (hostile / "ran").exists()


def test_resuming_runs_no_code_of_the_run(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--resume", "--out", "run"]) == 2
    assert refused(capsys.readouterr().err)
    assert not (hostile / "ran").exists()
    assert train(["--resume", "--out", "run", "--encoder", "fakes:encoder"]) == 2
    assert "was trained with data.encoder 'payload:run', not 'fakes:encoder'" in capsys.readouterr().err
    assert not (hostile / "ran").exists()


def test_ending_the_process_is_not_an_encoder(hostile: Path) -> None:
    change(hostile / "run", encoder="os:abort")
    predictor = prime_jax.load("run", precision="float32", batch_sizes=(1,))
    with pytest.raises(ConfigError, match="'os:abort' is code"):
        predictor.predict_text([], "topic1 turn2")


@pytest.mark.parametrize("how", ["option", "config option", "file", "environment"])
def test_an_own_run_resumes_where_the_user_names_the_encoder_in_any_way(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    words = {
        "option": ["--encoder", "fakes:encoder"],
        "config option": ["--data.encoder", "fakes:encoder"],
        "file": ["--config", str(tmp_path / "mine.yaml")],
        "environment": [],
    }[how]
    (tmp_path / "mine.yaml").write_text((honest / "run" / "config.yaml").read_text())
    if how == "environment":
        monkeypatch.setenv("PRIME_DATA__ENCODER", "fakes:encoder")
    assert train(["--resume", "--out", str(honest / "run"), *words]) == 0


def test_an_own_run_needs_the_name_of_its_encoder(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--resume", "--out", str(honest / "run")]) == 2
    config = honest / "run" / "config.yaml"
    said = capsys.readouterr().err
    assert said.startswith(
        f"prime-jax train: {config}: data.encoder 'fakes:encoder' is code, which is not run"
    )
    assert "name it yourself: --encoder fakes:encoder, or in Python encoder='fakes:encoder'\n" in said
    assert said.count("\n") == 1


def test_names_that_are_no_code_need_no_word(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    for name in ("minilm", str(tmp_path), str(tmp_path / "a:b"), "nowhere"):
        file = tmp_path / "config.yaml"
        file.write_text(f"data:\n  encoder: {name!r}\n")
        assert read_config(file, stored=True).data.encoder == name


class Other:
    """An encoder whose embeddings are another's."""

    identity, dim = "other@2", fakes.DIM

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return fakes.encoder().encode(texts)


def test_another_encoder_than_that_of_training_is_refused(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"was trained on embeddings of bag-of-words, but .* is other@2"):
        prime_jax.load(honest / "run", encoder=Other())
    words = ["--run", str(honest / "run"), "--data", str(honest / "data"), "--out", str(tmp_path / "out")]
    assert evaluate([*words, "--encoder", f"{__name__}:Other"]) == 2
    assert "is other@2; vectors of different encoders cannot be compared" in capsys.readouterr().err


def test_explaining_and_serving_take_the_name(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_settings(["--run", "x", "--encoder", "fakes:encoder"]).encoder == "fakes:encoder"
    words = ["--run", str(honest / "run"), "--data", str(honest / "data"), "--encoder", "fakes:nothing"]
    assert explain(words) == 2
    assert "encoder 'fakes:nothing': module 'fakes' has no attribute 'nothing'" in capsys.readouterr().err


def handed_over(honest: Path, tmp_path: Path, **data: str) -> Path:
    """A copy of the run, changed by somebody, and a folder of the reader with something in it."""
    shutil.copytree(honest / "run", tmp_path / "run")
    (tmp_path / "home" / "bag-of-words").mkdir(parents=True)
    change(tmp_path / "run", **data)
    return tmp_path / "run"


def test_a_store_that_only_the_run_names_is_not_made(honest: Path, tmp_path: Path) -> None:
    """Also where there is a folder of that name."""
    run = handed_over(honest, tmp_path, store=str(tmp_path / "home"))
    words = ["--run", str(run), "--data", str(honest / "data"), "--out", str(tmp_path / "out")]
    assert evaluate([*words, "--encoder", "fakes:encoder"]) == 0
    assert list((tmp_path / "home").rglob("*")) == [tmp_path / "home" / "bag-of-words"]


def test_exporting_makes_no_store_that_only_the_run_names(honest: Path, tmp_path: Path) -> None:
    shutil.copytree(honest / "data", tmp_path / "data", ignore=shutil.ignore_patterns("embeddings"))
    run = handed_over(honest, tmp_path, store=str(tmp_path / "home"), path=str(tmp_path / "data"))
    predictor = prime_jax.load(run, precision="float32", batch_sizes=(1,), encoder="fakes:encoder")
    assert _data_of(predictor, None) is None
    assert _data_of(predictor, tmp_path / "mine") == tmp_path / "data"  # the user's word
    shutil.copytree(honest / "data" / "embeddings", tmp_path / "home", dirs_exist_ok=True)
    assert _data_of(predictor, None) == tmp_path / "data"


def test_resuming_makes_no_store_that_only_the_run_names(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "home")
    run = handed_over(honest, tmp_path, store=store)
    words = ["--resume", "--out", str(run), "--encoder", "fakes:encoder"]
    assert train(words) == 2
    said = capsys.readouterr().err
    assert f"config.yaml: data.store '{store}' holds no embeddings of bag-of-words; add --data.store" in said
    assert list((tmp_path / "home").rglob("*")) == [tmp_path / "home" / "bag-of-words"]
    config = load_stored_config(run / "config.yaml")
    assert resumed(config, run, ["--data.store", store]) == config
    assert resumed(config, run, [f"--data.store={store}"]) == config
    monkeypatch.setenv("PRIME_DATA__STORE", store)
    assert resumed(config, run, []) == config
    monkeypatch.delenv("PRIME_DATA__STORE")
    shutil.copytree(honest / "data" / "embeddings", store, dirs_exist_ok=True)
    assert resumed(config, run, []) == config


@pytest.mark.parametrize("how", ["nothing", "option", "file", "environment"])
def test_resuming_sends_nothing_where_only_the_run_says_so(
    honest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    run, begun = handed_over(honest, tmp_path), []

    def init(**options: object) -> SimpleNamespace:
        begun.append(options["project"])
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("wandb: null", "wandb: '[theirs]'"))
    shutil.copy(config, tmp_path / "mine.yaml")
    if how == "environment":
        monkeypatch.setenv("PRIME_MONITOR__WANDB", "[theirs]")
    words = {"option": ["--monitor.wandb", "[theirs]"], "file": ["--config", str(tmp_path / "mine.yaml")]}
    resume = ["--resume", "--out", str(run), "--encoder", "fakes:encoder", *words.get(how, [])]
    assert train(resume) == 0
    line = "nothing is sent to wandb; add --monitor.wandb [theirs] to go on sending\n"
    assert (line in capsys.readouterr().err) == (how == "nothing")
    assert begun == ([] if how == "nothing" else ["[theirs]"])
