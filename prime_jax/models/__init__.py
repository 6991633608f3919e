"""The models, and the one list of them: a new model is one file here and one name in this list."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from prime_jax.models.jasper import JasperConfig, JasperPredictor
from prime_jax.models.mix import MixConfig, MixPredictor
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.models.subspace import DecomposedJasperPredictor, SubspaceConfig
from prime_jax.models.text import TextConfig, TextPredictor

EmbeddingConfig = PredictorConfig | JasperConfig | SubspaceConfig | MixConfig
AnyConfig = EmbeddingConfig | TextConfig
MODELS: tuple[type[AnyConfig], ...] = (PredictorConfig, JasperConfig, SubspaceConfig, TextConfig, MixConfig)
KINDS: dict[str, type[AnyConfig]] = {kind.model_fields["kind"].default: kind for kind in MODELS}
DEFAULT_KIND = "prime"

EmbeddingModel = EmbeddingPredictor | JasperPredictor | DecomposedJasperPredictor | MixPredictor
Model = EmbeddingModel | TextPredictor


def model_config(given: Mapping[str, Any]) -> AnyConfig:
    """The configuration of a model from its stored content.

    Raises:
        pydantic.ValidationError: If it does not describe a model, or one of no known kind.
    """
    kind = KINDS.get(kind_of(given))
    config: AnyConfig = (TypeAdapter(ModelConfig) if kind is None else TypeAdapter(kind)).validate_python(
        given
    )
    return config


def kind_of(given: Any) -> Any:
    """Which model a configuration or its content as a mapping is for; without a word the default one."""
    kind = given.get("kind", DEFAULT_KIND) if isinstance(given, dict) else getattr(given, "kind", None)
    return kind if isinstance(kind, str) else None


ModelConfig = Annotated[
    Annotated[PredictorConfig, Tag("prime")]
    | Annotated[JasperConfig, Tag("jasper")]
    | Annotated[SubspaceConfig, Tag("subspace")]
    | Annotated[TextConfig, Tag("text")]
    | Annotated[MixConfig, Tag("mix")],
    Discriminator(kind_of),
]
