"""The settings of the server: command line, over environment variables `PRIME_SERVE_...`, over defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliImplicitFlag, SettingsConfigDict, SettingsError

from prime_jax.errors import ConfigError
from prime_jax.models import AnyConfig

TEXT_BYTES = 32
"""Room for one number of a request: 17 digits, sign, exponent, separators."""


class ServeSettings(BaseSettings):
    """Serve a run, a checkpoint or a bundle over HTTP."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_SERVE_",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        cli_prog_name="python -m prime_jax.serve",
    )

    run: Path | None = Field(default=None, description="run folder, checkpoint folder or bundle")
    untrained: int | None = Field(
        default=None, ge=1, description="instead of a run: embeddings of this dimension"
    )
    general: CliImplicitFlag[bool] = Field(
        default=False, description="instead of a run: the predictor of the package, which reads texts"
    )
    encoder: str | None = Field(
        default=None, description="encoder that clients use; refused if the run was trained with another one"
    )
    max_turns: int | None = Field(
        default=None, ge=1, le=50, description="of a request, with --untrained; else 10"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto measures at start which is faster"
    )
    guard: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="go back to the query (or its mix with turns) for foreign ones; auto: where calibrated",
    )
    max_delay_ms: float = Field(default=2.0, ge=0, description="how long a request waits for company")
    max_queue: int = Field(default=1024, ge=1, description="most waiting requests; more get 503")
    max_body_bytes: int | None = Field(
        default=None, ge=1, description="largest request body; default: enough for a full window as text"
    )
    timeout_s: float = Field(default=10.0, gt=0, description="longest a request may take; then 504")
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="longest a request's head may take to arrive; then 408"
    )
    max_connections: int = Field(default=1000, ge=1, description="most connections open at once")
    max_sessions: int = Field(default=0, ge=0, description="most sessions kept here; 0 keeps none")
    session_idle_s: float = Field(default=900.0, gt=0, description="a session unused for so long is dropped")
    grace_s: int = Field(default=20, ge=1, description="how long a stop waits for running requests")

    @model_validator(mode="after")
    def _one_predictor(self) -> "ServeSettings":
        if (self.run is not None) + (self.untrained is not None) + self.general != 1:
            raise ValueError("name one: a --run, --untrained with the dimension of embeddings, or --general")
        if self.run is None and self.encoder is not None:
            raise ValueError("--encoder goes with --run, which says what it was trained on")
        if self.untrained is None and self.max_turns is not None:
            raise ValueError("--max-turns goes with --untrained; a run knows its own")
        if self.run is None and self.precision != "auto":
            raise ValueError("--precision goes with --run; without one all is computed in float32")
        return self

    def guards(self, possible: bool) -> bool:
        """Whether answers are guarded, where a guard is possible or not."""
        return possible if self.guard == "auto" else self.guard == "on"

    def body_limit(self, model: AnyConfig) -> int:
        """Largest request body in bytes for a model."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return 4096 + TEXT_BYTES * (model.max_context_length + 1) * model.input_dim


def read_settings(options: Sequence[str]) -> ServeSettings:
    """Read the settings from command-line words and the environment.

    Raises:
        ConfigError: Naming the option that is unknown, missing or out of bounds.
    """
    try:
        return ServeSettings(_cli_parse_args=list(options))  # type: ignore[call-arg]
    except ValidationError as invalid:
        told = []
        for fault in invalid.errors():
            option = "-".join(str(part) for part in fault["loc"]).replace("_", "-")
            words = fault["msg"].removeprefix("Value error, ")
            told.append(f"--{option}: {words}" if option else words)
        raise ConfigError("; ".join(told)) from None
    except SettingsError as unreadable:
        raise ConfigError(str(unreadable)) from None
