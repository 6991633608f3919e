"""Predict from a bundle with ONNX Runtime and numpy only: `python export/predict_onnx.py BUNDLE`.

Checks every file against the manifest, repeats the golden requests, then predicts for one new conversation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bundle_files import BundleError, checked, onnx_file, read_safetensors, verify


def repeat_golden(session: Any, bundle: Path) -> None:
    """Show that this machine computes what the exporting one did."""
    golden = read_safetensors(bundle / "golden.safetensors")
    feeds = {given.name: golden[given.name] for given in session.get_inputs()}
    (answers,) = session.run(["embedding"], feeds)
    difference = np.abs(answers - golden["embedding"]).max()
    print(f"golden requests: {len(answers)}, largest difference {difference:.1e}")
    if not difference <= 1e-4:  # room for processors that round differently
        raise BundleError("this machine does not compute what the model should")


def predict_one(session: Any, bundle: Path) -> None:
    """One conversation of two turns; put your encoder's vectors in place of the random ones."""
    shapes = json.loads((bundle / "config.json").read_text())["inputs"]
    if "input_ids" in shapes:
        print("reads texts: MODEL_CARD.md has the code that makes token ids of a conversation")
        return
    _, slots, size = shapes["context"]["shape"]
    turns, query = np.random.default_rng(7).normal(size=(min(2, slots), size)), np.ones(size)

    context = np.zeros((1, slots, size), np.float32)  # oldest turn first, padding behind
    context[0, : len(turns)] = turns / np.linalg.norm(turns, axis=1, keepdims=True)
    context_mask = np.arange(slots)[None] < len(turns)
    queries = (query / np.linalg.norm(query))[None].astype(np.float32)

    inputs = {"context": context, "context_mask": context_mask, "query": queries}
    embedding = checked(session.run(["embedding"], inputs)[0])
    print(f"prediction: {embedding.shape}, norm {np.linalg.norm(embedding):.4f}; search your index with it")


def main() -> None:
    """Check, repeat, predict."""
    if len(sys.argv) != 2:
        sys.exit("usage: python export/predict_onnx.py BUNDLE")
    bundle = Path(sys.argv[1])
    try:
        file = onnx_file(bundle, verify(bundle), "fp32")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        repeat_golden(session, bundle)
        predict_one(session, bundle)
    except BundleError as mistake:
        print(f"predict_onnx: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
