"""The one way to read a configuration: YAML file < environment < command line.

Environment variables are named `PRIME_<SECTION>__<FIELD>`, options `--section.field`.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from prime_jax.config.hybrid import HybridSection
from prime_jax.config.sections import (
    Config,
    DataConfig,
    MeshConfig,
    MonitorConfig,
    SteeringConfig,
    TrainingConfig,
)
from prime_jax.data.encode import names_code, unnamed_code
from prime_jax.errors import ConfigError
from prime_jax.files import user_path
from prime_jax.losses.jasper import JasperLossConfig
from prime_jax.models import DEFAULT_KIND, KINDS, kind_of
from prime_jax.models.prime import PredictorConfig

ENV_PREFIX = "PRIME_"
_PATHS = {
    "data": ("path", "store", "encoder"),
    "steering": ("path",),
    "model": ("checkpoint_path",),
    "train": ("start",),
}
SPEC_SECTIONS = {"predictor": "model", "training": "train"}


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

    model: Any = PredictorConfig()
    train: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    monitor: MonitorConfig = MonitorConfig()
    steering: SteeringConfig = SteeringConfig()
    jasper: JasperLossConfig = JasperLossConfig()
    hybrid: HybridSection = HybridSection()

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


def read_config(file: Path | None = None, options: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Read the configuration of a run: defaults < YAML file < environment < command line.

    Args:
        file: YAML file, or None for the defaults.
        options: Command-line words such as `["--train.num-epochs", "3"]`.
        stored: Whether the file lies in a run instead of being the user's own. Code that it names as an
            encoder is then run only if environment or options name it as well.

    Raises:
        ConfigError: For a missing or malformed file, an unknown key (with the nearest valid one), or a value
            out of bounds; the message says where it came from.
    """
    given = {} if file is None else _read_yaml(file)
    unnamed = _without_code(given) if stored else None
    words = [_dashed(word) for word in options]
    kind = _kind(given, words, os.environ, str(file))
    _check(_with_kind(given, kind), str(file))
    _check_names(
        [word.split("=")[0] for word in words if word.startswith("--")], _option_names, kind, "option"
    )
    variables = [name for name in os.environ if name.upper().startswith(ENV_PREFIX) and "__" in name]
    _check_names([name.upper() for name in variables], _variable_names, kind, "environment variable")
    model = KINDS[kind]
    try:
        kinded: Any = create_model("Settings", __base__=_Settings, model=(model, model()))
        settings = kinded(_cli_parse_args=words, **given)
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, "command line or environment", kind)) from None
    except SettingsError as unreadable:
        raise ConfigError(str(unreadable)) from None
    try:
        config = Config(**{name: getattr(settings, name) for name in Config.model_fields})
    except ValidationError as invalid:  # sections that do not fit together
        raise ConfigError(_explain(invalid, "configuration", kind)) from None
    if unnamed is not None and file is not None and config.data.encoder == DataConfig().encoder:
        raise unnamed_code(unnamed, file)
    return _at_home(config)


def load_stored_config(file: Path) -> Config:
    """Read a configuration written by `to_yaml`, and nothing else: no environment, no options."""
    given = _read_yaml(file)
    _kind(given, [], {}, str(file))
    return _check(given, str(file))


def user_names(section: str, name: str, options: Sequence[str]) -> bool:
    """Whether the command line or the environment names a setting, whatever a file says of it."""
    words = {_dashed(word).partition("=")[0] for word in options}
    variables = {variable.upper() for variable in os.environ}
    return (
        f"--{section}.{name}".replace("_", "-") in words
        or f"{ENV_PREFIX}{section}__{name}".upper() in variables
    )


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML, every field with its description beside it."""
    lines = []
    for section, part in config:
        lines.append(f"{section}:")
        for name, value in part:
            text = f"{name}: {_flow(value)}"
            lines.append(f"  {text:<34} # {type(part).model_fields[name].description}")
    return "\n".join(lines) + "\n"


def _without_code(given: dict[str, Any]) -> str | None:
    """Take the encoder out of a configuration if it is code, and return its name."""
    data = given.get("data")
    if not isinstance(data, dict) or not isinstance(name := data.get("encoder"), str) or not names_code(name):
        return None
    given["data"] = {key: value for key, value in data.items() if key != "encoder"}
    return name


def _at_home(config: Config) -> Config:
    """The configuration with `~` in its paths expanded, as no shell does it in YAML."""
    changed: dict[str, Any] = {}
    for section, names in _PATHS.items():
        part: Any = getattr(config, section)
        given = {name: getattr(part, name, None) for name in names}
        at_home = {name: text for name, text in given.items() if isinstance(text, str) and text[:1] == "~"}
        try:
            update: dict[str, Any] = {name: str(user_path(text)) for name, text in at_home.items()}
            start = getattr(part, "init_from", None)
            if start is not None and start.path[:1] == "~":
                update["init_from"] = start.model_copy(update={"path": str(user_path(start.path))})
        except ValueError as unknown:
            raise ConfigError(f"section {section}: {unknown}") from None
        if update:
            changed[section] = part.model_copy(update=update)
    return config.model_copy(update=changed) if changed else config


def _with_kind(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    model = given.get("model", {})
    return {**given, "model": {**model, "kind": kind}} if isinstance(model, dict) else dict(given)


def _kind(given: Mapping[str, Any], words: Sequence[str], environment: Mapping[str, str], origin: str) -> str:
    """Which model is asked for: it decides which settings there are."""
    model = given.get("model") or {}
    found: Any = model.get("kind", DEFAULT_KIND) if isinstance(model, dict) else DEFAULT_KIND
    for name, value in environment.items():
        if name.upper() == f"{ENV_PREFIX}MODEL__KIND":
            found, origin = value, "environment"
    for index, word in enumerate(words):
        if word == "--model.kind" and index + 1 < len(words):
            found, origin = words[index + 1], "option"
        elif word.startswith("--model.kind="):
            found, origin = word.partition("=")[2], "option"
    if not isinstance(found, str) or found not in KINDS:
        raise ConfigError(f"{origin}: model.kind: {found!r} is none of {', '.join(KINDS)}")
    return found


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


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
        home = next((name for name in ("model", "train") if key in _fields(name, DEFAULT_KIND)), None)
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


def _fields(section: str, kind: str) -> Iterable[str]:
    """Field names of one section, for a kind of model."""
    if section == "model":
        return KINDS[kind].model_fields
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation.model_fields


def _keys(kind: str) -> list[tuple[str, str]]:
    return [(section, name) for section in Config.model_fields for name in _fields(section, kind)]


def _option_names(kind: str) -> list[str]:
    return [f"--{section}.{name}".replace("_", "-") for section, name in _keys(kind)]


def _variable_names(kind: str) -> list[str]:
    return [f"{ENV_PREFIX}{section}__{name}".upper() for section, name in _keys(kind)]


def _dashed(word: str) -> str:
    """Let `--model.num_layers` mean `--model.num-layers`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _check_names(
    given: Iterable[str], names_of: Callable[[str], Iterable[str]], kind: str, what: str
) -> None:
    for name in given:
        known = list(names_of(kind))
        if name not in known:
            raise ConfigError(
                f"unknown {what} {name}{_elsewhere(name, names_of, kind) or nearest(name, known)}"
            )


def _elsewhere(name: str, names_of: Callable[[str], Iterable[str]], kind: str) -> str:
    """A hint at the kinds of model that do have a name, or nothing."""
    others = " and ".join(other for other in KINDS if name in names_of(other))
    return f": model.kind is {kind}, only {others} has it" if others else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar valid name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _check(content: Mapping[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(content)
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, origin, str(kind_of(content.get("model", {}))))) from None


def _explain(invalid: ValidationError, origin: str, kind: str) -> str:
    """Every fault in one line each: key, what is wrong, what was given."""
    lines = []
    for fault in invalid.errors():
        path = [str(part) for part in fault["loc"]]
        if path[:1] == ["model"] and path[1:2] == [kind]:  # the tag of the model's kind, which is no key
            del path[1]
        if fault["type"] == "extra_forbidden":
            known = _fields(path[0], kind) if len(path) > 1 else Config.model_fields
            hint = nearest(path[-1], known).replace("mean ", f"mean {'.'.join([*path[:-1], ''])}")
            if path[0] == "model":
                hint = _elsewhere(path[-1], partial(_fields, "model"), kind) or hint
            lines.append(f"{origin}: unknown key {'.'.join(path)}{hint}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = "" if isinstance(fault["input"], dict) else f" (given: {fault['input']!r})"
            lines.append(": ".join(filter(None, (origin, ".".join(path), f"{message}{given}"))))
    return "\n".join(lines)
