"""Reading settings: where they come from, who wins, and what a mistake says."""

from pathlib import Path

import pytest
from flax import nnx

from prime_jax.config import Config, TrainingConfig, load_stored_config, read_config, to_yaml
from prime_jax.errors import ConfigError
from prime_jax.models import KINDS
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.layers import LLAMA_ONLY
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.train.text_start import completed

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def test_defaults_are_those_of_the_requirement() -> None:
    model, train = PredictorConfig(), TrainingConfig()
    later = {"kind", "context_attention", "residual", "conversation_input", "max_delta", "block", *LLAMA_ONLY}
    assert model.model_dump(exclude=later) == {
        "input_dim": 1024,
        "hidden_dim": 2048,
        "output_dim": 1024,
        "num_layers": 4,
        "num_heads": 8,
        "max_context_length": 10,
        "dropout": 0.1,
        "checkpoint_path": None,
        "use_static_cache": True,
        "use_torch_compile": True,
        "compile_mode": "reduce-overhead",
        "max_batch_size": 32,
    }
    assert (model.context_attention, model.residual, model.max_delta) == ("full", "none", None)
    assert model.block == "gelu"
    required = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "batch_size": 64,
        "num_epochs": 10,
        "warmup_steps": 1000,
        "temperature": 0.07,
        "gradient_checkpointing": True,
        "mixed_precision": True,
        "y_encoder_lr_multiplier": 0.05,
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": 1,
    }
    assert train.model_dump(include=set(required)) == required


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", 13),
        ("model.num_layers", 0),
        ("model.hidden_dim", 127),
        ("model.max_context_length", 51),
        ("model.dropout", 0.6),
        ("model.max_batch_size", 0),
        ("model.compile_mode", "fast"),
        ("model.max_delta", 0),
        ("train.learning_rate", 0),
        ("train.learning_rate", ".nan"),
        ("train.temperature", ".inf"),
        ("train.weight_decay", -1),
        ("train.batch_size", 2.5),
        ("train.y_encoder_lr_multiplier", 1.1),
        ("train.gradient_clip_val", -0.1),
        ("data.context_from", "thin air"),
    ],
)
def test_out_of_bounds_names_file_key_and_value(tmp_path: Path, key: str, value: object) -> None:
    section, name = key.split(".")
    file = write(tmp_path, f"{section}: {{{name}: {value}}}")
    with pytest.raises(ConfigError, match=rf"settings\.yaml: {key}: .*given"):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_lyers: 3}", r"unknown key model\.num_lyers; did you mean model\.num_layers\?"),
        ("modle: {num_layers: 3}", r"unknown key modle; did you mean model\?"),
        ("hiden_dim: 256", r"unknown key hiden_dim"),
        ("model: {num_layers: 3, num_layers: 4}", "'num_layers' is given twice"),
        ("num_layers: 3\nmodel: {num_layers: 4}", r"model\.num_layers is given twice"),
        ("model: [1", "cannot be read as YAML"),
        ("- model", "expected sections"),
        ("model: 3", "model: .*given: 3"),
        ("model: {num_heads: 3}", "hidden_dim 2048 is not divisible by num_heads 3"),
    ],
)
def test_a_mistake_in_the_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: there is no such file"):
        read_config(tmp_path / "absent.yaml")


def test_file_then_environment_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "train: {num_epochs: 1, batch_size: 1, seed: 1}")
    monkeypatch.setenv("PRIME_TRAIN__BATCH_SIZE", "2")
    monkeypatch.setenv("PRIME_TRAIN__SEED", "2")
    train = read_config(file, ["--train.seed", "3", "--model.num_layers=2"]).train
    assert (train.num_epochs, train.batch_size, train.seed, train.learning_rate) == (1, 2, 3, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--train.num-epoch", "3"],
            r"unknown option --train\.num-epoch; did you mean --train\.num-epochs\?",
        ),
        (["--train.num-epochs", "three"], r"train\.num_epochs: .*given: 'three'"),
        (["--train.num-epochs"], "num-epochs"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(None, options)


def test_a_mistake_in_the_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_TRAIN__NUM_EPOCH", "3")
    with pytest.raises(ConfigError, match="did you mean PRIME_TRAIN__NUM_EPOCHS"):
        read_config()


@pytest.mark.parametrize(
    "text",
    [
        "hidden_dim: 256\nuse_static_cache: false\nuse_torch_compile: false\nlearning_rate: 1e-3",
        "predictor:\n  hidden_dim: 256\n  use_static_cache: false\n  use_torch_compile: false\n"
        "training:\n  learning_rate: 1e-3",
    ],
)
def test_yaml_with_the_names_of_the_requirement_loads(tmp_path: Path, text: str) -> None:
    config = read_config(write(tmp_path, text))
    assert (config.model.hidden_dim, config.model.use_torch_compile) == (256, False)
    assert config.train.learning_rate == 1e-3


def test_printed_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = read_config(None, ["--model.residual", "copy", "--data.query-prefix", "query: "])
    assert load_stored_config(write(tmp_path, to_yaml(config))) == config


KINDED = {
    "prime": ["--model.residual", "copy", "--train.target", "ema"],
    "jasper": ["--model.output-dim", "96", "--jasper.stage-in", '{"vicreg": [1, 2.5], "jepa": [0, 3]}'],
    "subspace": ["--model.num-subspaces", "7", "--steering.variants", '["keyword", "predicted"]'],
}


@pytest.mark.parametrize("kind", KINDED)
def test_printed_config_of_every_kind_reads_back_as_itself(tmp_path: Path, kind: str) -> None:
    config = read_config(None, ["--model.kind", kind, *KINDED[kind]])
    assert type(config.model) is KINDS[kind]
    file = write(tmp_path, to_yaml(config))
    assert load_stored_config(file) == read_config(file) == config
    assert config != read_config(None, ["--model.kind", kind])


def test_file_environment_or_command_line_choose_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later wins; what a file says of a field that both kinds have stays."""
    file = write(tmp_path, "model: {kind: jasper, hidden_dim: 64}")
    assert type(read_config().model) is PredictorConfig
    assert read_config(file).model == JasperConfig(hidden_dim=64)
    assert read_config(write(tmp_path, "kind: jasper\nhidden_dim: 64")).model == JasperConfig(hidden_dim=64)
    monkeypatch.setenv("PRIME_MODEL__KIND", "subspace")
    monkeypatch.setenv("PRIME_MODEL__NUM_SUBSPACES", "5")
    assert read_config(file).model == SubspaceConfig(hidden_dim=64, num_subspaces=5)
    monkeypatch.delenv("PRIME_MODEL__NUM_SUBSPACES")
    for words in (["--model.kind", "jasper"], ["--model.kind=jasper"]):
        assert read_config(file, words).model == JasperConfig(hidden_dim=64)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("kind: japser", [], r"settings\.yaml: model\.kind: 'japser' is none of prime, jasper, subspace"),
        ("model: {kind: [jasper]}", [], r"settings\.yaml: model\.kind: \['jasper'\] is none of"),
        ("", ["--model.kind", "japser"], r"option: model\.kind: 'japser' is none of"),
        ("", ["--model.kind"], "model.kind: expected one argument"),
        (
            "model: {kind: jasper, num_heads: 4}",
            [],
            r"unknown key model\.num_heads: model\.kind is jasper, only prime has it",
        ),
        (
            "model: {kind: jasper}",
            ["--model.num_heads", "4"],
            r"unknown option --model\.num-heads: model\.kind is jasper, only prime has it",
        ),
        (
            "",
            ["--model.num-subspaces=4"],
            r"--model\.num-subspaces: model\.kind is prime, only subspace has it",
        ),
        ("model: {kind: jasper, num_heds: 4}", [], r"unknown key model\.num_heds"),
        ("model: {kind: jasper, dropout: 0.9}", [], r"model\.dropout: .*given: 0\.9"),
        ("model: {kind: subspace, output_dim: 9}", [], "input_dim 384 must equal output_dim 9"),
        ("jasper: {stage_in: {vicrig: [0, 1]}}", [], "stage_in names 'vicrig'"),
        ("steering: {variants: [centroid, thin air]}", [], r"steering\.variants\.1: .*'thin air'"),
    ],
)
def test_a_mistake_about_kinds_is_explained(
    tmp_path: Path, text: str, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text), options)


def test_an_unknown_kind_in_the_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_MODEL__KIND", "japser")
    with pytest.raises(ConfigError, match=r"^environment: model\.kind: 'japser' is none of"):
        read_config()


@pytest.mark.parametrize("kind", ["jasper", "subspace"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.target", "ema"),
        ("train.target", "slow"),
        ("train.positives", "all"),
        ("train.rotation", "0.5"),
        ("train.context-negatives", "true"),
        ("data.context-from", "search"),
    ],
)
def test_what_a_steered_model_does_not_take_is_refused(kind: str, setting: str, value: str) -> None:
    """Fine for PRIME; with a steering vector as the one turn, and targets that stay, it makes no sense."""
    name = setting.replace("-", "_")
    with pytest.raises(ConfigError, match=rf"^configuration: {name} is .*, but a {kind} model needs"):
        read_config(None, ["--model.kind", kind, f"--{setting}", value])
    assert read_config(None, [f"--{setting}", value]) != read_config()


def test_only_what_starts_as_an_encoder_is_blended_with_its_start() -> None:
    with pytest.raises(ConfigError, match="a prime model starts at random"):
        read_config(None, ["--train.blend-with-start", "true"])
    text = read_config(None, ["--model.kind", "text", "--train.blend-with-start", "true"])
    assert text.train.blend_with_start


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_builds(file: Path) -> None:
    config = read_config(file)
    if config.model.reads_text:  # it takes its shape from its encoder
        shapes = nnx.eval_shape(lambda: completed(config).model.build(rngs=nnx.Rngs(0)))
        assert shapes.encoder.words.embedding.shape[1] == config.model.input_dim
    else:
        assert config.model.fake_inputs(2)["query"].shape == (2, config.model.input_dim)


def test_there_are_shipped_configs() -> None:
    named = {"quickstart", "recommended", "frozen", "prime_base", "prime_small"}
    assert named <= {file.stem for file in CONFIGS}


def test_a_tilde_is_the_users_home_also_where_no_shell_expands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data:\n  path: ~/data\n  encoder: ~/models/e5\nsteering:\n  path: ~\n"
    text += "model:\n  checkpoint_path: ~/run\n"
    config = read_config(write(tmp_path, text), ["--data.store=~/store"])
    assert config.data.path == str(tmp_path / "data")
    assert config.data.encoder == str(tmp_path / "models" / "e5")
    assert config.data.store == str(tmp_path / "store")
    assert config.steering.path is None  # in YAML, ~ alone is nothing
    assert config.model.checkpoint_path == str(tmp_path / "run")
    assert read_config(None, ["--data.path", "a~b"]).data.path == "a~b"
    with pytest.raises(ConfigError, match="section data: ~nobody-of-this-name/x: "):
        read_config(None, ["--data.path", "~nobody-of-this-name/x"])
