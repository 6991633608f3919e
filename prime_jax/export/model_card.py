"""MODEL_CARD.md of a bundle: what the model predicts, how to use it, where it comes from, how good it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from prime_jax._version import __version__
from prime_jax.models.prime import PredictorConfig


def model_card(
    config: PredictorConfig,
    parameters: int,
    facts: Mapping[str, Any],
    parity: dict[str, Any],
    *,
    memory_mapped: bool = False,
) -> str:
    """The card as Markdown.

    Args:
        config: Shape and behaviour of the model.
        parameters: How many numbers were trained.
        facts: Where the model comes from (`write_bundle`).
        parity: What parity.json holds.
        memory_mapped: Whether the memory must be mapped by target_head.safetensors before it is searched.
    """
    parts = [
        "# Embedding predictor",
        "Predicts the embedding of the passage that should be retrieved, from the embeddings of the past "
        "turns and of the current query. Search your index with the prediction instead of the query.",
        f"Exported with prime-jax {__version__}; {parameters:,} parameters, float32; residual "
        f"`{config.residual}`, context attention `{config.context_attention}`.",
        "## Inputs and output",
        _shapes(config),
        _encoder(facts),
        _MEMORY if memory_mapped else "",
        "## Use",
        _usage(config),
        "## Training and evaluation",
        _origin(facts),
        "## Agreement with JAX",
        _agreement(parity),
        "## Limits",
        _limits(config),
        "## Licence",
        "The code in this bundle is Apache-2.0. The weights may also be bound by the terms of the data they "
        "were trained on and of the encoder that made the embeddings.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_MEMORY = (
    "**The memory must be mapped first.** This model was trained against targets that a trained head mapped; "
    "its predictions search passages that went through the same head: `y + y @ kernel`, scaled to unit norm, "
    "for every passage embedding `y`, with `kernel` from target_head.safetensors. Without it they are wrong."
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shapes(config: PredictorConfig) -> str:
    N, D, E = config.max_context_length, config.input_dim, config.output_dim
    return table(
        ["name", "type", "meaning"],
        [
            ["`context`", f"float32 [B, {N}, {D}]", "past turns, oldest first; padded slots hold anything"],
            ["`context_mask`", f"bool [B, {N}]", "True where a turn is real; none is real at the first turn"],
            ["`query`", f"float32 [B, {D}]", "the current query"],
            ["`embedding`", f"float32 [B, {E}]", "the prediction, unit norm"],
        ],
    )


def _encoder(facts: Mapping[str, Any]) -> str:
    """Which embeddings the model takes."""
    if "encoder" not in facts:
        return (
            "Inputs must come from the encoder that the model was trained with; this bundle does not name it."
        )
    sentences = [f"All embeddings, also those of the passages, come from the encoder `{facts['encoder']}`."]
    for name, what in (("query_prefix", "Queries and turns"), ("passage_prefix", "Passages")):
        if facts.get(name):
            sentences.append(f"{what} are encoded with `{facts[name]}` in front.")
    if facts.get("context_from") == "search":
        sentences.append(
            f"In training the turns were the top {facts['first_pass_k']} passages of a first search with the "
            "query, best last; give it the same."
        )
    return " ".join(sentences)


def _usage(config: PredictorConfig) -> str:
    N = config.max_context_length
    return f"""```python
import prime_jax                                         # JAX

embedding = prime_jax.load("bundle").predict(context, query, context_mask)
```

```python
import onnxruntime                                       # ONNX Runtime

session = onnxruntime.InferenceSession("bundle/model.onnx")
(embedding,) = session.run(None, {{"context": context, "context_mask": context_mask, "query": query}})
```

```python
from torch_runtime import load_bundle                    # PyTorch; copy torch_runtime.py beside your code

embedding = load_bundle("bundle")(context, query, context_mask)
```

The ONNX file takes exactly {N} slots and a mask; JAX and PyTorch take any number of turns up to {N}."""


def _origin(facts: Mapping[str, Any]) -> str:
    named = {"step": "training steps", "epoch": "epochs", "data_hash": "training data (SHA-256)"}
    rows = [[what, f"{facts[name]}"] for name, what in named.items() if name in facts]
    parts = [table(["what", "value"], rows)] if rows else []
    if metrics := facts.get("metrics"):
        scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        parts.append(f"Validation: {scores}.")
    if report := facts.get("report"):
        methods: Mapping[str, Mapping[str, float]] = report["methods"]
        columns = list(next(iter(methods.values())))
        measured = [[name, *(f"{scores[key]:.4f}" for key in columns)] for name, scores in methods.items()]
        parts += [
            f"Measured on the {report['split']} split: {report['queries']:,} queries, "
            f"{report['corpus']:,} passages.",
            table(["method", *columns], measured),
        ]
    return "\n\n".join(parts) or "Nothing is recorded about the training of this model."


def _agreement(parity: dict[str, Any]) -> str:
    rows = []
    for name in ("onnxruntime", "torch"):
        found = parity[name]
        figures = [f"{found['max_abs_difference']:.1e}", f"{found['min_cosine']:.9f}"]
        rows.append([name, *figures] if found["checked"] else [name, f"not checked: {found['why']}", ""])
    return (
        f"Over {parity['rows']} golden requests (golden.safetensors), one per number of turns:\n\n"
        + table(["runtime", "largest difference", "smallest cosine"], rows)
    )


def _limits(config: PredictorConfig) -> str:
    return (
        f"- At most {config.max_context_length} turns are looked at; pass the newest ones.\n"
        "- Embeddings of another encoder, or with other prefixes, give meaningless answers and no error.\n"
        "- The prediction is as good as the training data is close to yours: measure it beside the plain "
        "query on your own data before relying on it."
    )
