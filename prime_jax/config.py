"""The root configuration and the one way to read it: YAML file < environment < command line.

`Config` describes a run completely and is stored with it. Environment variables are named
`PRIME_<SECTION>__<FIELD>`, options `--section.field`.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from prime_jax.errors import ConfigError
from prime_jax.frozen import Frozen
from prime_jax.models import ModelConfig

ENV_PREFIX = "PRIME_"
SPEC_SECTIONS = {"predictor": "model", "training": "train"}


class TrainingConfig(Frozen):
    """How a predictor is trained (spec section 8, plan section 4)."""

    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay, on matrices only")
    batch_size: int = Field(default=64, ge=1, description="examples per step, over all devices")
    micro_batch_size: int = Field(
        default=0, ge=0, description="examples whose activations are held at a time; 0: the whole batch"
    )
    num_epochs: int = Field(default=10, ge=1, description="passes over the training split")
    warmup_steps: int = Field(default=1000, ge=0, description="linear warm-up; at most a tenth of the run")
    gradient_checkpointing: bool = Field(default=True, description="recompute activations to save memory")
    remat_policy: Literal["blocks", "dots"] = Field(
        default="blocks", description="what gradient_checkpointing recomputes: all, or all but products"
    )
    mixed_precision: bool = Field(default=True, description="matrix products in bfloat16")
    gradient_clip_val: float = Field(
        default=1.0, ge=0, description="largest gradient norm; 0 turns clipping off"
    )
    accumulate_grad_batches: int = Field(default=1, ge=1, description="batches per optimizer update")
    temperature: float = Field(default=0.07, gt=0, description="InfoNCE temperature")
    temperature_schedule: Literal["fixed", "learned", "annealed"] = Field(
        default="fixed", description="whether the temperature is trained (0.01 to 0.5) or moves to the end"
    )
    temperature_end: float = Field(default=0.02, gt=0, description="last temperature when annealed")
    projection_dim: int = Field(
        default=0, ge=0, description="ProjNCE: dimension of a learned projection to compare in; 0: none"
    )
    projection_weight: float = Field(
        default=1.0, gt=0, description="weight of the loss in the projection beside the plain one"
    )
    target: Literal["frozen", "slow", "ema"] = Field(
        default="frozen", description="targets as encoded, or through a head that is trained slowly"
    )
    y_encoder_lr_multiplier: float = Field(
        default=0.05, ge=0, le=1, description="learning rate of the target head, as a share"
    )
    ema_start: float = Field(default=0.996, ge=0, lt=1, description="first decay of target: ema")
    ema_end: float = Field(default=0.999, ge=0, lt=1, description="last decay of target: ema")
    positives: Literal["one", "all"] = Field(
        default="one", description="a row per right answer, or a row per example with all of them"
    )
    negatives: Literal["batch", "corpus"] = Field(
        default="batch", description="what a prediction is told from: the batch's targets, or all passages"
    )
    corpus_chunk: int = Field(default=8192, ge=1, description="passages at a time for negatives: corpus")
    num_negatives: int = Field(default=0, ge=0, description="explicit negatives per example, from the data")
    context_negatives: bool = Field(default=False, description="the turns' own passages are negatives too")
    mined_negatives: int = Field(default=0, ge=0, le=10, description="hard negatives found by searching")
    mine_every_epochs: int = Field(default=1, ge=1, description="epochs between two searches for negatives")
    mining_margin: float = Field(
        default=0.05, ge=0, lt=1, description="how far a negative stays below the positive, relatively"
    )
    rotation: float = Field(
        default=0.0, ge=0, le=1, description="share of batches turned at random; helps on unseen topics"
    )
    average_weights: float = Field(
        default=0.0, ge=0, lt=1, description="decay of a moving average of weights that predicts; 0: none"
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, data order and dropout")
    eval_every_epochs: int = Field(default=1, ge=1, description="epochs between validations and checkpoints")
    select_by: Literal["MRR@10", "unseen MRR@10"] = Field(
        default="MRR@10", description="dev figure of the best checkpoint; unseen: answers not in train"
    )
    save_every_steps: int = Field(default=0, ge=0, description="steps between more checkpoints; 0: none")
    params_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="dtype of the saved inference parameters"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "TrainingConfig":
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}"
            )
        if self.negatives == "corpus":
            for name, off in (("target", "frozen"), ("projection_dim", 0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"negatives 'corpus' compares with the passages as they are encoded; {name} moves "
                        "what is compared: use negatives 'batch'"
                    )
        return self


class DataConfig(Frozen):
    """Which texts are trained on, and which encoder embeds them."""

    path: str | None = Field(default=None, description="folder with corpus.jsonl, train.jsonl, dev.jsonl")
    store: str | None = Field(
        default=None, description="embedding store; default: embeddings/ in the data folder"
    )
    encoder: str = Field(default="minilm", description="minilm, a model folder, or module:name of an Encoder")
    query_prefix: str = Field(default="", description="put before queries and turns when encoding")
    passage_prefix: str = Field(default="", description="put before passages when encoding")
    context_from: Literal["data", "search"] = Field(
        default="data", description="turns come from the data, or from a first dense search"
    )
    first_pass_k: int = Field(default=10, ge=1, description="passages per query for context_from: search")


class MeshConfig(Frozen):
    """How devices are arranged; -1 means all that are left."""

    data: int = Field(default=-1, ge=-1, description="groups of devices that share the batch")
    fsdp: int = Field(default=1, ge=1, description="devices that share weights and optimizer state")


class MonitorConfig(Frozen):
    """Where a run's figures go besides history.jsonl, history.csv and curves.png."""

    tensorboard: bool = Field(default=False, description="also to tensorboard/ in the run folder")
    wandb: str | None = Field(default=None, description="also to this Weights & Biases project")
    log_every: int = Field(default=20, ge=1, description="steps between two rows of the history")


class Config(Frozen):
    """Everything that defines a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Config":
        if self.train.rotation and self.model.input_dim != self.model.output_dim:
            raise ValueError(
                f"train.rotation turns queries and predictions alike, so model.input_dim "
                f"{self.model.input_dim} must equal model.output_dim {self.model.output_dim}"
            )
        return self


class _Settings(BaseSettings):
    """`Config` as pydantic-settings fills it: given values < environment < command line."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_prog_name="prime-jax",
    )

    model: ModelConfig = ModelConfig()
    train: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    monitor: MonitorConfig = MonitorConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def read_config(file: Path | None = None, options: Sequence[str] = ()) -> Config:
    """Read the configuration of a run: defaults < YAML file < environment < command line.

    Args:
        file: YAML file, or None for the defaults.
        options: Command-line words such as `["--train.num-epochs", "3"]`.

    Raises:
        ConfigError: For a missing or malformed file, an unknown key (with the nearest valid one), or a value
            out of bounds; the message says where it came from.
    """
    given = {} if file is None else _read_yaml(file)
    _check(Config, given, str(file))
    words = [_dashed(word) for word in options]
    _check_names([word.split("=")[0] for word in words if word.startswith("--")], _option_names(), "option")
    variables = [name for name in os.environ if name.upper().startswith(ENV_PREFIX) and "__" in name]
    _check_names([name.upper() for name in variables], _variable_names(), "environment variable")
    try:
        settings = _Settings(_cli_parse_args=words, **given)  # type: ignore[call-arg]
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, Config, "command line or environment")) from None
    except SettingsError as unreadable:
        raise ConfigError(str(unreadable)) from None
    try:
        return Config(**{name: getattr(settings, name) for name in Config.model_fields})
    except ValidationError as invalid:  # sections that do not fit together
        raise ConfigError(_explain(invalid, Config, "configuration")) from None


def load_stored_config(file: Path) -> Config:
    """Read a configuration written by `to_yaml`, and nothing else: no environment, no options."""
    return _check(Config, _read_yaml(file), str(file))


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML, every field with its description beside it."""
    lines = []
    for section, part in config:
        lines.append(f"{section}:")
        for name, value in part:
            text = yaml.safe_dump({name: value}, default_flow_style=False, width=1000).strip()
            lines.append(f"  {text:<34} # {type(part).model_fields[name].description}")
    return "\n".join(lines) + "\n"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key {twice!r} is given twice", node.start_mark
        )
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as broken:
        raise ConfigError(f"{file}: cannot be read as YAML: {broken}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{file}: expected sections such as 'model:' and 'train:'")
    return _from_spec_names(content, file)


def _from_spec_names(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Accept the requirement documents' layout: flat field names, or sections `predictor` and `training`."""
    sections: dict[str, Any] = {}
    for key, value in content.items():
        home = next((name for name in ("model", "train") if key in _fields(name)), None)
        section = key if home is None else home
        section = SPEC_SECTIONS.get(section, section)
        value = value if home is None else {key: value}
        if section in sections and isinstance(value, dict) and isinstance(sections[section], dict):
            twice = sorted(sections[section].keys() & value.keys())
            if twice:
                raise ConfigError(f"{file}: {section}.{twice[0]} is given twice")
            value = sections[section] | value
        sections[section] = value
    return sections


def _fields(section: str) -> Iterable[str]:
    """Field names of one section."""
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation.model_fields


def _keys() -> list[tuple[str, str]]:
    return [(section, name) for section in Config.model_fields for name in _fields(section)]


def _option_names() -> list[str]:
    return [f"--{section}.{name}".replace("_", "-") for section, name in _keys()]


def _variable_names() -> list[str]:
    return [f"{ENV_PREFIX}{section}__{name}".upper() for section, name in _keys()]


def _dashed(word: str) -> str:
    """Let `--model.num_layers` mean `--model.num-layers`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} {name}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar valid name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


M = TypeVar("M", bound=BaseModel)


def _check(kind: type[M], content: Mapping[str, Any], origin: str) -> M:
    try:
        return kind.model_validate(content)
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, kind, origin)) from None


def _explain(invalid: ValidationError, kind: type[BaseModel], origin: str) -> str:
    """Every fault in one line each: key, what is wrong, what was given."""
    lines = []
    for fault in invalid.errors():
        path = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            known = _fields(path[0]) if len(path) > 1 else kind.model_fields
            hint = nearest(path[-1], known).replace("mean ", f"mean {'.'.join([*path[:-1], ''])}")
            lines.append(f"{origin}: unknown key {'.'.join(path)}{hint}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = "" if isinstance(fault["input"], dict) else f" (given: {fault['input']!r})"
            lines.append(f"{origin}: {'.'.join(path)}: {message}{given}")
    return "\n".join(lines)
