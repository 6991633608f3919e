"""What MODEL_CARD.md says of one kind of model and of no other."""

from collections.abc import Mapping
from typing import Any

from prime_jax.export.interface import Words
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.mix import MixConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.models.text import TextConfig

_EXPLANATION = (
    "The prediction is `coarse + fine`. `coarse` lies among the centroids of the subspaces that `routing` "
    "chose, clusters of the training data; the norm of `fine` says how far the prediction is from what they "
    "stand for."
)

_FOREIGN = "- Embeddings of another encoder, or with other prefixes, give meaningless answers and no error."

_STEERED_USAGE = """```python
import prime_jax                                         # JAX

embedding = prime_jax.load("bundle").steer(question, steering)
```

```python
import onnxruntime                                       # ONNX Runtime

session = onnxruntime.InferenceSession("bundle/model.onnx")
inputs = {"context": steering[:, None], "context_mask": has_steering[:, None], "query": question}
(embedding,) = session.run(["embedding"], inputs)
```

```python
from torch_runtime import load_bundle                    # PyTorch; copy torch_runtime.py beside your code

embedding = load_bundle("bundle").predict(question, steering)
```"""

_EXPLAINED_USAGE = (
    "`session.run(None, inputs)` and, in PyTorch, `explain(question, steering)` also give `routing`, "
    "`coarse` and `fine`."
)


def prime_words(config: PredictorConfig, facts: Mapping[str, Any]) -> Words:
    """Of the default model."""
    settings = f"residual `{config.residual}`, context attention `{config.context_attention}`"
    return _of_turns(config.max_context_length, settings, _embeddings_from(facts, "Queries and turns"))


def mix_words(config: MixConfig, facts: Mapping[str, Any]) -> Words:
    """Of the models without layers."""
    turns = "their mean is" if config.average else "they are"
    settings = f"no layers: turns are weighted by their age, {turns} added to the query"
    settings += "" if config.linear == "none" else f"; linear map of the {config.linear}"
    settings += "" if config.keep_query else " alone, to which nothing is added"
    encoder = "Queries, turns and passages must be embeddings of one encoder, whichever it is."
    if "encoder" in facts:
        encoder = _embeddings_from(facts, "Queries and turns")
    return _of_turns(config.max_context_length, settings, encoder)


def _of_turns(N: int, settings: str, encoder: str) -> Words:
    """Of the models that take the embeddings of up to N turns and a query."""
    return Words(
        given="the embeddings of the past turns and of the current query",
        settings=settings,
        explanation="",
        encoder=encoder,
        usage=f"""```python
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

The ONNX file takes exactly {N} slots and a mask; JAX and PyTorch take any number of turns up to {N}.""",
        golden="one per number of turns",
        limits=f"- At most {N} turns are looked at; pass the newest ones.\n{_FOREIGN}",
    )


def steered_words(config: SteeredConfig, facts: Mapping[str, Any]) -> Words:
    """Of the models that take a steering vector."""
    subspaces = isinstance(config, SubspaceConfig)
    settings = f"residual `{config.residual}`"
    if isinstance(config, SubspaceConfig):
        settings += f", {config.num_subspaces} subspaces, routing `{config.routing}`"
    return Words(
        given="the embedding of a question and a steering vector that says where to look",
        settings=settings,
        explanation=_EXPLANATION if subspaces else "",
        encoder=_embeddings_from(facts, "Questions"),
        usage=_STEERED_USAGE + ("\n\n" + _EXPLAINED_USAGE if subspaces else ""),
        golden="every second one without steering",
        limits="- Steering that is made from the right answer finds it more often than any that is made from "
        f"a question alone; measure with what you will really have.\n{_FOREIGN}",
    )


def text_words(config: TextConfig, facts: Mapping[str, Any]) -> Words:
    """Of the models that read query and turns themselves."""
    prefix = facts.get("query_prefix", "")
    between = "turns, a separator between them" if config.separate_turns else "turns"
    order = f"`[CLS] {prefix}query [SEP] newest turn [SEP] the one before [SEP] ...`"
    if not config.separate_turns:
        order = f"`[CLS] {prefix}query newest turn, the one before, ... [SEP]`"
    roles = (
        " Who said what (the query, what answered its author, what its author said) is told by the "
        "separators, in the graph itself; turns are taken to alternate."
    )
    return Words(
        given="the texts of the current query and of the past turns, read as one sequence",
        settings=f"pooling `{config.pooling}`, reads at most {config.max_tokens} tokens, the query and up to "
        f"{config.max_context_length} {between}",
        explanation=f"The token ids of a conversation are {order}, cut at {config.max_tokens}, so that the "
        "oldest words go first; special tokens that a text spells out are ordinary characters."
        + (" Texts are lower-cased first." if config.lower_case else "")
        + (roles if config.roles else ""),
        encoder=_memory_of(facts),
        usage=_reading(config, prefix),
        golden="one per number of turns, up to the longest",
        limits=f"- At most {config.max_context_length} turns and {config.max_tokens} tokens are read; of "
        "longer conversations the oldest words are not.\n"
        "- A memory of another encoder, or with another prefix, gives meaningless answers and no error.",
    )


def _memory_of(facts: Mapping[str, Any]) -> str:
    """What the predictions can be searched in."""
    if "encoder" not in facts:
        return (
            "Passages must come from the encoder of the memory that the model was trained against; this "
            "bundle does not name it."
        )
    sentences = [f"It searches passages as the encoder `{facts['encoder']}` embeds them."]
    if facts.get("passage_prefix"):
        sentences.append(f"Passages are encoded with `{facts['passage_prefix']}` in front.")
    if facts.get("context_from") == "search":
        sentences.append(
            f"In training the turns were the top {facts['first_pass_k']} passages of a first search with the "
            "query, best last; give it the same."
        )
    return " ".join(sentences)


def _reading(config: TextConfig, prefix: str) -> str:
    """Code that reads `turns`, oldest first, and `query`."""
    asked = f"{prefix!r} + query" if prefix else "query"
    text = "text.lower()" if config.lower_case else "text"
    turn = "[separator, *pieces(turn)]" if config.separate_turns else "pieces(turn)"
    return f"""```python
import prime_jax                                         # JAX

embedding = prime_jax.load("bundle").predict_text(turns, query)
```

```python
import numpy as np
import onnxruntime                                       # ONNX Runtime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("bundle/tokenizer.json")
tokenizer.no_truncation()
tokenizer.no_padding()
start, separator = tokenizer.encode("").ids
tokenizer.encode_special_tokens = True


def pieces(text):
    return tokenizer.encode({text}, add_special_tokens=False).ids


ids = [start, *pieces({asked})]
for turn in turns[::-1][:{config.max_context_length}]:
    ids += {turn}
ids = np.array([[*ids[:{config.max_tokens - 1}], separator]], np.int32)
session = onnxruntime.InferenceSession("bundle/model.onnx")
(embedding,) = session.run(None, {{"input_ids": ids, "attention_mask": np.ones_like(ids)}})
```

```python
from torch_runtime import load_bundle, load_tokenizer    # PyTorch; copy torch_runtime.py beside your code

input_ids, attention_mask = load_tokenizer("bundle")([turns], [query])
embedding = load_bundle("bundle")(input_ids, attention_mask)
```

Batches are padded behind, with any id and a mask of 0; `turns` are oldest first."""


def _embeddings_from(facts: Mapping[str, Any], asked: str) -> str:
    """Which embeddings the model takes."""
    if "encoder" not in facts:
        return (
            "Inputs must come from the encoder that the model was trained with; this bundle does not name it."
        )
    sentences = [f"All embeddings, also those of the passages, come from the encoder `{facts['encoder']}`."]
    for name, what in (("query_prefix", asked), ("passage_prefix", "Passages")):
        if facts.get(name):
            sentences.append(f"{what} are encoded with `{facts[name]}` in front.")
    if facts.get("context_from") == "search":
        sentences.append(
            f"In training the turns were the top {facts['first_pass_k']} passages of a first search with the "
            "query, best last; give it the same."
        )
    if "steering" in facts:
        sentences.append(f"On the validation data the steering vectors were those of `{facts['steering']}`.")
    return " ".join(sentences)
