"""The mix of query and turns in PyTorch, in one file that needs torch and the standard library only.

Every exported bundle of such a model holds it as torch_runtime.py; take it into your own project.

    from torch_runtime import load_bundle

    model = load_bundle("bundle/")                  # every file checked against manifest.json, in eval mode
    with torch.inference_mode():
        embedding = model(context, query, context_mask)    # [B, N, D], [B, D], [B, N] -> [B, E]

It gives the numbers of the JAX model to about 1e-6; `prime_jax.export.from_torch` takes its state_dict back
to JAX.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from prime_jax.export.torch_runtime import (
    CheckpointError,
    PredictorError,
    _opened,
    _read_json,
    check_inputs,
)

# Everything above this line is in torch_runtime.py already.

MAPS = {"none": 0, "query": 1, "context": 3}  # embeddings that a linear map takes


@dataclass(frozen=True)
class MixConfig:
    """Shape and behaviour of a `MixPredictor`; the fields of prime_jax.

    Attributes:
        input_dim: Width D of queries and turns.
        output_dim: Width of a prediction, the same.
        max_context_length: Most turns.
        average: Whether the weighted turns are divided by their number.
        linear: Of what there is a linear map: `none`, `query`, or `context`, which is query, mean turn and
            newest turn.
        keep_query: Whether query and turns are added to what it gives.
    """

    input_dim: int
    output_dim: int
    max_context_length: int
    average: bool
    linear: str
    keep_query: bool

    def __post_init__(self) -> None:
        if self.linear not in MAPS:
            raise PredictorError(f"linear {self.linear!r} is none of {', '.join(MAPS)}")

    @classmethod
    def from_json(cls, path: str | Path) -> "MixConfig":
        """Read the `model` section of a bundle's config.json; settings of the JAX service are left aside.

        Raises:
            CheckpointError: If the file is missing, is not JSON, or does not describe such a model.
        """
        model = _read_json(Path(path)).get("model")
        if not isinstance(model, dict) or model.get("kind") != "mix":
            raise CheckpointError(f"{path}: does not describe a model of kind mix")
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in model:
                raise CheckpointError(f"{path}: model.{name} is missing")
        try:
            return cls(**{name: model[name] for name in names})
        except PredictorError as unfit:
            raise CheckpointError(f"{path}: does not describe a model ({unfit})") from None


class MixPredictor(nn.Module):
    """Unit-norm query plus weighted unit-norm turns, plus a linear map where the config has one."""

    def __init__(self, config: MixConfig) -> None:
        super().__init__()
        self.config = config
        self.turn_weights = nn.Parameter(0.3 * 0.5 ** torch.arange(config.max_context_length))
        if MAPS[config.linear]:
            self.linear_map = nn.Linear(MAPS[config.linear] * config.input_dim, config.output_dim)

    def forward(self, context: Tensor, query: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Predict the embedding of the passage to retrieve.

        Args:
            context: Turn embeddings, oldest first, `[B, N, D]`; N from 0 to max_context_length.
            query: Query embeddings, `[B, D]`.
            context_mask: True where a turn is real, `[B, N]`; None means all are.

        Returns:
            Unit-norm predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape or dtype does not fit.
        """
        check_inputs(self.config, context, query, context_mask)
        if context_mask is None:
            context_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        turns = functional.normalize(context.masked_fill(~context_mask[..., None], 0.0), dim=-1)
        query = functional.normalize(query, dim=-1)
        count = context_mask.sum(dim=1, keepdim=True).clamp(min=1).to(query.dtype)
        age = context_mask.sum(dim=1, keepdim=True) - context_mask.cumsum(dim=1)
        added = torch.zeros_like(query)
        if self.config.keep_query:
            mix = ((self.turn_weights[age] * context_mask)[..., None] * turns).sum(dim=1)
            added = query + (mix / count if self.config.average else mix)
        if self.config.linear == "query":
            added = added + self.linear_map(query)
        elif self.config.linear == "context":
            newest = turns.masked_fill((age != 0)[..., None], 0.0).sum(dim=1)
            added = added + self.linear_map(torch.cat([query, turns.sum(dim=1) / count, newest], dim=1))
        return functional.normalize(added, dim=-1)

    def get_num_params(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def load_bundle(folder: str | Path) -> MixPredictor:
    """Open an exported bundle: verify every file, then build the model, in eval mode.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    model: MixPredictor = _opened(folder, MixConfig, MixPredictor)
    return model
