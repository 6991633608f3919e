"""Pretrained text encoders from a local Hugging Face or sentence-transformers folder, without torch.

The folder holds `config.json`, `tokenizer.json` and `model.safetensors` (or shards listed in
`model.safetensors.index.json`). A sentence-transformers folder also says how to pool and where to cut texts.
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from prime_jax import files
from prime_jax.errors import ConfigError, DataError
from prime_jax.nn.bert import Pooling, pool
from prime_jax.nn.encoder_products import EncoderPrecision, dtype_of, has_fused_attention
from prime_jax.nn.encoders import EncoderModel, build_encoder
from prime_jax.nn.remat import Remat
from prime_jax.pretrained.families import load_encoder_model, read_encoder_config
from prime_jax.pretrained.sentence_folder import SentenceFolder
from prime_jax.pretrained.weights import weight_files

logger = logging.getLogger(__name__)

BUCKETS = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)
"""Sequence lengths that programs are compiled for, up to the encoder's own maximum."""

TOKENS_PER_BATCH = {"cpu": 768}
"""Batch size in tokens: a CPU is fastest while activations stay in its cache."""
TOKENS_PER_BATCH_ELSEWHERE = 65536

TOKENIZED_AT_ONCE = 8192

_State = nnx.State[Any, Any]


class BertTextEncoder:
    """Texts in, unit-norm embeddings out.

    Texts are sorted by length and run in batches of about equal tokens, padded to a few lengths, so that few
    programs are compiled and little is computed for nothing. An embedding does not depend on its batch.

    Args:
        folder: The model's folder.
        pooling: "mean" or "cls"; None reads it from the folder.
        max_length: Longest text in tokens, [CLS] and [SEP] included; longer ones are cut there and counted.
            None reads it from the folder, as sentence-transformers does.
        dtype: Compute dtype of the products: float32, or bfloat16, as `precision` says better.
        name: How the encoder is called in its identity; None takes the folder's name.
        batch_size: Most texts that run together. Fewer do where their tokens are more than is fastest on the
            device; None means that alone decides.
        devices: How many of this process's devices share a batch; None means all accelerators, one CPU.
        precision: Of the products: `float32`; `tf32`, which GPUs multiply faster and which changes embeddings
            in the fourth digit; `bfloat16`, faster still, in the third. None means `dtype`.
        fused: Whether longer texts take a fused attention; None: in bfloat16 on a GPU that has it.

    Attributes:
        identity: Name, pooling, maximum length, a `precision` below float32 and a hash over everything that
            decides the embeddings.
        dim: Width of an embedding.
        truncated: How many of the texts encoded so far were cut at `max_length`.
        source: The folder, as read.
        graph: Structure of the model; its parameters are in `params`.

    Raises:
        DataError: If a file or tensor is missing, damaged or not supported; the message names it.
        ConfigError: If `pooling` is neither given nor in the folder, or `max_length` is out of bounds.
    """

    def __init__(
        self,
        folder: Path | str,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        name: str | None = None,
        batch_size: int | None = None,
        devices: int | None = None,
        precision: EncoderPrecision | None = None,
        fused: bool | None = None,
    ):
        source = self.source = SentenceFolder.read(Path(folder))
        config = read_encoder_config(source.transformer)
        self.pooling = source.choose_pooling(pooling)
        self.max_length = source.choose_length(max_length, config.longest)
        self.dim = config.hidden_size
        self.truncated = 0
        self._batch_size = batch_size
        self._mesh = _rows_over(devices)
        self._lower_case = source.lower_case
        self._tokenizer = source.tokenizer(config.vocab_size, self.max_length)
        if precision is not None:
            dtype = dtype_of(precision)
        if fused is None:
            heads = config.num_attention_heads
            fused = jnp.dtype(dtype) == jnp.bfloat16 and has_fused_attention(heads, self.dim // heads)
        weights = nnx.state(load_encoder_model(source.transformer, config, dtype))
        tf32 = precision == "tf32"
        self.graph = nnx.split(nnx.eval_shape(lambda: build_encoder(config, dtype, tf32=tf32, fused=fused)))[
            0
        ]
        self._weights = jax.device_put(weights, NamedSharding(self._mesh, P()))
        self._embed = _embedder(self.graph, self.pooling)
        rounding = "tf32" if tf32 else jnp.dtype(dtype).name
        if rounding == "bfloat16":  # an earlier version stored results in float32
            rounding = "bfloat16 factors and results"
        settings = (self.pooling, self.max_length, self._lower_case, rounding)
        digest = hashlib.sha256(f"{config.told()} {settings}".encode())
        for file in (source.transformer / "tokenizer.json", *weight_files(source.transformer)):
            digest.update(files.sha256(file).encode())
        name = name or Path(folder).resolve().name
        marked = f"-{precision}" if precision not in (None, "float32") else ""
        self.identity = f"{name}-{self.pooling}-{self.max_length}{marked}-{digest.hexdigest()[:8]}"

    @property
    def params(self) -> Any:
        """The model's parameters as nested dicts of arrays."""
        return nnx.to_pure_dict(self._weights)

    def structure(self, dtype: DTypeLike) -> Any:
        """The model's structure with products in another dtype; `nnx.merge` with `params` gives the model."""
        config = read_encoder_config(self.source.transformer)
        return nnx.split(nnx.eval_shape(lambda: build_encoder(config, dtype)))[0]

    def with_params(self, params: Any, identity: str) -> "BertTextEncoder":
        """The same encoder with other parameters of the same shapes, by the programs compiled already.

        Args:
            params: As `params` gives them.
            identity: Names its embeddings.
        """
        other = copy.copy(self)
        weights = nnx.state(nnx.merge(self.graph, params))
        other._weights = jax.device_put(weights, NamedSharding(self._mesh, P()))
        other.identity = identity
        return other

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Embed texts.

        Args:
            texts: Any number of texts, any length.

        Returns:
            float32 `[n, dim]`, unit norm, in the order of `texts`.

        Raises:
            DataError: If an entry is not a string.
        """
        check_texts(texts)
        tokens = self.tokenize(texts)
        embeddings = np.empty((len(texts), self.dim), np.float32)
        running = []
        for chosen, length, rows in self._batches([len(row) for row in tokens], alone=len(texts) == 1):
            batch = np.zeros((rows, length), np.int32)
            lengths = np.zeros(rows, np.int32)
            for row, text in enumerate(chosen):
                lengths[row] = len(tokens[text])
                batch[row, : lengths[row]] = tokens[text]
            placed = jax.device_put((batch, lengths), NamedSharding(self._mesh, P("rows")))
            running.append((chosen, self._embed(self._weights, *placed)))
        for chosen, result in running:
            embeddings[chosen] = np.asarray(result)[: len(chosen)]
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Token ids of each text, [CLS] and [SEP] included, cut at `max_length`."""
        tokens, cut = [], 0
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            block = list(texts[start : start + TOKENIZED_AT_ONCE])
            if self._lower_case:
                block = [text.lower() for text in block]
            for encoding in self._tokenizer.encode_batch_fast(block):
                tokens.append(np.array(encoding.ids, np.int32))
                cut += bool(encoding.overflowing)
        if cut and not self.truncated:
            logger.warning(
                "%d of %d texts are longer than %d tokens and are cut there; later ones are counted in "
                "`truncated` without a message",
                cut,
                len(texts),
                self.max_length,
            )
        self.truncated += cut
        return tokens

    def _batches(
        self, lengths: list[int], alone: bool
    ) -> Iterator[tuple[Int[np.ndarray, " texts"], int, int]]:
        """Texts, padded length and padded rows of every batch, longest texts first."""
        budget = TOKENS_PER_BATCH.get(jax.default_backend(), TOKENS_PER_BATCH_ELSEWHERE)
        devices = self._mesh.size
        buckets = [*(bucket for bucket in BUCKETS if bucket < self.max_length), self.max_length]
        order = np.argsort(np.negative(lengths), kind="stable")
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            length = next(bucket for bucket in buckets if bucket >= longest)
            rows = 1 if alone else max(1, budget * devices // length)
            rows = -(-min(rows, self._batch_size or rows) // devices) * devices
            yield order[start : start + rows], length, rows
            start += rows


def _rows_over(devices: int | None) -> Mesh:
    """A mesh of this process's devices that share the rows of a batch.

    Raises:
        ConfigError: If there are not as many.
    """
    here = jax.local_devices()
    count = (1 if here[0].platform == "cpu" else len(here)) if devices is None else devices
    if not 1 <= count <= len(here):
        raise ConfigError(f"devices {count} is not from 1 to {len(here)}, what this process has")
    return Mesh(np.asarray(here[:count]), ("rows",))


def check_texts(texts: Sequence[object]) -> None:
    """Refuse what is not a list of strings.

    Raises:
        DataError: If `texts` is one string, or an entry is not a string, or half a character; the message
            says which.
    """
    if isinstance(texts, str):
        raise DataError("expected a list of texts, got one string; wrap it in a list")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {position} is a {type(text).__name__}, not a string")
        if not is_unicode(text):
            raise DataError(f"text {position} holds half a character (a lone surrogate)")


def is_unicode(text: str) -> bool:
    """Whether a string is whole characters: JSON can spell halves of them, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _embedder(graph: Any, pooling: Pooling) -> Callable[[_State, ArrayLike, ArrayLike], Array]:
    """The jitted program, compiled once per batch shape; it takes the weights."""

    @jax.jit
    def embed(weights: _State, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B H"]:
        return embedded(nnx.merge(graph, weights), tokens, lengths, pooling)

    return embed


def embedded(
    model: EncoderModel,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    pooling: Pooling,
    remat: Remat = "none",
) -> Float[Array, "B H"]:
    """Unit-norm embeddings of token ids of which the first `lengths` are real."""
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    with jax.default_matmul_precision("float32"):  # GPUs would round float32 products to TF32
        return pool(model(tokens, mask, remat=remat), mask, pooling)
