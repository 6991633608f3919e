"""Predicted search for users of sentence-transformers: a bundle on top of your encoder. No JAX.

    encoder = SentenceTransformer("all-MiniLM-L6-v2")        # the encoder the model was trained on
    predicted = PredictedQuery(encoder, "bundle/")
    memory = predicted.encode_documents(passages)            # as you index them today
    vector = predicted.encode_query("And in Berlin?", turns=["What is the weather in Paris?"])
    best = (memory @ vector).argmax()

`python export/sentence_transformers_search.py BUNDLE ENCODER PASSAGES` reads a conversation from
the terminal, one turn a line, and finds a line of the file PASSAGES for each, by query and by prediction.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bundle_files import BundleError, checked, config_of_embeddings, onnx_file, read_safetensors, verify


class PredictedQuery:
    """Encodes queries as predictions of what should be retrieved, and documents to go with them.

    Args:
        encoder: A SentenceTransformer, or anything else whose `encode(texts)` gives `[n, D]`. It must be the
            encoder that config.json names: another one gives meaningless answers and no error.
        bundle: Folder of `prime-jax export`; every file is checked.
        precision: `fp32`, or `fp16` or `int8` where the bundle has it.

    Raises:
        BundleError: If the bundle is damaged, lacks the precision, or was trained on other turns.
    """

    def __init__(self, encoder: Any, bundle: str | Path, precision: str = "fp32"):
        bundle = Path(bundle)
        file = onnx_file(bundle, verify(bundle), precision)
        config = config_of_embeddings(bundle)
        if config.get("context_from") == "search":
            raise BundleError(
                f"{bundle}: takes the passages of a first search as turns, not a conversation's"
            )
        self.encoder = encoder
        self.slots, self.size = config["inputs"]["context"]["shape"][1:]
        self.query_prefix = config.get("query_prefix", "")
        self.passage_prefix = config.get("passage_prefix", "")
        head = bundle / "target_head.safetensors"
        self.head = read_safetensors(head)["kernel"] if head.is_file() else None
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def encode_query(self, query: str, turns: Sequence[str] = ()) -> Any:
        """The embedding to search with, `[E]`, unit norm; `turns` are the past ones, oldest first."""
        newest = list(turns)[-self.slots :]
        vectors = self._encode([self.query_prefix + text for text in (*newest, query)])
        context = np.zeros((1, self.slots, self.size), np.float32)
        context[0, : len(newest)] = vectors[:-1]
        mask = np.arange(self.slots)[None] < len(newest)
        feeds = {"context": context, "context_mask": mask, "query": vectors[-1:]}
        return checked(self.session.run(["embedding"], feeds)[0])[0]

    def encode_documents(self, passages: Sequence[str], *, mapped: bool = True) -> Any:
        """What the memory holds, `[n, E]`, unit norm; `mapped` through the bundle's target head, if any."""
        vectors = self._encode([self.passage_prefix + text for text in passages])
        return vectors if self.head is None or not mapped else _unit(vectors + vectors @ self.head)

    def encode_plain(self, query: str) -> Any:
        """The query as it is searched without a prediction, `[D]`; compare it with unmapped documents."""
        return self._encode([self.query_prefix + query])[0]

    def _encode(self, texts: list[str]) -> Any:
        if not texts:
            return np.zeros((0, self.size), np.float32)
        vectors = np.asarray(self.encoder.encode(texts), np.float32)
        if vectors.shape != (len(texts), self.size):
            raise ValueError(
                f"the encoder gives {vectors.shape}, the model takes vectors of {self.size} dimensions; "
                "is it the encoder that config.json names?"
            )
        wrong = np.flatnonzero(~(np.linalg.norm(vectors, axis=1) > 0) | ~np.isfinite(vectors).all(axis=1))
        if wrong.size:
            raise ValueError(f"the encoder gives zeros or NaN for {texts[wrong[0]][:80]!r}")
        return _unit(vectors)


def _unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    """Search the passages for each turn of a conversation."""
    if len(sys.argv) != 4:
        sys.exit("usage: python export/sentence_transformers_search.py BUNDLE ENCODER PASSAGES")
    from sentence_transformers import SentenceTransformer

    try:
        predicted = PredictedQuery(SentenceTransformer(sys.argv[2]), sys.argv[1])
        passages = [line.strip() for line in Path(sys.argv[3]).read_text().splitlines() if line.strip()]
    except (BundleError, OSError) as mistake:
        print(f"sentence_transformers_search: {mistake}", file=sys.stderr)
        sys.exit(2)
    memory = predicted.encode_documents(passages)
    unmapped = predicted.encode_documents(passages, mapped=False)
    turns: list[str] = []
    for line in sys.stdin:
        query = line.strip()
        plain = int((unmapped @ predicted.encode_plain(query)).argmax())
        print(f"{query}\n  query       {passages[plain]}")
        found = int((memory @ predicted.encode_query(query, turns)).argmax())
        print(f"  prediction  {passages[found]}", flush=True)
        turns.append(query)


if __name__ == "__main__":
    main()
